"""A gate passes only where the end of the interval that is against it holds; what fails says where, how much, and which layer."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import runs

from buildsys.errors import BuildError
from buildsys.measurement import Limit, Measurement, Verdict
from buildsys.plan import Plan
from buildsys.slots import modules
from buildsys.store import Store
from buildsys.verdict import MEASUREMENTS, judge, layer_errors, load_measurements, worst_layer

NAN = float("nan")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny(tmp_path_factory.mktemp("base") / "workspace")


@pytest.fixture
def workspace(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here has to survive a power cut
    return runs.copy(base, tmp_path / "workspace")


def measured(plan: Plan, store: Store, found: dict[str, list[Measurement]], errors: dict[str, float] | None = None) -> None:
    """Puts a build into the store that has these measurements; a check that is not named found nothing wrong."""
    built: dict[str, Any] = {}
    checks = {step.planned_key: name for name, step in plan.measures}
    clean = {
        "codes": [Measurement.exact("mismatched_codes", 0, "codes"), Measurement.exact("mismatched_floats", 0, "values")],
        "lint": [Measurement.exact("findings", 0, "findings")],
        "kl": [Measurement("kl", 0.1, "nats", 0.09, 0.11)],
    }
    for step in plan.steps:
        key = store.key(step, built)
        stage = store.stage(key)
        (stage / "output").write_text(key)
        if step is plan.quantized or step == plan.quantized:
            notes = {name: {"error": error, "damping": 0.01} for name, error in (errors or {}).items()}
            (stage / "block-00000.errors.json").write_text(json.dumps(notes))
        if step.planned_key in checks:
            check = checks[step.planned_key]
            said = [asdict(one) for one in found.get(check, clean.get(check, []))]
            (stage / MEASUREMENTS).write_text(json.dumps(said))
        built[step.planned_key] = store.commit(key, stage, {})


def judged(workspace: Path, found: dict[str, list[Measurement]], errors: dict[str, float] | None = None) -> tuple[Verdict, ...]:
    plan, store = runs.planned(workspace, "tiny"), Store(workspace / "artifacts")
    measured(plan, store, found, errors)
    return judge(plan, store)


def gate(verdicts: tuple[Verdict, ...], check: str) -> Verdict:
    (one,) = [verdict for verdict in verdicts if verdict.check == check]
    return one


@pytest.mark.parametrize(
    ("value", "low", "high", "state"),
    [
        (0.10, 0.09, 0.11, "passed"),
        (0.10, 0.09, 0.20, "passed"),  # equal to the limit
        (0.10, 0.09, 0.21, "failed"),  # the upper end alone is beyond it
        (0.30, 0.25, 0.35, "failed"),
        (NAN, NAN, NAN, "failed"),
        (0.10, 0.09, NAN, "failed"),
    ],
)
def test_largest_value_holds_the_upper_end(workspace: Path, value: float, low: float, high: float, state: str) -> None:
    runs.edit(workspace / "recipes/tiny.yaml", "max_nats: 9.0", "max_nats: 0.2")
    # Measurements are JSON without NaN; a NaN that comes all the same (another writer, a bug) has to fail.
    assert gate(judged(workspace, {"kl": [Measurement("kl", value, "nats", low, high)]}), "kl").state == state


@pytest.mark.parametrize(("low", "state"), [(0.76, "passed"), (0.75, "failed"), (NAN, "failed")])
def test_smallest_value_holds_the_lower_end(workspace: Path, low: float, state: str) -> None:
    runs.edit(workspace / "recipes/tiny.yaml", "kl: {max_nats: 9.0}", "agreement: {min_share: 0.76}")
    verdict = gate(judged(workspace, {"agreement": [Measurement("share", 0.8, "of tokens", low, 0.85)]}), "agreement")
    assert verdict.state == state and "limit: at least 0.76" in verdict.text


def test_sides_of_a_limit() -> None:
    found = Measurement("x", 1.0, "u", 0.5, 1.5)
    assert Limit("x", "max").holds(found, 1.5) and not Limit("x", "max").holds(found, 1.4)
    assert Limit("x", "min").holds(found, 0.5) and not Limit("x", "min").holds(found, 0.6)
    assert not Limit("x", "max").holds(Measurement.exact("x", NAN, "u"), float("inf"))
    assert not Limit("x", "min").holds(Measurement.exact("x", NAN, "u"), -float("inf"))


def test_text_of_a_gate(workspace: Path) -> None:
    found = {"kl": [Measurement("kl", 9.5, "nats", 8.25, 10.123456, "KV cache none")]}
    errors = {"model.layers.0.mlp.up_proj": 0.02, "model.layers.1.self_attn.q_proj": 0.31, "model.layers.1.mlp.up_proj": 0.1}
    verdict = gate(judged(workspace, found, errors), "kl")
    line = (workspace / "recipes/tiny.yaml").read_text().splitlines().index("  kl: {max_nats: 9.0}") + 1
    assert verdict.where == f"recipes/tiny.yaml:{line}"
    assert verdict.text.startswith("kl 9.5 nats (95% interval 8.25 to 10.12), limit: at most 9; KV cache none")
    assert verdict.text.endswith("worst layer: model.layers.1.self_attn.q_proj, relative output error 0.31")


def test_passed_says_the_measured_value_and_the_limit(workspace: Path) -> None:
    verdicts = judged(workspace, {}, {"model.layers.0.mlp.up_proj": 0.02})
    assert gate(verdicts, "kl").text == "kl 0.1 nats (95% interval 0.09 to 0.11), limit: at most 9"
    assert {verdict.state for verdict in verdicts} == {"passed"}
    assert "interval" not in gate(verdicts, "lint").text, "what is exact has none"


@pytest.mark.parametrize(("check", "name"), [("lint", "findings"), ("codes", "mismatched_codes"), ("codes", "mismatched_floats")])
def test_fixed_demands_hold_without_being_named(workspace: Path, check: str, name: str) -> None:
    assert check not in (workspace / "recipes/tiny.yaml").read_text()
    fixed: ModuleType = modules("checks")[check]
    found = [
        Measurement.exact(limit.measurement, float(limit.measurement == name), "of them", "in q_proj") for limit, _ in fixed.FIXED.values()
    ]
    failed = [verdict for verdict in judged(workspace, {check: found}) if verdict.state == "failed"]
    assert len(failed) == 1 and failed[0].check == check
    assert f"{name} 1 of them, limit: at most 0; in q_proj" in failed[0].text and failed[0].where.startswith("recipes/tiny.yaml:")


def test_what_a_gate_asks_for_has_to_be_measured(workspace: Path) -> None:
    verdict = gate(judged(workspace, {"kl": []}), "kl")
    assert verdict.state == "failed" and "measured no kl, which max_nats limits" in verdict.text


def test_check_without_a_limit_is_no_gate(workspace: Path) -> None:
    runs.edit(workspace / "recipes/tiny.yaml", "kl: {max_nats: 9.0}", "kl: {}")
    assert "kl" not in {verdict.check for verdict in judged(workspace, {"kl": [Measurement("kl", 99.0, "nats", 98.0, 100.0)]})}


def test_unmeasured_is_refused(workspace: Path) -> None:
    plan, store = runs.planned(workspace, "tiny"), Store(workspace / "artifacts")
    with pytest.raises(BuildError, match="has not been measured") as caught:
        judge(plan, store)
    assert "tiny, check" in caught.value.where and caught.value.fix == "run `doit build recipe=tiny`"
    measured(plan, store, {})
    step = dict(plan.measures)["lint"]
    found = store.walk(plan.steps)[step.planned_key]
    assert found.key is not None and store.forget(found.key)
    with pytest.raises(BuildError, match="check lint"):
        judge(plan, store)


def test_worst_layer_reads_every_block(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    stage = store.stage("a" * 64)
    for layer, error in enumerate((0.1, 0.4, 0.2)):
        notes = {f"layers.{layer}.q": {"error": error}, f"layers.{layer}.k": {"error": 0.01}, f"layers.{layer}.v": {"stood_in": "rtn"}}
        (stage / f"block-0000{layer}.errors.json").write_text(json.dumps(notes))
    artifact = store.commit("a" * 64, stage, {})
    assert worst_layer(layer_errors(artifact, store)) == "layers.1.q, relative output error 0.4"
    assert worst_layer(layer_errors(None, store)) == ""


def test_measurements_survive_their_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    stage = store.stage("b" * 64)
    found = [Measurement("kl", 0.1, "nats", 0.05, 0.2, "why"), Measurement.exact("findings", 0, "findings")]
    (stage / MEASUREMENTS).write_text(json.dumps([asdict(one) for one in found]))
    assert load_measurements(store.commit("b" * 64, stage, {}), store) == found


@pytest.mark.parametrize("check", ["lint", "codes"])
def test_what_a_check_demands_has_to_be_measured(workspace: Path, check: str) -> None:
    failed = [verdict for verdict in judged(workspace, {check: []}) if verdict.state == "failed"]
    assert {verdict.check for verdict in failed} == {check} and "measured no" in failed[0].text
