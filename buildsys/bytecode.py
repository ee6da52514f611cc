"""Where child processes keep the bytecode of what they import, where Python keeps none beside the sources.

Images of containers are built with PYTHONDONTWRITEBYTECODE, or by somebody else than who runs them: there every process compiles the 1,500
modules of torch anew, which is half of its import. In a folder apart Python holds bytecode to its source as it always does (PEP 3147).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from buildsys import disk

FORBIDS, APART = "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"


def kept(environment: Mapping[str, str]) -> dict[str, str]:
    """The `environment` for children that import torch: as it is, unless every one of them would compile torch."""
    spec = find_spec("torch")
    if spec is None or spec.cached is None or Path(spec.cached).exists() or not (environment.get(FORBIDS) or _closed(Path(spec.cached))):
        return dict(environment)
    try:
        home = disk.user_cache() / "bytecode"
    except RuntimeError:  # nobody's home
        return dict(environment)
    return {name: value for name, value in environment.items() if name != FORBIDS} | {APART: str(home)}


def _closed(compiled: Path) -> bool:
    """Whether no bytecode can come where Python would put it."""
    return not os.access(next(folder for folder in compiled.parents if folder.exists()), os.W_OK)
