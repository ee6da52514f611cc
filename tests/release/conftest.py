"""Private keys here are for their owner alone, as signing wants them, whatever the umask of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _private() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)
