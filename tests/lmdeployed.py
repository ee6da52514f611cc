"""A Python that has LMDeploy, for tests that ask LMDeploy itself: without CUDA it parses arguments, makes configs, quantizes on the CPU.

BUILDSYS_LMDEPLOY names it (.ci/lmdeploy makes one); else this one, if it has lmdeploy. Without either such tests are skipped, unless
`lmdeploy` is in BUILDSYS_TEST_REQUIRE.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest


def python() -> str:
    """The interpreter; skips the test where there is none."""
    named = os.environ.get("BUILDSYS_LMDEPLOY")
    if named:
        return named
    if importlib.util.find_spec("lmdeploy") is not None:
        return sys.executable
    told = "no Python with lmdeploy: run BUILDSYS_LMDEPLOY=$(.ci/lmdeploy)"
    if "lmdeploy" in os.environ.get("BUILDSYS_TEST_REQUIRE", ""):
        pytest.fail(f"{told}; BUILDSYS_TEST_REQUIRE names lmdeploy")
    pytest.skip(told)


class Asked:
    """A script that answers lines of JSON with lines of JSON, in a process that lives as long as this: importing LMDeploy takes seconds."""

    def __init__(self, script: Path, arguments: Sequence[str] = ()) -> None:
        self._process = subprocess.Popen(
            [python(), "-P", str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
        )

    def __call__(self, question: Mapping[str, Any]) -> Any:
        """The answer; an assertion with what was raised, where something was."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        assert "raised" not in told, told["raised"]
        return told["answer"]

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _environment() -> dict[str, str]:
    """Ours, less what would have it find other packages, or a network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
