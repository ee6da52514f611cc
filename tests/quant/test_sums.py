"""Sums over windows against one product over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.quant.sums import PART, STRIP, Products, Squares, in_parts


def windows(count: int, width: int, seed: int, several: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*((several,) if several else ()), 9, width, generator=made) for _ in range(count)]


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # which has a thread of its own, as a GPU has: every window is added at once
@pytest.mark.parametrize("width", [40, 2 * STRIP + 8])
@pytest.mark.parametrize("count", [1, 2 * PART + 1])
def test_squares_are_the_whole_gram_matrix(count: int, width: int, device: str) -> None:
    xs, squares = windows(count, width, 1), Squares(width, device)
    parts = in_parts(range(count), device)
    assert [at for part in parts for at in part] == list(range(count)) and max(map(len, parts)) <= PART
    for part in parts:
        mine = squares.part()
        for at in part:
            mine.include(xs[at])
        squares.add(mine)
    together = torch.cat(xs).double()
    torch.testing.assert_close(squares.sum().double(), together.t() @ together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
@pytest.mark.parametrize("several", [0, 1, 2, 5])
@pytest.mark.parametrize("count", [1, PART + 3])
def test_products_are_the_means_of_two_halves(count: int, several: int, device: str) -> None:
    if several and device == "cpu":
        return  # whose windows come one by one
    xs, ys, products = windows(count, 24, 1, several), windows(count, 7, 2, several), Products(7, 24, device)
    for part in in_parts(range(count), device):
        mine = products.part()
        for at in part:
            mine.include(at, ys[at], xs[at])
        products.add(mine)
    found, tokens = products.halves()
    cut = several // 2 + several % 2
    for half in (0, 1):
        if several > 1:
            chosen = [slice(0, cut), slice(cut, None)][half]
            x, y = (torch.cat([window[chosen].flatten(0, 1) for window in of]).double() for of in (xs, ys))
        else:
            x, y = (torch.cat([torch.zeros(0, of[0].shape[-1]), *(w.flatten(0, -2) for w in of[half::2])]).double() for of in (xs, ys))
        assert tokens[half] == len(x)
        torch.testing.assert_close(found[half].double(), y.t() @ x / max(len(x), 1), rtol=0, atol=1e-5)


def test_what_devices_summed_comes_together() -> None:
    xs, ys = windows(6, 12, 1), windows(6, 5, 2)
    squares, products = [Squares(12, "cpu:0") for _ in range(3)], [Products(5, 12, "cpu:0") for _ in range(3)]
    for at, (x, y) in enumerate(zip(xs, ys, strict=True)):
        for count in (0, 1 if at < 4 else 2):  # the first has all
            squares[count].include(x)
            products[count].include(at, y, x)
    alone, alone_halves = squares[0].sum(), products[0].halves()
    squares[1].add(squares[2])
    products[1].add(products[2])
    together, tokens = products[1].halves()
    torch.testing.assert_close(squares[1].sum(), alone)
    torch.testing.assert_close(together, alone_halves[0])
    assert tokens == alone_halves[1] == (27, 27)


def test_half_precision_differences_are_summed_in_the_type_of_what_is_read() -> None:
    x, y = windows(1, 12, 1)[0].bfloat16(), windows(1, 5, 2)[0]  # the residual stream is wider than what linears read
    products = Products(5, 12, "cpu")
    products.include(0, y, x)
    torch.testing.assert_close(products.halves()[0][0], y.t() @ x.float() / 9)
