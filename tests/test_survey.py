"""What a model is, is read from config.json and the headers; a model that is not what it says is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.survey import Survey, describe, read_config, survey

Tensors = dict[str, Tensor]


def alter(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(folder: Path, **changed: Any) -> None:
    said = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps({key: value for key, value in said.items() if value is not ...}))


def refused(folder: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        survey(models.files(folder))
    assert caught.value.where and caught.value.what and caught.value.fix
    return caught.value


@pytest.mark.parametrize("family", models.FAMILIES)
def test_families_are_known(tmp_path: Path, family: str) -> None:
    found = survey(models.files(models.FAMILIES[family](tmp_path)))
    assert isinstance(found, Survey) and found.architecture.model_type == family and found.architecture.layers == 2
    assert found.tokenizer == "tokenizer.json" and found.computed == {"arch": family, "version": found.version}
    assert set(found.architecture.tensors()) == set(load_file(tmp_path / "model.safetensors"))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return models.tiny_llama(tmp_path / "llama")


def test_code_of_a_known_architecture_is_of_no_interest(llama: Path) -> None:
    configured(llama, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (llama / "evil.py").write_text("raise SystemExit\n")
    assert survey(models.files(llama)).architecture.model_type == "llama"


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not implemented; implemented: InternLM2ForCausalLM"),
        (
            {"architectures": ["BaichuanForCausalLM"], "auto_map": {"AutoModel": "x.Y"}},
            "is not implemented, and running the model's own code (auto_map), which it asks for, is refused",
        ),
        ({"architectures": ...}, "names no architecture; implemented: "),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": [7]}, "names no architecture"),
        ({"quantization_config": {"quant_method": "gptq"}}, "the model is quantized already (gptq)"),
        ({"quantization_config": "odd"}, "the model is quantized already (odd)"),
    ],
)
def test_what_is_not_implemented(llama: Path, changed: dict[str, Any], what: str) -> None:
    configured(llama, **changed)
    error = refused(llama)
    assert what in error.what and "config.json" in error.where


def test_implemented_ones_are_all_named() -> None:
    with pytest.raises(BuildError) as caught:
        describe({}, "config.json")
    for name in ("InternLM2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in caught.value.what


@pytest.mark.parametrize(("text", "what"), [("{", "is not valid JSON"), ("[1]", "is not a JSON object"), ("", "is not valid JSON")])
def test_config_that_is_none(llama: Path, text: str, what: str) -> None:
    (llama / "config.json").write_text(text)
    assert what in refused(llama).what


def test_config_in_another_encoding(llama: Path) -> None:
    (llama / "config.json").write_bytes(b'{"model_type": "caf\xe9"}')
    with pytest.raises(BuildError, match="is not valid JSON"):
        read_config(llama / "config.json", "config.json")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.pop(UP), f"has no tensor {UP}, which llama needs"),
        (lambda t: t.update({UP: torch.zeros(255, 128)}), f"tensor {UP} is [255, 128], config.json says [256, 128]"),
        (lambda t: t.update({UP: torch.zeros(128, 256)}), f"tensor {UP} is [128, 256], config.json says [256, 128]"),
        (lambda t: t.update({UP: torch.zeros(256, 128, dtype=torch.int8)}), f"tensor {UP} holds I8; known are F16, BF16, F32"),
        (lambda t: t.update({UP: torch.zeros(256, 128, dtype=torch.float64)}), f"tensor {UP} holds F64"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[UP].clone()}),
            "tensor model.layers.2.mlp.up_proj.weight (of 1 such) belongs to nothing",
        ),
        (lambda t: t.update({UP.replace("weight", "lora_A"): torch.zeros(8, 128)}), "belongs to nothing that llama computes"),
    ],
    ids=["missing", "shape", "transposed", "int8", "float64", "layer", "adapter"],
)
def test_tensors_that_are_not_the_architectures(llama: Path, change: Callable[[Tensors], object], what: str) -> None:
    alter(llama, change)
    error = refused(llama)
    assert what in error.what and "model.safetensors" in error.where


def test_more_layers_in_the_config_than_in_the_file(llama: Path) -> None:
    configured(llama, num_hidden_layers=3)
    assert "has no tensor model.layers.2." in refused(llama).what


def test_old_buffers_and_a_tied_head_may_lie_there(tmp_path: Path) -> None:
    folder = models.tiny_qwen2(tmp_path)
    alter(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16), "lm_head.weight": t["model.embed_tokens.weight"].clone()}
        ),
    )
    assert survey(models.files(folder)).architecture.lm_head is None


def test_untied_model_needs_its_head(llama: Path) -> None:
    alter(llama, lambda t: t.pop("lm_head.weight"))
    assert "has no tensor lm_head.weight" in refused(llama).what


def test_tokenizer_has_to_be_there(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    error = refused(llama)
    assert error.what == "has no tokenizer.json or tokenizer.model" and error.where == str(llama)
    (llama / "tokenizer.model").write_bytes(b"pieces")
    assert survey(models.files(llama)).tokenizer == "tokenizer.model"


def test_damaged_weights_are_refused_from_the_header(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    error = refused(llama)
    assert "truncated" in error.what and str(weights.stat().st_size) in error.what


def test_a_header_and_its_files_size_are_enough(llama: Path) -> None:
    known = survey(models.files(llama))
    weights, tokenizer = llama / "model.safetensors", llama / "tokenizer.json"
    sizes = {path.name: path.stat().st_size for path in (weights, tokenizer)}
    header_bytes = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    weights.write_bytes(weights.read_bytes()[:header_bytes])
    tokenizer.unlink()
    assert survey(models.files(llama), sizes) == known
