"""Where methods and formats meet: a weight matrix as integer codes with a scale and a zero for each group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from buildsys.scheme import Scheme


@dataclass(frozen=True)
class QuantizedLinear:
    """codes: uint8 [out, in]; scale: float16 [out, groups]; zero: uint8 [out, groups]; weight ~ (codes - zero) * scale.

    Scales that another tool chose for W8A8 may be float32, as the format smooth_quant stores them.

    Where the scheme's numbers are fp8 a code is the bits of one (e4m3, OCP 8-bit floating point), and every zero is 0."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = (out_features, self.scheme.groups(in_features))
        assert self.codes.dtype == torch.uint8 and self.zero.dtype == torch.uint8
        assert self.scale.dtype == torch.float16 or (self.scale.dtype == torch.float32 and self.scheme.activations != "none")
        assert tuple(self.scale.shape) == tuple(self.zero.shape) == groups, (self.scale.shape, self.zero.shape, groups)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # -> [out, in]
        out_features, in_features = self.codes.shape
        group = self.scheme.group(in_features)
        codes = self.codes.view(torch.float8_e4m3fn) if self.scheme.number == "fp8" else self.codes
        centered = codes.view(out_features, -1, group).to(dtype) - self.zero.to(dtype).unsqueeze(-1)
        return (centered * self.scale.to(dtype).unsqueeze(-1)).view(out_features, in_features)


@dataclass(frozen=True)
class Rounding:
    """What a rounding method made of a matrix, and what a manifest should tell about how (`damping`: share of H's mean diagonal).

    norms: [2, out], the squared error of each output and its square, by a method that has the matrices where they are weighed fastest."""

    linear: QuantizedLinear
    notes: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    norms: Tensor | None = None
