"""Hosts that could not be reached when something was planned: asked once in a process, which may have many recipes to plan.

Planning alone is told so. A download or a publish, which may come hours later, tries for itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from buildsys.errors import BuildError


class Unreachable(BuildError):
    """No connection was made: the next question would wait as long, and end no other way."""


@cache
def silent() -> dict[str, tuple[str, str]]:
    """Address -> what was found there, and its fix. A test that needs a new process calls silent.cache_clear()."""
    return {}


@contextmanager
def asked_once(address: str, where: str, fix: str = "") -> Iterator[None]:
    """Around planning's questions to `address`. `fix`: what mends it at this `where`, if anything does that mends nothing elsewhere."""
    if address in silent():
        what, mended = silent()[address]
        raise Unreachable(where, what, fix or mended)
    try:
        yield
    except Unreachable as error:
        silent()[address] = error.what, error.fix
        raise


def answers(address: str) -> None:
    """It does by now."""
    silent().pop(address, None)
