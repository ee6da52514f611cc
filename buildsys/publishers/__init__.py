"""Where an artifact goes. A module: Knobs, VERSION, `destination`, `plan`, `publish`, `verify`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Receipt:
    """Proof of a publication: where it can be had, and the digest of what was read back from there."""

    url: str
    digest: str  # step.digest of {name: sha256}, as an artifact's own
