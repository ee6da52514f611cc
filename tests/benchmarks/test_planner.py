"""How the planner's benchmark reads an engine's log and judges what was planned; the engine itself needs a GPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from buildsys import footprint, gpus
from buildsys.footprint import MIB

LOG = """\
[TM][INFO] 11-21 06:00:00.000 Object cache budget: 27300.25 MB from free 136501.25 MB and ratio 0.200
[TM][WARN] slab_size 33554432, object_size 2097152, object_count 16, ratio 1
[TM][WARN] dp0 cache stats:
[cache] region=26.66GiB live=0.00B (0.00%) live_alloc=0 | pages 0/852 used (0.00%) page_size=32.00MiB
"""


@pytest.fixture(scope="module")
def planner() -> Iterator[ModuleType]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    try:
        yield importlib.import_module("planner")
    finally:
        sys.path.pop(0)


def test_a_log_tells_the_pool_and_how_it_is_cut(planner: ModuleType) -> None:
    told = planner.Told.read(LOG)
    assert told == planner.Told(int(27300.25 * MIB), int(136501.25 * MIB), 33554432, 2097152, 16, 852)
    assert told.tokens == 852 * 16 * 64
    wide = replace(told, slab=4 * 33554432, slab_blocks=60)
    assert wide.tokens == 213 * 60 * 64
    assert planner.Told.read("Traceback") is None
    without = planner.Told.read("\n".join(LOG.splitlines()[:2]))
    assert without is not None and without.pages == 853


@pytest.mark.parametrize(
    ("planned", "measured", "share", "least", "holds"),
    [
        (100.9, 100.0, 0.01, 0.0, True),
        (101.1, 100.0, 0.01, 0.0, False),
        (98.9, 100.0, 0.01, 0.0, False),
        (100.0 + 299, 100.0, 0.05, 300.0, True),
        (100.0 - 301, 100.0, 0.05, 300.0, False),
        (5.0, 100.0, None, 0.0, True),
    ],
)
def test_limits(planner: ModuleType, planned: float, measured: float, share: float | None, least: float, holds: bool) -> None:
    row = planner.Row("tokens in the pool", planned, measured, share, least)
    assert row.holds == holds and ("MISSED" in str(row)) == (not holds)


def test_an_engine_that_did_as_planned_misses_no_limit(planner: ModuleType) -> None:
    """Measurements made of the plan itself; then each is moved, and its row misses."""
    case = next(case for case in planner.CASES if case.name == "demo")
    architecture, schemes = planner.model(Path(), case)
    assert schemes is None
    gpu = gpus.GPUS["h200"]
    asked = footprint.Asked(gpu, 1, case.policy, case.share, case.session_len, case.max_batch_size)
    planned = footprint.filled(architecture, schemes, footprint.held(architecture, schemes), asked)
    block = 64 * planned.kv_bytes_per_token
    cut = footprint.pool(planned.pool_bytes, block)
    free = planned.memory_bytes - planned.context_bytes - planned.weights_bytes
    pages = planned.pool_bytes // footprint.PAGE_BYTES
    told = planner.Told(planned.pool_bytes, free, cut.slab_bytes, block, cut.slab_blocks, pages)
    used = planned.context_bytes + planned.weights_bytes + planned.workspace_bytes + planned.pool_bytes
    seen = planner.Seen("NVIDIA H200", planned.memory_bytes, 0, 0, planned.weights_bytes, planned.weights_bytes, used, used)
    assert all(row.holds for row in planner.rows(Path(), case, seen, told))
    assert missed(planner, case, replace(seen, loaded=used + 400 * MIB), told) == ["memory less the pool, under load, bytes"]
    assert missed(planner, case, seen, replace(told, pages=told.pages * 9 // 10)) == ["tokens in the pool"]
    assert missed(planner, case, seen, replace(told, block=block + 64))[:1] == ["KV of a token (block / 64)"]


def missed(planner: ModuleType, *seen: Any) -> list[str]:
    return [row.what for row in planner.rows(Path(), *seen) if not row.holds]


def test_settings_are_of_the_case(planner: ModuleType) -> None:
    case = next(case for case in planner.CASES if case.name == "awq-int4")
    assert case.settings["quant_policy"] == 4 and case.settings["model_format"] == "awq" and case.settings["session_len"] == 8192
