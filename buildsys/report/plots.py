"""Plots as SVG without a view box: places in percent, text and marks in CSS pixels, so that they are as readable on a phone as on a wall.

Around the field of a plot stand its axes, each an SVG of its own in a grid of the style sheet (`frame`). Colours are classes: light and
dark have their own. What a plot shows is said in words too (`said`), and stands in a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from buildsys.report.axes import Scale, every, step_of, steps
from buildsys.report.markup import join, number, tag

Ticks = Sequence[tuple[float, str]]  # percent, text
NONE = Markup("")
LETTER_PX, NARROW_PX = 7, 195  # of an axis' text, and of a plot's field on a phone


@dataclass(frozen=True)
class Axis:
    """`title` says what is shown, and in which unit."""

    title: str
    ticks: Ticks


def ticks(scale: Scale) -> Ticks:
    return [(scale.percent(tick), number(tick)) for tick in scale.ticks]


def figure(title: str, field: Markup, *, x: Axis, said: str, height: int, y: Axis | None = None, key: Markup = NONE) -> Markup:
    """A plot with its caption and axes; `field` is what it draws, `height` pixels high."""
    parts = [tag("figcaption", title), key]
    inside = [
        tag("svg", *_x_grid(x.ticks), field, class_="field", height=height, role="img", aria_label=f"{title}. {said}"),
        tag("svg", *_x_labels(x.ticks), class_="xaxis", height=16, aria_hidden="true"),
        tag("p", x.title, class_="xtitle"),
    ]
    if y is not None:
        labels = [tag("text", text, x="100%", dx=-6, y=_percent(100 - at), dy=".35em", text_anchor="end") for at, text in y.ticks]
        inside = [
            tag("p", y.title, class_="ytitle"),
            tag("svg", *labels, class_="yaxis", height=height, aria_hidden="true"),
            *inside,
        ]
    parts.append(tag("div", *inside, class_="frame" if y is not None else "frame bare"))
    return tag("figure", *parts, class_="plot")


def _percent(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") + "%"


def _x_grid(marks: Ticks) -> Iterable[Markup]:
    return (tag("line", class_="grid", x1=_percent(at), x2=_percent(at), y1="0", y2="100%") for at, _ in marks)


def _x_labels(marks: Ticks) -> Iterable[Markup]:
    """One that would touch the one before it on a phone is for wide screens only."""
    free = -math.inf
    for at, text in marks:
        anchor = "start" if at < 3 else "end" if at > 97 else "middle"
        length = LETTER_PX * len(text)
        left = at / 100 * NARROW_PX - {"start": 0.0, "middle": length / 2, "end": length}[anchor]
        spare = left < free
        free = free if spare else left + length + LETTER_PX
        yield tag("text", text, class_="spare" if spare else None, x=_percent(at), y=12, text_anchor=anchor)


def _y_grid(marks: Ticks) -> Markup:
    return join(tag("line", class_="grid", x1="0", x2="100%", y1=_percent(100 - at), y2=_percent(100 - at)) for at, _ in marks)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """(class of the swatch, text)."""
    swatch = tag("rect", width=12, height=12, rx=2)
    items = [tag("li", tag("svg", tag("g", swatch, class_=css), width=12, height=12, aria_hidden="true"), text) for css, text in entries]
    return tag("ul", *items, class_="legend")


# One number and its interval


def interval(title: str, unit: str, scale: Scale, low: float, value: float, high: float, bound: tuple[str, float] | None) -> Markup:
    """`bound`: the side of a limit ("max", "min") and where it is; what lies beyond it is shaded."""
    marks = []
    said = f"{number(value)} {unit}, 95% interval {number(low)} to {number(high)}"
    if bound is not None:
        side, at = bound[0], scale.percent(bound[1])
        start, width = (at, 100 - at) if side == "max" else (0.0, at)
        marks.append(tag("rect", class_="beyond", x=_percent(start), y="0", width=_percent(width), height="100%"))
        marks.append(tag("line", class_="bound", x1=_percent(at), x2=_percent(at), y1="0", y2="100%"))
        said += f", limit at {'most' if side == 'max' else 'least'} {number(bound[1])}"
    left, right = scale.percent(low), scale.percent(high)
    marks.append(tag("line", class_="span", x1=_percent(left), x2=_percent(right), y1="50%", y2="50%"))
    ends = (tag("line", class_="end", x1=_percent(at), x2=_percent(at), y1="30%", y2="70%") for at in (left, right))
    marks += [*ends, tag("circle", class_="dot", cx=_percent(scale.percent(value)), cy="50%", r=5)]
    return figure(title, join(marks), x=Axis(unit, ticks(scale)), said=said + ".", height=32)


# Layers

Grid = Mapping[str, Sequence[float | None]]  # a row's name -> a value for each layer; None where there is none
HEAT = 7
ROW_PX = 24


def heat_map(title: str, rows: Grid, what: str, unit: str, said: str) -> Markup:
    """A cell for each layer (across) and row, coloured in steps of one hue; a cell without a value is hatched."""
    count = max((len(row) for row in rows.values()), default=0)
    edges = steps((value for row in rows.values() for value in row if value is not None), HEAT)
    cells = [
        _cell(f"layer {layer}, {name}", value, 100 * layer / count, 100 / count, ROW_PX * at, edges)
        for at, (name, row) in enumerate(rows.items())
        for layer, value in enumerate(row)
    ]
    ranges = [(f"heat {_shade(at, edges)}", f"{number(low)} to {number(high)}") for at, (low, high) in enumerate(pairwise(edges))]
    every_value = [value for row in rows.values() for value in row]
    ranges += [("heat none", "left float")] if None in every_value else []
    ranges += [("heat wrong", "not a number")] if any(value is not None and math.isnan(value) for value in every_value) else []
    x = Axis("layer, from the input on", [(100 * (layer + 0.5) / count, str(layer)) for layer in every(count, 8)])
    y = Axis(what, [(100 - 100 * (at + 0.5) / len(rows), name) for at, name in enumerate(rows)])
    key = tag("div", tag("p", unit, class_="unit"), legend(ranges), class_="key")
    return figure(title, join(cells), x=x, y=y, said=said, height=ROW_PX * len(rows), key=key)


def _cell(name: str, value: float | None, left: float, width: float, top: int, edges: Sequence[float]) -> Markup:
    text = "left float" if value is None else number(value)
    css = "none" if value is None else "wrong" if math.isnan(value) else _shade(step_of(value, edges), edges)
    place = {"x": _percent(left), "y": top, "width": _percent(width), "height": ROW_PX}
    return tag("rect", tag("title", f"{name}: {text}"), class_=f"heat {css}", **place)


def _shade(step: int, edges: Sequence[float]) -> str:
    """The class of a step; few steps are as far apart in colour as many."""
    return f"h{round(step * (HEAT - 1) / max(len(edges) - 2, 1))}"


def lines(title: str, series: Mapping[str, Sequence[float]], scale: Scale, unit: str, said: str) -> Markup:
    """Values by layer, a line for each of `series` (class -> values); a gap where a value is no number."""
    count = max(map(len, series.values()))
    across = [100 * (layer + 0.5) / count for layer in range(count)]
    marks = [_y_grid(ticks(scale))]
    for css, values in series.items():
        points = [(x, 100 - scale.percent(value)) for x, value in zip(across, values, strict=True) if math.isfinite(value)]
        marks += [_segment(css, first, second) for first, second in pairwise(points) if second[0] - first[0] < 150 / count]
        if count <= 40:
            marks += [tag("circle", class_=f"point {css}", cx=_percent(x), cy=_percent(y), r=2.5) for x, y in points]
    x = Axis("layer", [(across[layer], str(layer)) for layer in every(count, 6)])
    return figure(title, join(marks), x=x, y=Axis(unit, ticks(scale)), said=said, height=120)


def _segment(css: str, first: tuple[float, float], second: tuple[float, float]) -> Markup:
    x1, y1, x2, y2 = map(_percent, (*first, *second))
    return tag("line", class_=f"curve {css}", x1=x1, y1=y1, x2=x2, y2=y2)


# Parts of a whole

BAR_PX, GAP_PX = 30, 12


@dataclass(frozen=True)
class Part:
    """A piece of a bar; `css` colours it."""

    name: str
    css: str
    value: float


def bars(
    title: str,
    rows: Mapping[str, Sequence[Part]],
    scale: Scale,
    unit: str,
    said: str,
    *,
    bound: float | None = None,
    per: float = 1.0,
    key: Markup = NONE,
) -> Markup:
    """Stacked bars, one below the other; `per` of the parts' units are one of the axis'. `bound` is where all of it has to end."""
    height = (BAR_PX + GAP_PX) * len(rows)
    marks = []
    for at, (name, parts) in enumerate(rows.items()):
        done = 0.0
        for part in parts:
            left, right = scale.percent(done / per), scale.percent((done + part.value) / per)
            done += part.value
            place = {"x": _percent(left), "y": at * (BAR_PX + GAP_PX) + GAP_PX // 2, "width": _percent(right - left), "height": BAR_PX}
            marks.append(tag("rect", tag("title", f"{name}, {part.name}: {number(part.value / per)} {unit}"), class_=part.css, **place))
    if bound is not None:
        at_bound = _percent(scale.percent(bound))
        marks.append(tag("line", class_="bound", x1=at_bound, x2=at_bound, y1="0", y2="100%"))
    y = Axis("model", [(100 - 100 * (at + 0.5) / len(rows), name) for at, name in enumerate(rows)])
    return figure(title, join(marks), x=Axis(unit, ticks(scale)), y=y, said=said, height=height, key=key)


def share(part: float, whole: float, css: str = "time") -> Markup:
    """A bar inside a table's cell; the number stands beside it."""
    width = 100 * part / whole if whole > 0 and math.isfinite(part) else 0.0
    return tag("svg", tag("rect", class_=css, width=_percent(width), height="100%", rx=2), class_="share", height=10, aria_hidden="true")
