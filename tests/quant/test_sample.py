"""The sampler with its KV cache against one that recomputes everything for each token; seeds, threads, ends of text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from buildsys.quant.model import Model
from buildsys.quant.rotary import tables
from buildsys.quant.sample import MICRO_BATCH, greedy, sample
from buildsys.step import Resources
from tests import models

LENGTH = 24
SMALL = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 40, "head_dim": 8}


def quiet(what: str, done: int, of: int) -> None:
    assert 0 < done <= of


def small(folder: Path, family: str = "llama", **config: object) -> Model:
    return models.opened(models.FAMILIES[family](folder, **(SMALL | config)))


def recomputed(model: Model, seed: int, batch: int, temperature: float) -> Tensor:  # -> [MICRO_BATCH, LENGTH]
    """Every token from a whole forward of its row so far; the same generator, drawn from in the same order."""
    a, generator = model.architecture, torch.Generator().manual_seed(seed * 1_000_003 + batch)
    first = torch.randint(a.vocab_size, (MICRO_BATCH,), generator=generator)
    rows = [[int(first[row]) if a.bos_token_id is None else a.bos_token_id] for row in range(MICRO_BATCH)]
    blocks, head, rotary = [model.block(layer) for layer in range(a.layers)], model.head(), tables(a, LENGTH)
    while len(rows[0]) < LENGTH:
        logits = []
        for h in model.embed(torch.tensor(rows)):
            for block in blocks:
                h = block.forward(h, (rotary[0][: len(h)], rotary[1][: len(h)]))
            logits.append(head.logits(h)[-1])
        drawn = torch.multinomial((torch.stack(logits) / temperature).softmax(-1), 1, generator=generator)[:, 0]
        for row, token in zip(rows, drawn.tolist(), strict=True):
            row.append(a.bos_token_id if a.bos_token_id is not None and row[-1] in a.eos_token_ids else token)
    return torch.tensor(rows)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_cache_changes_no_token(family: str, tmp_path: Path) -> None:
    window = {"sliding_window": 5} if family == "mistral" else {}
    model = small(tmp_path, family, **window)
    found = sample(model, MICRO_BATCH + 3, LENGTH, 3, 0.9, Resources(), quiet)
    assert found.dtype == torch.int32 and found.shape == (MICRO_BATCH + 3, LENGTH)
    expected = torch.cat([recomputed(model, 3, batch, 0.9) for batch in range(2)])[: MICRO_BATCH + 3]
    assert torch.equal(found.long(), expected)


def test_a_rope_that_depends_on_the_length_is_that_of_the_whole_window(tmp_path: Path) -> None:
    model = small(tmp_path, rope_scaling={"type": "dynamic", "factor": 4.0}, max_position_embeddings=8)
    assert torch.equal(sample(model, 2, LENGTH, 0, 1.0, Resources(), quiet).long(), recomputed(model, 0, 0, 1.0)[:2])


def test_threads_and_batch_change_no_token(tmp_path: Path) -> None:
    model = small(tmp_path)
    runs = [sample(model, 40, LENGTH, 1, 1.0, Resources(*said), quiet) for said in ((1, 1), (3, 1), (3, 8))]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_fewer_samples_are_the_first_of_more(tmp_path: Path) -> None:
    model = small(tmp_path)
    assert torch.equal(sample(model, 5, LENGTH, 1, 1.0, Resources(), quiet), sample(model, 30, LENGTH, 1, 1.0, Resources(), quiet)[:5])


def test_seeds_and_rows_differ(tmp_path: Path) -> None:
    model = small(tmp_path)
    runs = torch.cat([sample(model, 20, LENGTH, seed, 1.0, Resources(), quiet) for seed in range(3)])
    assert len(runs.unique(dim=0)) == 60


def test_a_text_begins_after_an_end_of_text(tmp_path: Path) -> None:
    model = small(tmp_path, bos_token_id=3, eos_token_id=[4, 7, 9, 11, 13])
    found = sample(model, 30, LENGTH, 0, 2.0, Resources(), quiet)
    ended = torch.isin(found[:, :-1], torch.tensor([4, 7, 9, 11, 13]))
    assert ended.sum() > 20 and (found[:, 1:][ended] == 3).all() and (found[:, 0] == 3).all()


def test_a_model_without_begin_of_text_begins_anywhere(tmp_path: Path) -> None:
    model = small(tmp_path, bos_token_id=None)
    found = sample(model, 30, LENGTH, 0, 1.0, Resources(), quiet)
    assert len(found[:, 0].unique()) > 10 and torch.equal(found[:MICRO_BATCH].long(), recomputed(model, 0, 0, 1.0))


def test_a_low_temperature_is_the_likeliest_token(tmp_path: Path) -> None:
    model = small(tmp_path, eos_token_id=None)
    found = sample(model, 20, LENGTH, 5, 1e-3, Resources(), quiet)
    assert len(found.unique(dim=0)) == 1 and torch.equal(found[0].long(), recomputed(model, 9, 0, 1e-3)[0])


def test_what_is_sampled_is_the_models_distribution(tmp_path: Path) -> None:
    """The second token of many rows, against the model's own probabilities after begin-of-text."""
    model, rows = small(tmp_path, num_hidden_layers=1), 2000
    drawn = sample(model, rows, 2, 0, 1.0, Resources(2, 8), quiet)[:, 1].long()
    h = model.block(0).forward(model.embed(torch.tensor([[models.BOS]]))[0], tables(model.architecture, 1))
    expected = model.head().logits(h)[0].softmax(-1)
    seen = torch.bincount(drawn, minlength=40) / rows
    assert (seen - expected).abs().max() < 5 * float((expected * (1 - expected) / rows).sqrt().max())


def likeliest(model: Model, prompt: list[int], new: int) -> list[int]:
    """Each token from a whole forward of all before it."""
    a = model.architecture
    blocks, head, row = [model.block(layer) for layer in range(a.layers)], model.head(), list(prompt)
    while len(row) < len(prompt) + new:
        h = model.embed(torch.tensor([row]))[0]
        rotary = tables(a, len(row))
        for block in blocks:
            h = block.forward(h, rotary)
        row.append(int(head.logits(h)[-1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_greedy_answers_are_those_of_whole_forwards_whatever_stands_beside_them(family: str, tmp_path: Path) -> None:
    model = small(tmp_path, family)
    prompts = [[1, 2, 3], [7], [5, 9, 5, 9, 5, 9, 5]]
    seen: list[int] = []
    found = greedy(model, prompts, 6, frozenset(), Resources(), lambda done, of: seen.append(done))
    assert found == [likeliest(model, prompt, 6) for prompt in prompts]
    assert seen == list(range(1, 13)), "seven tokens of the longest prompt, and six after them: the last needs no forward"


def test_an_answer_ends_before_the_end_of_text(tmp_path: Path) -> None:
    model = small(tmp_path)
    whole = likeliest(model, [3, 4], 8)
    end = whole[2]
    assert greedy(model, [[3, 4]], 8, frozenset({end}), Resources(), lambda *_: None) == [whole[: whole.index(end)]]


def test_an_empty_prompt_is_begun_with_the_first_token(tmp_path: Path) -> None:
    model = small(tmp_path)
    first = model.architecture.bos_token_id
    assert greedy(model, [[]], 4, frozenset(), Resources(), lambda *_: None) == [likeliest(model, [0 if first is None else first], 4)]
