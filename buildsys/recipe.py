"""What a recipe says, as frozen types: parsed once, with the line of every value, and trusted from then on.

Each kind of choice (source, dataset, method, format, check, publisher) is a slot folder (slots.py); workspace.py finds and loads recipes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args

from pydantic import BaseModel, Field, PrivateAttr, StrictBool, StrictFloat, StrictInt, ValidationError, create_model

from buildsys import gpus
from buildsys.backends import Asked
from buildsys.complaints import dotted, explain
from buildsys.document import Document, Where
from buildsys.errors import BuildError, BuildErrors
from buildsys.overlay import is_inside, lexical, settle
from buildsys.scheme import Activations, Bits, GroupSize, Number, Scheme
from buildsys.serving.settings import RopeScaling, ToolCallParser
from buildsys.slots import Choice, Frozen, choice, modules, several

if TYPE_CHECKING:
    Source: TypeAlias = Choice
    Dataset: TypeAlias = Choice
    Method: TypeAlias = Choice
    Backend: TypeAlias = Choice
    Format: TypeAlias = Choice
else:
    Source, Dataset, Method, Backend, Format = (choice(slot) for slot in ("sources", "datasets", "methods", "backends", "formats"))

CHOICES: frozenset[Where] = frozenset(
    {("source",), ("calibration", "dataset"), ("quantization", "backend"), ("verify", "text"), ("format",)}
)
"""Where one choice stands: naming another one in a file that extends replaces it, knobs included."""

PATH_KNOBS = ("path", "paths")
"""Knobs of these names, in every slot, hold paths: relative to the folder of the file that wrote them, inside the workspace
unless the knob `outside` beside them is true."""

Samples = Annotated[StrictInt, Field(ge=1, le=65_536)]
Seqlen = Annotated[StrictInt, Field(ge=16, le=131_072)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]


class Calibration(Frozen):
    """The text that methods see: `samples` windows of `seqlen` tokens."""

    dataset: Dataset = Field(description="where calibration text comes from")
    samples: Samples = Field(default=128, description="how many windows of tokens")
    seqlen: Seqlen = Field(default=2048, description="tokens in a window")
    seed: Seed = Field(default=0, description="which windows are drawn, or which text is sampled")


class Override(Frozen):
    """What is other than the recipe says for the linears that one pattern names."""

    bits: Bits | None = Field(default=None, description="bits a weight of these linears")
    group_size: GroupSize | None = Field(default=None, description="input channels of these linears that share one scale")
    symmetric: StrictBool | None = Field(default=None, description="fix the zeros of these linears at mid-range")
    method: Method | None = Field(default=None, description="the method that rounds these linears: rtn, gptq or gptaq")
    skip: StrictBool | None = Field(default=None, description="true: these linears stay float; false: they do not, whatever skip says")

    def scheme(self, default: Scheme) -> Scheme:
        """`default` with what this says of it."""
        return replace(
            default,
            bits=default.bits if self.bits is None else self.bits,
            group_size=default.group_size if self.group_size is None else self.group_size,
            symmetric=default.symmetric if self.symmetric is None else self.symmetric,
        )


class Mixed(Frozen):
    """Bits for each layer, chosen by what a bit less costs there, under a budget for all of them."""

    budget_bits: Annotated[StrictFloat, Field(gt=1, lt=16)] = Field(
        description="bits a quantized weight may take on average, with its share of scale and zero: 4.5"
    )
    bits: tuple[Bits, ...] = Field(default=(3, 4, 8), min_length=2, description="the bits to choose from")


class Quantization(Frozen):
    """How weights are held in few bits."""

    bits: Bits = Field(description="bits a weight")
    group_size: GroupSize = Field(default=128, description="input channels that share one scale; -1: the whole row")
    symmetric: StrictBool = Field(default=False, description="fix the zero of every group at mid-range")
    number: Number = Field(default="int", description="what a code is: a whole number, or an 8-bit float (fp8: e4m3)")
    activations: Activations = Field(default="none", description="what linears round their inputs to at run time, token by token")
    method: tuple[Method, ...] = Field(min_length=1, description="rescaling methods, if any, then exactly one that rounds: [awq, gptq]")
    backend: Backend = Field(
        default_factory=lambda: Backend.model_validate("native"),
        description="what makes the codes: buildsys itself, or a tool with a version",
    )
    skip: tuple[str, ...] = Field(default=("lm_head",), description="globs over names of linears that stay float")
    overrides: Mapping[str, Override] = Field(
        default_factory=dict, description="globs over names of linears, each with what is other for them; a later one wins"
    )
    mixed: Mixed | None = Field(default=None, description="choose bits layer by layer under a budget, instead of `bits` for all")

    @property
    def scheme(self) -> Scheme:
        """Of every linear that no override names."""
        return Scheme(self.bits, self.group_size, self.symmetric, self.number, self.activations)

    @property
    def told(self) -> str:
        """The scheme for people, and whether it is not that of every linear."""
        return f"{self.scheme}{', mixed' if self.mixed is not None else ''}{', with overrides' if self.overrides else ''}"

    @property
    def kinds(self) -> tuple[Scheme, ...]:
        """Each scheme that the recipe names, once, the default first. (Where patterns overlap, planning knows what comes of it.)"""
        default = self.scheme
        own = [override.scheme(default) for override in self.overrides.values()]  # also where it skips: a later pattern may not
        chosen = [replace(default, bits=bits) for bits in self.mixed.bits] if self.mixed is not None else []
        return tuple(dict.fromkeys((default, *own, *chosen)))


class KvCache(Frozen):
    """How the engine holds keys and values; changes no weight."""

    policy: gpus.KvPolicy = Field(default="none", description="bits of keys and values at run time: LMDeploy's quant_policy 0, 8 or 4")
    max_entry_count: Annotated[StrictFloat, Field(gt=0, lt=1)] = Field(
        default=0.8, description="share of free GPU memory that the cache may take"
    )


class Target(Frozen):
    """The machine that will serve the model; planning refuses what does not fit it."""

    gpu: str = Field(min_length=1, description="a GPU that gpus.py knows: " + ", ".join(gpus.GPUS))
    count: Annotated[StrictInt, Field(ge=1, le=64)] = Field(default=1, description="GPUs that share the model (tensor parallel)")
    session_len: Annotated[StrictInt, Field(ge=16, le=16_777_216)] | None = Field(
        default=None, description="tokens of one conversation; the model's own maximum if left out"
    )
    max_batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] = Field(default=32, description="conversations served at once")
    rope_scaling: RopeScaling | None = Field(
        default=None, description="dynamic: prompts longer than the model's own maximum have their positions stretched (dynamic NTK)"
    )
    tool_call_parser: ToolCallParser | None = Field(
        default=None, description="how the server reads tool calls in what the model writes: LMDeploy's --tool-call-parser"
    )


class _Verify(Frozen):
    """What the result is held to: the text that it is scored on, and the checks, each with its limits."""

    text: Dataset = Field(description="text that calibration has not seen")
    samples: Samples = Field(default=64, description="how many windows of tokens")
    seqlen: Seqlen = Field(default=2048, description="tokens in a window")
    seed: Seed = Field(default=1, description="which windows are drawn, or which text is sampled")

    @property
    def checks(self) -> dict[str, BaseModel]:
        """Knobs of the checks that the recipe names, by name."""
        return _named(self, "checks")


class _Publish(Frozen):
    """Where `doit publish` sends the artifact."""

    waive: tuple[str, ...] = Field(
        default=(), description="checks that may be skipped, and the artifact is published all the same: [serve]"
    )

    @property
    def publishers(self) -> dict[str, BaseModel]:
        """Knobs of the publishers that the recipe names, by name."""
        return _named(self, "publishers")


def _named(model: BaseModel, slot: str) -> dict[str, BaseModel]:
    return {name: knobs for name in modules(slot) if (knobs := getattr(model, name)) is not None}


if TYPE_CHECKING:
    Verify: TypeAlias = _Verify
    Publish: TypeAlias = _Publish
else:
    Verify = create_model("Verify", __base__=_Verify, __doc__=_Verify.__doc__, **several("checks"))
    Publish = create_model("Publish", __base__=_Publish, __doc__=_Publish.__doc__, **several("publishers"))


class Report(Frozen):
    """What `doit report` shows beside numbers: greedy answers of the source and of the result, side by side."""

    prompts: tuple[Annotated[str, Field(min_length=1, max_length=100_000)], ...] = Field(default=(), description="what both are asked")
    path: str | None = Field(default=None, min_length=1, description="a text file of prompts, one a line, relative to this file")
    outside: StrictBool = Field(default=False, description="let the path leave the workspace: the recipe then works on this machine only")
    max_new_tokens: Annotated[StrictInt, Field(ge=1, le=4096)] = Field(default=64, description="tokens of an answer, at most")
    chat: StrictBool | None = Field(default=None, description="ask through the model's chat template; left out: where the model has one")


class Recipe(Frozen):
    """One model to build: where it comes from, how it is quantized, what it is held to, where it goes."""

    schema_version: Literal[1] = Field(alias="schema", description="version of this format; 1")
    source: Source = Field(description="the model to quantize")
    calibration: Calibration = Field(description="the text that methods see")
    quantization: Quantization = Field(description="how weights are held in few bits")
    kv_cache: KvCache = Field(default_factory=KvCache, description="how the engine holds keys and values")
    target: Target | None = Field(default=None, description="the machine that will serve the model")
    format: Format = Field(description="how codes lie on disk")
    verify: Verify = Field(description="what the result is held to")
    publish: Publish = Field(default_factory=Publish, description="where `doit publish` sends the artifact")

    report: Report = Field(default_factory=Report, description="what `doit report` shows beside numbers")
    locked: Literal["required"] | None = Field(
        default=None, description="required: nothing is built that is other than the recipe's lock says"
    )

    _name: str = PrivateAttr("")
    _root: Path = PrivateAttr(default_factory=Path)  # a default itself would be copied deeply for each recipe
    _document: Document = PrivateAttr(default_factory=lambda: Document({}))

    @classmethod
    def parse(cls, name: str, document: Document, root: Path) -> Recipe:
        """The recipe that a composed document says; every mistake that needs no model raises, all in one BuildErrors."""
        data, idle = settle(document, CHOICES)
        errors = [*_idle(document, idle), *stray_paths(document, data, root)]
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            errors += [found for found in explain(error, cls, data, document) if found.missing not in idle]
            raise BuildErrors(errors) from None
        recipe._name, recipe._root, recipe._document = name, root, document
        errors += refusals(recipe)
        if errors:
            raise BuildErrors(errors)
        return recipe

    @property
    def name(self) -> str:
        """The file's stem, or stem@variant."""
        return self._name

    # What is cached here lies beside the fields, where it is found much sooner than a private attribute.

    @cached_property
    def document(self) -> Document:
        """What was written, and by whom."""
        return self._document

    @cached_property
    def root(self) -> Path:
        """The workspace's folder."""
        return self._root

    @cached_property
    def file(self) -> Path:
        """The recipe's own file."""
        return self.root / self.at().rpartition(":")[0]

    def at(self, *where: str | int) -> str:
        """`recipes/x.yaml:9`: the line that wrote this value or, where it is a default, the nearest value around it."""
        return str(self.document.origin(where) or self._name)

    def floating(self) -> list[str]:
        """What the recipe leaves open, so that tomorrow it may name something else; asks no hub."""
        chosen = (("source", self.source), ("calibration.dataset", self.calibration.dataset), ("verify.text", self.verify.text))
        found = [(f"{where}.{choice.name}", choice.module.floats(choice.knobs)) for where, choice in chosen]
        return [f"{where}: {text}" for where, text in found if text]

    def folder(self, *where: str | int) -> Path:
        """What relative paths in the knobs at `where` are relative to: the folder of the file that wrote them (it may be a base)."""
        below = (path for path in self.document.origins if path[: len(where)] == where and path[-1:] and path[-1] in PATH_KNOBS)
        origin = self.document.origin(min(below, key=len, default=where))
        return self.root / os.path.dirname(origin.file) if origin is not None else self.root


