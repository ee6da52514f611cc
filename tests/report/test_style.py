"""Colours of the style sheet can be told apart by eyes that see less: WCAG 2.2, contrast of 4.5 for text and 3 for marks."""

from __future__ import annotations

import re

import pytest

from buildsys.report.markup import FOLDER

STYLE = (FOLDER / "style.css").read_text()
THEMES = dict(zip(("light", "dark", "print"), re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL), strict=True))


def colours(theme: str) -> dict[str, str]:
    return {name: colour * 2 if len(colour) == 3 else colour for name, colour in re.findall(r"--([\w-]+): #(\w+);", THEMES[theme])}


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(theme: str) -> None:
    found = colours(theme)
    for text in ("ink", "soft", "accent", "passed", "failed", "skipped", "open"):
        for below in ("paper", "card"):
            assert contrast(found[text], found[below]) >= 4.5, f"{text} on {below}"
    assert contrast(found["ink"], found["mark"]) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
def test_marks_can_be_seen(theme: str) -> None:
    found = colours(theme)
    for mark in ("s0", "s1", "accent", "failed"):
        assert contrast(found[mark], found["card"]) >= 3, mark
    assert contrast(found["failed"], found["beyond"]) >= 3
    heat = [luminance(found[f"h{at}"]) for at in range(7)]
    assert heat in (sorted(heat), sorted(heat, reverse=True)), "more is darker, or lighter where all is dark"


@pytest.mark.parametrize("theme", THEMES)
def test_themes_name_the_same_colours(theme: str) -> None:
    assert colours(theme).keys() == colours("light").keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) == colours(theme).keys()
