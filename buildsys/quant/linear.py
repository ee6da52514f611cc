"""Where methods and formats meet: a weight matrix as integer codes with a scale and a zero for each group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.scheme import Scheme


@dataclass(frozen=True)
class QuantizedLinear:
    """codes: uint8 [out, in]; scale: float16 [out, groups]; zero: uint8 [out, groups]; weight ~ (codes - zero) * scale."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    scheme: Scheme

    def __post_init__(self) -> None:
        out_features, in_features = self.codes.shape
        groups = (out_features, self.scheme.groups(in_features))
        assert self.codes.dtype == torch.uint8 and self.zero.dtype == torch.uint8 and self.scale.dtype == torch.float16
        assert tuple(self.scale.shape) == tuple(self.zero.shape) == groups, (self.scale.shape, self.zero.shape, groups)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:  # -> [out, in]
        out_features, in_features = self.codes.shape
        group = self.scheme.group(in_features)
        centered = self.codes.view(out_features, -1, group).to(dtype) - self.zero.to(dtype).unsqueeze(-1)
        return (centered * self.scale.to(dtype).unsqueeze(-1)).view(out_features, in_features)
