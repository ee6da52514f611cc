"""The weight that is rounded instead of another, against least squares over all tokens in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.quant import aim
from buildsys.quant.aim import aimed
from buildsys.quant.stream import Apart

WIDTH, OUT = 24, 10


def tokens(count: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """What a quantized model reads [tokens, in] and how far from it the float model's reading is, part of which the former tells."""
    made = torch.Generator().manual_seed(seed)
    taught = torch.Generator().manual_seed(99)
    x = torch.randn(count, WIDTH, generator=made) @ torch.randn(WIDTH, WIDTH, generator=taught)
    told = x @ (torch.randn(WIDTH, WIDTH, generator=taught) * 0.05)
    return x, told + noise * torch.randn(count, WIDTH, generator=made)


def apart(x: Tensor, y: Tensor, of_outputs: bool) -> tuple[Tensor, Apart]:
    halves = [slice(0, None, 2), slice(1, None, 2)]
    crossed = torch.stack([y[half].t() @ x[half] / len(x[half]) for half in halves])
    return x.t() @ x / len(x), Apart(crossed, (len(x[::2]), len(x[1::2])), of_outputs)


def weights() -> Tensor:
    return torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("of_outputs", [False, True])
@pytest.mark.parametrize("rows", [3, 4096])
@pytest.mark.parametrize("count", [400, 401])
def test_it_is_the_answer_of_least_squares(count: int, rows: int, of_outputs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aim, "ROWS", rows)
    weight, (x, y) = weights(), tokens(count, 1, 0.5)
    y = y @ weight.t() if of_outputs else y
    gram, seen = apart(x, y, of_outputs)
    kept = weight.clone(), gram.clone(), seen.crossed.clone()
    found, ridge = aimed(weight, gram, seen, (0.02,))
    assert ridge == 0.02 and torch.equal(weight, kept[0]) and torch.equal(gram, kept[1]) and torch.equal(seen.crossed, kept[2])
    # The ridge as rows of data: sqrt(n * 0.02 * mean) in each channel, for which nothing more is wanted.
    more = torch.eye(WIDTH, dtype=torch.float64) * (count * 0.02 * gram.diagonal().mean().double()).sqrt()
    wanted = y.double() if of_outputs else y.double() @ weight.double().t()
    answer = torch.linalg.lstsq(torch.cat([x.double(), more]), torch.cat([wanted, torch.zeros(WIDTH, OUT, dtype=torch.float64)])).solution
    torch.testing.assert_close((found - weight).double(), answer.t(), rtol=1e-3, atol=1e-5)


def test_outputs_come_nearer_on_tokens_never_seen() -> None:
    weight, (x, y) = weights(), tokens(2000, 1, 0.5)
    found, ridge = aimed(weight, *apart(x, y, False), (0.01, 0.1, 1.0))
    x, y = tokens(2000, 2, 0.5)
    wanted = (x + y) @ weight.t()
    assert ridge and (x @ found.t() - wanted).square().sum() < 0.8 * (x @ weight.t() - wanted).square().sum()


@pytest.mark.parametrize("count", [40, 80, 160, 4000])
def test_of_few_tokens_little_is_believed(count: int) -> None:
    """A fit to a handful of tokens is worse on others than none. What was tried first is as good as none, or better."""
    weight, (x, y), off = weights(), tokens(4000, 2, 6.0), {"fitted": 0.0, "tried": 0.0}
    wanted = (x + y) @ weight.t()
    for seed in range(3, 13):
        gram, seen = apart(*tokens(count, seed, 6.0), False)
        fitted = weight + weight @ seen.crossed.mean(0) @ torch.linalg.inv(gram)
        for name, found in (("fitted", fitted), ("tried", aimed(weight, gram, seen, (0.01, 0.1, 1.0))[0])):
            off[name] += float((x @ found.t() - wanted).square().sum() / (x @ weight.t() - wanted).square().sum()) / 10
    assert off["tried"] < 1.005 and off["tried"] < off["fitted"] + 0.005
    assert off["fitted"] > 1.1 if count < 160 else count < 4000 or off["tried"] < 0.99


def test_the_ridge_is_the_one_that_does_best_on_the_other_half() -> None:
    weight, seen = weights(), apart(*tokens(200, 1, 3.0), False)
    gram, told = seen

    def gain(ridge: float) -> float:  # written out: a half's answer, by the other half's tokens
        h = gram.double() + torch.eye(WIDTH) * ridge * gram.diagonal().mean().double()
        pulls = [weight.double() @ half.double() for half in told.crossed]
        answers = [torch.linalg.solve(h, pull.t()).t() for pull in pulls]
        return sum(
            float((2 * answer * pull).sum() - (answer @ gram.double() * answer).sum())
            for answer, pull in zip(answers, reversed(pulls), strict=True)
        )

    ridges = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    assert len({round(gain(ridge), 6) for ridge in ridges}) == len(ridges)
    assert aimed(weight, gram, told, ridges)[1] == max(ridges, key=gain)


def test_where_there_is_nothing_to_try_it_on_the_weight_stays() -> None:
    weight, (gram, seen) = weights(), apart(*tokens(200, 1, 0.5), False)
    nothing = replace(seen, crossed=torch.zeros_like(seen.crossed))
    for told, ridge in ((replace(seen, tokens=(200, 0)), 0.0), (replace(seen, tokens=(0, 200)), 0.0), (nothing, None)):
        found = aimed(weight, gram, told, (0.01,))
        assert found[1] == ridge and torch.equal(found[0], weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["gram", "crossed"])
def test_what_is_not_finite_is_refused(where: str, value: float) -> None:
    weight, (gram, seen) = weights(), apart(*tokens(200, 1, 0.5), True)
    (gram if where == "gram" else seen.crossed[1])[7, 7] = value
    with pytest.raises(BuildError, match="NaN or infinite"):
        aimed(weight, gram, seen, (0.01,))


def test_channels_never_seen_and_a_singular_gram_matrix() -> None:
    weight, (x, y) = weights(), tokens(300, 1, 0.1)
    x[:, 3], x[:, 5] = 0, x[:, 6]
    gram, seen = apart(x, y, False)
    gram[5, 6] = gram[6, 5] = 1.001 * gram[5, 5]  # as sums of rounded products may be
    found, ridge = aimed(weight, gram, seen, (1e-12,))
    assert ridge and ridge > 1e-6, "what was added in the end"
    assert torch.isfinite(found).all() and torch.equal(found[:, 3], weight[:, 3]) and not torch.equal(found, weight)
