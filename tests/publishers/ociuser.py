"""The OCI publisher as tests use it: one repository, releases small and large, and refusals that must say what mends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from publishers.places import described, release
from registry import SECRET

from buildsys.errors import BuildError
from buildsys.publishers import Release, oci

REPO = "my-org/tiny-4bit"
WEIGHTS = "model.safetensors"


def quiet(what: str, done: int, total: int) -> None:
    assert what and 0 <= done <= total


def at(host: str, **knobs: Any) -> oci.Knobs:
    return oci.Knobs(repo=f"{host}/{REPO}", **knobs)


def publish(knobs: oci.Knobs, made: Release) -> str:
    receipt = oci.publish(knobs, made, oci.destination(knobs, made.tree), quiet)
    assert receipt.digest == made.digest
    return receipt.url


def verify(knobs: oci.Knobs, made: Release) -> str:
    return oci.verify(knobs, made, oci.destination(knobs, made.tree), quiet).url


def refused(what: Any, *arguments: Any) -> BuildError:
    with pytest.raises(BuildError) as caught:
        what(*arguments)
    assert caught.value.fix and SECRET not in str(caught.value)
    return caught.value


def large(folder: Path, mib: float = 3.5) -> Release:
    release(folder, "a")
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * int(4096 * mib))
    return described(folder)
