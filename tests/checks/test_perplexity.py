"""Perplexity: both models', and their ratio, whose interval is far narrower than theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from buildsys.checks import perplexity


def test_both_and_their_ratio(tmp_path: Path, made: Any) -> None:
    scores = made.random(harm=0.05)
    found = {each.name: each for each in perplexity.measure(perplexity.Knobs(), {"scores": made.write(tmp_path, scores)}, made.Context())}
    source, quantized, ratio = found["source_perplexity"], found["quantized_perplexity"], found["ratio"]
    assert source.value == pytest.approx(math.exp(float(scores["source_nll"].double().mean())))
    assert ratio.value == pytest.approx(quantized.value / source.value)
    assert ratio.high - ratio.low < (quantized.high - quantized.low) / source.value / 3, "paired"
    assert perplexity.LIMITS["max_ratio"].measurement in found


def test_a_model_against_itself(tmp_path: Path, made: Any) -> None:
    found = perplexity.measure(perplexity.Knobs(), {"scores": made.write(tmp_path, made.random())}, made.Context())[2]
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)
