"""unpack == codes: an honest packing passes, and one changed bit anywhere is counted and named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Architecture, Linear, Rope
from buildsys.checks import codes
from buildsys.errors import BuildError
from buildsys.formats import awq, gptq
from buildsys.io.checkpoint import save
from buildsys.io.headers import SINGLE
from buildsys.quant.blocks import save_block
from buildsys.quant.linear import QuantizedLinear
from buildsys.relayout import relayout
from buildsys.scheme import Scheme, Schemes
from buildsys.slots import modules

KEPT = "model.layers.1.attn.q"
SCHEMES = Schemes(Scheme(4, 32), frozenset([KEPT]))
HELD = [Scheme(4, 32), Scheme(4, 32, True), Scheme(8, -1, True), Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")]
ARCHITECTURE = Architecture(
    model_type="toy",
    layers=2,
    hidden_size=32,
    intermediate_size=64,
    heads=1,
    kv_heads=1,
    head_dim=32,
    vocab_size=16,
    rms_norm_eps=1e-5,
    rope=Rope(10000.0),
    max_positions=64,
    linears=(Linear("attn.q", "q", "attn_in", 32, 32), Linear("mlp.down", "down", "down_in", 64, 32)),
    block_prefix="model.layers.{}.",
    attn_norm="norm1.weight",
    mlp_norm="norm2.weight",
    embed="model.embed.weight",
    final_norm="model.norm.weight",
    lm_head=None,
)


@dataclass(frozen=True)
class Files:
    files: Mapping[str, Path]


@dataclass(frozen=True)
class Build:
    """A quantize step's blocks and what an honest pack step makes of them."""

    folder: Path
    packed: dict[str, Tensor]
    schemes: Schemes = SCHEMES
    format: ModuleType = awq

    def measure(self) -> tuple[tuple[int, str], tuple[int, str]]:
        save(self.folder / SINGLE, self.packed)
        inputs = {
            "packed": Files({SINGLE: self.folder / SINGLE}),
            "blocks": Files({path.name: path for path in self.folder.glob("block-*")}),
        }
        steps: list[object] = []
        context = SimpleNamespace(
            device="cpu",
            architecture=ARCHITECTURE,
            relayout=relayout(ARCHITECTURE, {}, "config.json", None),
            schemes=self.schemes,
            format=self.format,
            progress=lambda *step: steps.append(step),
        )
        found = codes.measure(codes.Knobs(), inputs, context)
        assert [measurement.name for measurement in found] == list(codes.FIXED) and steps[-1] == ("codes", 2, 2)
        for measurement in found:
            limit, bound = codes.FIXED[measurement.name]
            assert limit.holds(measurement, bound) == (measurement.value == 0)
        return (int(found[0].value), found[0].detail), (int(found[1].value), found[1].detail)


def built(folder: Path, format: ModuleType, schemes: Schemes) -> Build:
    random = torch.Generator().manual_seed(0)
    packed: dict[str, Tensor] = {"model.embed.weight": torch.randn(16, 32).half(), "model.norm.weight": torch.ones(32).half()}
    for layer in range(2):
        prefix, linears = ARCHITECTURE.prefix(layer), {}
        floats = {name: torch.randn(32, generator=random).half() for name in ("norm1.weight", "norm2.weight")}
        for linear in ARCHITECTURE.linears:
            scheme = schemes.of(prefix + linear.name)
            shape = (linear.out_features, linear.in_features)
            if scheme is None:
                floats[f"{linear.name}.weight"] = torch.randn(shape, generator=random).half()
                continue
            groups = (linear.out_features, scheme.groups(linear.in_features))
            zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
            linears[linear.name] = QuantizedLinear(
                torch.randint(0, scheme.top + 1, shape, dtype=torch.uint8, generator=random),
                torch.rand(groups, generator=random).half(),
                torch.full_like(zero, scheme.middle) if scheme.symmetric else zero,
                scheme,
            )
            packed |= {f"{prefix}{linear.name}.{part}": tensor for part, tensor in format.pack(linears[linear.name]).items()}
        save_block(folder / f"block-{layer:05}.safetensors", linears, floats)
        packed |= {prefix + name: tensor for name, tensor in floats.items()}
    return Build(folder, packed, schemes, format)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return built(tmp_path, awq, SCHEMES)


EVERY = [(format, scheme) for format in modules("formats").values() for scheme in HELD if format.accepts(scheme) is None]


