"""Six changes, each with the comment that a reviewer would sign. `UPDATE_GOLDEN=1 pytest tests/review/test_golden.py` writes them anew."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path

import pytest
import scripted
from markdown_it import MarkdownIt

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", scripted.CHANGES)
def test_the_comment_is_the_golden_one(name: str, comments: dict[str, str]) -> None:
    path = GOLDEN / f"{name}.md"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(comments[name], encoding="utf-8")
    assert comments[name] == path.read_text(encoding="utf-8")


class _Tables(HTMLParser):
    """Cells of each row of each table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append(0)
        elif tag in ("td", "th"):
            self.rows[-1] += 1


@pytest.mark.parametrize("name", scripted.CHANGES)
def test_another_reader_sees_tables_of_few_columns(name: str, comments: dict[str, str]) -> None:
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(comments[name])
    tables = _Tables()
    tables.feed(html)
    assert tables.rows and max(tables.rows) <= 5
    assert "|" not in html and html.count("<details>") == html.count("</details>")
