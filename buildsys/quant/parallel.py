"""Threads over fixed units of work, so that a result never depends on how many threads there are.

A matrix product split over threads by a BLAS may sum in another order for another thread count. Here every unit runs on one thread
(worker.py sets torch so) and results are handed back in the order of the units; more threads only mean that more units run at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import Tensor

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
    else:
        yield from _pooled(quietly, units, resources.threads, resources.threads + resources.batch)


def on_each(work: Callable[[str, range], Result], count: int, devices: Sequence[str]) -> list[Result]:
    """`work(device, its share of range(count))` on all devices at the same time; results in the order of the devices, whose shares follow
    one another and differ by one at most."""
    dealt = shares(count, len(devices))
    if len(devices) == 1:
        return [work(devices[0], dealt[0])]

    begun = [_begun(partial(work, device, share), device) for device, share in zip(devices, dealt, strict=True)]
    wait(begun)  # nobody goes on behind the back of whoever is told of an error
    return [one.result() for one in begun]


def aside(work: Callable[[], Result], device: str) -> Callable[[], Result]:
    """Begins `work` on one device of several, before what is next asked of it; the answer waits for its result."""
    return _begun(work, device).result


COMPILING = 4  # works at a time: each thread's handles keep some memory of a GPU


def beforehand(works: Sequence[Callable[[str], None]], devices: Sequence[str]) -> Callable[[], None]:
    """Begins every `work(device)` on GPUs for what it leaves loaded there, on a CPU nothing; the answer waits until all ended, however.

    Several run at a time, since a compiler lets others run, and then once more in the device's thread, where libraries keep its handles."""

    def all_on(device: str) -> None:
        with ThreadPoolExecutor(COMPILING) as pool:
            wait([pool.submit(_there, work, device) for work in works])
        for work in works:
            work(device)

    begun = [_begun(partial(all_on, device), device) for device in devices if device != "cpu" and works]

    def waited() -> None:
        wait(begun)

    return waited


def _there(work: Callable[[str], Result], device: str) -> Result:
    with torch.cuda.device(device), torch.no_grad():  # both are a thread's own
        return work(device)


def _begun(work: Callable[[], Result], device: str) -> Future[Result]:
    return _thread(device).submit(_there, lambda _: work(), device)


@cache
def _thread(device: str) -> ThreadPoolExecutor:
    """A device's own thread, for as long as the process lives: libraries keep their handles and plans by thread, and make them anew for
    each new one (tens of milliseconds for attention's)."""
    return ThreadPoolExecutor(1, f"for {device}")


def spread(windows: list[Tensor], devices: Sequence[str]) -> list[Tensor]:
    """Each window on the device whose share of them it is in; on the host all stay where they are."""
    if len(devices) == 1 or windows[0].device.type == "cpu":
        return windows
    dealt = zip(devices, shares(len(windows), len(devices)), strict=True)
    return [windows[at].to(device) for device, share in dealt for at in share]


