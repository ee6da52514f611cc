"""Where child processes keep the bytecode of what they import, where Python keeps none beside the sources.

Images of containers are built with PYTHONDONTWRITEBYTECODE, or by somebody else than who runs them: there every process compiles the 1,500
modules of torch anew, which is half of its import. In a folder apart Python holds bytecode to its source as it always does (PEP 3147).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from buildsys import disk

FORBIDS, APART = "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"


def kept(environment: Mapping[str, str]) -> dict[str, str]:
    """The `environment` for children that import torch: as it is, unless every one of them would compile torch and this process's user has
    a folder that nobody else can write into."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None or spec.cached is None or APART in environment or Path(spec.cached).exists():
        return dict(environment)
    if not environment.get(FORBIDS) and not _closed(Path(spec.cached)):
        return dict(environment)
    home = _home(Path(spec.origin).parent.parent)
    if home is None:  # Python would find nothing beside any source then, and keep nothing either
        return dict(environment)
    return {name: value for name, value in environment.items() if name != FORBIDS} | {APART: str(home)}


def _closed(compiled: Path) -> bool:
    """Whether no bytecode can come where Python would put it."""
    return not os.access(next(folder for folder in compiled.parents if folder.exists()), os.W_OK)


def _home(packages: Path) -> Path | None:
    """The folder for what is installed there, which must be this user's alone: whoever writes bytecode runs code. Versions are in its name:
    images with equal paths may give all their files one time, by which Python tells sources apart."""
    try:
        home = disk.user_cache() / "bytecode" / hashlib.sha256("\n".join(sorted(os.listdir(packages))).encode()).hexdigest()[:16]
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (home, home.parent):
            found = folder.stat()
            if found.st_uid != os.getuid() or found.st_mode & 0o022 or not os.access(folder, os.W_OK):
                return None
    except (OSError, RuntimeError):  # a disk that is full or not ours; nobody's home
        return None
    return home
