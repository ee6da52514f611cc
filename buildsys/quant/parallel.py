"""Threads over fixed units of work, so that a result never depends on how many threads there are.

A matrix product split over threads by a BLAS may sum in another order for another thread count. Here every unit runs on one thread
(worker.py sets torch so) and results are handed back in the order of the units; more threads only mean that more units run at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch

from buildsys.step import Resources

Unit = TypeVar("Unit")
Result = TypeVar("Result")


IN_FLIGHT_BYTES = 2 << 30


def within(resources: Resources, unit_bytes: int) -> Resources:
    """Fewer threads, and fewer finished units that wait, where a unit's result is large: results do not depend on it, memory does."""
    fit = max(1, IN_FLIGHT_BYTES // max(unit_bytes, 1))
    threads = min(resources.threads, fit)
    return replace(resources, threads=threads, batch=max(1, min(resources.batch, fit - threads)))


def ordered(work: Callable[[Unit], Result], units: Iterable[Unit], resources: Resources) -> Iterator[Result]:
    """`map(work, units)` on `resources.threads` threads, results in the order of the units, without gradients."""

    def quietly(unit: Unit) -> Result:
        with torch.inference_mode():  # thread-local, so it is entered in the worker thread
            return work(unit)

    if resources.threads == 1 or resources.device != "cpu":
        yield from map(quietly, units)
        return
    with ThreadPoolExecutor(resources.threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for unit in units:
                waiting.append(pool.submit(quietly, unit))
                if len(waiting) >= resources.threads + resources.batch:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def tensor_cores(device: str) -> Iterator[None]:
    """On a GPU, products of float32 round their factors to TF32 (10 bits of mantissa) and are several times as fast: for what is weighed,
    never for what is scored."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device != "cpu"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Behind:
    """One piece of work at a time beside the caller's own: what is finished is written while a GPU computes the next. On a CPU, which
    would only do two things by halves and hold both in memory, at once."""

    def __init__(self, device: str) -> None:
        self._pool = ThreadPoolExecutor(1) if device != "cpu" else None
        self._last: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def do(self, work: Callable[[], None]) -> None:
        """Starts `work` when what came before it is done; what that raised is raised here."""
        if self._pool is None:
            work()
            return
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self._last is not None and failed is None:
            self._last.result()
