"""Memory: what the planner knows, as measurements with a gate that needs no knob."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from buildsys.architecture import Architecture, llama_family
from buildsys.checks import memory
from buildsys.measurement import Measurement
from buildsys.scheme import Scheme, Schemes

TARGET = {"gpu": "t4", "count": 1, "session_len": 4096, "max_batch_size": 8}
Measure = Callable[[Architecture, dict[str, Any] | None], dict[str, Measurement]]
KV = {"policy": "int8", "max_entry_count": 0.5}


def seventy_billion() -> Architecture:
    sizes = {"num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256}
    return llama_family(sizes | {"num_attention_heads": 64, "num_key_value_heads": 8}, "config.json")


@pytest.fixture
def measure(made: Any) -> Measure:
    def measure(architecture: Architecture, target: dict[str, Any] | None) -> dict[str, Measurement]:
        found = memory.measure(memory.Knobs(), {}, made.Context({"target": target, "kv_cache": KV}, architecture))
        return {each.name: each for each in found}

    return measure


def holds(found: dict[str, Measurement]) -> bool:
    return all(limit.holds(found[name], bound) for name, (limit, bound) in memory.FIXED.items())


def test_fits_or_says_what_to_change(made: Any, measure: Measure) -> None:
    small, large = measure(made.tiny(), TARGET), measure(seventy_billion(), TARGET)
    assert holds(small) and "8 sessions of 4096 tokens" in small["free_gib"].detail
    assert not holds(large) and "target.count" in large["free_gib"].detail
    assert holds(measure(seventy_billion(), TARGET | {"gpu": "h100"})), "39 GB of 4-bit weights"
    assert "each of 4 t4" in measure(seventy_billion(), TARGET | {"count": 4})["free_gib"].detail


def test_without_a_target_nothing_is_gated_but_the_knob(made: Any, measure: Measure) -> None:
    found = measure(made.tiny(), None)
    assert set(found) == {memory.LIMITS["max_gib"].measurement} and found["needed_gib"].unit == "GiB"
    shorter = measure(made.tiny(), {"gpu": None, "count": 1, "session_len": 64, "max_batch_size": 1})
    assert shorter["needed_gib"].value < found["needed_gib"].value


def test_skipped_layers_weigh_more(made: Any, measure: Measure) -> None:
    context = made.Context(
        {"target": TARGET, "kv_cache": KV}, made.tiny(), schemes=Schemes(Scheme(4, 32), frozenset({"model.layers.0.mlp.down_proj"}))
    )
    found = memory.measure(memory.Knobs(), {}, context)[0]
    assert found.value > measure(made.tiny(), TARGET)["needed_gib"].value


@pytest.mark.parametrize("check", ["agreement", "kl", "kv", "memory", "perplexity"])
def test_naming_a_check_loads_no_torch(check: str) -> None:
    code = f"import sys, buildsys.checks.{check}; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
