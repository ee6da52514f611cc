"""What verify.serve makes of what servers did: shares, ratios with the ends that are against us, and every failed answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from buildsys.checks import serve
from buildsys.measurement import Measurement
from buildsys.quant.bootstrap import wilson

Found = dict[str, Measurement]


def trial(name: str, speeds: dict[int, list[float]], **more: Any) -> dict[str, Any]:
    rates = [
        {"batch": batch, "prompt_tokens": 16, "new_tokens": 32, "tokens_per_s": runs, "first_token_s": [0.3, 0.1, 0.2]}
        for batch, runs in speeds.items()
    ]
    made = {"name": name, "engine": "turbomind", "failures": [], "load_s": 9.5, "loaded_bytes": 3 << 30, "vram_bytes": 6 << 30}
    return {**made, "pool_tokens": 4096, "rates": rates, "gaps": [[0.0, 0.0], [0.0, 0.0]], **more}


@pytest.fixture
def measured(made: Any, tmp_path: Path) -> Callable[..., Found]:
    def measure(*trials: dict[str, Any]) -> Found:
        (tmp_path / "served.json").write_text(json.dumps({"trials": trials}))
        inputs = {"served": made.Files({"served.json": tmp_path / "served.json"})}
        return {one.name: one for one in serve.measure(serve.Knobs(), inputs, made.Context())}

    return measure


def test_speedup_is_the_worst_batchs_and_its_ends_are_the_worst_runs(measured: Callable[..., Found]) -> None:
    ours = trial("artifact", {1: [200.0, 180.0, 220.0], 32: [900.0, 1000.0, 950.0]})
    theirs = trial("source", {1: [100.0, 90.0, 110.0], 32: [1000.0, 1000.0, 1000.0]})
    found = measured(ours, theirs)
    assert found["speedup_1"].value == pytest.approx(2.0)
    assert found["speedup_1"].low == pytest.approx(180 / 110) and found["speedup_1"].high == pytest.approx(220 / 90)
    assert found["speedup"].value == pytest.approx(0.95) and found["speedup"].low == pytest.approx(0.9)
    assert "batch 32" in found["speedup"].detail
    assert found["first_token_s_32"].value == 0.2


def test_near_ties_agree_and_the_interval_is_over_answers(measured: Callable[..., Found]) -> None:
    gaps = [[0.0, 0.019, 0.0, 0.021]] * 4 + [[0.0, 0.0, None, 0.0]] * 4
    found = measured(trial("artifact", {1: [1.0]}, gaps=gaps))["agreement"]
    assert found.value == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx(wilson(0.75, 32)), "eight answers of which none differs in its share"
    uneven = measured(trial("artifact", {1: [1.0]}, gaps=[[0.0, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]))["agreement"]
    assert uneven.value == pytest.approx(0.875) and uneven.low < uneven.value < uneven.high <= 1.0


def test_a_few_tokens_that_agree_are_no_certainty(measured: Callable[..., Found]) -> None:
    found = measured(trial("artifact", {1: [1.0]}, gaps=[[0.0] * 4] * 2))["agreement"]
    assert (found.value, found.high) == (1.0, 1.0) and found.low < 0.7, "no gate of 0.98 is passed by 8 tokens"
    assert measured(trial("artifact", {1: [1.0]}, gaps=[[0.0] * 128] * 16))["agreement"].low > 0.998


def test_a_failure_of_any_server_is_counted(measured: Callable[..., Found]) -> None:
    found = measured(trial("artifact", {1: [1.0]}), trial("plain", {1: [1.0]}, failures=["silent", "no call"]))
    limit, bound = serve.FIXED["failures"]
    assert found["failures"].value == 2 and not limit.holds(found["failures"], bound)
    assert found["failures"].detail == "plain: silent; plain: no call"


def test_without_the_source_there_is_no_speedup(measured: Callable[..., Found]) -> None:
    found = measured(trial("artifact", {1: [1.0]}, pool_tokens=None))
    assert "speedup" not in found and "pool_tokens" not in found
    assert found["vram_gib"].value == 6.0 and found["load_s"].value == 9.5


def test_a_gate_on_speed_needs_its_other_side() -> None:
    with pytest.raises(ValidationError, match="beside does not name source"):
        serve.Knobs(min_speedup=1.1, beside=("kv",))
