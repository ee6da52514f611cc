"""Quality against size of every recipe, with error bars, and names that do not run into each other.

How wide the plot will be is not known here. A name's place is tried at several widths; there are two sets of names, for narrow and for wide
screens, of which the style sheet shows one. A point that has no room for its name has it in its title, and in the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from buildsys.report.axes import Scale, fit
from buildsys.report.markup import in_bytes, join, number, tag
from buildsys.report.plots import Axis, figure, ticks

HEIGHT, LETTER, LINE, OFFSET, MOST = 340, 7.4, 15, 9, 60  # pixels, but for MOST names

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Screen:
    """Widths in pixels that the plot's field may have, and how many letters of a name are shown."""

    css: str
    widths: tuple[int, ...]
    letters: int


SCREENS = (Screen("narrow", (215, 280, 360, 460, 580), 16), Screen("wide", (560, 640, 740, 850, 980), 26))
"""The style sheet shows the second where plot and axis have 640 px or more."""


@dataclass(frozen=True)
class Point:
    """One recipe; `state` is its class: passed, failed, skipped or open."""

    name: str
    size: float  # bytes
    value: float
    low: float
    high: float
    state: str
    href: str = ""


MARKS = {
    "passed": tag("circle", r=5),
    "failed": tag("path", d="M-5-5L5 5M-5 5L5-5"),
    "skipped": tag("path", d="M0-6L6 5H-6Z"),
    "open": tag("path", d="M-5-5H5V5H-5Z"),
}
"""A shape for each state, so that colour is not all that tells them apart; around 0, in pixels."""


def scatter(title: str, points: Sequence[Point], unit: str, said: str) -> Markup:
    """Both axes start at zero, or are logarithmic where the values differ much."""
    shown = [point for point in points if all(map(math.isfinite, (point.size, point.value, point.low, point.high)))]
    x = fit([point.size for point in shown], allow_log=True, room=0.08, count=4)
    y = fit([end for point in shown for end in (max(point.low, point.value / 3), point.high)], allow_log=True, room=0.08)
    horizontal = [(x.percent(tick), in_bytes(tick)) for tick in x.ticks]
    grid = (tag("line", class_="grid", x1="0", x2="100%", y1=f"{100 - at:.2f}%", y2=f"{100 - at:.2f}%") for at, _ in ticks(y))
    names = (tag("text", text, class_=f"names {screen.css}", **place) for screen in SCREENS for text, place in named(shown, x, y, screen))
    field = join([*grid, *(_point(point, x, y) for point in shown), *names])
    kind = " (logarithmic)"
    across, up = (Axis(f"size of the artifact{kind if x.logarithmic else ''}", horizontal), Axis(_upright(unit, y), ticks(y)))
    key = tag("ul", *(_entry(state) for state in MARKS if any(point.state == state for point in shown)), class_="legend")
    return figure(title, field, x=across, y=up, said=said, height=HEIGHT, key=key)


def _upright(unit: str, scale: Scale) -> str:
    return f"{unit}{', logarithmic' if scale.logarithmic else ''}: lower is better"


def _entry(state: str) -> Markup:
    words = {"passed": "passed", "failed": "failed", "skipped": "gates skipped", "open": "no gates"}
    mark = tag("svg", tag("svg", tag("g", MARKS[state], class_=f"mark {state}"), x="50%", y="50%", overflow="visible"), width=14, height=14)
    return tag("li", mark, words[state])


def _point(point: Point, x: Scale, y: Scale) -> Markup:
    left, top = f"{x.percent(point.size):.2f}%", f"{100 - y.percent(point.value):.2f}%"
    ends = [f"{100 - y.percent(end):.2f}%" for end in (point.low, point.high)]
    bar = tag("line", class_=f"error {point.state}", x1=left, x2=left, y1=ends[0], y2=ends[1])
    name = f"{point.name}: {number(point.value)} ({number(point.low)} to {number(point.high)}), {in_bytes(point.size)}"
    around = tag("circle", r=12, class_="touch")
    mark = tag("g", around, MARKS[point.state], tag("title", name), class_=f"mark {point.state}")
    return join([bar, tag("svg", tag("a", mark, href=point.href) if point.href else mark, x=left, y=top, overflow="visible")])


def named(points: Sequence[Point], x: Scale, y: Scale, screen: Screen) -> Iterator[tuple[str, dict[str, object]]]:
    """The names that have room at each of the widths, and where; those that nothing beats in both size and quality choose first."""
    places = [(x.percent(point.size) / 100, (100 - y.percent(point.value)) / 100 * HEIGHT) for point in points]
    taken: dict[int, list[Box]] = {width: [_around(place, width) for place in places] for width in screen.widths}
    order = sorted(range(len(points)), key=lambda at: (_beaten(points[at], points), points[at].value, points[at].name))
    for at in order[:MOST]:
        text = _short(points[at].name, screen.letters)
        for anchor, dx, dy in (("start", OFFSET, 0), ("end", -OFFSET, 0), ("middle", 0, -OFFSET - 4), ("middle", 0, OFFSET + 5)):
            boxes = {width: box(places[at], width, LETTER * len(text), anchor, dx, dy) for width in screen.widths}
            if all(_free(one, width, taken[width]) for width, one in boxes.items()):
                for width, one in boxes.items():
                    taken[width].append(one)
                left, top = f"{100 * places[at][0]:.2f}%", f"{100 * places[at][1] / HEIGHT:.2f}%"
                yield text, {"x": left, "y": top, "dx": dx, "dy": dy + 4, "text_anchor": anchor}
                break


def _short(name: str, letters: int) -> str:
    """Names of one family begin alike, so most of what is kept is the end."""
    return name if len(name) <= letters else f"{name[: letters // 4]}…{name[letters // 4 + 1 - letters :]}"


def _beaten(point: Point, points: Sequence[Point]) -> bool:
    return any(other.size <= point.size and other.value < point.value for other in points)


def _around(place: tuple[float, float], width: int) -> Box:
    return place[0] * width - 6, place[1] - 6, place[0] * width + 6, place[1] + 6


def box(place: tuple[float, float], width: int, length: float, anchor: str, dx: int, dy: int) -> Box:
    start = place[0] * width + dx - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
    return start, place[1] + dy - LINE / 2, start + length, place[1] + dy + LINE / 2


def _free(one: Box, width: int, taken: Sequence[Box]) -> bool:
    inside = one[0] >= 0 and one[2] <= width and one[1] >= 0 and one[3] <= HEIGHT
    return inside and not any(one[0] < right and left < one[2] and one[1] < bottom and top < one[3] for left, top, right, bottom in taken)
