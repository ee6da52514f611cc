"""Codes of a few bits in whole words: densely into bytes for our own files, and in 32-bit words as inference kernels read them.

GPTQ's and compressed-tensors' words are the same dense bytes, four at a time. AWQ's differ in the order of lanes, which comes from its GEMM
kernel (Lin et al. 2023, arXiv:2306.00978, released code): it takes even and odd lanes apart with one mask.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

from buildsys.scheme import Number

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Lane i of a word, counted from the lowest bits, holds value AWQ_ORDER[i] of its eight."""


def _unit(bits: int) -> tuple[int, int]:
    """The smallest run of codes that fills whole bytes: (codes, bytes). Three bits: eight codes in three bytes."""
    codes = 8 // gcd(bits, 8)
    return codes, codes * bits // 8


def dense_width(count: int, bits: int) -> int:
    """Bytes that `pack_dense` takes for `count` codes."""
    codes, wide = _unit(bits)
    return -(-count // codes) * wide


def _runs(values: Tensor, length: int) -> Tensor:  # [..., n * length] -> [..., n, length]
    return values.reshape(*values.shape[:-1], values.shape[-1] // length, length)


def _check_range(values: Tensor, bits: int) -> None:
    """A value too large would spill into its neighbours, and no later check could tell."""
    if values.numel() and int(values.amax()) >= 2**bits:
        raise ValueError(f"a code is {int(values.amax())}, {bits} bits hold {2**bits - 1} at most")


def pack_dense(codes: Tensor, bits: int) -> Tensor:  # uint8 [..., n] -> uint8 [..., dense_width(n)]
    """Codes one after another from the lowest bit of the first byte; the last unit is filled up with zeros."""
    _check_range(codes, bits)
    per_unit, unit_bytes = _unit(bits)
    runs = _runs(pad(codes, (0, -codes.shape[-1] % per_unit)), per_unit)
    packed = torch.zeros(*runs.shape[:-1], unit_bytes, dtype=torch.uint8, device=codes.device)
    for lane in range(per_unit):
        byte, shift = divmod(lane * bits, 8)
        packed[..., byte] |= runs[..., lane] << shift  # a uint8 shift drops what leaves the byte …
        if shift + bits > 8:
            packed[..., byte + 1] |= runs[..., lane] >> (8 - shift)  # … and this puts it into the next
    return packed.flatten(-2)


def unpack_dense(packed: Tensor, bits: int, count: int) -> Tensor:  # uint8 [..., dense_width(count)] -> uint8 [..., count]
    """The inverse of `pack_dense`."""
    per_unit, unit_bytes = _unit(bits)
    runs = _runs(packed, unit_bytes)
    codes = torch.empty(*runs.shape[:-1], per_unit, dtype=torch.uint8, device=packed.device)
    for lane in range(per_unit):
        byte, shift = divmod(lane * bits, 8)
        code = runs[..., byte] >> shift
        if shift + bits > 8:
            code |= runs[..., byte + 1] << (8 - shift)
        codes[..., lane] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :count].contiguous()


def pack_int32(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:  # uint8 [rows, n] -> int32 [rows, n * bits / 32]
    """Whole words along each row, the first code in the lowest bits; three-bit codes run on from word to word.

    With an `order`, each run of 32 / bits codes is a word of its own whose lane i holds code order[i] of the run.
    """
    if values.shape[-1] * bits % 32:
        raise ValueError(f"{values.shape[-1]} values of {bits} bits do not fill 32-bit words")
    ordered = values if order is None else _reordered(values, bits, order)
    return pack_dense(ordered, bits).view(torch.int32)  # hosts and devices alike keep a word's lowest byte first


def unpack_int32(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:  # int32 [rows, w] -> uint8 [rows, n]
    """The inverse of `pack_int32`."""
    values = unpack_dense(words.contiguous().view(torch.uint8), bits, words.shape[-1] * 32 // bits)
    return values if order is None else _reordered(values, bits, tuple(order.index(at) for at in range(len(order))))


def _reordered(values: Tensor, bits: int, order: tuple[int, ...]) -> Tensor:  # uint8 [rows, n] -> same
    """Each word's codes in another order."""
    if len(order) * bits != 32 or sorted(order) != list(range(len(order))):
        raise ValueError(f"32-bit words hold {bits}-bit codes in no lanes {order}")
    return _runs(values, len(order))[..., torch.tensor(order, device=values.device)].flatten(-2)


def to_numbers(codes: Tensor, number: Number) -> Tensor:  # uint8 -> int8 | float8_e4m3fn, same shape
    """Eight-bit codes as the numbers that kernels multiply: code - 128, or the float whose bits these are."""
    return codes.view(torch.float8_e4m3fn) if number == "fp8" else (codes ^ 0x80).view(torch.int8)


def from_numbers(numbers: Tensor) -> Tensor:  # int8 | float8_e4m3fn -> uint8, same shape
    """The inverse of `to_numbers`."""
    bits = numbers.view(torch.uint8)
    return bits ^ 0x80 if numbers.dtype == torch.int8 else bits.clone()
