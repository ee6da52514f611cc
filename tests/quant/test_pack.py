"""Packing: the pairs are inverses, and the fast packers write what the obvious loops write."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buildsys.quant.pack import (
    AWQ_ORDER,
    dense_width,
    from_numbers,
    pack_dense,
    pack_int32,
    to_numbers,
    unpack_dense,
    unpack_int32,
)

BITS = st.sampled_from([2, 3, 4, 8])
IN_WORDS = st.sampled_from([2, 4, 8])


def slow_dense(codes: list[int], bits: int) -> list[int]:
    """The oracle: codes as one long number, the first in its lowest bits, cut into bytes; whole units of lcm(bits, 8) bits."""
    unit = {2: 4, 3: 8, 4: 2, 8: 1}[bits]
    number = sum(code << (at * bits) for at, code in enumerate(codes))
    size = -(-len(codes) // unit) * unit * bits // 8
    return list(number.to_bytes(size, "little"))


def slow_word(values: list[int], bits: int, order: tuple[int, ...]) -> int:
    """The oracle: one word, lane by lane, as a signed number."""
    word = 0
    for lane, at in enumerate(order):
        word |= values[at] << (lane * bits)
    return word - 2**32 if word >= 2**31 else word


@st.composite
def codes(draw: st.DrawFn, bits: int, multiple: int = 1, least: int = 0) -> Tensor:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(least, 5)) * multiple
    values = st.lists(st.integers(0, 2**bits - 1), min_size=rows * columns, max_size=rows * columns)
    return torch.tensor(draw(values), dtype=torch.uint8).reshape(rows, columns)


@given(data=st.data(), bits=BITS, multiple=st.sampled_from([1, 8]))
def test_dense_is_the_loops_and_comes_back(data: st.DataObject, bits: int, multiple: int) -> None:
    given_codes = data.draw(codes(bits, multiple))
    packed = pack_dense(given_codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (given_codes.shape[0], dense_width(given_codes.shape[1], bits))
    assert packed.tolist() == [slow_dense(row, bits) for row in given_codes.tolist()]
    assert torch.equal(unpack_dense(packed, bits, given_codes.shape[1]), given_codes)


@given(data=st.data(), bits=IN_WORDS)
def test_words_are_the_loops_and_come_back(data: st.DataObject, bits: int) -> None:
    lanes = 32 // bits
    order = tuple(data.draw(st.permutations(range(lanes))))
    values = data.draw(codes(bits, lanes, 1))
    words = pack_int32(values, bits, order)
    assert words.dtype == torch.int32 and words.shape == (values.shape[0], values.shape[1] // lanes)
    runs = values.reshape(values.shape[0], -1, lanes).tolist() if values.numel() else [[] for _ in range(values.shape[0])]
    assert words.tolist() == [[slow_word(run, bits, order) for run in row] for row in runs]
    assert torch.equal(unpack_int32(words, bits, order), values)


@given(data=st.data(), bits=BITS)
def test_words_in_order_are_the_dense_bytes(data: st.DataObject, bits: int) -> None:
    """What no kernel's own order tells apart: a row as one long number, cut into words."""
    values = data.draw(codes(bits, 32, 1))
    words = pack_int32(values, bits)
    assert words.dtype == torch.int32 and words.shape == (values.shape[0], values.shape[1] * bits // 32)
    for row, drawn in zip(words.tolist(), values.tolist(), strict=True):
        number = sum(code << (at * bits) for at, code in enumerate(drawn))
        assert [word % 2**32 for word in row] == [(number >> (32 * at)) % 2**32 for at in range(len(row))]
    assert torch.equal(unpack_int32(words, bits), values)
    assert torch.equal(unpack_int32(words.t().contiguous().t(), bits), values)  # whatever the strides


def test_three_bits_run_on_from_word_to_word() -> None:
    """By hand, as kernels for three bits take them apart: ten codes, two bits of the next; its third, ten, one bit; two bits, ten codes."""
    values = torch.zeros(1, 32, dtype=torch.uint8)
    values[0, 10], values[0, 21] = 0b101, 0b110
    assert pack_int32(values, 3).tolist() == [[0b01 << 30, 0b1, 0b11]]


def test_eight_bit_numbers() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    ints, floats = to_numbers(every, "int"), to_numbers(every, "fp8")
    assert ints.dtype == torch.int8 and ints.tolist() == list(range(-128, 128))
    assert floats.dtype == torch.float8_e4m3fn and floats[0x38] == 1.0 and floats[0x7E] == 448.0 and floats[0xFE] == -448.0
    assert floats.float().isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    assert torch.equal(from_numbers(ints), every) and torch.equal(from_numbers(floats), every)


def test_words_by_hand() -> None:
    values = torch.arange(8, dtype=torch.uint8)[None]
    assert pack_int32(values, 4).item() == 0x76543210
    assert pack_int32(values, 4, AWQ_ORDER).item() == 0x75316420
    assert pack_int32(values + 8, 4, AWQ_ORDER).item() == 0xFDB9ECA8 - 2**32


def test_dense_by_hand() -> None:
    assert pack_dense(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]
    assert pack_dense(torch.full((8,), 7, dtype=torch.uint8), 3).tolist() == [255, 255, 255]
    assert pack_dense(torch.tensor([0xA, 0xB], dtype=torch.uint8), 4).tolist() == [0xBA]


def test_any_leading_shape() -> None:
    given_codes = torch.randint(0, 8, (2, 3, 16), dtype=torch.uint8)
    packed = pack_dense(given_codes, 3)
    assert packed.shape == (2, 3, 6) and torch.equal(unpack_dense(packed, 3, 16), given_codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_too_large_would_spill(bits: int) -> None:
    spilling = torch.full((1, 16), 2**bits, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"a code is {2**bits}, {bits} bits hold {2**bits - 1}"):
        pack_dense(spilling, bits)


def test_words_refuse_what_does_not_fill_them() -> None:
    with pytest.raises(ValueError, match="do not fill"):
        pack_int32(torch.zeros(1, 12, dtype=torch.uint8), 4)
    for bits, order in ((3, tuple(range(10))), (4, (0, 1, 2, 3, 4, 5, 6, 6)), (8, AWQ_ORDER)):
        with pytest.raises(ValueError, match="in no lanes"):
            pack_int32(torch.zeros(1, 32, dtype=torch.uint8), bits, order)
