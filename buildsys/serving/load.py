"""What a server does under load: tokens a second of whole answers, and the time to the first token, with so many requests at a time.

Throughput is of answers that come in one piece: reading 10,000 streamed pieces a second in Python would measure this client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

from buildsys.errors import BuildError
from buildsys.serving.client import Client

T = TypeVar("T")

BATCHES = (1, 8, 32)
WARM_TOKENS = 4  # engines allocate, and choose kernels, when they first see a batch
FIRST_TOKENS = 4  # of a streamed request; the first is timed


@dataclass(frozen=True)
class Rate:
    """One measurement: `batch` requests at a time, each with its own prompt."""

    batch: int
    prompt_tokens: int  # of a prompt, the mean
    new_tokens: int  # of a request
    seconds: float  # from the first request to the last answer
    tokens_per_s: float  # new tokens, of all requests together
    first_token_s: float  # from a request to its first token, the median


def measure(client: Client, prompts: Sequence[Sequence[int]], batch: int, new_tokens: int) -> Rate:
    """Greedy, and past the end of text, so that each request writes new_tokens. prompts: one request each, token ids; `batch` at least.

    Raises BuildError where the server fails, or a request ends before it has all its tokens.
    """
    if len(prompts) < batch:
        raise ValueError(f"{len(prompts)} prompts are fewer than a batch of {batch}")

    def warm(prompt: Sequence[int]) -> None:
        client.generate(prompt, WARM_TOKENS, True)

    def first(prompt: Sequence[int]) -> float:
        return _first_token_s(client, prompt)

    def whole(prompt: Sequence[int]) -> int:
        return len(client.generate(prompt, new_tokens, True))

    at_once(warm, prompts[:batch], batch)
    firsts = at_once(first, prompts, batch)
    began = time.monotonic()
    counts = at_once(whole, prompts, batch)
    took_s = time.monotonic() - began
    if set(counts) != {new_tokens}:
        what = f"a request for {new_tokens} tokens with end-of-text ignored ended after {min(counts)}"
        fix = "ask for fewer tokens, or serve with a longer session_len"
        raise BuildError(f"{client.url}/generate", what, fix)
    tokens = round(sum(map(len, prompts)) / len(prompts))
    return Rate(batch, tokens, new_tokens, took_s, sum(counts) / took_s, median(firsts))


def _first_token_s(client: Client, prompt: Sequence[int]) -> float:
    """The stream is read to its end, so that the server is done with it."""
    began = time.monotonic()
    first_s: float | None = None
    for tokens in client.pieces(prompt, FIRST_TOKENS, True):
        if tokens and first_s is None:
            first_s = time.monotonic() - began
    if first_s is None:
        raise BuildError(f"{client.url}/generate", "a streamed request ended without a token", "look at the server's log for the reason")
    return first_s


def at_once(do: Callable[[Sequence[int]], T], prompts: Sequence[Sequence[int]], batch: int) -> list[T]:
    """Each prompt's result, in their order, `batch` of them in flight. The first error ends it; nobody waits for the rest.

    Not an executor's threads: Python waits for those before it ends, and after Ctrl-C a server that hangs would hold the command.
    """
    answers: list[Future[T]] = [Future() for _ in prompts]
    left, lock = iter(list(zip(prompts, answers, strict=True))), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                one = next(left, None)
            if one is None:
                return
            try:
                one[1].set_result(do(one[0]))
            except BaseException as error:  # noqa: BLE001  it is raised where the answer is asked for
                one[1].set_exception(error)

    for _ in range(min(batch, len(prompts))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [answer.result() for answer in answers]
    finally:
        with lock:
            left = iter(())
