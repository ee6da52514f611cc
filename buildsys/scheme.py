"""How a weight matrix is held in few bits: the contract between methods and formats.

Uniform affine quantization per group of input channels (Jacob et al. 2018, arXiv:1712.05877, eq. 1): w ~ (code - zero) * scale, one scale
and one zero for each output row and group. Eight-bit floats are e4m3 (arXiv:2209.05433): w ~ number * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[32, 64, 128, -1]
Number = Literal["int", "fp8"]
Activations = Literal["none", "int8", "fp8"]


@dataclass(frozen=True)
class Scheme:
    """bits a code, input channels a group (-1: the whole row), whether zero is fixed at mid-range, what a code is (`fp8`: the bits of an
    e4m3 number), and what the linear's inputs are rounded to at run time, token by token."""

    bits: Bits
    group_size: GroupSize
    symmetric: bool = False
    number: Number = "int"
    activations: Activations = "none"

    @property
    def top(self) -> int:
        """The largest code; codes run from 0 to top."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of every group under a symmetric scheme."""
        return 0 if self.number == "fp8" else int(2 ** (self.bits - 1))

    def group(self, in_features: int) -> int:
        """Input channels in one group of a layer that is `in_features` wide."""
        return in_features if self.group_size == -1 else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups along a row; `divides` has been asked before."""
        return in_features // self.group(in_features)

    def divides(self, in_features: int) -> bool:
        return in_features % self.group(in_features) == 0

    def __str__(self) -> str:
        codes = "fp8" if self.number == "fp8" else f"{self.bits}-bit"
        read = "" if self.activations == "none" else f", activations {self.activations}"
        return f"{codes} g{self.group_size} {'symmetric' if self.symmetric else 'asymmetric'}{read}"


@dataclass(frozen=True)
class Schemes:
    """The scheme of every linear of a model, by whole names: one for all, but for those with one of their own and those left float."""

    default: Scheme
    left_float: frozenset[str] = frozenset()
    own: Mapping[str, Scheme] = field(default_factory=lambda: MappingProxyType({}))

    def of(self, name: str) -> Scheme | None:
        """None: the linear stays float."""
        return None if name in self.left_float else self.own.get(name, self.default)

    def kinds(self) -> tuple[Scheme, ...]:
        """Each scheme that may occur, once, the default first."""
        return tuple(dict.fromkeys((self.default, *(self.own[name] for name in sorted(self.own)))))

    def to_json(self) -> dict[str, Any]:
        """For the key of a step."""
        own = {
            name: {**vars(scheme)} for name, scheme in sorted(self.own.items()) if scheme != self.default and name not in self.left_float
        }
        return {"scheme": {**vars(self.default)}, "skip": sorted(self.left_float)} | ({"own": own} if own else {})

    @staticmethod
    def from_json(said: Mapping[str, Any]) -> Schemes:
        """The inverse of `to_json`."""
        own = {name: Scheme(**raw) for name, raw in said.get("own", {}).items()}
        return Schemes(Scheme(**said["scheme"]), frozenset(said["skip"]), MappingProxyType(own))
