"""What several recipes share, found once: a model's files, their digests, its survey, what is quantized of it and what that weighs.

A finder lives as long as one command. Files are looked at once in that time, as a workspace reads each recipe once; the next command looks
again. A thousand recipes of five models so cost five models, and one hub that cannot be reached is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

from buildsys import deployment, effort, footprint, misfits
from buildsys.errors import BuildError
from buildsys.linears import Linears, linears
from buildsys.located import Located
from buildsys.recipe import Recipe
from buildsys.scheme import Schemes
from buildsys.slots import Choice
from buildsys.store import Store
from buildsys.survey import Survey, survey

Answer = TypeVar("Answer")


class Finder:
    """Answers questions about files and models, each once. Objects that it answered with are kept, so that their identity is a key."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._answers: dict[Hashable, Any] = {}
        self._refusals: dict[Hashable, BuildError] = {}

    def once(self, key: Hashable, find: Callable[[], Answer]) -> Answer:
        """`find()`, or what it answered, or refused, when `key` was asked before."""
        if key in self._refusals:
            raise self._refusals[key]
        if key not in self._answers:
            try:
                self._answers[key] = find()
            except BuildError as error:
                self._refusals[key] = error
                raise
        answer: Answer = self._answers[key]
        return answer

    def located(self, recipe: Recipe, where: tuple[str, ...], chosen: Choice, revision: str = "") -> Located:
        """The files of the recipe's choice at `where`; what is wrong with them is told at the recipe's own line. `revision` is asked for
        in the place of the choice's own."""
        knobs = chosen.knobs.model_copy(update={"revision": revision}) if revision else chosen.knobs
        folder, home = recipe.folder(*where), self.store.home / "hub"
        key = ("located", chosen.slot, chosen.name, knobs.model_dump_json(), folder)
        try:
            found: Located = self.once(key, lambda: chosen.module.locate(knobs, folder, home))
        except BuildError as error:
            raise BuildError(recipe.at(*where, chosen.name), f"{error.where}: {error.what}", error.fix) from None
        return found

    def digests(self, found: Located) -> Mapping[str, str]:
        """sha256 of each file, as far as it is not known from a hub read here. `found` is of `located`."""
        return self.once(
            ("digests", id(found)), lambda: {name: found.sha256.get(name) or self.store.sha256(found.files[name]) for name in found.names}
        )

    def survey(self, found: Located) -> Survey:
        """What the model is. `found` is of `located`."""
        return self.once(("survey", id(found)), lambda: survey(found.files, found.sizes))

    def linears(self, recipe: Recipe, surveyed: Survey) -> tuple[Linears, list[BuildError]]:
        """As linears.linears; mistakes have the recipe's own lines, so they are looked for in each. `surveyed` is of `survey`."""
        asked = recipe.quantization.model_dump_json(exclude={"method", "backend"})
        key = ("linears", id(surveyed), asked)
        if key in self._answers:
            known: Linears = self._answers[key]
            return known, []
        made, errors = linears(recipe, surveyed)
        if not errors:
            self._answers[key] = made
        return made, errors

    def unheld(self, recipe: Recipe, surveyed: Survey, schemes: Schemes) -> list[BuildError]:
        """As misfits.unheld; mistakes have the recipe's own lines, so they are looked for in each. `surveyed` is of `survey`."""
        mixed = recipe.quantization.mixed
        asked = recipe.format.model_dump_json(), None if mixed is None else mixed.bits, recipe.quantization.scheme
        key = ("held", id(surveyed), id(self._kept(schemes)), *asked)
        if key in self._answers:
            return []
        errors = misfits.unheld(recipe, surveyed, schemes)
        if not errors:
            self._answers[key] = True
        return errors

    def engine(self, recipe: Recipe, surveyed: Survey) -> tuple[str, tuple[str, ...]]:
        """As deployment.engine. `surveyed` is of `survey`."""
        target, policy = recipe.target, recipe.kv_cache.policy
        asked = recipe.format.model_dump_json(), recipe.quantization.kinds, policy, target.gpu if target is not None else None
        key = ("engine", id(surveyed), *asked)
        if key not in self._answers:  # what it raises has the recipe's own line
            self._answers[key] = deployment.engine(recipe, surveyed)
        known: tuple[str, tuple[str, ...]] = self._answers[key]
        return known

    def serving(self, recipe: Recipe, surveyed: Survey, schemes: Schemes) -> footprint.Serving | None:
        """As deployment.serving."""
        said = deployment.on_target(recipe, surveyed)
        if said is None:
            return None
        key = ("held", id(self._kept(surveyed.architecture)), id(self._kept(schemes)), said.count, said.gpu.sm)
        here = self.once(key, lambda: footprint.held(surveyed.architecture, schemes, said.count, said.gpu.sm))
        return footprint.filled(surveyed.architecture, schemes, here, said)

    def building(self, surveyed: Survey, schemes: Schemes, speed: effort.Speed, **asked: Any) -> effort.Building:
        """As effort.building; all of `asked` can be hashed."""
        architecture = surveyed.architecture
        both = id(self._kept(architecture)), id(self._kept(schemes))
        held = self.once(("weights", *both), lambda: footprint.weights(architecture, schemes))
        return self.once(
            ("building", *both, speed, *asked.items()), lambda: effort.building(architecture, schemes, speed, held=held, **asked)
        )

    def _kept(self, thing: Answer) -> Answer:
        """Kept alive, so that no other object gets its id."""
        self._answers[("kept", id(thing))] = thing
        return thing
