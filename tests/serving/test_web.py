"""The chat page in a real browser, wide and narrow: what is typed is answered piece by piece, and no request leaves this machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from apiserver import ApiServer

from buildsys.errors import BuildError
from buildsys.serving import web
from buildsys.serving.client import Client
from buildsys.serving.ports import free_port
from buildsys.serving.web import page

WANTED = "chromium" in os.environ.get("BUILDSYS_TEST_REQUIRE", "")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WAIT_MS = 60_000


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


@contextmanager
def opened(browser: Any, url: str, width: int, scheme: str = "light") -> Iterator[Any]:
    """The page, and at its end: nothing was asked of anybody else, and it complained of nothing."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(WAIT_MS)
    tab = context.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.goto(url)
    yield tab
    context.close()
    away = [one for one in asked if urlsplit(one).scheme in ("http", "https", "ws", "wss") and urlsplit(one).hostname != "127.0.0.1"]
    assert asked and away == [] and complaints == []


def say(tab: Any, text: str) -> None:
    tab.get_by_role("textbox", name="Message").fill(text)
    tab.keyboard.press("Enter")


def answered(tab: Any, text: str) -> None:
    tab.locator(".message.bot").filter(has_text=text).last.wait_for()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_conversation(browser: Any, width: int, scheme: str) -> None:
    with ApiServer("late:0.05") as server, page(Client(server.url, 30), "my-model", free_port()) as url:
        with opened(browser, url, width, scheme) as tab:
            tab.get_by_role("heading", name="my-model").wait_for()
            assert tab.title() == "my-model"
            say(tab, "one two three")
            answered(tab, "three two one")
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.get_by_role("textbox", name="Message").fill("four five")
            tab.get_by_test_id("submit-button").click()
            answered(tab, "five four")
            box = tab.get_by_role("textbox", name="Message").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > width / 3
        asked = [[(one["role"], one["content"]) for one in body["messages"]] for _, body in server.asked]
    assert asked == [
        [("user", "one two three")],
        [("user", "one two three"), ("assistant", "three two one"), ("user", "four five")],
    ]


@pytest.mark.slow
def test_an_answer_is_shown_while_it_is_written(browser: Any) -> None:
    with ApiServer("late:0") as server, page(Client(server.url, 60), "my-model", free_port()) as url, opened(browser, url, 1280) as tab:
        server.hold = 2
        say(tab, "alpha beta gamma")
        answered(tab, "gamma beta")
        assert "alpha" not in tab.locator(".message.bot").last.inner_text()
        server.hold = None
        answered(tab, "gamma beta alpha")


@pytest.mark.slow
def test_an_error_is_shown_and_the_page_lives_on(browser: Any) -> None:
    with ApiServer("refuses") as server, page(Client(server.url, 30), "my-model", free_port()) as url, opened(browser, url, 390) as tab:
        say(tab, "one two")
        tab.get_by_text("the prompt is too long").first.wait_for()
        del server.faults["refuses"]
        say(tab, "three four")
        answered(tab, "four three")
        said = [one["content"] for one in server.asked[-1][1]["messages"]]
    assert said == ["three four"], "what was not answered is not said again"


def test_a_taken_port_and_a_server_that_is_not_there() -> None:
    with ApiServer() as server:
        with pytest.raises(BuildError, match="is taken"), page(Client(server.url, 5), "my-model", int(server.url.rpartition(":")[2])):
            pass
        gone = server.url
    with pytest.raises(BuildError, match="cannot be reached"), page(Client(gone, 5), "my-model", free_port()):
        pass


def test_without_gradio_says_so_before_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="has no gradio") as raised:
        web.require_gradio()
    assert raised.value.fix == "pip install 'buildsys[web]'"
