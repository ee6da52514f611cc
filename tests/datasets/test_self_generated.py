"""Text that a model writes itself, through the slot's own entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from buildsys.datasets import self_generated
from buildsys.io import corpus
from buildsys.quant.model import Model
from buildsys.step import Resources
from tests import models


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return models.opened(models.tiny_llama(tmp_path, num_hidden_layers=1))


def generate(model: Model, samples: int, seqlen: int, seed: int, temperature: float = 1.0) -> torch.Tensor:
    seen: list[tuple[int, int]] = []
    knobs = self_generated.Knobs(temperature=temperature)
    found = self_generated.generate(knobs, model, samples, seqlen, seed, Resources(), lambda _, done, of: seen.append((done, of)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1)), "progress goes from one to all"
    return found


def test_tokens_are_the_models(model: Model) -> None:
    found = generate(model, 5, 20, 0)
    assert found.shape == (5, 20) and found.dtype == torch.int32
    assert found.min() >= 0 and corpus.within(found, model.architecture.vocab_size, "calibration") is found


def test_two_seeds_share_no_text(model: Model) -> None:
    """What a recipe relies on that calibrates and verifies on generated text."""
    assert corpus.shared_windows(generate(model, 6, 96, 1), generate(model, 6, 96, 0)) == []
    assert corpus.shared_windows(generate(model, 6, 96, 0), generate(model, 6, 96, 0)) == list(range(6))


def test_temperature_is_heard(model: Model) -> None:
    cold, warm = (generate(model, 8, 60, 0, temperature) for temperature in (0.2, 3.0))
    assert len(cold.unique()) < len(warm.unique())


def test_nothing_floats() -> None:
    assert self_generated.floats(self_generated.Knobs()) == "" and self_generated.PLACES == ()


@pytest.mark.parametrize("temperature", [0, -1, 11, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense_are_refused(temperature: float) -> None:
    with pytest.raises(ValidationError):
        self_generated.Knobs(temperature=temperature)
