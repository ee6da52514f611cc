"""What each part's rounding costs, against whole forwards of a model with that part rounded; groups, sharing among experts, and threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Linear, Site, fused
from buildsys.errors import BuildError
from buildsys.methods import awq, rtn
from buildsys.quant import allocate
from buildsys.quant.allocate import measure, sample
from buildsys.quant.block import Block
from buildsys.quant.budget import Group
from buildsys.quant.grid import least_error
from buildsys.quant.model import Model
from buildsys.quant.observe import calibrate, load_stats
from buildsys.quant.quantize import block_name
from buildsys.quant.rotary import tables
from buildsys.quant.rounding import Job, Method, rescale
from buildsys.quant.score import compare_window
from buildsys.quant.search import gram_norm
from buildsys.scheme import Bits, Scheme, Schemes
from buildsys.step import Resources
from tests import models

LENGTH, LAYERS, SCHEME = 24, 2, Scheme(4, 32)
SIZES: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 64, "intermediate_size": 96}
RTN = Method(rtn, rtn.Knobs())
JOB = Job(Schemes(SCHEME), (Method(awq, awq.Knobs(ratios=4)),), RTN)
BITS: tuple[Bits, ...] = (3, 4, 8)


def quiet(what: str, done: int, of: int) -> None:
    assert what in ("calibrate", "allocate") and 0 < done <= of


@dataclass(frozen=True)
class Bench:
    """A model with its calibration."""

    model: Model
    tokens: Tensor
    stats: Path

    @property
    def together(self) -> tuple[tuple[Linear, ...], ...]:
        return tuple(fused(self.model.architecture))

    def measure(self, job: Job = JOB, bits: Sequence[Bits] = BITS, resources: Resources | None = None) -> tuple[Group, ...]:
        def stats(layer: int) -> Path:
            return self.stats / block_name(layer)

        return measure(self.model, job, self.together, bits, stats, self.tokens, resources or Resources(), quiet)


def bench(folder: Path, family: str) -> Bench:
    model = models.opened(models.FAMILIES[family](folder / "model", **SIZES))
    tokens, stats = models.tokens(3, LENGTH), folder / "stats"
    stats.mkdir()
    calibrate(model, tokens, stats, Resources(), quiet)
    return Bench(model, tokens, stats)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("mixtral"), "mixtral")


def rounded(block: Block, site: Site, bits: Bits, stats: Path) -> tuple[Block, dict[str, float]]:
    """A block rescaled, then with one part rounded, and each linear's squared output error."""
    observed = load_stats(stats)
    block, scales = rescale(block, observed, JOB)
    errors = {}
    for linear in (one for one in block.architecture.linears if one.site.partition(".")[0] == site):
        folded = "mlp_in" if site == "mlp_in" else linear.site
        seen, weight = observed[linear.site].divided(scales[folded]), block.weights[f"{linear.name}.weight"]
        importance = torch.cat([each.diagonal() for each in seen.gram])[: linear.in_features]
        grid = least_error(weight, replace(SCHEME, bits=bits), importance)
        after = grid.dequantize(grid.round(weight))
        errors[linear.name] = float(gram_norm(after - weight, seen)) * (seen.sent if seen.sent is not None else 1)
        block = block.with_weights({f"{linear.name}.weight": after})
    return block, errors


def divergence(bench: Bench, layer: int, site: Site, bits: Bits) -> float:
    """The slow twin: mean KL of the whole model with one part rounded, every block forwarded for it alone."""
    model, head = bench.model, bench.model.head()
    rotary, found = tables(model.architecture, LENGTH), []
    for one, other, window in zip(model.embed(bench.tokens), model.embed(bench.tokens), bench.tokens, strict=True):
        for at in range(LAYERS):
            block = model.block(at)
            one = block.forward(one, rotary)
            other = (rounded(block, site, bits, bench.stats / block_name(at))[0] if at == layer else block).forward(other, rotary)
        longer = torch.cat([window.long(), window[:1].long()])  # so that the last prediction is scored too
        found.append(compare_window((head, head), torch.cat([one, one[:1]]), torch.cat([other, other[:1]]), longer)["kl"])
    return float(torch.cat(found).mean())