@pytest.mark.parametrize(("format", "scheme"), EVERY, ids=lambda value: str(getattr(value, "QUANT_METHOD", value)))
def test_every_format_is_compared_byte_by_byte(format: ModuleType, scheme: Scheme, tmp_path: Path) -> None:
    """Whatever a format stores of a linear: one byte of it changed is found."""
    honest = built(tmp_path, format, Schemes(scheme))
    assert honest.measure() == ((0, ""), (0, ""))
    name = "model.layers.1.mlp.down"
    for part in (part for part in honest.packed if part.startswith(f"{name}.")):
        changed = honest.packed[part].clone()
        changed.view(-1).view(torch.uint8)[-5] ^= 1
        count, detail = replace(honest, packed={**honest.packed, part: changed}).measure()[0]
        assert count == 1 and detail.endswith(f"{name}, 1"), part


def test_each_linear_is_read_in_its_own_scheme(tmp_path: Path) -> None:
    own = {"model.layers.1.mlp.down": Scheme(8, 64, True)}
    build = built(tmp_path, gptq, Schemes(Scheme(4, 32, True), frozenset([KEPT]), own))
    assert build.measure() == ((0, ""), (0, ""))
    told = replace(build, schemes=Schemes(Scheme(4, 32, True), frozenset([KEPT])))  # what config.json would say
    assert told.measure()[0] == (64 * 32, "1 of 3 tensors differ; worst: model.layers.1.mlp.down, 2048")


def test_an_honest_packing_has_no_mismatch(build: Build) -> None:
    assert build.measure() == ((0, ""), (0, ""))


@pytest.mark.parametrize(("part", "at"), [("qweight", (5, 1)), ("qweight", (31, 3)), ("qzeros", (0, 2))])
def test_one_changed_bit_is_one_mismatch(part: str, at: tuple[int, int], build: Build) -> None:
    build.packed[f"model.layers.0.attn.q.{part}"][at] ^= 1 << 13
    assert build.measure() == ((1, "1 of 3 tensors differ; worst: model.layers.0.attn.q, 1"), (0, ""))


def test_scales_are_compared_by_their_bits(build: Build) -> None:
    scales = build.packed["model.layers.1.mlp.down.scales"]
    scales[0, 0], scales[1, 1] = float("nan"), -scales[1, 1]
    assert build.measure()[0] == (2, "1 of 3 tensors differ; worst: model.layers.1.mlp.down, 2")


def test_the_worst_layer_is_named(build: Build) -> None:
    build.packed["model.layers.0.attn.q.qzeros"][0, 0] ^= 1
    build.packed["model.layers.0.mlp.down.qweight"][:3, 0] ^= 1
    assert build.measure()[0] == (4, "2 of 3 tensors differ; worst: model.layers.0.mlp.down, 3")


def test_lanes_in_plain_order_are_found(build: Build) -> None:
    """What a packer for another layout would write loads without complaint, and is nonsense."""
    from buildsys.quant.pack import AWQ_ORDER, pack_int32, unpack_int32

    name = "model.layers.0.attn.q.qweight"
    build.packed[name] = pack_int32(unpack_int32(build.packed[name], 4, AWQ_ORDER), 4)
    assert build.measure()[0][0] > 500


@pytest.mark.parametrize("form", ["absent", "float", "shape"])
def test_a_linear_of_another_form_mismatches_whole(form: str, build: Build) -> None:
    name = "model.layers.0.attn.q.qweight"
    tensor = build.packed.pop(name)
    if form != "absent":
        build.packed[name] = tensor.float() if form == "float" else tensor[:16]
    assert build.measure()[0][0] == 32 * 32


def test_a_linear_that_quantize_left_out_mismatches_whole(build: Build) -> None:
    save_block(build.folder / "block-00001.safetensors", {}, {})
    assert build.measure()[0] == (64 * 32, "1 of 3 tensors differ; worst: model.layers.1.mlp.down, 2048")


def test_a_norm_that_was_not_carried_over(build: Build) -> None:
    build.packed["model.layers.1.norm1.weight"] = torch.ones(32).half()
    assert build.measure() == ((0, ""), (32, "1 of 5 tensors differ; worst: model.layers.1.norm1.weight, 32"))
    assert replace(build, packed=build.packed | {f"{KEPT}.weight": torch.zeros(2, 2)}).measure()[1][0] == 32 + 32 * 32


def test_a_missing_block(build: Build) -> None:
    (build.folder / "block-00001.safetensors").unlink()
    with pytest.raises(BuildError, match=r"block-00001.safetensors"):
        build.measure()
