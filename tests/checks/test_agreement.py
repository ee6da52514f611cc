"""Agreement: a share of tokens, gated from below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from buildsys.checks import agreement


def test_share_and_gate(tmp_path: Path, made: Any) -> None:
    scores = made.random(harm=0.05)
    (found,) = agreement.measure(agreement.Knobs(), {"scores": made.write(tmp_path, scores)}, made.Context())
    assert found.value == pytest.approx(float(scores["agree"].double().mean())) and 0 < found.low < found.value < found.high <= 1
    limit = agreement.LIMITS["min_share"]
    assert limit.holds(found, found.low) and not limit.holds(found, (found.low + found.value) / 2)


def test_an_end_is_no_share_above_one(tmp_path: Path, made: Any) -> None:
    scores = made.random(windows=2)
    scores["agree"][0, 0] = 0
    (found,) = agreement.measure(agreement.Knobs(), {"scores": made.write(tmp_path, scores)}, made.Context())
    assert found.high == 1.0 and 0 <= found.low < found.value


def test_few_tokens_that_all_agree_prove_little(tmp_path: Path, made: Any) -> None:
    scores = made.random(windows=1)
    scores["agree"][:] = 1
    (found,) = agreement.measure(agreement.Knobs(), {"scores": made.write(tmp_path, scores)}, made.Context())
    count = scores["agree"].numel()
    assert found.value == found.high == 1.0 and found.low == pytest.approx(count / (count + 1.959964**2))
