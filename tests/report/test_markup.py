"""Escaping, cleaning and the spelling of numbers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from buildsys.report.markup import clean, dotted, in_bytes, in_gib, in_seconds, join, number, tag


def test_tags_escape_children_and_attributes() -> None:
    made = tag("p", "<b>", tag("i", "x & y"), class_='a"b', stroke_width=2, fill=None)
    assert made == '<p class="a&#34;b" stroke-width="2">&lt;b&gt;<i>x &amp; y</i></p>'
    assert join([tag("b"), "<"]) == "<b></b>&lt;"


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_becomes_bytes(text: str) -> None:
    assert clean(text).encode().decode() == clean(text)
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in clean(text))
    assert clean(clean(text)) == clean(text)
    tag("p", text, title=text).encode()


def test_lines_of_windows_are_lines() -> None:
    assert clean("a\r\nb\rc") == "a\nb\ufffdc"


def test_names_break_after_dots() -> None:
    assert dotted("layers.0.<q>") == Markup("layers.<wbr>0.<wbr>&lt;q&gt;")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.08637322, "0.08637"),
        (15.046, "15.05"),
        (5853888.0, "5,853,888"),
        (12345.678, "12,346"),
        (1e-9, "1e-09"),
        (-0.0123, "−0.0123"),
        (-1234.0, "−1,234"),
        (1.2e300, "1.2e+300"),
        (math.nan, "not a number"),
        (math.inf, "infinite"),
        (-math.inf, "minus infinite"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_numbers_keep_four_digits(value: float) -> None:
    said = float(number(value).replace(",", "").replace("−", "-"))
    assert said == pytest.approx(value, rel=6e-4, abs=1e-300)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (3461641, "3.46 MB"), (999_999, "1,000 kB"), (17e9, "17 GB"), (2.5e15, "2,500 TB")],
)
def test_bytes(size: float, text: str) -> None:
    assert in_bytes(size) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.011, "0.01 s"), (2.06, "2.1 s"), (119.9, "119.9 s"), (130, "2 min 10 s"), (11520, "3 h 12 min")]
)
def test_seconds(value: float, text: str) -> None:
    assert in_seconds(value) == text


def test_gib_line_up_unless_they_would_be_zero() -> None:
    assert [in_gib(value) for value in (11.166, 0.0, 0.0031, -2.0)] == ["11.17", "0.00", "0.0031", "-2.00"]
