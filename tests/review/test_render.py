"""What a review looks like where there is much of it, and where somebody would like it to look otherwise."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from markdown_it import MarkdownIt

from buildsys.errors import BuildError
from buildsys.review.found import Change, Figure, Gate, Knob, Moved, Review, StepChange
from buildsys.review.markdown import code, markdown
from buildsys.review.render import as_json, chosen, text

LIMIT = 65_536  # GitHub's, of a comment
HOSTILE = "a|b`c*d_e_ <script>alert(1)</script> @everyone #1 [x](y) $$ \\ \n## no\x00\ud800 </details> https://x.example"
STEP = StepChange("quantize", "4-bit g64", "runs", "scheme.group_size 128 -> 64", 12.5, "k" * 64)
CHANGE = Change(
    "one",
    "changed",
    "recipes/one.yaml:3",
    knobs=(Knob("quantization.group_size", 128, 64, "recipes/bases/w4.yaml:1"),),
    steps=(STEP,),
    kept=7,
    figures=(Figure("weights on disk", "bytes", 4e9, 4.2e9), Figure("clean build", "s", 600.0, 600.0)),
    gates=(Gate("kl.max_nats", 0.05, 0.08, "LOOSENED"),),
    measurements=(Moved("kl", "kl", "nats", (0.05, 0.04, 0.06), (0.08, 0.07, 0.09), "worse"),),
    measured="Measured on a100-40gb.",
)


def review(*changes: Change) -> Review:
    return Review("main", "c" * 40, changes, same=3, runs=1, runs_s=12.5)


@pytest.mark.parametrize("same", [True, False])
def test_a_thousand_recipes_fit_a_comment(same: bool) -> None:
    knobs = [CHANGE.knobs if same else (replace(CHANGE.knobs[0], after=number),) for number in range(1000)]
    comment = markdown(review(*(replace(CHANGE, name=f"recipe-{number:04d}", knobs=knobs[number]) for number in range(1000))))
    assert len(comment) < LIMIT and "1000 changed; 3 as before" in comment
    assert comment.count("<details>") == comment.count("</details>") > 0
    assert ("and 992 more" in comment) if same else ("960 more" in comment and "do not fit a comment" in comment)


def test_one_recipe_alone_may_be_too_much() -> None:
    huge = replace(CHANGE, knobs=tuple(Knob(f"quantization.overrides.layer{number}", 4, 8, "recipes/one.yaml:3") for number in range(2000)))
    comment = markdown(review(huge))
    assert len(comment) < LIMIT and "do not fit a comment" in comment


def test_nothing_that_a_recipe_says_becomes_markup() -> None:
    change = replace(
        CHANGE,
        name=HOSTILE,
        knobs=(Knob(HOSTILE, HOSTILE, [HOSTILE], HOSTILE),),
        files=(HOSTILE,),
        notes=(HOSTILE,),
        errors=(HOSTILE,),
        published=(HOSTILE,),
        steps=(replace(STEP, title=HOSTILE, why=HOSTILE),),
    )
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown(review(change)))
    assert "<script" not in html and "<a " not in html and "<em>" not in html and "<h2>no" not in html and "<s>" not in html
    assert html.count("</details>") == 1 and html.count("<table>") == html.count("</table>") == 5
    assert "alert(1)" in html, "it is shown"


def test_code_is_what_was_said() -> None:
    shown = MarkdownIt("commonmark", {"html": True}).renderInline(code("a_very/long_path.with-parts/_x_*y*"))
    assert shown.replace("<wbr>", "") == "<code>a_very/long_path.with-parts/_x_*y*</code>"


def test_machines_read_the_same_keys() -> None:
    said = json.loads(as_json(replace(review(CHANGE), errors=(BuildError("a", "b", "c"),))))
    assert set(said) == {field.name for field in fields(Review)} | {"format", "counts"}
    assert set(said["changes"][0]) == {field.name for field in fields(Change)}
    assert said["counts"] == {"changed": 1} and said["format"] == 1 and said["errors"] == ["a  b\n    fix: c"]


def test_a_terminal_is_told_all_of_a_few_and_a_line_of_each_of_many() -> None:
    few = "\n".join(text(review(CHANGE)))
    assert "kl.max_nats 0.05 -> 0.08: LOOSENED" in few and "scheme.group_size 128 -> 64" in few and "worse" in few
    many = [*text(review(*(replace(CHANGE, name=f"r{number}") for number in range(200))))]
    assert len(many) < 300 and sum("quantization.group_size 128 -> 64" in line for line in many) == 200


def test_an_empty_review_says_so() -> None:
    assert "no recipe changed; 3 as before" in markdown(review()) and "no recipe changed" in "\n".join(text(review()))


def test_a_form_that_is_none() -> None:
    with pytest.raises(BuildError, match="no form"):
        chosen("html")
