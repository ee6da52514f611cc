"""What GPTAQ adds to GPTQ: later linears make up for what earlier ones lost. Its arithmetic is held in tests/quant/test_aim.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from buildsys.methods import gptaq, gptq
from buildsys.quant.model import Model
from buildsys.quant.observe import calibrate
from buildsys.quant.quantize import block_name, quantize, quantized_weights
from buildsys.quant.rotary import tables
from buildsys.quant.rounding import Job, Method
from buildsys.quant.stream import Apart
from buildsys.scheme import Scheme, Schemes
from buildsys.step import Resources
from tests import models

LENGTH, LAYERS = 32, 4


def quiet(*_: object) -> None:
    """Nobody looks."""


def drift(model: Model, folder: Path, method: Method, tokens: Tensor, unseen: Tensor) -> float:
    """How far the residual stream behind the last block is from the float model's, on tokens that nobody calibrated on."""
    stats, out = folder / "stats", folder / method.module.__name__
    if not stats.exists():
        stats.mkdir()
        calibrate(model, tokens, stats, Resources(), quiet)
    out.mkdir()
    quantize(model, Job(Schemes(Scheme(3, 32)), (), method), lambda at: stats / block_name(at), tokens, out, Resources(), quiet)
    off, of, rotary = 0.0, 0.0, tables(model.architecture, LENGTH)
    for start in model.embed(unseen):
        h = wanted = start
        for layer in range(LAYERS):
            block = model.block(layer)
            wanted, h = (
                block.forward(wanted, rotary),
                block.with_weights(quantized_weights(out / block_name(layer), "cpu")).forward(h, rotary),
            )
        off, of = off + float((h - wanted).square().sum()), of + float(wanted.square().sum())
    return off / of


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_end_of_the_model_is_nearer_to_the_float_model(family: str, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96}
    model = models.opened(models.FAMILIES[family](tmp_path / "model", **sizes))
    tokens, unseen = models.tokens(144, LENGTH)[:128], models.tokens(144, LENGTH)[128:]
    plain, aimed = (drift(model, tmp_path, Method(of, of.Knobs()), tokens, unseen) for of in (gptq, gptaq))
    assert aimed < 0.9 * plain


def test_an_edit_of_gptqs_codes_is_one_of_these() -> None:
    """A cached step is known by the VERSION of its own method."""
    assert gptaq.VERSION // 100 == gptq.VERSION


def test_what_is_told_of_a_linear() -> None:
    made = torch.Generator().manual_seed(1)
    x, weight = torch.randn(400, 32, generator=made), torch.randn(8, 32, generator=made)
    gram, crossed = x.t() @ x / 400, torch.eye(32).repeat(2, 1, 1) * 0.1
    found, notes = gptaq.aim(weight, gram, Apart(crossed, (200, 200), False), gptaq.Knobs(ridges=(0.5,)))
    assert notes == {"aim_ridge": 0.5} and not torch.equal(found, weight)
    _, notes = gptaq.aim(weight, gram, Apart(crossed, (400, 0), False), gptaq.Knobs())
    assert notes == {"aim_ridge": 0.0}
    assert gptaq.aim(weight, gram, Apart(0 * crossed, (200, 200), False), gptaq.Knobs())[1] == {}
