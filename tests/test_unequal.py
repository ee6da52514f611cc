"""Two files that should be equal: what is said of where they part is what was changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from buildsys import unequal
from buildsys.io import checkpoint
from buildsys.quant.blocks import save_block
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme

Change = Callable[[dict[str, torch.Tensor]], object]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    named = ("model.layers.0.b", "model.layers.10.a", "model.layers.2.a", "model.layers.0.a", "model.norm")
    return {name: torch.rand(4, 8, dtype=torch.bfloat16 if "10" in name else torch.float32) for name in named}


def told(tmp_path: Path, change: Change, order: tuple[str, ...] = (".b", ".a")) -> str:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    checkpoint.save(old, tensors())
    changed = tensors()
    change(changed)
    checkpoint.save(new, changed)
    return unequal.told("model.safetensors", old, new, order)


def add(name: str, amount: float) -> Change:
    def change(changed: dict[str, torch.Tensor]) -> None:
        changed[name] = changed[name].clone()
        changed[name][1, 2] += amount

    return change


def test_the_first_tensor_as_a_model_computes(tmp_path: Path) -> None:
    def change(changed: dict[str, torch.Tensor]) -> None:
        for name in ("model.layers.10.a", "model.layers.0.a", "model.layers.0.b", "model.layers.2.a"):
            add(name, 0.5)(changed)

    text = told(tmp_path, change)
    assert text == (
        "layer 0, model.layers.0.b: 1 of 32 values differs, by at most 0.5, 0.0156 on average over all; 3 more of 5 tensors differ"
    )
    assert told(tmp_path, change, (".a", ".b")).startswith("layer 0, model.layers.0.a: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add("model.norm", 0.25), "model.norm: 1 of 32 values differs, by at most 0.25, 0.00781 on average over all"),
        (add("model.layers.10.a", float("nan")), "layer 10, model.layers.10.a: 1 of 32 values differs, by at most inf"),
        (lambda t: t.pop("model.norm"), "model.norm: is gone"),
        (lambda t: t.update({"model.x": torch.zeros(1)}), "model.x: is new"),
        (lambda t: t.update({"model.norm": torch.zeros(8)}), "model.norm: F32 [4, 8] is F32 [8] now"),
        (lambda t: None, "its tensors are equal, stored otherwise"),
    ],
)
def test_how_a_tensor_differs(change: Change, expected: str, tmp_path: Path) -> None:
    assert told(tmp_path, change).startswith(expected)


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    for name, zero in (("old", 0.0), ("new", -0.0)):
        checkpoint.save(tmp_path / name, {"a": torch.tensor([zero, 1.0])})
    said = unequal.told("x.safetensors", tmp_path / "old", tmp_path / "new")
    assert said == "a: 1 of 2 values differs, by at most 0, 0 on average over all"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_in_units_of_their_scale(bits: int, tmp_path: Path) -> None:
    """A changed code changes a part of a byte: the difference is that of the code."""
    scheme = Scheme(bits=bits, group_size=8, symmetric=False)
    codes = torch.randint(0, 2**bits, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    other = codes.clone()
    other[2, 3] = codes[2, 3] ^ 3
    other[4, 5] = codes[4, 5] ^ 1
    for name, each in (("old", codes), ("new", other)):
        linear = QuantizedLinear(each, torch.ones(6, 2, dtype=torch.float16), torch.zeros(6, 2, dtype=torch.uint8), scheme)
        save_block(tmp_path / name, {"self_attn.q_proj": linear}, {"norm.weight": torch.ones(16)})
    apart = (codes.int() - other.int()).abs()
    expected = f"by at most {int(apart.max())} times the scale, {float(apart.float().mean()):.3g} on average over all"
    assert unequal.told("block-00007.safetensors", tmp_path / "old", tmp_path / "new") == (
        f"layer 7, self_attn.q_proj.codes: 2 of 96 codes differ, {expected}"
    )


def test_packed_words_are_counted(tmp_path: Path) -> None:
    for name, word in (("old", 1), ("new", 1 << 30)):
        checkpoint.save(tmp_path / name, {"q.qweight": torch.tensor([word, 5], dtype=torch.int32)})
    assert unequal.told("model.safetensors", tmp_path / "old", tmp_path / "new") == "q.qweight: 1 of 2 words differs"


def test_json_and_other_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(json.dumps([{"name": "kl", "value": 0.5, "unit": "nats"}, {"name": "n", "value": 1}]))
    new.write_text(json.dumps([{"name": "kl", "value": 0.25, "unit": "nats"}, {"name": "n", "value": 2}]))
    assert unequal.told("measurements.json", old, new) == "[0].value 0.5 -> 0.25; 1 more of 5 entries differ"
    old.write_bytes(b"abcdef")
    new.write_bytes(b"abXdeX")
    assert unequal.told("text.txt", old, new) == "2 bytes differ, the first at 2"
    old.write_text('{"a": 1}')
    new.write_bytes(old.read_bytes() + b"\n")
    assert unequal.told("measurements.json", old, new) == "says the same, written otherwise"
    size = old.stat().st_size
    assert unequal.told("text.txt", old, new) == f"{size} bytes -> {size + 1} bytes; 0 bytes differ, the first at {size}"


def test_weights_come_before_what_stands_beside_them() -> None:
    old = {"block-00000.errors.json": "a", "block-00000.safetensors": "b", "block-00001.safetensors": "c"}
    new = {"block-00000.errors.json": "x", "block-00001.safetensors": "y", "block-00000.safetensors": "b"}
    assert unequal.files(old, new) == ["block-00001.safetensors", "block-00000.errors.json"]