def shares(count: int, among: int) -> list[range]:
    """range(count) in `among` runs, which differ by one at most."""
    ends = [count * at // among for at in range(among + 1)]
    return [range(*ends[at : at + 2]) for at in range(among)]


FILES_AT_ONCE = 4


def through_files(work: Callable[[Unit], Result], units: Iterable[Unit], resources: Resources) -> Iterator[Result]:
    """`map(work, units)` for work that reads, computes a little and writes: several units at a time where a GPU computes, since then
    copies take the time; on a CPU, where each would only be held in memory longer, one."""
    if resources.device == "cpu":
        yield from map(work, units)
        return
    streams = _Streams(resources.device, FILES_AT_ONCE)

    def apart(unit: Unit) -> Result:
        with streams.own():
            return work(unit)

    yield from _pooled(apart, units, FILES_AT_ONCE, FILES_AT_ONCE)


class _Streams:
    """Streams of a GPU for work beside that of its default one, whose copies would wait there for everything that was launched before.
    Without a GPU, as threads are tested, there are none."""

    def __init__(self, device: str, count: int) -> None:
        self._device = device if device.startswith("cuda") and torch.cuda.is_available() else "cpu"
        self._free: SimpleQueue[torch.cuda.Stream] = SimpleQueue()
        for _ in range(count if self._device != "cpu" else 0):
            self._free.put(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    def launched(self) -> torch.cuda.Event | None:
        """When what this thread has launched until now is done."""
        return torch.cuda.current_stream(self._device).record_event() if self._device != "cpu" else None

    @contextmanager
    def own(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Work of this thread on a stream that nobody else has, after `after`; done at the end."""
        if self._device == "cpu":
            yield
            return
        stream = self._free.get()
        try:
            with torch.cuda.stream(stream):
                if after is not None:
                    stream.wait_event(after)
                yield
                stream.synchronize()
        finally:
            self._free.put(stream)


AHEAD = 4


def ahead(work: Callable[[Unit], Result], units: Iterable[Unit], device: str, at_once: int = AHEAD) -> Iterator[Result]:
    """`map(work, units)`; where a GPU computes, `at_once` units are begun before they are asked for."""
    if device == "cpu":
        yield from map(work, units)
    else:
        yield from _pooled(work, units, at_once, at_once + 1)


def parts_ahead(work: Callable[[Unit], Result], groups: Iterable[Sequence[Unit]], groups_ahead: int) -> Iterator[list[Result]]:
    """`map(work, group)` of each group, of which `groups_ahead` are begun before they are asked for: AHEAD threads share the first one's
    parts before those of the next, so that it is there as soon as may be."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[list[Future[Result]]] = deque()
        try:
            for group in groups:
                waiting.append([pool.submit(work, part) for part in group])
                if len(waiting) > groups_ahead:
                    yield [part.result() for part in waiting.popleft()]
            while waiting:
                yield [part.result() for part in waiting.popleft()]
        finally:
            for begun in waiting:
                for part in begun:
                    part.cancel()


def _pooled(work: Callable[[Unit], Result], units: Iterable[Unit], threads: int, at_most: int) -> Iterator[Result]:
    """Results in the order of the units, of which `at_most` are begun and not yet handed back."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for unit in units:
                waiting.append(pool.submit(work, unit))
                if len(waiting) >= at_most:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def tensor_cores(device: str) -> Iterator[None]:
    """Products of float32 round their factors, to TF32 (10 bits of mantissa) on a GPU and to bfloat16 (7 bits) on a CPU that has matrix
    units, and are several times as fast; sums stay float32. For what is weighed, never for what is scored. Process-wide while it lasts."""
    if device != "cpu":
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    elif has_matrix_units():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")  # a CPU's word for bfloat16
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield


def has_matrix_units() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 as such (AMX); others would only spell it out."""
    return bool(torch.cpu._is_amx_tile_supported())


SETTLING, UNSETTLED = 8, 16


class Behind:
    """What is finished goes to the disk while a GPU computes the next, in no order: `writers` pieces at a time are copied to the host, each
    of which holds its block on the GPU until then. What is left to do of each, for which no GPU is needed, SETTLING more threads do, since
    a disk takes in several files faster than one after the other. On a CPU, which would only do two things by halves and hold both in
    memory, all is done at once.
    """

    def __init__(self, device: str, writers: int) -> None:
        self._on_gpu, self._writers = device != "cpu", writers
        self._copies, self._rest = ThreadPoolExecutor(writers), ThreadPoolExecutor(SETTLING)  # no thread before there is work for it
        self._streams = _Streams(device, writers)
        self._copying: deque[Future[Future[None]]] = deque()
        self._settling: deque[Future[None]] = deque()

    def __enter__(self) -> Behind:
        return self

    def do(self, work: Callable[[], Callable[[], None]]) -> None:
        """Begins `work`, which copies and hands back what is left, when fewer than `writers` pieces are being copied; what an earlier one
        raised is raised here, or at the end."""
        if not self._on_gpu:
            work()()
            return
        while len(self._copying) >= self._writers or (self._copying and self._copying[0].done()):
            self._settling.append(self._copying.popleft().result())
        while len(self._settling) >= UNSETTLED or (self._settling and self._settling[0].done()):
            self._settling.popleft().result()
        made = self._streams.launched()

        def apart() -> Future[None]:
            with self._streams.own(made):
                rest = work()
            return self._rest.submit(rest)

        self._copying.append(self._copies.submit(apart))

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        for pool in (self._copies, self._rest):
            pool.shutdown(cancel_futures=failed is not None)
        while self._copying and failed is None:
            self._settling.append(self._copying.popleft().result())
        while self._settling and failed is None:
            self._settling.popleft().result()
