"""benchmarks/engines.py without an engine: a tiny model is made and built, and texts that differ from its own are told apart."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.model import Model
from buildsys.survey import describe, read_config

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def engines() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("engines")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def said(engines: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], Any]:
    """Greedy tokens and logits of a built llama."""
    folder = tmp_path_factory.mktemp("engines")
    engines.workspace(folder, ["llama"])
    assert engines.build(folder, ["llama@awq"]) == {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        texts, logits = engines.reference(folder, "llama@awq")
    return texts, lambda ids: logits(ids)


def test_quantized_model_still_says_what_its_readout_was_solved_for(engines: ModuleType, said: tuple[list[list[int]], Any]) -> None:
    texts, logits = said
    outcome = engines.judged("llama@awq", "turbomind", texts, texts, logits)
    assert outcome.holds and outcome.equal == 20 and outcome.least_gap > engines.EXCUSED_NATS
    assert texts == engines.decided.answers(2048)
    assert len({tuple(text) for text in texts}) == 20 and all(len(set(text)) > 8 for text in texts)


def test_other_text_fails_and_near_ties_are_excused_twice(engines: ModuleType, said: tuple[list[list[int]], Any]) -> None:
    texts, logits = said
    wrong = [[*texts[0][:3], (texts[0][3] + 1) % 2048, *texts[0][4:]], *texts[1:]]
    outcome = engines.judged("llama@awq", "turbomind", texts, wrong, logits)
    assert not outcome.holds and outcome.equal == 19 and outcome.failed[0].startswith("prompt 0, token 3: ")

    def tied(ids: list[int]) -> Any:
        return logits(ids) * 1e-3  # every token within a few thousandths of every other

    near = engines.judged("llama@awq", "turbomind", texts, wrong, tied)
    assert near.holds and near.equal == 19 and len(near.excused) == 1
    assert not replace(near, equal=17, excused=near.excused * 3).holds


@pytest.mark.parametrize(
    ("model", "part", "value"), [("qwen2", ".bias", 0), ("qwen3", ".q_norm.weight", 1), ("qwen3_moe", ".mlp.gate.weight", 0)]
)
def test_engine_that_dropped_a_part_of_the_model_would_show(
    engines: ModuleType, tmp_path: Path, model: str, part: str, value: float
) -> None:
    decided = engines.decided
    decided.write(tmp_path / "model", model)
    path = tmp_path / "model" / "model.safetensors"
    architecture = describe(read_config(path.with_name("config.json"), "config.json"), "config.json")[0]

    def right() -> int:
        """Of the texts, those that the model says when it reads them up to there."""
        whole = decided.Whole.of(Model(architecture, Checkpoint({path.name: path})))
        texts = zip(decided.prompts(), decided.answers(architecture.vocab_size), strict=True)
        return sum(whole.logits(before + after)[len(before) - 1 : -1].argmax(-1).tolist() == after for before, after in texts)

    assert right() == decided.PROMPTS
    tensors = {name: torch.full_like(tensor, value) if name.endswith(part) else tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert right() < decided.PROMPTS - engines.EXCUSED_PROMPTS


def test_text_that_breaks_off_fails(engines: ModuleType, said: tuple[list[list[int]], Any]) -> None:
    texts, logits = said
    outcome = engines.judged("llama@awq", "turbomind", texts, [texts[0][:-1], *texts[1:]], logits)
    assert outcome.failed == ("prompt 0: 15 tokens, 16 were asked for",)
    assert engines.Outcome.read(outcome.written) == outcome


def test_engine_that_cannot_start_is_the_failure_of_its_case(engines: ModuleType, tmp_path: Path) -> None:
    outcome = engines.run(tmp_path, "llama@awq")
    assert not outcome.holds and "ended with 1" in outcome.failed[0]


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run([sys.executable, str(BENCHMARKS / "engines.py")], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.count("\n")) == (1, 1) and "CUDA" in ran.stdout


def test_unknown_case_is_refused(engines: ModuleType) -> None:
    with pytest.raises(SystemExit, match="gpt2"):
        engines.chosen("llama,gpt2")
    assert engines.chosen("phi3,llama@awq") == ["llama@awq", "phi3@awq", "phi3@as-llama", "phi3@int8"]
