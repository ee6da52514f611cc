"""So many requests are in flight as asked for, every token is counted, and what a server fails to write is no rate."""

from __future__ import annotations

import time

import pytest
from apiserver import ApiServer

from buildsys.errors import BuildError
from buildsys.serving.client import Client
from buildsys.serving.load import measure


def prompts(count: int) -> list[list[int]]:
    return [[at, at + 1, at + 2] for at in range(count)]


@pytest.mark.parametrize(("batch", "count"), ((1, 2), (4, 4), (4, 10)))
def test_rate_is_of_all_tokens_of_all_requests(batch: int, count: int) -> None:
    with ApiServer("late:0.02", f"gathers:{batch}") as server:
        rate = measure(Client(server.url, 10), prompts(count), batch, 6)
        asked = [body for _, body in server.asked]
    assert (rate.batch, rate.prompt_tokens, rate.new_tokens) == (batch, 3, 6)
    assert rate.tokens_per_s == pytest.approx(count * 6 / rate.seconds)
    # The server's thread of an answered request may not be through when the next one comes: as many again at most.
    assert batch <= server.most <= 2 * batch and rate.first_token_s >= 0.02
    whole = [body["input_ids"] for body in asked if body["max_tokens"] == 6]
    assert sorted(whole) == prompts(count), "each prompt once"
    assert all(body["ignore_eos"] for body in asked) and sum(body["stream"] for body in asked) == count


def test_tokens_that_do_not_come_are_an_error() -> None:
    with ApiServer("short") as server, pytest.raises(BuildError, match="for 6 tokens with end-of-text ignored ended after 3"):
        measure(Client(server.url, 10), prompts(2), 2, 6)


def test_the_first_error_ends_it() -> None:
    with ApiServer("fails") as server:
        with pytest.raises(BuildError, match="finish_reason error"):
            measure(Client(server.url, 10), prompts(2), 1, 6)
        time.sleep(0.05)
        assert len(server.asked) <= 2


def test_fewer_prompts_than_the_batch_are_no_batch() -> None:
    with pytest.raises(ValueError, match="1 prompts are fewer than a batch of 2"):
        measure(Client("http://127.0.0.1:9", 1), prompts(1), 2, 6)
