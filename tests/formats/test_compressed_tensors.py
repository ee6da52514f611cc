"""compressed-tensors' layout against the library of that name: it writes and reads the same, and transformers runs the model with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from torch import Tensor, nn

from buildsys.errors import BuildError
from buildsys.formats import compressed_tensors as ours
from buildsys.io.checkpoint import Checkpoint, save
from buildsys.quant.grid import min_max
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme, Schemes
from tests.models import tiny_llama

INT8, FP8 = Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")
SCHEMES = [Scheme(4, 32), Scheme(4, 128, True), Scheme(4, -1), Scheme(8, 64), Scheme(8, -1, True), INT8, FP8, Scheme(8, -1, True, "fp8")]
OUT, IN = 48, 256

each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def example(scheme: Scheme, seed: int = 0) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    groups = (OUT, scheme.groups(IN))
    codes = torch.randint(0, scheme.top + 1, (OUT, IN), dtype=torch.uint8, generator=random)
    if scheme.number == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        codes[codes == 0x80] = 0  # of two zeros the library writes this
    zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
    zero = torch.full_like(zero, scheme.middle) if scheme.symmetric else zero
    return QuantizedLinear(codes, (torch.rand(groups, generator=random) + 0.01).half(), zero, scheme)


def library(scheme: Scheme) -> tuple[Any, Any]:
    """Its compressor and its own type of a scheme, both from the config that we write."""
    group = QuantizationConfig.model_validate(known(ours.config(Schemes(scheme), ["lm_head"]))).config_groups["group_0"]
    return BaseCompressor.get_value_from_registry(group.format), group


def known(config: dict[str, Any]) -> dict[str, Any]:
    """Without what the library writes beside its own config, and takes off again before it reads."""
    return {key: value for key, value in config.items() if key not in ("version", "sparsity_config", "transform_config")}


def same_bytes(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(*(each.reshape(-1).clone().view(torch.uint8) for each in (one, other)))


@each_scheme
def test_the_library_writes_the_same_words(scheme: Scheme) -> None:
    linear = example(scheme)
    compressor, group = library(scheme)
    given: dict[str, Tensor] = {"weight": linear.dequantize(), "weight_scale": linear.scale}
    if not scheme.symmetric:
        given["weight_zero_point"] = (linear.zero.to(torch.int16) - scheme.middle).to(torch.int8)
    theirs = compressor.compress(given, group)
    packed = ours.pack(linear)
    assert packed.keys() == theirs.keys()
    for part, tensor in packed.items():
        assert tensor.dtype == theirs[part].dtype and same_bytes(tensor, theirs[part]), part
    found = ours.unpack(theirs, scheme)
    assert torch.equal(found.codes, linear.codes) and torch.equal(found.zero, linear.zero) and torch.equal(found.scale, linear.scale)


@each_scheme
def test_the_library_reads_the_same_weights(scheme: Scheme) -> None:
    linear = example(scheme)
    compressor, group = library(scheme)
    assert torch.equal(compressor.decompress(ours.pack(linear), group)["weight"], linear.dequantize().half())


def test_every_name_is_one_that_the_library_expects() -> None:
    for scheme in SCHEMES:
        compressor, group = library(scheme)
        assert {part.removeprefix("q.") for part in ours.layout("q", scheme, IN, OUT)} == set(compressor.compression_param_names(group))


# config.json


Q, K, V = (f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
KEPT = "model.layers.1.mlp.up_proj"
EIGHT = Scheme(8, 64, True)
MIXED = Schemes(Scheme(4, 32, True), frozenset([KEPT]), {Q: EIGHT, K: EIGHT, V: EIGHT, "model.layers.0.mlp.down_proj": FP8})


def test_config_is_what_readers_ask_for() -> None:
    config = ours.config(Schemes(Scheme(4, 128)), ["lm_head", "a"])
    group = config["config_groups"]["group_0"]  # LMDeploy asks for this one and for these four of its entries
    weights = group["weights"]
    assert (group["format"], weights["num_bits"], weights["type"], weights["group_size"]) == ("pack-quantized", 4, "int", 128)
    assert (config["quant_method"], config["quantization_status"], config["ignore"]) == (
        "compressed-tensors",
        "compressed",
        ["a", "lm_head"],
    )
    assert ours.config(Schemes(INT8), [])["format"] == "int-quantized" and ours.config(MIXED, [])["format"] == "mixed-precision"


@pytest.mark.parametrize("schemes", [*map(Schemes, SCHEMES), MIXED], ids=str)
def test_the_library_writes_the_same_config(schemes: Schemes) -> None:
    """Read by the library and written again, nothing that we say is changed or lost."""
    config = known(json.loads(json.dumps(ours.config(schemes, ["lm_head"]))))
    written = json.loads(QuantizationConfig.model_validate(config).model_dump_json())
    assert written.pop("moe_sparsity_config") is None
    assert written == config


class Skeleton(nn.Module):
    """A Llama's linears by their names."""

    def __init__(self) -> None:
        super().__init__()
        parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
        blocks = [{to: nn.ModuleDict({of: self.linear() for of in names}) for to, names in parts.items()} for _ in range(12)]
        self.model = nn.ModuleDict({"layers": nn.ModuleList(map(nn.ModuleDict, blocks))})
        self.lm_head = self.linear()

    @staticmethod
    def linear() -> nn.Linear:
        return nn.Linear(IN, OUT, device="meta")


