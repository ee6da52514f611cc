"""Decides whether an event may start builds: builds run a pull request's code on machines of ours, so somebody who may write has to ask.

A label or a comment is worth as much as who gave it, and holds for the commit that they saw: a comment on a fork's pull request has to
name that commit, since its owner can push another between the comment and the build. GitHub's REST API alone, and the standard library.
"""

from __future__ import annotations

import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITERS = ("admin", "write")  # the API says `write` of maintainers too
COMMAND = re.compile(r"/build(?:[ \t]+(?P<recipes>[A-Za-z0-9@._*?,/-]*?))??(?:[ \t]+(?P<sha>[0-9a-f]{7,40}))?[ \t]*")
NAMES = re.compile(r"[A-Za-z0-9@._*?,/-]*")
ZEROS = "0" * 40


@dataclass(frozen=True)
class Decision:
    go: bool
    why: str
    sha: str = ""
    base: str = ""
    recipes: str = ""
    number: str = ""
    answer: bool = False  # whether the pull request is to be told


def main() -> int:
    event = json.loads(Path(os.environ["GITHUB_EVENT_PATH"]).read_text())
    try:
        decided = decide(os.environ["GITHUB_EVENT_NAME"], event)
    except urllib.error.URLError as error:
        print(f"::error::GitHub's API does not answer: {error}; run the job again")
        return 1
    told = Path(os.environ["RUNNER_TEMP"], "gate.md")
    run = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}/actions/runs/{os.environ['GITHUB_RUN_ID']}"
    told.write_text(f"{decided.why} [The run]({run}).\n")
    print(f"::notice::{decided.why}")
    outputs = {
        "go": str(decided.go).lower(),
        "sha": decided.sha,
        "base": decided.base,
        "recipes": decided.recipes,
        "number": decided.number,
        "file": str(told) if decided.answer else "",
    }
    with Path(os.environ["GITHUB_OUTPUT"]).open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in outputs.items())
    return 0


def decide(name: str, event: dict[str, Any]) -> Decision:
    if name == "push":
        before = event["before"]
        base = before if before != ZEROS else f"{event['after']}~1"
        return Decision(True, f"Building what {event['after'][:12]} changed.", event["after"], base)
    if name == "workflow_dispatch":
        sha, recipes = os.environ["GITHUB_SHA"], os.environ.get("RECIPES", "").strip()
        if NAMES.fullmatch(recipes) is None:
            return Decision(False, "Not built: recipes are names or globs, separated by commas.")
        return Decision(True, f"Building {recipes or 'what changed'} as of {sha[:12]}.", sha, f"{sha}~1", recipes)
    if name == "pull_request":
        return _asked(event["sender"]["login"], event["pull_request"], "", event["pull_request"]["head"]["sha"])
    if name == "issue_comment":
        return _comment(event)
    return Decision(False, f"Not built: {name} starts no build.")


def _comment(event: dict[str, Any]) -> Decision:
    line = event["comment"]["body"].strip().partition("\n")[0].strip()
    if "pull_request" not in event["issue"] or re.match(r"/build(\s|$)", line) is None:
        return Decision(False, "Not built: no /build on a pull request.")
    number, who = str(event["issue"]["number"]), event["comment"]["user"]["login"]
    command = COMMAND.fullmatch(line)
    if command is None:
        if not _writes(who):
            return Decision(False, f"Not built: {who} may not write here.")
        return Decision(False, "Not built: write `/build`, `/build RECIPES` or `/build RECIPES COMMIT`.", number=number, answer=True)
    return _asked(who, _get(f"pulls/{number}"), command["recipes"] or "", command["sha"])


def _asked(who: str, pull: dict[str, Any], recipes: str, seen: str | None) -> Decision:
    """`seen`: the commit that was asked for, if any was."""
    number, head = str(pull["number"]), pull["head"]["sha"]
    if not _writes(who):
        return Decision(False, f"Not built: {who} may not write here.")
    fork = pull["head"]["repo"] is None or pull["head"]["repo"]["full_name"] != os.environ["GITHUB_REPOSITORY"]
    if seen is None and fork:
        why = f"Not built: this comes from a fork. Its code will run on our machines: read it, then write `/build {head}`."
        return Decision(False, why, number=number, answer=True)
    if seen is not None and not head.startswith(seen):
        why = f"Not built: {seen[:12]} is no longer the last commit, {head[:12]} is. Read that one, then ask again."
        return Decision(False, why, number=number, answer=True)
    why = f"Building {f'`{recipes}`' if recipes else 'what changed'} as of {head[:12]}, asked for by {who}."
    return Decision(True, why, head, pull["base"]["sha"], recipes, number, answer=True)


def _writes(who: str) -> bool:
    try:
        return _get(f"collaborators/{urllib.parse.quote(who)}/permission")["permission"] in WRITERS
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def _get(path: str) -> Any:
    headers = {
        "Accept": "application/vnd.github+json",
        "Authorization": f"Bearer {os.environ['GITHUB_TOKEN']}",
        "X-GitHub-Api-Version": "2022-11-28",
    }
    address = f"{os.environ['GITHUB_API_URL']}/repos/{os.environ['GITHUB_REPOSITORY']}/{path}"
    with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