def parse_fragment(document: Document, root: Path) -> list[BuildError]:
    """What is wrong with a file for `extends` even before a recipe completes it: anything but what it leaves out."""
    data, _ = settle(document, CHOICES)
    errors = stray_paths(document, data, root)
    try:
        Recipe.model_validate(data)
    except ValidationError as error:
        errors += [found for found in explain(error, Recipe, data, document) if found.missing is None]
    return errors


def _idle(document: Document, idle: list[Where]) -> Iterator[BuildError]:
    """Keys without a value: `kl:` reads as "the kl check", and means "no kl check"."""
    for where in idle:
        what = f"{dotted(where)} is empty (null): that removes an inherited value, and none is inherited here"
        fix = f"write a value (`{where[-1]}: {{}}` where every knob has a default), or leave {where[-1]} out"
        yield BuildError(str(document.origin(where)), what, fix)


def stray_paths(document: Document, data: Mapping[str, Any], root: Path) -> list[BuildError]:
    """Paths that leave the workspace without saying `outside: true`, judged by spelling: a link inside may lead anywhere."""
    errors = []
    for where, knobs, written in _paths(data, ()):
        origin = document.origin(where)
        if origin is None or knobs.get("outside") is True:
            continue
        place = lexical(written, f"{root}{os.sep}{os.path.dirname(origin.file)}")
        absolute = os.path.isabs(written)
        if absolute or not is_inside(place, root):
            how = "is absolute" if absolute else f"leads to {place}, outside the workspace {root}"
            fix = "move it into the workspace, or write outside: true beside it (the recipe then works on this machine only)"
            errors.append(BuildError(str(origin), f"{dotted(where)}: {written} {how}", fix))
    return errors


