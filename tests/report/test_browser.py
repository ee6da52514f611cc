"""What people see, in a real browser: at the widths of a desk and of a phone, light and dark, with scripts and without, on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WANTED = "chromium" in os.environ.get("BUILDSYS_TEST_REQUIRE", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KINDS = ("demo", "plain", "cached", "large", "bare", "compare", "compare odd")
NAMES = (*KINDS, "catalogue 0", "catalogue 1", "catalogue 3", "catalogue 200")
VIEWS = ((1280, "light"), (390, "dark"), (600, "light"), (390, "light"), (1280, "dark"), (768, "light"), (320, "light"))
THOROUGH = ("demo", "compare", "catalogue 3")  # in all of VIEWS; other pages in the first three

STICKS_OUT = """() => {
  const inBox = (e) => { for (; e; e = e.parentElement) { const s = getComputedStyle(e);
    if (['auto', 'scroll'].includes(s.overflowX) || s.clipPath !== 'none' || e.classList.contains('skip')) return true; } return false; };
  return [...document.querySelectorAll('body *')].filter((e) => {
    const r = e.getBoundingClientRect();
    return r.width && (r.left < -1 || r.right > innerWidth + 1) && !inBox(e);
  }).slice(0, 5).map((e) => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 60) + JSON.stringify(e.getBoundingClientRect()));
}"""
SMALL = """() => [...document.querySelectorAll('body *')].filter((e) =>
  [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length
  && parseFloat(getComputedStyle(e).fontSize) < 10
).map((e) => e.tagName + e.textContent.slice(0, 40))"""
UNTITLED = """() => [...document.querySelectorAll('figure')].filter((f) => {
  const said = (s) => (f.querySelector(s) || {textContent: ''}).textContent.trim();
  const upright = f.querySelector('.frame.bare') || said('.ytitle');
  return !(said('figcaption') && said('.xtitle') && upright && f.querySelector('svg[role=img][aria-label]'));
}).map((f) => f.textContent.slice(0, 80))"""
TOUCHING = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('.xaxis, .field, .yaxis')) {
    const texts = [...svg.querySelectorAll(':scope > text')].filter((t) => t.getClientRects().length);
    const boxes = texts.map((t) => t.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(0, i).forEach((b, j) => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4)
        found.push(texts[i].textContent + ' | ' + texts[j].textContent);
    }));
  }
  return found;
}"""


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


@pytest.fixture(scope="module")
def files(pages: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    found = {name: folder / f"{name.replace(' ', '-')}.html" for name in NAMES}
    for name, path in found.items():
        path.write_text(pages[name], encoding="utf-8")
    return found


class Tab:
    """A page in the browser, and all that it asked for or complained of."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str = "light", **more: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, *exc: object) -> None:
        self.context.close()


def unfold(page: Any) -> None:
    page.evaluate("() => document.querySelectorAll('details').forEach((each) => { each.open = true; })")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_sticks_out_and_all_can_be_read(name: str, browser: Any, files: dict[str, Path]) -> None:
    for width, scheme in VIEWS if name in THOROUGH else VIEWS[:3]:
        tab = Tab(browser, files[name], width, scheme)
        with tab as page:
            for again in range(2):
                assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}, {again}"
                assert page.evaluate(STICKS_OUT) == []
                unfold(page)
            assert page.evaluate(SMALL) == [] and page.evaluate(UNTITLED) == [] and page.evaluate(TOUCHING) == []
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, paper[4:-1].split(","))) > 384) == (scheme == "light")
        assert tab.complaints == [] and len(tab.requests) == 1


@pytest.mark.parametrize("name", ("large", "catalogue 200"))
def test_nothing_is_cut_off_on_paper(name: str, browser: Any, files: dict[str, Path]) -> None:
    with Tab(browser, files[name], 720, "dark") as page:
        page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.scrollWidth") <= 720
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_landmarks_headings_and_names(browser: Any, files: dict[str, Path]) -> None:
    with Tab(browser, files["demo"], 1280) as page:
        for role in ("main", "navigation", "banner", "contentinfo"):
            assert page.get_by_role(role).count() == 1, role
        assert page.get_by_role("heading", level=1).inner_text() == "demo"
        assert page.get_by_role("img").count() == page.locator("figure").count() >= 10
        table = page.get_by_role("table", name="Everything that was measured")
        assert table.get_by_role("columnheader").all_inner_texts() == ["Measurement", "Value", "95% interval", "Limit", "Gate"]
    with Tab(browser, files["demo"], 390) as page:
        assert page.get_by_role("table", name="Everything that was measured").get_by_role("rowheader").count() >= 8, "also as cards"


def test_the_catalogue_sorts_and_needs_no_script(browser: Any, files: dict[str, Path]) -> None:
    sizes = "() => [...document.querySelectorAll('table[data-sort] tbody td[data-label=Size]')].map((cell) => Number(cell.dataset.value))"
    with Tab(browser, files["catalogue 200"], 1280) as page:
        page.get_by_role("button", name="Size").click()
        found = page.evaluate(sizes)
        assert len(found) == 202 and found == sorted(found)
        page.get_by_role("button", name="Size").click()
        assert page.evaluate(sizes) == found[::-1]
        for _ in range(2):
            page.get_by_role("button", name="KL, nats").click()
            last = page.locator("table[data-sort] tbody tr").last
            assert last.locator("[data-label='KL, nats']").get_attribute("data-value") == "nan", "what was not measured stays last"
    with Tab(browser, files["catalogue 200"], 1280, java_script_enabled=False) as page:
        assert page.get_by_role("button").count() == 0
        assert page.locator("table[data-sort] tbody tr").count() == 202
