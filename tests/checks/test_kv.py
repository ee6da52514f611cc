"""KV: KL with the policy on, and what the policy adds, window by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from buildsys.checks import kv


def test_the_increase_is_paired(tmp_path: Path, made: Any) -> None:
    plain = made.random(harm=0.05)
    with_policy = plain | {"kl": plain["kl"] + 0.001}
    inputs = {"scores": made.write(tmp_path / "a", plain), "kv_scores": made.write(tmp_path / "b", with_policy)}
    kl, increase = kv.measure(kv.Knobs(), inputs, made.Context({"kv_cache": {"policy": "int8"}}))
    assert kl.value == pytest.approx(float(with_policy["kl"].mean()), rel=1e-5) and kl.detail == "KV cache int8"
    assert increase.value == pytest.approx(0.001, rel=1e-3) and increase.high - increase.low < 1e-6 < kl.high - kl.low
    assert {limit.measurement for limit in kv.LIMITS.values()} == {kl.name, increase.name}


def test_without_a_policy_the_plain_scores_serve(tmp_path: Path, made: Any) -> None:
    inputs = {"scores": made.write(tmp_path, made.random(harm=0.05))}
    kl, increase = kv.measure(kv.Knobs(), inputs, made.Context({"kv_cache": {"policy": "none"}}))
    assert kl.value > 0 and (increase.low, increase.value, increase.high) == (0.0, 0.0, 0.0)


def test_a_policy_without_its_scores_is_no_pass(tmp_path: Path, made: Any) -> None:
    with pytest.raises(KeyError):
        kv.measure(kv.Knobs(), {"scores": made.write(tmp_path, made.random())}, made.Context({"kv_cache": {"policy": "int4"}}))