def test_the_library_gives_each_linear_its_scheme() -> None:
    skeleton = Skeleton()
    config = QuantizationConfig.model_validate(known(ours.config(MIXED, ["lm_head", KEPT])))
    assert config.quantization_status == QuantizationStatus.COMPRESSED
    apply_quantization_config(skeleton, config)
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.Linear):
            told, scheme = getattr(module, "quantization_scheme", None), None if name == "lm_head" else MIXED.of(name)
            assert (told is None) == (scheme is None), name
            if told is not None and scheme is not None:
                read = (told.weights.num_bits, told.weights.group_size or -1, told.weights.symmetric, told.input_activations is not None)
                assert read == (scheme.bits, scheme.group_size, scheme.symmetric, scheme.activations != "none"), name


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_status": "frozen"},
        {"config_groups": {}},
        {"config_groups": {"group_0": "W4A16"}},
        {"config_groups": {"attention": ours.config(Schemes(Scheme(4, 128)), [])["config_groups"]["group_0"]}},
        {"ignore": ["re:.*mlp.*"]},
        {"ignore": "lm_head"},
    ],
    ids=str,
)
def test_another_layout_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BuildError, match=r"config.json.*quantization_config"):
        ours.schemes_of(ours.config(Schemes(Scheme(4, 128)), []) | change)


@pytest.mark.parametrize(
    ("part", "key", "value"), [("weights", "num_bits", 3), ("weights", "strategy", "block"), ("input_activations", "dynamic", False)]
)
def test_a_scheme_that_is_not_ours_is_refused(part: str, key: str, value: object) -> None:
    config = json.loads(json.dumps(ours.config(Schemes(INT8), [])))
    config["config_groups"]["group_0"][part][key] = value
    with pytest.raises(BuildError, match="group_0 as no scheme that format compressed_tensors holds"):
        ours.schemes_of(config)


def test_what_does_not_fit() -> None:
    assert ours.fits(Scheme(4, -1), 100, 64) == "packs input channels in whole 32-bit words, 100 4-bit codes do not fill them"
    assert ours.fits(Scheme(4, 32), 64, 100) == "packs zeros of output channels in whole 32-bit words, 100 4-bit codes do not fill them"
    assert ours.fits(Scheme(4, 32, True), 64, 100) is None and ours.fits(INT8, 99, 77) is None


# A whole model


def both(folder: Path, schemes: Schemes) -> tuple[Path, Path]:
    """A Llama packed, and the same with its weights written out."""
    source = Checkpoint({"model.safetensors": tiny_llama(folder / "source") / "model.safetensors"})
    packed: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for name in source.names():
        weight, module = source.load(name), name.removesuffix(".weight")
        scheme = schemes.of(module) if module.endswith("_proj") else None
        if scheme is None:
            packed[name] = written[name] = weight
            continue
        grid = min_max(weight, scheme)
        linear = grid.linear(grid.round(weight))
        written[name] = linear.dequantize()
        packed |= {f"{module}.{part}": tensor for part, tensor in ours.pack(linear).items()}
    said = {"quantization_config": ours.config(schemes, ["lm_head", *schemes.left_float])}
    config = json.loads((folder / "source" / "config.json").read_text())
    for name, tensors, more in (("packed", packed, said), ("written", written, {})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config | more))
        save(folder / name / "model.safetensors", tensors, {"format": "pt"})
    return folder / "packed", folder / "written"


def apart(packed: Path, written: Path, **how: Any) -> float:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        found, wanted = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **more)(torch.arange(40)[None]).logits
            for path, more in ((packed, how), (written, {}))
        )
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    ("schemes", "limit"),
    [
        pytest.param(Schemes(Scheme(4, 32, True)), 1e-3, id="W4A16"),
        pytest.param(replace(MIXED, own={Q: EIGHT, K: EIGHT, V: EIGHT}), 1e-3, id="mixed"),
        pytest.param(Schemes(INT8), 0.1, id="W8A8-int8"),  # the packed model rounds its activations
        pytest.param(Schemes(FP8), 0.1, id="W8A8-fp8"),
        pytest.param(MIXED, 0.1, id="mixed-with-fp8"),
    ],
)
def test_transformers_runs_the_model(schemes: Schemes, limit: float, tmp_path: Path) -> None:
    assert apart(*both(tmp_path, schemes)) < limit


def test_transformers_reads_zeros_where_it_dequantizes(tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    assert apart(*both(tmp_path, Schemes(Scheme(4, 32))), quantization_config=CompressedTensorsConfig(dequantize=True)) < 1e-3
