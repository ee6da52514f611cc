"""The folder is the registry: a file in a slot folder is a choice that a recipe can name.

A slot module offers `Knobs` (a frozen pydantic model, the choice's settings and their only defaults), `VERSION` (an integer, bumped when
its output changes) and its entry functions. Here a folder becomes a validated choice: `{name: {knobs}}`, or just `name`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache, cached_property
from types import ModuleType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, create_model, model_validator

SLOTS = ("sources", "datasets", "methods", "backends", "formats", "archs", "checks", "publishers")


class Frozen(BaseModel):
    """Base of everything that a recipe says: immutable, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@cache
def modules(slot: str) -> dict[str, ModuleType]:
    """Every choice of a slot by name, sorted; importing one never loads torch (a test holds it)."""
    package = importlib.import_module(f"buildsys.{slot}")
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
    return {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}


class Choice(Frozen):
    """Exactly one choice of a slot, written `{name: {knobs}}`, or `name` where the defaults serve."""

    slot: ClassVar[str]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raw = {raw: {}}
        if isinstance(raw, dict):
            named = {key: {} if value is None else value for key, value in raw.items()}
            if len(named) != 1:
                raise ValueError(f"takes one choice of {', '.join(cls.model_fields)}; has {', '.join(map(str, named)) or 'none'}")
            return named
        return raw

    @cached_property
    def name(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def knobs(self) -> BaseModel:
        knobs: BaseModel = getattr(self, self.name)
        return knobs

    @cached_property
    def module(self) -> ModuleType:
        return modules(self.slot)[self.name]


@cache
def choice(slot: str) -> type[Choice]:
    """The pydantic type of "one of this folder": errors and JSON Schema list the choices."""
    fields: dict[str, Any] = {name: (module.Knobs | None, None) for name, module in modules(slot).items()}
    made = create_model(f"{slot.capitalize()}Choice", __base__=Choice, **fields)
    made.slot = slot
    return made


def several(slot: str) -> dict[str, Any]:
    """Field definitions for a model in which each choice of a slot may be named at most once."""
    return {name: (module.Knobs | None, None) for name, module in modules(slot).items()}
