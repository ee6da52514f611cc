"""The page that holds builds against each other: words for differences, and nothing that a name or a lack of numbers can break."""

from __future__ import annotations

import pytest

from buildsys.quant.bootstrap import Interval
from buildsys.report import compare


@pytest.mark.parametrize(
    ("low", "high", "verdict", "text"),
    [
        (-0.02, -0.001, "better", "better: -0.0105 nats, -0.02 to -0.001"),
        (0.001, 0.02, "worse", "worse: +0.0105 nats, +0.001 to +0.02"),
        (-0.001, 0.02, "noise", "within noise: +0.0095 nats, -0.001 to +0.02"),
        (0.0, 0.0, "noise", "within noise: 0 nats, 0 to 0"),
    ],
)
def test_a_difference_is_told_by_the_whole_interval(low: float, high: float, verdict: str, text: str) -> None:
    found = compare.Difference(Interval((low + high) / 2, low, high))
    assert (found.verdict, found.text) == (verdict, text)


def test_what_is_not_paired_says_why() -> None:
    assert (compare.Difference(None, "not the same text as a").verdict, compare.Difference(None, "not the same text as a").text) == (
        "",
        "not the same text as a",
    )


def test_pages_escape_whatever_a_recipe_brings(pages: dict[str, str]) -> None:
    for name in ("compare", "compare odd"):
        assert "<script" not in pages[name] and "onerror=" not in pages[name].replace("onerror=alert(2)&gt;", "")
        assert "{{" not in pages[name].replace("{{ 7*7 }}", "") and "default-src" in pages[name]


def test_a_page_without_numbers_says_so(pages: dict[str, str]) -> None:
    assert "not measured" in pages["compare odd"] and "no gates" in pages["compare odd"]


def test_files_are_named_by_their_recipes() -> None:
    assert compare.file_name(["a", "b@c"]) == "compare-a+b@c.html"
    long = compare.file_name(["x" * 150, "y" * 150])
    assert len(long) < 40 and long != compare.file_name(["y" * 150, "x" * 150])
