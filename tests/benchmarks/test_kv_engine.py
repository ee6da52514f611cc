"""benchmarks/kv_engine.py without an engine: our own forward in float16 stands in its place, with the right cache and with wrong ones."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from buildsys.quant.kv import dequantize, fake_quantize, keep, quantize
from buildsys.quant.model import Model

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
NAME = "d64"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        made = importlib.import_module("kv_engine")
        with pytest.MonkeyPatch.context() as patched:
            for name, value in (("WINDOWS", 4), ("PROMPTS", 3), ("LENGTH", 64), ("NEW", 8)):
                patched.setattr(made, name, value)
            yield made
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def folder(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    there = tmp_path_factory.mktemp("kv_engine")
    bench.write(there, NAME)
    return there


@torch.inference_mode()
def stand_in(bench: ModuleType, folder: Path, policy: str, cache: Any) -> list[Any]:
    """Rows of a case whose engine is a float16 forward with that cache."""
    half: Model = replace(bench.opened(folder / NAME, "none"), dtype=torch.float16, keep_kv=cache)
    whole = bench.decided.Whole.of(half)
    windows, prompts = bench.asked(folder / NAME)
    texts = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + bench.NEW:
            ids.append(int(whole.logits(ids)[-1].argmax()))
        texts.append(ids)
    decode = [whole.logits(ids)[len(prompt) - 1 : -1] for prompt, ids in zip(prompts, texts, strict=True)]
    tokens = torch.tensor([ids[-bench.NEW :] for ids in texts])
    found = {"prefill": torch.stack([whole.logits(ids) for ids in windows]), "tokens": tokens, "decode": torch.stack(decode)}
    save_file(found, bench.answers(folder, f"{NAME}@{policy}"))
    return list(bench.rows_of(folder, f"{NAME}@{policy}"))


def symmetric(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 7
    return (x / scale).round().clamp(-8, 7) * scale


def of_all_heads(x: Tensor) -> Tensor:  # [heads, tokens, head_dim]: one scale for all heads of a token
    together = x.transpose(0, 1).flatten(1)
    return fake_quantize(together, 4).view(x.shape[1], x.shape[0], -1).transpose(0, 1)


def truncated(x: Tensor) -> Tensor:
    _, scale, zero = quantize(x, 4)
    return dequantize(((x.half() - zero) / scale).floor().clamp(0, 15).to(torch.uint8), scale, zero).to(x.dtype)


def test_the_right_cache_holds_and_wrong_ones_do_not(bench: ModuleType, folder: Path) -> None:
    none = stand_in(bench, folder, "none", None)
    assert [row.way for row in none] == ["prefill", "decode"] and none[0].tokens == 4 * 64 and none[1].tokens == 3 * 8
    for policy in ("int8", "int4"):
        rows = none + stand_in(bench, folder, policy, keep(policy))
        assert bench.faults(rows) == []
        for row in rows[2:]:
            assert row.emulated.nats < row.plain.nats and row.predicted == pytest.approx(row.measured, rel=0.15)
            assert len(row.line(bench.beside(rows, row)).split()) == 14
    wrong: list[Callable[[Tensor], Tensor] | None] = [None, symmetric, of_all_heads, truncated, keep("int8")]
    for cache in wrong:
        rows = none + stand_in(bench, folder, "int4", cache)
        assert any("prefill" in fault for fault in bench.faults(rows)), cache


def test_distance_is_what_its_words_say(bench: ModuleType) -> None:
    drawn = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).double()
    shifted = bench.distance(drawn + 3, drawn)  # a softmax does not see it
    assert shifted.mean_square < 1e-20 and shifted.nats < 1e-12 and shifted.share == 1
    other = drawn.clone()
    other[0, drawn[0].argmin()] = drawn[0].max() + 1
    assert bench.distance(drawn, other).share == 0.8
    p, q = drawn.softmax(-1), other.softmax(-1)
    assert bench.nats(drawn, other) == pytest.approx(float((p * (p / q).log()).sum() / 5))


def test_cases_are_chosen_with_what_they_are_held_against(bench: ModuleType) -> None:
    assert bench.chosen("d64@int8,demo") == ["demo@none", "demo@int8", "demo@int4", "d64@none", "d64@int8"]
    with pytest.raises(SystemExit, match="gpt2"):
        bench.chosen("gpt2")


def test_engine_that_cannot_start_is_told(bench: ModuleType, folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    rows, failed = bench.compare(folder, [])
    assert (rows, failed) == ([], [])
    said = bench.run(folder, f"{NAME}@missing")
    assert said is not None and said.startswith("ended with 1")


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run([sys.executable, str(BENCHMARKS / "kv_engine.py")], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.count("\n")) == (1, 1) and "CUDA" in ran.stdout
