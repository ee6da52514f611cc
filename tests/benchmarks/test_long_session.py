"""benchmarks/long_session.py without an engine: for prompts beyond the positions, what one rule writes is told from the other's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from buildsys.architecture import Rope
from buildsys.io.checkpoint import Checkpoint
from buildsys.plan import plan
from buildsys.quant.model import Model
from buildsys.serving.settings import settings
from buildsys.store import Store
from buildsys.survey import describe, read_config
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "recipes" / "demo" / "model"


@pytest.fixture(scope="module")
def long() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("long_session")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def whole(long: ModuleType) -> Any:
    architecture, _ = describe(read_config(MODEL / "config.json", "config.json"), "config.json")
    return long.decided.Whole.of(Model(architecture, Checkpoint({"model.safetensors": MODEL / "model.safetensors"})))


def text(whole: Any, prompt: list[int], new: int) -> list[int]:
    """What the model writes greedily, whole sequence by whole sequence."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(whole.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.slow
def test_rules_are_told_apart(long: ModuleType, whole: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 2048, (length,), generator=generator).tolist() for length in (1000, 1200)]
    stretched = [text(long.by_rule(whole, 4.0, len(prompt)), prompt, long.decided.NEW) for prompt in prompts]
    own = [text(whole, prompt, long.decided.NEW) for prompt in prompts]
    assert stretched[0] == own[0] and stretched[1] != own[1]
    short, beyond = long.judged(whole, 4.0, prompts, stretched)
    assert (short.prompt_tokens, short.tokens, short.stretched, short.own) == (1000, 16, 16, 16)
    assert beyond.stretched == 16 and beyond.stretched_nats == 0 and beyond.own < 16 and beyond.own_nats > long.EXCUSED_NATS
    assert long.held("4096", [short, beyond]) and not long.held("no hf_overrides", [short, beyond])
    assert long.held("no hf_overrides", long.judged(whole, 4.0, prompts, own))


def test_the_rule_is_that_of_one_long_sequence(long: ModuleType, whole: Any) -> None:
    """quant/rotary.py's dynamic rule, at the length of the prompt."""
    from dataclasses import replace

    from buildsys.quant.rotary import tables

    a = whole.model.architecture
    told = tables(replace(a, rope=Rope(a.rope.theta, "dynamic", {"factor": 4.0})), 3000)
    ours = tables(long.by_rule(whole, 4.0, 3000).model.architecture, 3000)
    torch.testing.assert_close(ours, told)
    assert not torch.allclose(ours[0], tables(a, 3000)[0], atol=0.1)


def test_its_recipe_plans_what_it_runs(long: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long.engines, "doit", lambda folder, cases: None)
    long.build(tmp_path)
    for variant, lengths in long.LENGTHS.items():
        made = plan(Workspace(tmp_path).load(f"long@{variant}"), Store(tmp_path / "artifacts"))
        knobs, a = made.artifact.knobs, made.survey.architecture
        assert knobs["engine"] == "turbomind" and a.max_positions == 1024
        said = settings("turbomind", "awq", knobs["kv_cache"], knobs["target"], a.max_positions, a.rope)
        assert said.engine["hf_overrides"]["rope_parameters"]["factor"] == int(variant[1:]) / 1024
        assert max(lengths) + long.decided.NEW <= said.engine["session_len"]
