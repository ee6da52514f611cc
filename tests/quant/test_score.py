"""Scores of two models against transformers' logits, with KL written out by hand in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from buildsys.quant.model import HEAD_CHUNK_TOKENS, Head
from buildsys.quant.score import SCORES, compare_window, score
from buildsys.step import Resources
from tests import models

WINDOWS, LENGTH = 3, 40


def quiet(what: str, done: int, of: int) -> None:
    assert 0 < done <= of


@torch.no_grad()
def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:  # -> float64 [windows, tokens, vocab]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([model(window[None].long()).logits[0] for window in tokens]).double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_scores_are_those_of_transformers_models(family: str, tmp_path: Path) -> None:
    build, tokens = models.FAMILIES[family], models.tokens(WINDOWS, LENGTH)
    ours, theirs = build(tmp_path / "a", seed=1), build(tmp_path / "b", seed=2)
    found = score(models.opened(ours), models.opened(theirs), tokens, Resources(), quiet)
    p, q = log_probabilities(ours, tokens), log_probabilities(theirs, tokens)
    assert tuple(found) == SCORES
    for window in range(WINDOWS):
        for at in range(LENGTH - 1):
            following = int(tokens[window, at + 1])
            one, other = p[window, at], q[window, at]
            expected = {
                "source_nll": -float(one[following]),
                "quantized_nll": -float(other[following]),
                "kl": sum(float(a.exp() * (a - b)) for a, b in zip(one, other, strict=True)),
                "agree": float(one.argmax() == other.argmax()),
            }
            assert {name: float(found[name][window, at]) for name in SCORES} == pytest.approx(expected, abs=1e-4)
    assert all(tensor.dtype == torch.float32 and tensor.shape == (WINDOWS, LENGTH - 1) for tensor in found.values())
    assert found["kl"].mean() > 0.1 and 0 <= found["agree"].mean() < 1, "the models do not differ: the test says nothing"


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    folder = models.tiny_internlm2(tmp_path)
    found = score(models.opened(folder), models.opened(folder), models.tokens(2, 16), Resources(), quiet)
    assert (found["agree"] == 1).all() and (found["kl"] == 0).all() and torch.equal(found["source_nll"], found["quantized_nll"])


def test_threads_and_batch_change_no_bit(tmp_path: Path) -> None:
    one, other = models.opened(models.tiny_llama(tmp_path / "a")), models.opened(models.tiny_llama(tmp_path / "b", seed=1))
    runs = [score(one, other, models.tokens(5, 20), Resources(*said), quiet) for said in ((1, 1), (3, 1), (3, 8))]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in SCORES)


def test_long_windows_are_scored_in_pieces_without_a_seam() -> None:
    made, length = torch.Generator().manual_seed(1), 2 * HEAD_CHUNK_TOKENS + 3
    heads = [Head(torch.rand(8, generator=made), torch.randn(50, 8, generator=made), 1e-6) for _ in range(2)]
    one, other = (torch.randn(length, 8, generator=made) for _ in range(2))
    tokens = torch.randint(50, (length,), generator=made)
    found = compare_window((heads[0], heads[1]), one, other, tokens)
    p = heads[0].logits(one).double().log_softmax(-1)[:-1]
    q = heads[1].logits(other).double().log_softmax(-1)[:-1]
    torch.testing.assert_close(found["kl"].double(), (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["source_nll"].double(), -p[torch.arange(length - 1), tokens[1:]], rtol=1e-4, atol=1e-5)
    assert all(len(values) == length - 1 for values in found.values())
