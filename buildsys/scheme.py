"""How a weight matrix is held in few bits: the contract between methods and formats.

Uniform affine quantization per group of input channels (Jacob et al. 2018, arXiv:1712.05877, eq. 1):
w ~ (code - zero) * scale, one scale and one zero for each output row and group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128, -1]


@dataclass(frozen=True)
class Scheme:
    """bits a code, input channels a group (-1: the whole row), and whether zero is fixed at mid-range."""

    bits: Bits
    group_size: GroupSize
    symmetric: bool = False

    @property
    def top(self) -> int:
        """The largest code; codes run from 0 to top."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of every group under a symmetric scheme."""
        return int(2 ** (self.bits - 1))

    def group(self, in_features: int) -> int:
        """Input channels in one group of a layer that is `in_features` wide."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups along a row; `divides` has been asked before."""
        return in_features // self.group(in_features)

    def divides(self, in_features: int) -> bool:
        return in_features % self.group(in_features) == 0

    def __str__(self) -> str:
        return f"{self.bits}-bit g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}"
