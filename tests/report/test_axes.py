"""Axes show what they are given, at numbers that people expect."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.report.axes import every, fit, linear, step_of, steps

NUMBERS = st.floats(min_value=-1e9, max_value=1e9, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9)
POSITIVE = st.floats(min_value=1e-9, max_value=1e12)


@given(st.lists(NUMBERS, max_size=20), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_in_their_order(values: list[float], zero: bool, allow_log: bool) -> None:
    scale = fit(values, zero=zero, allow_log=allow_log, room=0.1)
    places = [scale.percent(value) for value in sorted(values)]
    assert places == sorted(places) and all(0 <= place <= 100 for place in places)
    assert scale.low < scale.high and all(scale.low <= value <= scale.high for value in values)
    assert list(scale.ticks) == sorted(set(scale.ticks)) and len(scale.ticks) <= 12


@given(st.lists(POSITIVE, min_size=2, max_size=20))
def test_values_that_differ_much_are_read_on_a_logarithmic_axis(values: list[float]) -> None:
    scale = fit(values, allow_log=True)
    assert scale.logarithmic == (max(values) / min(values) > 30)
    if scale.logarithmic:
        assert len(scale.ticks) >= 2 and scale.percent(math.sqrt(scale.low * scale.high)) == pytest.approx(50, abs=0.1)


def test_ticks_are_round() -> None:
    assert linear(0, 1).ticks == (0, 0.5, 1.0)
    assert linear(0.0743, 0.1287).ticks == (0.08, 0.1, 0.12)
    assert fit([0.001, 0.3], allow_log=True).ticks == (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    assert fit([], zero=True).ticks == (0, 0.5, 1)
    alone = fit([math.nan, 3.0])
    assert alone.percent(3.0) == pytest.approx(200 / 3) and alone.ticks == (0, 2, 4)


@given(st.lists(st.floats(min_value=0, max_value=1e6).filter(lambda value: value == 0 or value > 1e-9), max_size=30), st.integers(2, 9))
def test_steps_of_colour_hold_every_value(values: list[float], count: int) -> None:
    edges = steps(values, count)
    assert 2 <= len(edges) <= count + 1
    for value in values:
        at = step_of(value, edges)
        assert edges[at] <= value <= edges[at + 1] * (1 + 1e-9)
    assert all(low < high for low, high in pairwise(edges))


def test_labels_of_layers_are_few_and_regular() -> None:
    assert list(every(4, 8)) == [0, 1, 2, 3]
    assert list(every(80, 8)) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert list(every(0, 8)) == []
