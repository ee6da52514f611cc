"""What every method keeps: a rescaling leaves the float function as it is, and a rounding is no worse than rounding to nearest."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Site, scale_site
from buildsys.methods import rtn
from buildsys.quant.activations import fake_quantize
from buildsys.quant.block import Block
from buildsys.quant.fold import tied_channels
from buildsys.quant.grid import min_max
from buildsys.quant.observe import SiteStats, gram_blocks
from buildsys.quant.rotary import tables
from buildsys.quant.rounding import Job, Method, rescale
from buildsys.scheme import Bits, GroupSize, Scheme, Schemes
from buildsys.slots import Frozen, modules
from tests import models

METHODS = modules("methods")
SCHEMES = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]
W8A8 = [Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")]
TOKENS = 48
VARIANTS = {
    "llama": lambda folder: models.tiny_llama(folder, attention_bias=True, mlp_bias=True),
    "llama one head each": lambda folder: models.tiny_llama(folder, num_key_value_heads=4),
    "mistral": models.tiny_mistral,
    "qwen2": models.tiny_qwen2,
    "qwen3": models.tiny_qwen3,
    "internlm2": lambda folder: models.tiny_internlm2(folder, bias=True, num_attention_heads=8),
    "internlm3": models.tiny_internlm3,
    "phi3": models.tiny_phi3,
    "mixtral": models.tiny_mixtral,
    "qwen3_moe": models.tiny_qwen3_moe,
}


def of_kind(kind: str) -> list[ModuleType]:
    return [pytest.param(module, id=name) for name, module in METHODS.items() if kind == module.KIND]


def each_scheme(kind: str) -> pytest.MarkDecorator:
    """Every method of a kind in every scheme that it accepts."""
    pairs = [(name, module, scheme) for name, module in METHODS.items() if kind == module.KIND for scheme in (*SCHEMES, *W8A8)]
    able = [pytest.param(module, scheme, id=f"{name} {scheme}") for name, module, scheme in pairs if module.accepts(scheme) is None]
    return pytest.mark.parametrize(("module", "scheme"), able)


def suited(module: ModuleType) -> Scheme:
    """One that the method accepts, of four bits if it may be."""
    return next(scheme for scheme in (Scheme(4, 32), *W8A8) if module.accepts(scheme) is None)


def stats(x: Tensor) -> SiteStats:  # [tokens, in]
    return SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))


def correlated(tokens: int, width: int, seed: int) -> Tensor:  # -> [tokens, in], some channels loud, neighbours alike
    made = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=made) @ (torch.eye(width) + torch.randn(width, width, generator=made) / width**0.5)
    return mixed * torch.randn(width, generator=made).mul(0.8).exp()


def observed(block: Block, h: Tensor) -> tuple[dict[Site, SiteStats], Tensor]:
    rotary = tables(block.architecture, len(h))
    x = {"attn_in": block.attn_in(h)}
    x["o_in"] = block.o_in(x["attn_in"], rotary)
    after = block.after_attention(h, x["o_in"])
    x["mlp_in"] = block.mlp_in(after)
    experts = block.architecture.experts
    if experts is None:
        x["down_in"] = block.down_in(x["mlp_in"])
    else:
        for expert, (tokens, _) in enumerate(block.routed(x["mlp_in"], experts)):
            x[f"mlp_in.{expert}"] = x["mlp_in"][tokens]
            x[f"down_in.{expert}"] = block.down_in(x["mlp_in"][tokens], expert)
    assert all(map(len, x.values())), "an expert sees no token: the test says nothing of it"
    return {site: stats(values) for site, values in x.items()}, block.forward(h, rotary)


@pytest.mark.parametrize("name", METHODS)
def test_a_module_is_what_the_slot_asks_for(name: str) -> None:
    module = METHODS[name]
    assert issubclass(module.Knobs, Frozen) and isinstance(module.VERSION, int) and module.KIND in ("rescale", "round")
    assert callable(module.rescale) if module.KIND == "rescale" else callable(module.round_weights)
    if module.KIND == "round":  # what float tokens are compared with are those of a walk
        assert isinstance(module.SEES_TOKENS, bool) and module.SEES_FLOATS in (False, module.SEES_TOKENS)
        assert not module.SEES_FLOATS or callable(module.aim)
    reasons = [module.accepts(scheme) for scheme in (*SCHEMES, *W8A8)]
    assert None in reasons
    for reason in filter(None, reasons):  # goes on from "method <name> ", and gives both values
        assert reason[0].islower() and not reason.startswith(name) and "quantization." in reason
    assert set(models.FAMILIES) <= {variant.split()[0] for variant in VARIANTS}, "add your architecture to VARIANTS"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("module", of_kind("rescale"))
def test_rescaling_keeps_the_float_function(module: ModuleType, variant: str, tmp_path: Path) -> None:
    model = models.opened(VARIANTS[variant](tmp_path))
    block, h = model.block(1), correlated(TOKENS, 128, 3)
    seen, before = observed(block, h)
    job = Job(Schemes(suited(module)), (Method(module, module.Knobs()),), Method(rtn, rtn.Knobs()))
    after, scales = rescale(block, seen, job)
    assert max(float(scale.max() / scale.min()) for scale in scales.values()) > 1.1, "nothing was rescaled: the test says nothing"
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for scale in scales.values())
    torch.testing.assert_close(after.forward(h, tables(block.architecture, TOKENS)), before, rtol=0, atol=3e-5 * float(before.abs().max()))
    inside = observed(after, h)[0]
    for site in block.architecture.sites:  # the statistics that the next method is given are those of the rescaled block
        told = seen[site].divided(scales[scale_site(site)])
        for part in ("absmean", "absmax", "gram"):
            torch.testing.assert_close(getattr(told, part), getattr(inside[site], part), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("module", of_kind("rescale"))
def test_rescaling_leaves_alone_what_is_skipped(module: ModuleType, tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path))
    block, h = model.block(0), correlated(TOKENS, 128, 3)
    skipped = frozenset({"model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"})
    job = Job(Schemes(suited(module), skipped), (Method(module, module.Knobs()),), Method(rtn, rtn.Knobs()))
    _, scales = rescale(block, observed(block, h)[0], job)
    assert torch.equal(scales["o_in"], torch.ones(128)) and torch.equal(scales["down_in"], torch.ones(256))
    assert not torch.equal(scales["attn_in"], torch.ones(128))


def output_error(weight: Tensor, x: Tensor, scale: Tensor, scheme: Scheme) -> float:
    """What rounding costs after rescaling: of `weight` [out, in] to nearest, and of what it reads [tokens, in] where the scheme says so."""
    grid = min_max(weight * scale, scheme)
    rounded = fake_quantize(x / scale, scheme.activations) @ grid.dequantize(grid.round(weight * scale)).t()
    return float((rounded - x @ weight.t()).double().square().sum())


@each_scheme("rescale")
def test_rescaling_rounds_no_worse_than_without(module: ModuleType, scheme: Scheme) -> None:
    x = correlated(300, 128, 4)
    weights = [torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)) for rows in (24, 8)]
    scale = module.rescale(weights, stats(x), None, scheme, module.Knobs())
    with_scale, without = (sum(output_error(weight, x, s, scheme) for weight in weights) for s in (scale, torch.ones(128)))
    assert with_scale <= without * (1 + 1e-5)
    if scheme.group_size == -1 and (scheme.bits < 8 or scheme.activations == "int8"):
        assert with_scale < 0.95 * without


@pytest.mark.parametrize("module", of_kind("rescale"))
def test_tied_channels_get_one_scale_and_keep_the_function(module: ModuleType, tmp_path: Path) -> None:
    architecture = models.opened(models.tiny_llama(tmp_path)).architecture
    tied = tied_channels(architecture, "o_in")
    assert tied is not None
    scale = module.rescale([torch.randn(16, 128)], stats(correlated(200, 128, 8)), tied, suited(module), module.Knobs())
    for group in tied.unique():
        assert len(scale[tied == group].unique()) == 1
    assert len(scale.unique()) > 8


@pytest.mark.parametrize("module", of_kind("rescale"))
def test_rescaling_survives_channels_that_are_never_active(module: ModuleType) -> None:
    x = correlated(100, 128, 9)
    x[:, 5], x[:, 64:96] = 0, 0
    for seen in (stats(x), stats(torch.zeros(10, 128))):
        scale = module.rescale([torch.randn(8, 128)], seen, None, suited(module), module.Knobs())
        assert torch.isfinite(scale).all() and (scale > 0).all()


def error(linear: Tensor, weight: Tensor, hessian: Tensor) -> float:
    off = (linear - weight).double()
    return float(((off @ hessian.double()) * off).sum())


@each_scheme("round")
def test_rounding_is_no_worse_than_to_nearest(module: ModuleType, scheme: Scheme) -> None:
    for seed, width in ((1, 128), (2, 256)):
        x = correlated(2 * width, width, seed)
        hessian = x.t() @ x / len(x)
        weight = torch.randn(32, width, generator=torch.Generator().manual_seed(seed)) * 0.02
        nearest = rtn.round_weights(weight, hessian, scheme, rtn.Knobs()).linear
        kept = weight.clone(), hessian.clone()
        found = module.round_weights(weight, hessian, scheme, module.Knobs()).linear
        assert torch.equal(weight, kept[0]) and torch.equal(hessian, kept[1]), "inputs are the caller's"
        assert error(found.dequantize(), weight, hessian) <= error(nearest.dequantize(), weight, hessian)
        assert found.scheme == scheme and found.scale.dtype == torch.float16 and found.codes.shape == weight.shape
        assert int(found.codes.max()) <= scheme.top and int(found.zero.max()) <= scheme.top
        assert torch.isfinite(found.scale).all() and (found.scale > 0).all()
        assert not scheme.symmetric or (found.zero == scheme.middle).all()


@pytest.mark.parametrize("module", of_kind("round"))
def test_rows_are_rounded_independently(module: ModuleType) -> None:
    """The walk rounds the linears of one site together on that ground."""
    x = correlated(200, 64, 1)
    hessian, weight = x.t() @ x / len(x), torch.randn(12, 64, generator=torch.Generator().manual_seed(1))
    together = module.round_weights(weight, hessian, Scheme(4, 32), module.Knobs()).linear
    for rows in (slice(0, 5), slice(5, 12)):
        apart = module.round_weights(weight[rows], hessian, Scheme(4, 32), module.Knobs()).linear
        assert torch.equal(apart.scale, together.scale[rows]) and torch.equal(apart.zero, together.zero[rows])
        assert (apart.codes != together.codes[rows]).float().mean() < 0.01  # a matrix product of another shape may break a tie otherwise


@pytest.mark.parametrize("module", of_kind("round"))
def test_constant_and_zero_rows_are_held(module: ModuleType) -> None:
    x = correlated(100, 64, 1)
    weight = torch.zeros(4, 64)
    weight[1], weight[2], weight[3] = 0.5, -0.25, torch.arange(64) * 1e-9
    found = module.round_weights(weight, x.t() @ x / 100, Scheme(4, 32), module.Knobs()).linear
    assert (found.dequantize() - weight).abs().max() < 2e-3  # 4 bits: a scale in half of 0.5 / 15
