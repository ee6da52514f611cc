"""The most that was in use while something ran, and a driver that fails meanwhile is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from buildsys.errors import BuildError
from buildsys.serving import vram
from buildsys.serving.vram import Peak


def row(used: object, index: int = 0) -> str:
    return f"{index}, GPU-{index + 1}, H200, 570, {used}\n"


@pytest.fixture
def used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets what nvidia-smi answers; it is a program of the test's."""
    said, looks = tmp_path / "said", tmp_path / "looks"
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat {said}\necho >> {looks}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(vram, "LOOK_EVERY_S", 0.01)

    def answer(text: str, seen: int = 2) -> None:
        said.with_suffix(".new").write_text(text)
        said.with_suffix(".new").replace(said)  # never seen half-written
        before = len(looks.read_text()) if looks.exists() else -2
        while before >= 0 and len(looks.read_text()) < before + seen:  # the look that may have been under way, and the next
            time.sleep(0.001)

    return answer


def test_the_most_that_was_seen(used: Callable[..., None]) -> None:
    used(row(100) + row(5, 1))
    with Peak() as peak:
        used(row(300) + row(5, 1))
        used(row(100) + row(6, 1))
    assert peak.each == (300 << 20, 6 << 20) and peak.used_bytes == 306 << 20


def test_a_driver_that_fails_meanwhile(used: Callable[..., None]) -> None:
    used(row(100))
    with pytest.raises(BuildError, match="says what is not known here: 0, GPU-1, H200, 570, ERR!"), Peak():
        used(row("ERR!"), 1)


def test_an_error_in_the_body_stays_what_it_is(used: Callable[..., None]) -> None:
    used(row(100))
    with pytest.raises(BuildError, match="no answer"), Peak():
        used(row("ERR!"), 1)
        raise BuildError("server", "no answer", "look")
