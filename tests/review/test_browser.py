"""The comment as people see it, in a real browser at the widths of a desk and of a phone: no table is wider than the page.

The style is what GitHub does to a comment as far as width goes: a font's sizes, padding of cells, and words that break only where they may.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scripted
from markdown_it import MarkdownIt

pytestmark = pytest.mark.slow
WANTED = "chromium" in os.environ.get("BUILDSYS_TEST_REQUIRE", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (1280, 390)
STYLE = """
body { font: 14px/1.5 sans-serif; margin: 0; padding: 16px; max-width: 900px; }
table { border-collapse: collapse; margin: 0 0 16px; } td, th { border: 1px solid #d1d9e0; padding: 6px 8px; }
code { font: 85% monospace; background: #eff1f3; border-radius: 6px; padding: .2em .3em; }
"""
WIDER = """() => [...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + ' ' + e.textContent.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    reason = "no chromium on the path" if CHROMIUM is None else ""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "playwright is not installed (pip install 'buildsys[browser]')"
    if reason:
        (pytest.fail if WANTED else pytest.skip)(reason)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("name", scripted.CHANGES)
def test_no_table_is_wider_than_the_page(name: str, comments: dict[str, str], browser: Any, tmp_path: Path) -> None:
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(comments[name])
    page = tmp_path / f"{name}.html"
    page.write_text(f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>{body}", encoding="utf-8")
    shots = Path(os.environ.get("BUILDSYS_SCREENSHOTS", tmp_path))
    for width in WIDTHS:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto(page.as_uri())
        for _ in ("folded", "unfolded"):
            assert tab.evaluate(WIDER) == [], f"{name} at {width}"
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        tab.screenshot(path=shots / f"{name}-{width}.png", full_page=True)
        tab.close()
