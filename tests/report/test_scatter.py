"""Names in the catalogue's plot never run into each other, however wide it is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from buildsys.report.axes import fit
from buildsys.report.scatter import HEIGHT, LETTER, SCREENS, Point, Screen, box, named, scatter

SIZES = st.floats(min_value=1e6, max_value=1e12)
POINTS = st.lists(st.tuples(SIZES, st.floats(min_value=1e-4, max_value=1.0)), min_size=1, max_size=40)


@pytest.mark.parametrize("screen", SCREENS, ids=lambda screen: screen.css)
@given(places=POINTS)
@settings(max_examples=40, deadline=None)
def test_names_are_apart_and_inside_at_every_width(screen: Screen, places: list[tuple[float, float]]) -> None:
    points = [Point(f"recipe-with-a-name-{at}", size, value, value, value, "passed") for at, (size, value) in enumerate(places)]
    x, y = fit([size for size, _ in places], allow_log=True), fit([value for _, value in places], allow_log=True)
    shown = list(named(points, x, y, screen))
    assert all(len(text) <= screen.letters for text, _ in shown)
    for width in screen.widths:
        boxes = []
        for text, place in shown:
            left, top = (float(str(place[key]).rstrip("%")) / 100 for key in ("x", "y"))
            dx, dy = int(str(place["dx"])), int(str(place["dy"])) - 4
            boxes.append(box((left, top * HEIGHT), width, LETTER * len(text), str(place["text_anchor"]), dx, dy))
        for at, (left, top, right, bottom) in enumerate(boxes):
            assert left >= -0.1 and right <= width + 0.1 and top >= -0.1 and bottom <= HEIGHT + 0.1
            for other in boxes[:at]:
                assert right <= other[0] + 0.1 or other[2] <= left + 0.1 or bottom <= other[1] + 0.1 or other[3] <= top + 0.1


def test_one_point_has_its_name() -> None:
    for screen in SCREENS:
        point = Point("demo", 3.5e6, 0.086, 0.083, 0.09, "passed", "demo.html")
        assert [text for text, _ in named([point], fit([3.5e6], room=0.08), fit([0.086], room=0.08), screen)] == ["demo"]


def test_points_that_are_no_numbers_are_left_out() -> None:
    nan = float("nan")
    made = scatter("t", [Point("a", 5.0, nan, nan, nan, "failed"), Point("b", 5.0, 0.1, 0.0, 0.2, "open")], "nats", "")
    assert "nan" not in made and made.count('class="error') == 1 and "failed" not in made
