"""Each token of an answer beside the model's own best one, against the logits of whole forwards of every text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from buildsys.quant.agree import gaps
from buildsys.step import Resources
from tests import models

PROMPTS = ((3, 1, 4, 1, 5), (9, 2), (6, 5, 3, 5, 8, 9, 7, 9, 3))
NEW = 6


def quiet(*_: object) -> None:
    pass


def test_gaps_are_those_of_whole_forwards(tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path / "model"))
    answers = [models.tokens(1, NEW, seed=at)[0].tolist() for at in range(len(PROMPTS))]
    found = gaps(model, PROMPTS, answers, Resources(), quiet)
    for prompt, answer, ours in zip(PROMPTS, answers, found, strict=True):
        logits = models.streamed(model, torch.tensor([[*prompt, *answer]]))[0]
        for at, token in enumerate(answer):
            seen = logits[len(prompt) + at - 1]
            assert float(ours[at]) == pytest.approx(float(seen.max() - seen[token]), abs=1e-4)


def test_greedy_answers_are_the_models_own(tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path / "model"))
    answers = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(NEW):
            text.append(int(models.streamed(model, torch.tensor([text]))[0, -1].argmax()))
        answers.append(text[len(prompt) :])
    assert all(bool((one == 0).all()) for one in gaps(model, PROMPTS, answers, Resources(), quiet))
    wrong = [[*answer[:-1], (answer[-1] + 1) % models.VOCAB] for answer in answers]
    assert all(bool((one[:-1] == 0).all()) and float(one[-1]) > 0 for one in gaps(model, PROMPTS, wrong, Resources(), quiet))


def test_threads_change_nothing(tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path / "model"))
    answers = [[1, 2, 3]] * len(PROMPTS)
    one, two = (gaps(model, PROMPTS, answers, Resources(threads=threads), quiet) for threads in (1, 2))
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


def test_a_token_of_no_vocabulary_is_infinitely_far(tmp_path: Path) -> None:
    model = models.opened(models.tiny_llama(tmp_path / "model"))
    found = gaps(model, [[1, 2]], [[3, models.VOCAB, 4]], Resources(), quiet)[0]
    assert found.isinf().tolist() == [False, True, False]
