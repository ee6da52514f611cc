"""Sums of products over the tokens of many windows, to the same bits whatever the number of threads.

Half-precision inputs are summed in float32 by tensor cores. A GPU adds each window to the total. A CPU makes a part of a few windows in
whatever thread comes by, since a matrix of its own for each would cost as much as its product; parts are added in their order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STRIP, MIN_STRIP = 256, 1024  # rows of a Gram matrix computed at a time, on a CPU and at least on a GPU
PART = 8  # windows whose sums a CPU makes in one thread


def in_parts(windows: Sequence[int], device: str) -> list[Sequence[int]]:
    """Windows whose sums are made one after the other, in one thread, before they are added to those of the others: on a CPU a few, since
    what is handed over keeps other threads from working. Never by the number of threads."""
    step = PART if device == "cpu" else 1
    return [windows[at : at + step] for at in range(0, len(windows), step)]


class Squares:
    """The sum of x x^T over tokens, float32 [in, in]. Only its upper half is computed, by strips: torch has no symmetric product."""

    def __init__(self, width: int, device: str) -> None:
        self._width, self._device = width, device
        self._total = torch.zeros(width, width, device=device)
        self._strip = STRIP if device == "cpu" else max(MIN_STRIP, -(-width // 4))

    def part(self) -> Squares:
        """Where a few windows are included, one after the other, before they are added."""
        return Squares(self._width, "cpu") if self._device == "cpu" else self

    def include(self, x: Tensor) -> None:  # [..., tokens, in]
        x = x.float() if self._device == "cpu" else x.flatten(0, -2)
        for start in range(0, self._width, self._strip):  # right of the diagonal and in blocks on it
            _add_product(self._total[start : start + self._strip, start:], x[:, start : start + self._strip], x[:, start:])

    def add(self, other: Squares) -> None:
        """What a part has, or another device: the half that was computed, a strip at a time. To be called in their order."""
        for start in range(0, self._width if other is not self else 0, self._strip):
            strip = other._total[start : start + self._strip, start:]
            self._total[start : start + self._strip, start:] += strip.to(self._total.device)

    def sum(self) -> Tensor:
        """Once all is added."""
        for start in range(0, self._width, self._strip):
            stop = start + self._strip
            self._total[stop:, start:stop] = self._total[start:stop, stop:].t()
        return self._total


class Products:
    """The sums of y x^T over tokens, float32 [rows, in], of two halves of the windows apart, so that what one says can be tried on the
    other. Halves are every second window, or where windows come several together, the first and the last of those."""

    def __init__(self, rows: int, width: int, device: str) -> None:
        self._shape, self._device = (rows, width), device
        self._totals, self._tokens = torch.zeros(2, rows, width, device=device), [0, 0]

    def part(self) -> Products:
        """Where a few windows are included, one after the other, before they are added."""
        return Products(*self._shape, "cpu") if self._device == "cpu" else self

    def include(self, at: int, y: Tensor, x: Tensor) -> None:  # window `at`: [..., tokens, rows], [..., tokens, in]
        ys, xs = ((of.tensor_split(2) if of.dim() == 3 and len(of) > 1 else (of,)) for of in (y, x))
        for half, rows, columns in zip((at % 2,) if len(xs) == 1 else (0, 1), ys, xs, strict=True):
            columns = columns.flatten(0, -2)
            if self._device == "cpu" or columns.dtype == torch.float16:  # which may not hold how far two residual streams are apart
                columns = columns.float()
            _add_product(self._totals[half], rows.flatten(0, -2).to(columns.dtype), columns)
            self._tokens[half] += len(columns)

    def add(self, other: Products) -> None:
        """What a part has, or another device. To be called in their order."""
        if other is not self:
            self._totals += other._totals.to(self._totals.device)
            self._tokens = [mine + theirs for mine, theirs in zip(self._tokens, other._tokens, strict=True)]

    def halves(self) -> tuple[Tensor, tuple[int, int]]:
        """Once all is added: the means over each half's tokens [2, rows, in], and how many those are."""
        for total, tokens in zip(self._totals, self._tokens, strict=True):
            total.div_(max(tokens, 1))
        return self._totals, (self._tokens[0], self._tokens[1])


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:  # [rows, columns], [tokens, rows], [tokens, columns]
    """Adds left^T right, with sums in float32."""
    if left.dtype == torch.float32:
        into.addmm_(left.t(), right)
    else:
        torch.ops.aten.addmm.dtype_out(into, left.t(), right, torch.float32, out=into)
