"""Writes FILE as the comment of TOPIC on pull request NUMBER, or updates the one that is there: one comment, however often it runs.

GitHub's REST API, "Issue comments" (a pull request is an issue there); the standard library alone, so that nothing has to be installed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

MOST = 65_536  # characters of a comment, GitHub's limit
PAGE = 100
WRITER = "github-actions[bot]"  # whose comments are updated: anybody can write a marker, and theirs stay as they are


def main() -> int:
    """0 too where the token may not write: the review is in the job's summary, and a fork cannot help it."""
    number, topic = os.environ["NUMBER"], os.environ["TOPIC"]
    if not number.isdecimal():
        print(f"::error::there is no pull request to comment on: its number is {number!r}; run this on pull_request, or give number")
        return 1
    marker = f"<!-- buildsys: {re.sub(r'[^A-Za-z0-9 ._/-]', '', topic).replace('--', '')} -->"
    body = _fitting(marker, Path(os.environ["FILE"]).read_text())
    comments = f"{_api()}/issues"
    try:
        found = _find(f"{comments}/{number}/comments", marker)
        if found is None:
            _ask("POST", f"{comments}/{number}/comments", {"body": body})
        elif found["body"] != body:
            _ask("PATCH", f"{comments}/comments/{found['id']}", {"body": body})
    except urllib.error.HTTPError as error:
        if error.code != 403:
            print(f"::error::{error.url} answers {error.code} {error.reason}; see that number and token are this repository's")
            return 1
        print("::warning::this token may not comment (a fork's, or the job lacks `pull-requests: write`); the text is in the job's summary")
    except urllib.error.URLError as error:
        print(f"::error::{_api()} cannot be reached: {error.reason}; run the job again")
        return 1
    return 0


def _fitting(marker: str, text: str) -> str:
    body = f"{marker}\n{text.strip()}\n"
    if len(body) <= MOST:
        return body
    run = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}/actions/runs/{os.environ['GITHUB_RUN_ID']}"
    return f"{marker}\nThis has {len(text):,} characters, a comment holds {MOST:,}: it stands in the [summary of the job]({run}).\n"


def _find(address: str, marker: str) -> dict[str, Any] | None:
    """The comment that begins with the marker, written by whom this token writes as."""
    page, writer = 1, os.environ.get("WRITER") or WRITER
    while True:
        several = _ask("GET", f"{address}?per_page={PAGE}&page={page}")
        for one in several:
            if one["body"].replace("\r\n", "\n").startswith(f"{marker}\n") and one["user"]["login"] == writer:
                return dict(one)
        if len(several) < PAGE:
            return None
        page += 1


def _api() -> str:
    return f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}"


def _ask(method: str, address: str, what: dict[str, str] | None = None) -> Any:
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    data = None if what is None else json.dumps(what).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data, headers, method=method), timeout=30) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
