"""Files that planning has found, here or on a hub: what can be known of them before they are brought here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Located:
    """What `locate` of a source or a dataset answers; `fetch` of the same module brings the files here."""

    files: Mapping[str, Path]  # what planning may read: the file itself or, for a name in `sizes`, its safetensors header alone
    sha256: Mapping[str, str] = field(default_factory=dict)  # as far as it is known without reading: a hub tells it
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes of the files that are not here yet
    how: Mapping[str, Any] = field(default_factory=dict)  # plain JSON that `fetch` understands, never a secret; empty: all are here
    lacks: str = ""  # why its files cannot be had now: it is known from a lock alone, and nothing of it can be read
    commit: str = ""  # of a hub, in full: asking for it again finds the same files
    pin: str = ""  # what was found, for people: `internlm/internlm2_5-7b-chat at 9b8d9553846b`

    @property
    def names(self) -> tuple[str, ...]:
        """Every file; large ones that planning does not read are not among `files` before they are fetched."""
        return tuple(sorted({*self.files, *self.sha256}))
