"""The catalogue lists every recipe once, built or not."""

from __future__ import annotations

import re

from buildsys.release.facts import Facts
from buildsys.report.catalogue import Entry, catalogue, entry, unbuilt
from buildsys.report.view import View


def test_an_entry_is_the_facts(shown: tuple[Facts, View], plain: tuple[Facts, View]) -> None:
    facts, _ = shown
    one = entry(facts, "demo.html")
    assert (one.name, one.source, one.scheme, one.target) == ("demo", "model (local)", "4-bit g128 asymmetric, awq + gptq", "t4")
    assert (one.state, one.size, one.kl, one.limit) == ("passed", facts.artifact.size, facts.measurements["kl"][0], "at most 0.12")
    other = unbuilt(plain[0].plan.recipe, "its source is not here")
    assert (other.name, other.state, other.kl, other.why) == ("tiny", "", None, "its source is not here")


def test_all_are_listed_in_the_order_of_their_names(pages: dict[str, str]) -> None:
    rows = re.findall(r'rowheader" data-value="[^"]*"><a href="(\d+)\.html">([^<]+)</a>', pages["catalogue 200"])
    assert len(rows) == 200 and [name for _, name in rows] == sorted(name for _, name in rows)
    assert "Not built" in pages["catalogue 3"] and "tiny" in pages["catalogue 3"] and "Not built" not in pages["catalogue 200"]
    assert pages["catalogue 3"].count('class="error') == 3


def test_counts(pages: dict[str, str]) -> None:
    counts = {word: int(count) for count, word in re.findall(r"<li><b>(\d+)</b> ([a-z ]+)</li>", pages["catalogue 200"])}
    assert counts["recipes"] == 202 == sum(count for word, count in counts.items() if word != "recipes")


def test_the_order_of_entries_does_not_matter() -> None:
    some = [Entry(name, "s", "4-bit", "t4", "passed", 5) for name in "bca"]
    assert catalogue(some) == catalogue(reversed(some))
    assert "measured KL" in catalogue(some)
