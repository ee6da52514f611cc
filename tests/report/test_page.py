"""Every page is sound HTML that stands alone, says all numbers, and lets nothing in that strangers wrote."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser

import pytest

from buildsys.measurement import Measurement
from buildsys.release.facts import Facts
from buildsys.report.catalogue import Entry, catalogue
from buildsys.report.markup import FOLDER, number
from buildsys.report.page import page
from buildsys.report.view import NO_OUTLIERS, NO_PROMPTS, View

Shown = tuple[Facts, View]
NAMES = ("demo", "plain", "cached", "large", "bare", "catalogue 0", "catalogue 1", "catalogue 3", "catalogue 200")
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


class Strict(HTMLParser):
    """Every element is closed, in order; keeps what tests ask for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute is there twice in {tag} {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> closes nothing outside of an SVG"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def parse(html: str) -> Strict:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(params=NAMES)
def html(request: pytest.FixtureRequest, pages: dict[str, str]) -> str:
    return pages[request.param]


def test_elements_are_closed_and_ids_are_there_once(html: str) -> None:
    found = parse(html)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        href = attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids
        assert (attributes.get("aria-labelledby") or ids[0]) in ids
    html.encode()


def test_nothing_is_loaded(html: str) -> None:
    for tag, attributes in parse(html).elements:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "form", "audio", "video", "use", "image")
        assert not {"src", "srcset", "data", "action", "xlink:href", "background", "style"} & attributes.keys()
        assert tag == "a" or "href" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in html and "@import" not in html and "@font-face" not in html


def test_the_policy_allows_the_page_itself_and_nothing_else(html: str) -> None:
    policy = next(attributes["content"] or "" for _, attributes in parse(html).elements if attributes.get("http-equiv"))
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed["default-src"] == allowed["base-uri"] == allowed["form-action"] == "'none'"
    for kind, name in (("style", "style-src"), ("script", "script-src")):
        inline = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digests = ["'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in inline]
        assert digests == allowed.get(name, "").split()


def test_what_strangers_wrote_is_text(pages: dict[str, str]) -> None:
    for name in ("large", "catalogue 200"):
        found = parse(pages[name])
        scripts = [tag for tag, _ in found.elements if tag == "script"]
        assert len(scripts) == (1 if name.startswith("catalogue") else 0)
        assert "<script>alert(1)</script>" in "".join(found.text)
        assert "{{ 7*7 }}" in "".join(found.text) and "\x00" not in pages[name] and "\ufffd" in pages[name]


def test_links_that_are_no_links_lead_nowhere(shown: Shown) -> None:
    facts, view = shown
    made = page(facts, dataclasses.replace(view, catalogue='"><script>alert(1)</script>'))
    assert "<script>" not in made
    listed = catalogue([Entry("x", "s", "s", "t", "passed", 5, None, "", '"><script>alert(1)</script>')])
    assert listed.count("<script>") == 1


@pytest.mark.parametrize("of", ["shown", "plain", "cached", "large"])
def test_every_measurement_is_told(of: str, request: pytest.FixtureRequest) -> None:
    facts, view = request.getfixturevalue(of)
    text = "".join(parse(page(facts, view)).text)
    for measured in facts.measurements.values():
        for one in measured:
            assert f"{number(one.value)} {one.unit}"[:60] in text
            assert one.low == one.high or f"{number(one.low)} to {number(one.high)}" in text
    for verdict in facts.verdicts:
        assert verdict.check in text and verdict.text.split(";")[0] in text and verdict.where in text
    for error in facts.layer_errors.values():
        assert number(error) in text
    for _, file in facts.artifact.files.items():
        assert file.sha256 in text
    assert all(ran.output.key in text and ran.step.title in text for ran in facts.steps)


def test_a_page_says_what_it_is(shown: Shown) -> None:
    text = " ".join("".join(parse(page(*shown)).text).split())
    for said in (
        "Passed: all 6 gates hold.",
        "4-bit g128 asymmetric, awq + gptq, in format awq, of model (local).",
        "limit: at most 0.12",
        "bits: 4",
        "Signed with a key of its publisher's.",
        "Equal up to character 18; what follows is marked.",
        "Equal to the last character.",
    ):
        assert said in text, said


def test_what_differs_is_marked(shown: Shown) -> None:
    assert re.findall("<mark>(.*?)</mark>", page(*shown)) == ["animal of all.", "fish, they said."]


def test_what_is_absent_says_why(pages: dict[str, str]) -> None:
    text = "".join(parse(pages["bare"]).text)
    absent = ("Nothing was measured.", "names no target GPU", "wrote no errors", "No gates:", "Not signed.", "not recorded")
    for said in (NO_PROMPTS, NO_OUTLIERS, *absent):
        assert said in text, said
    assert "No recipe has an artifact yet" in pages["catalogue 0"]


def test_equal_facts_give_equal_bytes(shown: Shown, pages: dict[str, str]) -> None:
    assert page(*shown) == pages["demo"]


def test_no_path_of_this_machine_is_told(shown: Shown, pages: dict[str, str]) -> None:
    paths = [path for ran in shown[0].steps for path in ran.step.hints.get("paths", {}).values()]
    assert paths and not any(path in pages["demo"] for path in paths)
    assert str(FOLDER) not in pages["demo"]


def test_infinite_and_reversed_intervals_are_told_and_not_drawn(shown: Shown) -> None:
    facts, view = shown
    wild = (Measurement("kl", 0.1, "nats", 0.0, float("inf")), Measurement("other", 0.2, "nats", 0.1, 0.3))
    made = page(dataclasses.replace(facts, measurements={"kl": wild}), view)
    assert "0 to infinite" in made and "inf%" not in made and "nan%" not in made


def places(html: str) -> Iterator[float]:
    for _, attributes in parse(html).elements:
        for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
            value = attributes.get(name)
            if value is not None and value.endswith("%"):
                yield float(value[:-1])


def test_every_mark_is_inside_its_plot(html: str) -> None:
    assert all(0 <= place <= 100.01 for place in places(html))


def test_every_axis_has_its_first_label_on_a_phone_too(html: str) -> None:
    for axis in re.findall(r'<svg class="xaxis".*?</svg>', html):
        first = re.search("<text[^>]*>", axis)
        assert first is not None and "spare" not in first[0]
