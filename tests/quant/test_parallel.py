"""Units of work on threads: results in order, errors where they belong, no more in flight than asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from buildsys.quant.parallel import AHEAD, Behind, ahead, beforehand, has_matrix_units, ordered, parts_ahead, tensor_cores
from buildsys.step import Resources

RESOURCES = [Resources(threads, batch) for threads in (1, 2, 5) for batch in (1, 8)]
each = pytest.mark.parametrize("resources", RESOURCES, ids=lambda said: f"{said.threads} threads, batch {said.batch}")


@each
def test_results_come_in_the_order_of_the_units(resources: Resources) -> None:
    def work(unit: int) -> int:
        time.sleep(0.002 * (unit % 3 == 0))
        return unit * unit

    assert list(ordered(work, range(30), resources)) == [unit * unit for unit in range(30)]
    assert list(ordered(work, [], resources)) == []


@each
def test_an_error_reaches_the_caller_after_the_results_before_it(resources: Resources) -> None:
    done: list[int] = []

    def work(unit: int) -> int:
        if unit == 4:
            raise ValueError("unit 4")
        return unit

    with pytest.raises(ValueError, match="unit 4"):
        for result in ordered(work, range(1000), resources):
            done.append(result)
    assert done == [0, 1, 2, 3]


@each
def test_no_more_units_are_taken_than_may_wait(resources: Resources) -> None:
    taken = 0

    def units():
        nonlocal taken
        for unit in range(50):
            taken += 1
            yield unit

    results = ordered(lambda unit: unit, units(), resources)
    for done in range(50):
        next(results)
        assert taken <= done + 1 + resources.threads + resources.batch


@each
def test_leaving_early_leaves_no_thread(resources: Resources) -> None:
    before = threading.active_count()
    results = ordered(lambda unit: unit, range(1000), resources)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before


def test_units_run_at_the_same_time() -> None:
    meet = threading.Barrier(3, timeout=5)
    assert list(ordered(lambda _: meet.wait() >= 0, range(3), Resources(3, 1))) == [True] * 3


@each
def test_no_gradients_are_kept(resources: Resources) -> None:
    weight = torch.ones(2, requires_grad=True)
    assert [result.requires_grad for result in ordered(lambda unit: weight * unit, range(3), resources)] == [False] * 3
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_behind_does_everything_and_waits_at_the_end(device: str) -> None:
    done: list[int] = []
    with Behind(device, 2) as behind:
        for number in range(20):
            behind.do(lambda number=number: partial(done.append, number))
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_fails_behind_is_raised_in_front(device: str) -> None:
    def fail() -> None:
        raise OSError("the disk is full")

    for work in (fail, lambda: fail):  # while it is copied, and when it settles
        with pytest.raises(OSError, match="full"), Behind(device, 2) as behind:
            behind.do(work)
        with pytest.raises(OSError, match="full"), Behind(device, 2) as behind:
            behind.do(work)
            behind.do(lambda: lambda: None)
        with pytest.raises(ValueError, match="first"), Behind("cuda", 2) as behind:
            behind.do(work)
            raise ValueError("first")


@pytest.mark.parametrize(("device", "begun"), [("cpu", 1), ("cuda", AHEAD + 1)])
def test_a_gpu_s_next_units_are_begun_before_they_are_asked_for(device: str, begun: int) -> None:
    began: list[int] = []
    results = ahead(lambda unit: (began.append(unit), unit)[1], range(20), device)
    assert next(results) == 0
    for _ in range(500):
        if len(began) == begun:
            break
        time.sleep(0.01)
    assert sorted(began) == list(range(begun))
    assert list(results) == list(range(1, 20))


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_behind_has_as_many_things_at_work_as_it_was_told_and_no_more(writers: int) -> None:
    go, begun, done = threading.Event(), threading.Semaphore(0), list[int]()

    def work(number: int) -> Callable[[], None]:
        begun.release()
        go.wait(5)
        return partial(done.append, number)

    with Behind("cuda", writers) as behind:
        for number in range(writers):
            behind.do(partial(work, number))
        assert all(begun.acquire(timeout=5) for _ in range(writers)) and done == [], "all are at work, and the caller goes on"
        threading.Timer(0.05, go.set).start()
        behind.do(lambda: partial(done.append, writers))
        assert go.is_set(), "the next one waited for the first"
    assert sorted(done) == list(range(writers + 1))


def test_what_settles_keeps_nobody_from_copying() -> None:
    go, copied = threading.Event(), threading.Semaphore(0)

    def settle() -> None:
        go.wait(5)

    def work() -> Callable[[], None]:
        copied.release()
        return settle

    with Behind("cuda", 1) as behind:
        for _ in range(8):
            behind.do(work)
        assert all(copied.acquire(timeout=5) for _ in range(8)) and not go.is_set()
        go.set()


def test_works_beforehand_run_at_a_time_and_once_more_where_handles_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    together, ran = threading.Barrier(3), list[tuple[int, str]]()

    def work(number: int, device: str) -> None:
        name = threading.current_thread().name
        if not name.startswith("for "):
            together.wait(timeout=5)
        ran.append((number, name))
        if number == 0 and not name.startswith("for "):
            raise ValueError("told of when it is asked for in earnest")

    waited = beforehand([partial(work, number) for number in range(3)], ["cuda:7"])
    waited()
    assert [number for number, name in ran if name.startswith("for cuda:7")] == [0, 1, 2] and len(ran) == 6
    beforehand([partial(work, 0)], ["cpu"])()
    assert len(ran) == 6, "a CPU is always warm"


def test_parts_of_the_next_groups_are_begun_and_results_stay_together() -> None:
    began: list[int] = []
    results = parts_ahead(lambda part: (began.append(part), -part)[1], ([3 * at, 3 * at + 1, 3 * at + 2] for at in range(8)), 2)
    assert next(results) == [0, -1, -2]
    for _ in range(500):
        if len(began) == 3 * (2 + 1):
            break
        time.sleep(0.01)
    assert sorted(began) == list(range(3 * (2 + 1)))
    assert list(results) == [[-3 * at, -3 * at - 1, -3 * at - 2] for at in range(1, 8)]


def test_a_part_that_fails_is_told_of_and_the_rest_is_left() -> None:
    before = threading.active_count()

    def work(part: int) -> int:
        if part == 4:
            raise OSError("gone")
        return part

    results = parts_ahead(work, ([2 * at, 2 * at + 1] for at in range(100)), 2)
    assert [next(results), next(results)] == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="gone"):
        next(results)
    assert threading.active_count() == before


def test_products_are_rounded_where_a_cpu_gains_by_it_and_exact_again_afterwards() -> None:
    one, other = torch.rand(512, 512), torch.rand(512, 512)  # torch 2.11 does not round those of small products
    exact = one @ other
    with tensor_cores("cpu"):
        assert torch.equal(one @ other, exact) is not has_matrix_units()
        torch.testing.assert_close(one @ other, exact, rtol=2**-7, atol=0)
        inside = list(ordered(lambda _: one @ other, range(8), Resources(3)))
        assert all(torch.equal(product, one @ other) for product in inside), "a thread multiplies in another way"
    assert torch.equal(one @ other, exact)
