"""What a recipe says of each linear of its model: the patterns of `skip` and `overrides`, resolved against the linears' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from buildsys.architecture import Architecture, fused
from buildsys.errors import BuildError
from buildsys.quant.budget import least_bits, too_small
from buildsys.recipe import Override, Recipe
from buildsys.scheme import Scheme, Schemes
from buildsys.slots import Choice
from buildsys.survey import Survey


@dataclass(frozen=True)
class Linears:
    """What the recipe says of each linear of its model, patterns resolved: its scheme, and its rounding method where that is its own."""

    schemes: Schemes
    methods: Mapping[str, Choice]


def linears(recipe: Recipe, surveyed: Survey) -> tuple[Linears, list[BuildError]]:
    """Patterns of `skip` and `overrides` against the linears of the model; one that names nothing is an error."""
    a, asked = surveyed.architecture, recipe.quantization
    names = [a.prefix(layer) + linear.name for layer in range(a.layers) for linear in a.linears]
    errors = [*_idle_patterns(recipe, a, names)]
    left, own, methods = {name for name in names if _matches(name, asked.skip)}, dict[str, Scheme](), dict[str, Choice]()
    for name in names:
        for override in _overrides(recipe, name):
            own[name] = override.scheme(own.get(name, asked.scheme))
            if override.skip is not None:
                (left.add if override.skip else left.discard)(name)
            if override.method is not None:
                methods[name] = override.method
    other = {name: scheme for name, scheme in own.items() if scheme != asked.scheme and name not in left}
    schemes = Schemes(asked.scheme, frozenset(left), MappingProxyType(other))
    errors += [*_unlike(recipe, a, schemes), *_too_few_bits(recipe, a, schemes)]
    if len(left) == len(names):
        where = recipe.at("quantization", "skip")
        errors.append(BuildError(where, "quantization.skip matches every linear: nothing would be quantized", "narrow the patterns"))
    return Linears(schemes, MappingProxyType(methods)), errors


def _overrides(recipe: Recipe, name: str) -> Iterator[Override]:
    return (override for pattern, override in recipe.quantization.overrides.items() if _matches(name, (pattern,)))


def _idle_patterns(recipe: Recipe, a: Architecture, names: list[str]) -> Iterator[BuildError]:
    asked, head = recipe.quantization, (a.lm_head or "lm_head.weight").removesuffix(".weight")
    where = recipe.at("quantization", "skip")
    fix = f"name linears as the model does, for example {names[-1]} or {names[-1].rpartition('.')[2]}"
    for pattern in asked.skip:
        if not any(_matches(name, (pattern,)) for name in (*names, head, "lm_head")):
            yield BuildError(where, f"quantization.skip: {pattern} matches no linear of this model", fix)
    if not (_matches(head, asked.skip) or _matches("lm_head", asked.skip)):
        yield BuildError(where, "quantization.skip lacks lm_head, which no engine reads quantized", "add lm_head to skip")
    for pattern in asked.overrides:
        if not any(_matches(name, (pattern,)) for name in names):
            at = recipe.at("quantization", "overrides", pattern)
            yield BuildError(at, f"quantization.overrides: {pattern} matches no linear of this model", fix)


def _unlike(recipe: Recipe, a: Architecture, schemes: Schemes) -> Iterator[BuildError]:
    """Linears that engines fuse have to be all float, or all of one scheme."""
    groups = tuple(fused(a))
    for layer in range(a.layers):
        for together in groups:
            names = [a.prefix(layer) + linear.name for linear in together]
            kinds = {name: schemes.of(name) for name in names}
            if len(set(kinds.values())) == 1:
                continue
            short = ", ".join(name.rpartition(".")[2] for name in names)
            kept = next((name for name, scheme in kinds.items() if scheme is None), None)
            if kept is not None:
                where, what = recipe.at("quantization", "skip"), f"quantization.skip leaves {kept} float, and not what engines fuse it with"
                yield BuildError(where, what, f"skip all of {short}")
            else:
                said = "; ".join(f"{name.rpartition('.')[2]} {scheme}" for name, scheme in kinds.items())
                what = f"quantization.overrides gives linears that engines fuse different schemes ({a.prefix(layer)}: {said})"
                yield BuildError(recipe.at("quantization", "overrides"), what, f"name all of {short} in one pattern")
            return


def _too_few_bits(recipe: Recipe, a: Architecture, schemes: Schemes) -> Iterator[BuildError]:
    """A budget that the smallest choice for every linear breaks."""
    mixed = recipe.quantization.mixed
    if mixed is not None and any(schemes.of(a.prefix(at) + linear.name) for at in range(a.layers) for linear in a.linears):
        least = least_bits(a, schemes, tuple(fused(a)), mixed.bits)
        if least > mixed.budget_bits:
            yield too_small(mixed.budget_bits, least, recipe.at("quantization", "mixed", "budget_bits"))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches the whole name, or a tail of it that starts at a dot: `down_proj`, `layers.0.*`."""
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns)