def parts(bench: Bench, groups: Sequence[Group]) -> dict[tuple[int, Site], list[Group]]:
    """Groups by the part of the model that they were measured in."""
    a = bench.model.architecture
    where = {a.prefix(layer) + linear.name: (layer, linear.site.partition(".")[0]) for layer in range(LAYERS) for linear in a.linears}
    return {key: list(each) for key, each in groupby(groups, lambda group: where[group.names[0]])}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_fewest_bits_cost_what_a_whole_forward_says(name: str, request: pytest.FixtureRequest) -> None:
    """Experts of a part, which are measured together, share its cost out. A token near a tie between two may be sent to the other."""
    near = 0.05 if name == "llama" else 0.2
    at: Bench = request.getfixturevalue(name)
    found = parts(at, at.measure())
    assert len(found) == 4 * LAYERS
    for (layer, site), groups in found.items():
        cost = sum(group.options[0].error for group in groups)
        assert cost == pytest.approx(divergence(at, layer, site, 3), rel=near), (layer, site)
        assert cost > 0


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_other_bits_cost_in_proportion_to_their_output_errors(name: str, request: pytest.FixtureRequest) -> None:
    at: Bench = request.getfixturevalue(name)
    a = at.model.architecture
    for (layer, site), groups in parts(at, at.measure()).items():
        told = [rounded(at.model.block(layer), site, bits, at.stats / block_name(layer))[1] for bits in BITS]
        cost, whole = sum(group.options[0].error for group in groups), sum(told[0].values())
        for group in groups:
            short = [name.removeprefix(a.prefix(layer)) for name in group.names]
            for option, errors in zip(group.options, told, strict=True):
                share = sum(errors[name] for name in short) / whole
                assert option.error == pytest.approx(cost * share, rel=1e-3), (group.names, option.scheme)
            assert [option.scheme for option in group.options] == [replace(SCHEME, bits=bits) for bits in BITS]


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("llama", [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]),
        ("mixtral", [("q", "k", "v"), ("o",), *[("gate", "up")] * 4, *[("down",)] * 4]),
    ],
)
def test_what_engines_fuse_gets_one_choice(name: str, each: list[tuple[str, ...]], request: pytest.FixtureRequest) -> None:
    at: Bench = request.getfixturevalue(name)
    a, groups = at.model.architecture, at.measure()
    role = {a.prefix(layer) + linear.name: linear.role for layer in range(LAYERS) for linear in a.linears}
    assert sorted(tuple(role[name] for name in group.names) for group in groups) == sorted(each * LAYERS)
    assert sum(group.weights for group in groups) == sum(linear.in_features * linear.out_features for linear in a.linears) * LAYERS


def test_what_has_bits_of_its_own_keeps_them_and_what_stays_float_is_left_out(llama: Bench) -> None:
    prefix, own = llama.model.architecture.prefix(1), replace(SCHEME, bits=8)
    schemes = Schemes(
        SCHEME,
        frozenset({prefix + "self_attn.o_proj"}),
        {prefix + "mlp.down_proj": own, llama.model.architecture.prefix(0) + "mlp.down_proj": replace(SCHEME, group_size=-1)},
    )
    groups = {group.names[0]: group for group in llama.measure(replace(JOB, schemes=schemes))}
    assert prefix + "self_attn.o_proj" not in groups and len(groups) == 4 * LAYERS - 1
    assert [option.scheme for option in groups[prefix + "mlp.down_proj"].options] == [own]
    wide = groups[llama.model.architecture.prefix(0) + "mlp.down_proj"]
    assert [(option.scheme.bits, option.scheme.group_size) for option in wide.options] == [(3, -1), (4, -1), (8, -1)]


def test_threads_change_nothing(llama: Bench) -> None:
    assert llama.measure() == llama.measure(resources=Resources(threads=3, batch=2))


def test_a_part_that_nothing_hears_costs_nothing(tmp_path: Path) -> None:
    """The second block's down is zero: what is rounded before it in its MLP changes no prediction."""
    at = bench(tmp_path, "llama")
    prefix = at.model.architecture.prefix(1)

    class Deaf(Model):
        def block(self, layer: int) -> Block:
            block = super().block(layer)
            name = "mlp.down_proj.weight"
            return block.with_weights({name: torch.zeros_like(block.weights[name])}) if layer == 1 else block

    deaf = replace(at, model=Deaf(at.model.architecture, at.model.checkpoint))
    costs = {group.names[0]: group.options[0].error for group in deaf.measure(replace(JOB, rescalers=()))}
    assert costs[prefix + "mlp.gate_proj"] == costs[prefix + "mlp.down_proj"] == 0
    assert min(cost for name, cost in costs.items() if not name.startswith(prefix + "mlp")) > 0


def test_a_model_without_finite_predictions_is_refused(llama: Bench) -> None:
    class Broken(Model):
        def block(self, layer: int) -> Block:
            block = super().block(layer)
            return block.with_weights({"input_layernorm.weight": block.weights["input_layernorm.weight"] * torch.nan})

    broken = replace(llama, model=Broken(llama.model.architecture, llama.model.checkpoint))
    with pytest.raises(BuildError, match="no finite number") as caught:
        broken.measure(replace(JOB, rescalers=()))
    assert caught.value.where == llama.model.architecture.prefix(0) + "self_attn.q_proj"


def test_the_sample_is_as_large_as_the_model_allows(llama: Bench) -> None:
    a = llama.model.architecture
    assert sample(torch.zeros(64, 512), a).shape == (4, 512)
    assert sample(torch.zeros(128, 2048), a).shape == (4, 512)
    assert sample(torch.zeros(128, 64), a).shape == (32, 64)
    assert sample(torch.zeros(3, 512), a).shape == (3, 512)
    large = replace(a, hidden_size=8192, layers=80)
    assert sample(torch.zeros(128, 2048), large).shape == (1, 512)
    held = 2 * 8192 * 4 * 80 * 512
    assert held <= allocate.CHANGES_BYTES