def _paths(data: Any, where: Where) -> Iterator[tuple[Where, Mapping[str, Any], str]]:
    """Each path of the recipe: where it stands, the knobs around it, and as written."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        at = (*where, key)
        if key in PATH_KNOBS and isinstance(data, Mapping):
            listed = [((*at, index), path) for index, path in enumerate(value)] if isinstance(value, list) else [(at, value)]
            yield from ((place, data, path) for place, path in listed if isinstance(path, str))
        else:
            yield from _paths(value, at)


# Misfits between values, each known without the model


def refusals(recipe: Recipe) -> list[BuildError]:
    """Why valid values do not go together."""
    numbers = [*_numbers(recipe)]
    rest = [*_methods_do(recipe), *_format_holds(recipe)] if not numbers else []
    return [
        *_method_order(recipe),
        *_override_methods(recipe),
        *_backend_misfits(recipe),
        *numbers,
        *rest,
        *_budget(recipe),
        *_known_gpu(recipe),
        *_waivable(recipe),
        *_fresh_text(recipe),
    ]


def _method_order(recipe: Recipe) -> Iterator[BuildError]:
    methods = recipe.quantization.method
    names = [method.name for method in methods]
    written = f"quantization.method: [{', '.join(names)}]"
    where = recipe.at("quantization", "method")
    rounding = [method.name for method in methods if _rounds(method.module)]
    ordered = sorted(methods, key=lambda method: _rounds(method.module))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield BuildError(where, f"{written} names {' and '.join(twice)} twice", f"name {' and '.join(twice)} once")
    elif not rounding:
        fix = f"end the list with one of {', '.join(_rounding())}"
        yield BuildError(where, f"{written} rescales weights, and nothing rounds them", fix)
    elif len(rounding) > 1:
        yield BuildError(where, f"{written} rounds twice, by {' and by '.join(rounding)}", f"keep one of {', '.join(rounding)}, at the end")
    elif list(methods) != ordered:
        fix = f"write [{', '.join(method.name for method in ordered)}]"
        yield BuildError(where, f"{written} rounds first; rescaling comes before rounding", fix)


def _rounds(method: ModuleType) -> bool:
    return bool(method.KIND == "round")


def _rounding() -> list[str]:
    return [name for name, module in modules("methods").items() if _rounds(module)]


def _override_methods(recipe: Recipe) -> Iterator[BuildError]:
    for pattern, override in recipe.quantization.overrides.items():
        if override.method is not None and not _rounds(override.method.module):
            what = f"quantization.overrides.{pattern}.method: {override.method.name} rescales; scales belong to all that read one input"
            fix = f"name one that rounds: {' or '.join(_rounding())}"
            yield BuildError(recipe.at("quantization", "overrides", pattern, "method"), what, fix)


def _backend_misfits(recipe: Recipe) -> Iterator[BuildError]:
    """What another tool cannot do of what the recipe says."""
    q = recipe.quantization
    methods = tuple((method.name, method.knobs.model_dump(exclude_defaults=True)) for method in q.method)
    asked = Asked(methods, q.scheme, bool(q.overrides), q.mixed is not None, recipe.format.name)
    for key, what, fix in q.backend.module.misfits(asked):
        yield BuildError(recipe.at(key) if key == "format" else recipe.at("quantization", key), what, fix)


def _numbers(recipe: Recipe) -> Iterator[BuildError]:
    """Eight-bit floats, and rounded activations, leave no choice of bits, groups or zeros."""
    asked = recipe.quantization
    if asked.number == "int" and asked.activations == "none":
        return
    said = f"number: {asked.number}" if asked.activations == "none" else f"activations: {asked.activations}"
    wanted: dict[str, Any] = {"bits": 8, "group_size": -1, "symmetric": True}
    if asked.activations != "none":
        wanted["number"] = "fp8" if asked.activations == "fp8" else "int"
    for key, value in wanted.items():
        found = getattr(asked, key)
        if found != value:
            wrote, needs = (str(one).lower() if isinstance(one, bool) else one for one in (found, value))
            what = f"quantization.{said} goes with {key}: {needs}, {key} is {wrote}"
            yield BuildError(recipe.at("quantization", key), what, f"set {key}: {needs}")
    if asked.mixed is not None:
        what = f"quantization.mixed chooses bits of whole numbers, and {said} holds eight"
        yield BuildError(recipe.at("quantization", "mixed"), what, "leave mixed out")


def _methods_do(recipe: Recipe) -> Iterator[BuildError]:
    """Each method can do each scheme that it may get."""
    asked = recipe.quantization
    jobs: list[tuple[Where, Method, Scheme]] = [
        (("method",), method, scheme) for method in asked.method for scheme in (asked.kinds if _rounds(method.module) else (asked.scheme,))
    ]
    for pattern, override in asked.overrides.items():
        if override.method is not None:
            jobs.append((("overrides", pattern, "method"), override.method, override.scheme(asked.scheme)))
    told = set()
    for where, method, scheme in jobs:
        reason = method.module.accepts(scheme)
        if reason is not None and (where, reason) not in told:
            told.add((where, reason))
            others = [name for name, module in modules("methods").items() if module.KIND == method.module.KIND]
            able = [name for name in others if modules("methods")[name].accepts(scheme) is None]
            fix = f"name {' or '.join(able)} instead" if able else f"leave {method.name} out"
            yield BuildError(recipe.at("quantization", *where), f"method {method.name} {reason}", fix)


def _format_holds(recipe: Recipe) -> Iterator[BuildError]:
    format, kinds = recipe.format, recipe.quantization.kinds
    reason = format.module.accepts(kinds[0])
    if reason is not None:
        yield BuildError(recipe.at("format"), f"format: {format.name} {reason}", _holders(kinds[0], format.module))
        return
    strange = [str(kind) for kind in kinds if format.module.accepts(kind) is not None]
    reason = f"cannot hold {', '.join(strange)}, which overrides or mixed ask for" if strange else format.module.mixes(kinds)
    if reason is not None:
        others = [name for name, module in modules("formats").items() if _holds(module, kinds)]
        fix = f"set format: {' or '.join(others)}" if others else "give all linears one scheme"
        yield BuildError(recipe.at("format"), f"format: {format.name} {reason}", f"{fix}, or leave overrides and mixed out")


def _holds(format: ModuleType, kinds: tuple[Scheme, ...]) -> bool:
    return all(format.accepts(kind) is None for kind in kinds) and format.mixes(kinds) is None


def _holders(scheme: Scheme, format: ModuleType) -> str:
    """What to change so that a scheme and its format go together, one change at a time."""
    offers = {
        "bits": [bits for bits in get_args(Bits) if format.accepts(replace(scheme, bits=bits)) is None],
        "group_size": [size for size in get_args(GroupSize) if format.accepts(replace(scheme, group_size=size)) is None],
        "symmetric": [str(flag).lower() for flag in (False, True) if format.accepts(replace(scheme, symmetric=flag)) is None],
        "activations": [to for to in get_args(Activations) if format.accepts(replace(scheme, activations=to)) is None],
    }
    fixes = [f"set {knob}: {' or '.join(map(str, values))}" for knob, values in offers.items() if values]
    others = [name for name, module in modules("formats").items() if module.accepts(scheme) is None]
    fixes += [f"format: {' or '.join(others)}"] if others else []
    return ", or ".join(fixes) or "choose another bits, group_size and symmetric; the format says what it holds"


def _budget(recipe: Recipe) -> Iterator[BuildError]:
    """A budget that the smallest choice breaks, or that the largest does not reach, chooses nothing."""
    asked = recipe.quantization
    if asked.mixed is None:
        return
    least, most = min(asked.mixed.bits), max(asked.mixed.bits)
    if asked.bits not in asked.mixed.bits:
        what = f"quantization.bits is {asked.bits}, and mixed chooses from {', '.join(map(str, asked.mixed.bits))}"
        yield BuildError(recipe.at("quantization", "bits"), what, f"set bits: {least}, or add {asked.bits} to mixed.bits")
    if least == most or not least < asked.mixed.budget_bits < most + 1:
        what = f"quantization.mixed.budget_bits is {asked.mixed.budget_bits:g}; bits from {least} to {most} leave nothing to choose there"
        fix = f"set a budget between {least} and {most}" if least < most else "name other bits too in mixed.bits"
        yield BuildError(recipe.at("quantization", "mixed", "budget_bits"), what, fix)


def _waivable(recipe: Recipe) -> Iterator[BuildError]:
    """A waiver names a check that the recipe has, and that can be skipped at all; what always runs either holds or does not."""
    able = [name for name in recipe.verify.checks if "required" in type(recipe.verify.checks[name]).model_fields]
    for at, name in enumerate(recipe.publish.waive):
        if name not in able:
            what = f"publish.waive names {name}, which is no check of this recipe that can be skipped"
            fix = f"name {' or '.join(able)}, or leave waive out" if able else "leave waive out"
            yield BuildError(recipe.at("publish", "waive", at), what, fix)
        elif getattr(recipe.verify.checks[name], "required", "auto") == "always":
            what = f"publish.waive names {name}, and verify.{name}.required is always"
            yield BuildError(recipe.at("publish", "waive", at), what, "leave one of the two out")


def _known_gpu(recipe: Recipe) -> Iterator[BuildError]:
    if recipe.target is None or gpus.lookup(recipe.target.gpu) is not None:
        return
    near = gpus.close(recipe.target.gpu)
    fix = f"did you mean {' or '.join(near)}?" if near else f"name one of {', '.join(gpus.GPUS)}, or leave target out"
    yield BuildError(recipe.at("target", "gpu"), f"target.gpu: {recipe.target.gpu} is not in the table of GPUs", fix)


def _fresh_text(recipe: Recipe) -> Iterator[BuildError]:
    """Text that the model writes itself is new only under another seed. (Other text is compared window by window, once there is any.)"""
    calibration, verify = recipe.calibration, recipe.verify
    generates = calibration.dataset.module.READS != "text"
    if generates and calibration.dataset.name == verify.text.name and calibration.seed == verify.seed:
        what = f"verify.seed and calibration.seed are both {verify.seed}: {verify.text.name} would write the same text for both"
        yield BuildError(recipe.at("verify", "seed"), what, f"set verify.seed: {calibration.seed + 1}")
