"""Cutting a block's linears by rows: cutting and dequantizing commute, for any scheme, and nothing of a block is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from buildsys.quant.grid import min_max
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.rows import relay, split, take
from buildsys.relayout import Part, relayout
from buildsys.scheme import Bits, GroupSize, Scheme
from tests import models

EVERY = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]
EVERY += [Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")]


def rounded(weight: torch.Tensor, scheme: Scheme) -> QuantizedLinear:
    grid = min_max(weight, scheme)
    return grid.linear(grid.round(weight))


@pytest.mark.parametrize("scheme", EVERY, ids=str)
def test_cutting_and_dequantizing_commute(scheme: Scheme) -> None:
    linear = rounded(torch.randn(24, 256, generator=torch.Generator().manual_seed(1)), scheme)
    part = Part("x", (range(5, 9), range(20, 24), range(0, 1)))
    cut = split(linear, part)
    rows = [5, 6, 7, 8, 20, 21, 22, 23, 0]
    assert cut.scheme == scheme and torch.equal(cut.codes, linear.codes[rows]) and torch.equal(cut.zero, linear.zero[rows])
    assert torch.equal(cut.dequantize(), linear.dequantize()[rows]) and cut.codes.is_contiguous()
    assert torch.equal(split(linear, Part("x")).codes, linear.codes)


@pytest.mark.parametrize(("family", "changed"), [("internlm2", {"bias": True}), ("phi3", {"sliding_window": None})])
def test_a_quantized_block_under_new_names(family: str, changed: dict[str, object], tmp_path: Path) -> None:
    model = models.opened(models.FAMILIES[family](tmp_path, **changed))
    a = model.architecture
    made = relayout(a, json.loads((tmp_path / "config.json").read_text()), "config.json", "llama")
    floats = {name: model.checkpoint.load(a.prefix(1) + name) for name in a.block_tensors()}
    float_one = a.linears[-1].name  # stays float, as an override may say
    linears = {linear.name: rounded(floats.pop(f"{linear.name}.weight"), Scheme(4, 32)) for linear in a.linears if linear.name != float_one}
    found, others = relay(made, linears, floats)
    assert {f"{name}.weight" for name in found} | set(others) == set(made.architecture.block_tensors())
    assert {name for name in made.parts if name not in found} == {"mlp.down_proj"}
    for name, linear in found.items():
        part = made.parts[name]
        assert torch.equal(linear.dequantize(), take(linears[part.name].dequantize(), part))
    bits = sum(linear.codes.numel() for linear in found.values()), sum(linear.codes.numel() for linear in linears.values())
    assert bits[0] == bits[1]
    assert sum(tensor.numel() for tensor in others.values()) == sum(tensor.numel() for tensor in floats.values())
