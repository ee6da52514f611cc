"""KL: the mean over tokens, an interval around it, a gate on its upper end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from buildsys.checks import kl


def test_mean_over_tokens(tmp_path: Path, made: Any) -> None:
    scores = made.random(harm=0.05)
    (found,) = kl.measure(kl.Knobs(), {"scores": made.write(tmp_path, scores)}, made.Context())
    assert (found.name, found.unit, found.detail) == ("kl", "nats", "")
    assert found.value == pytest.approx(float(scores["kl"].mean()), rel=1e-5) and 0 <= found.low < found.value < found.high


def test_the_gate_compares_the_upper_end(tmp_path: Path, made: Any) -> None:
    (found,) = kl.measure(kl.Knobs(), {"scores": made.write(tmp_path, made.random(harm=0.05))}, made.Context())
    limit = kl.LIMITS["max_nats"]
    assert limit.measurement == found.name and limit.holds(found, found.high) and not limit.holds(found, (found.value + found.high) / 2)


@pytest.mark.parametrize("bad", [{"max_nats": -0.1}, {"max_nats": "nan"}, {"max_ppl": 1}])
def test_knobs_refuse(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        kl.Knobs.model_validate(bad)
