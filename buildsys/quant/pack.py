"""Codes of a few bits in whole words: densely into bytes for our own files, and in lanes of 32-bit words as inference kernels read them.

Where layouts differ they differ in the order of lanes alone; AWQ's comes from its GEMM kernel (Lin et al. 2023, arXiv:2306.00978, released
code), which takes even and odd lanes apart with one mask.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def _lanes(bits: int, order: tuple[int, ...] | None) -> tuple[int, ...]:
    lanes = 32 // bits
    if lanes * bits != 32 or (order is not None and sorted(order) != list(range(lanes))):
        raise ValueError(f"32-bit words hold {bits}-bit codes in no lanes {order}")
    return order or tuple(range(lanes))


def pack_int32(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:  # uint8 [rows, n] -> int32 [rows, n * bits / 32]
    """Each run of 32 / bits values along a row becomes a word; lane i holds value order[i] of its run (default: in order)."""
    _check_range(values, bits)
    order = _lanes(bits, order)
    if values.shape[-1] % len(order):
        raise ValueError(f"{values.shape[-1]} values do not fill words of {len(order)}")
    runs = _runs(values, len(order))
    words = torch.zeros(runs.shape[:-1], dtype=torch.int32, device=values.device)
    for lane, at in enumerate(order):
        words |= runs[..., at].to(torch.int32) << (lane * bits)  # the highest lane reaches the sign bit; unpacking masks it off again
    return words


def unpack_int32(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:  # int32 [rows, w] -> uint8 [rows, n]
    """The inverse of `pack_int32`."""
    order = _lanes(bits, order)
    runs = torch.empty(*words.shape, len(order), dtype=torch.uint8, device=words.device)
    for lane, at in enumerate(order):
        runs[..., at] = ((words >> (lane * bits)) & (2**bits - 1)).to(torch.uint8)
    return runs.flatten(-2)
