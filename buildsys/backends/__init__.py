"""Who makes codes of a float model: our own walk, or a tool that the recipe names. A module: Knobs, VERSION, and what follows.

`TOOL`: the other tool with its version, "" for none. `READS`: which outputs of earlier steps it needs, of stats and tokens. `RESUMES`:
whether a killed run goes on. `misfits(asked)`, `unfit(config, architecture, left_float)`: why it cannot do what a recipe says, or not for
this model; each as (the recipe's key, what, fix). `ready(where)`: raises BuildError where it cannot run on this machine. `quantize(knobs,
work, progress)`: writes a block file for each layer into the step's folder (quant/blocks.py), and returns facts for the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from buildsys.scheme import Scheme
from buildsys.step import Request

if TYPE_CHECKING:
    from buildsys.quant.model import Model
    from buildsys.quant.rounding import Job

Progress = Callable[[str, int, int], None]
Misfit = tuple[str, str, str]  # a key below `quantization`, or of the recipe ("format"); what; fix


@dataclass(frozen=True)
class Asked:
    """What a recipe says that a backend may not do. `methods`: names in order, each with the knobs that are not its defaults."""

    methods: tuple[tuple[str, Mapping[str, Any]], ...]
    scheme: Scheme
    overrides: bool
    mixed: bool
    format: str


@dataclass(frozen=True)
class Work:
    """One model to quantize: the step with its inputs, the source read block by block, and what to do to each block."""

    request: Request
    model: Model
    job: Job
    formats: Mapping[str, ModuleType]  # whose layouts another tool may write
