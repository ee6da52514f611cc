"""A lock as frozen types: what a recipe named when it was locked, and what came of its last verified build.

A lock pins what floats (a branch to a commit), knows every file by its sha256, and has the model's config and shapes, so that a recipe can
be planned where its hub cannot be reached. How it lies on disk: lockfile.py. How it is made of a plan, and held against one: lock.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from buildsys import lockfile
from buildsys.document import Document, Where
from buildsys.errors import BuildError
from buildsys.locktext import Texts
from buildsys.slots import Choice, Frozen

SUFFIX = ".lock"
_SHA256 = r"[0-9a-f]{64}"
Digest = Annotated[str, Field(pattern=f"^{_SHA256}$")]
Count = Annotated[int, Field(ge=0)]


class _Locked(Frozen):
    model_config = ConfigDict(strict=True)


class Pinned(_Locked):
    """A choice of the recipe, and the files that it stood for. `choice`: {name: knobs}, defaults written out."""

    choice: Annotated[Mapping[str, Mapping[str, Any]], Field(min_length=1, max_length=1)]
    pin: str = ""  # the commit that the choice's revision pointed to; "": its files are local
    files: Mapping[str, Digest]
    sizes: Mapping[str, Count]  # bytes

    def fits(self, chosen: Choice) -> bool:
        """Whether the recipe still says this."""
        return dict(self.choice) == written(chosen)


class Tensor(_Locked):
    """`count` tensors of one name but for the numbers in it."""

    dtype: str
    shape: tuple[Count, ...]
    count: Count


class Model(_Locked):
    """What planning has to know of a model. `tensors`: by name, with * for the numbers of layers and experts."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    tokenizer: str  # the file that holds it
    template: Annotated[str, Field(pattern=f"^({_SHA256})?$")] = ""  # of the chat template; "": there is none


class Measured(_Locked):
    """One measured value with the ends of its 95% interval."""

    model_config = ConfigDict(strict=True, allow_inf_nan=True)

    check: str
    name: str
    value: float
    unit: str
    low: float
    high: float


class Built(_Locked):
    """The last verified build: what came out, and what was measured where. Steps by label; digests are of a step's whole output."""

    artifact: Digest
    steps: Mapping[str, Digest]
    measurements: tuple[Measured, ...]  # by check and name
    verdicts: Mapping[str, str]  # check -> passed, skipped
    on: str  # the GPU's name, or the processor's
    seconds: Mapping[str, float]
    size_bytes: Count


class Locked(_Locked):
    """One recipe or variant."""

    asked: Digest  # of all that a plan is made of and that needs no network: equal ones plan equal steps (see `asked`)
    source: Pinned
    model: Model
    calibration: Pinned | None = None  # None: the model writes the text itself
    text: Pinned | None = None  # what verify scores
    tokens: Mapping[str, Digest] = Field(default_factory=dict)  # calibration, verify -> sha256 of the token ids; once built
    steps: Mapping[str, Digest] = Field(default_factory=dict)  # label -> planned key; none of a step that depends on the machine that plans
    knobs: Mapping[str, Any] = Field(default_factory=dict)  # what the keys are made of: knobs that have one value in every step
    own: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)  # and those of one step, by label
    built: Built | None = None


class Lock(_Locked):
    """The lock of one file: its recipe and its variants, by name."""

    recipes: Annotated[Mapping[str, Locked], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_file(self) -> Self:
        stems = {name.partition("@")[0] for name in self.recipes}
        if len(stems) != 1:
            raise ValueError(f"holds recipes of several files: {', '.join(sorted(stems))}")
        return self

    @property
    def stem(self) -> str:
        return next(iter(self.recipes)).partition("@")[0]

    def text(self) -> str:
        """The file's whole content. Raises BuildError where a model's config cannot be written as text."""
        plain = {name: _plain(locked) for name, locked in sorted(self.recipes.items())}
        asked = {name: one.pop("asked") for name, one in plain.items()}
        base = lockfile.base_of(self.stem, plain)
        others = {name: lockfile.less(plain[base], one) for name, one in plain.items() if name != base}
        heading = f"Written by `{again(self.stem)}`, held to by builds; `doit lock check=1` says whether it still fits. Do not edit it."
        return lockfile.sealed(heading, {"recipe": self.stem, "asked": asked}, {"recipes": {base: plain[base], **others}})

    @classmethod
    def read(cls, path: Path, where: str = "", texts: Texts | None = None) -> Lock:
        """The inverse of `text`; `where` is what errors call the file. Raises BuildError with file, line and command on anything odd.
        Whoever reads several locks hands the same `texts` to each."""
        stem, where = path.name.removesuffix(SUFFIX), where or str(path)
        said = lockfile.quick(path, texts or Texts())
        if said is not None:
            try:
                return cls._of(Document(said), stem)
            except BuildError:
                pass  # said again below, with its line
        found = lockfile.raw(path, where, again(stem))
        lock = cls._of(found, stem)
        lockfile.check_seal(path, found, again(stem))
        return lock

    @classmethod
    def _of(cls, found: Document, stem: str) -> Lock:
        _check_head(found, stem)
        return cls(recipes=dict(_recipes(found, stem)))


def written(chosen: Choice) -> dict[str, Any]:
    """A choice as plain data, {name: knobs}: what is no default, and the revision always."""
    knobs = chosen.knobs.model_dump(mode="json", exclude_defaults=True)
    return {chosen.name: knobs | chosen.knobs.model_dump(mode="json", include={"revision"})}


def collapsed(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors by name with * for numbers; those of one such name that differ in type or shape stand by themselves."""
    groups: dict[str, dict[tuple[str, tuple[int, ...]], list[str]]] = {}
    for name, kind in tensors.items():
        pattern = ".".join("*" if part.isdecimal() else part for part in name.split("."))
        groups.setdefault(pattern, {}).setdefault(kind, []).append(name)
    found = {}
    for pattern, kinds in groups.items():
        for (dtype, shape), names in kinds.items():
            alike = {pattern: len(names)} if len(kinds) == 1 else dict.fromkeys(names, 1)
            found.update({name: Tensor(dtype=dtype, shape=shape, count=count) for name, count in alike.items()})
    return dict(sorted(found.items()))


# To plain data and back


def again(stem: str) -> str:
    """The command that writes a lock anew."""
    return f"doit lock recipe={stem}"


def _plain(locked: Locked) -> dict[str, Any]:
    """What is written of one recipe, sorted."""
    found: dict[str, Any] = {"asked": locked.asked, "source": _pinned(locked.source)}
    model = locked.model
    told = {name: {"dtype": one.dtype, "shape": list(one.shape), "count": one.count} for name, one in sorted(model.tensors.items())}
    found["model"] = {"config": _sorted(model.config), "tensors": told, "tokenizer": model.tokenizer}
    found["model"] |= {"template": model.template} if model.template else {}
    for key in ("calibration", "text"):
        pinned: Pinned | None = getattr(locked, key)
        found |= {key: _pinned(pinned)} if pinned is not None else {}
    found |= {key: _sorted(value) for key in ("tokens", "steps", "knobs", "own") if (value := getattr(locked, key))}
    return found | ({"built": _built(locked.built)} if locked.built is not None else {})


def _pinned(pinned: Pinned) -> dict[str, Any]:
    files = {name: {"sha256": sha256, "bytes": pinned.sizes[name]} for name, sha256 in sorted(pinned.files.items())}
    return {**_sorted(pinned.choice), **({"pin": pinned.pin} if pinned.pin else {}), "files": files}


def _built(built: Built) -> dict[str, Any]:
    measured: dict[str, dict[str, Any]] = {}
    for one in built.measurements:
        exact = one.low == one.value == one.high
        ends = {} if exact else {"low": one.low, "high": one.high}
        measured.setdefault(one.check, {})[one.name] = {"value": one.value, "unit": one.unit, **ends}
    return {
        "on": built.on,
        "artifact": built.artifact,
        "size_bytes": built.size_bytes,
        "verdicts": _sorted(built.verdicts),
        "measurements": measured,
        "steps": _sorted(built.steps),
        "seconds": _sorted(built.seconds),
    }


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(inner) for key, inner in sorted(value.items())}
    return [_sorted(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_head(found: Document, stem: str) -> None:
    """The lock is this recipe's, and has nothing that no lock has."""
    head = ("lock", "seal", "recipe", "asked", "recipes")
    for key in (*found.data, *head):
        where = str(found.origin((key,)))
        if key not in head:
            raise BuildError(where, f"has the unknown key {key}", again(stem))
        if key not in found.data:
            raise BuildError(where, f"has no {key}", again(stem))
    if found.data["recipe"] != stem:
        what = f"is the lock of {found.data['recipe']!r}; it lies beside the recipe {stem}"
        raise BuildError(str(found.origin(("recipe",))), what, f"{again(stem)} (a lock is written, never copied)")
    for key in ("asked", "recipes"):
        said = found.data[key]
        if not isinstance(said, Mapping) or not said:
            raise BuildError(str(found.origin((key,))), f"{key} is no mapping of recipes", again(stem))
        for name in said:
            if name.partition("@")[0] != stem:
                raise BuildError(str(found.origin((key, name))), f"{key} has {name!r}, no variant of {stem}", again(stem))
    if found.data["asked"].keys() != found.data["recipes"].keys():
        names = sorted(found.data["asked"].keys() ^ found.data["recipes"].keys())
        raise BuildError(str(found.origin(("asked",))), f"asked and recipes differ in {', '.join(names)}", again(stem))


def _recipes(found: Document, stem: str) -> Iterator[tuple[str, Locked]]:
    written: Mapping[str, Any] = found.data["recipes"]
    base = lockfile.base_of(stem, written)
    for name in written:
        where: Where = ("recipes", name)
        if not isinstance(written[name], Mapping) or not isinstance(written[base], Mapping):
            raise BuildError(str(found.origin(where)), f"{name} is no mapping", again(stem))
        one = written[base] if name == base else lockfile.more(written[base], written[name])
        try:
            yield name, Locked.model_validate({**_parsed(one), "asked": found.data["asked"][name]})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = tuple(key for key in first["loc"])
            at = found.origin((*where, *place)) if found.origin((*where, *place[:1])) != found.origin(where) else None
            raise BuildError(
                str(at or found.origin(("recipes", base, *place))), f"{_dotted(name, place)}: {_complaint(first)}", again(stem)
            ) from None


def _dotted(name: str, place: tuple[str | int, ...]) -> str:
    return " ".join((name, ".".join(map(str, place))))


def _complaint(error: Any) -> str:
    shown = repr(error.get("input"))
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, it is {shown[:60]}{'…' if len(shown) > 60 else ''}"


def _parsed(one: Mapping[str, Any]) -> dict[str, Any]:
    """What `_plain` wrote, as the types take it. What has another form stays as it is, for them to complain of."""
    found = dict(one)
    for key in ("source", "calibration", "text"):
        if isinstance(found.get(key), Mapping):
            found[key] = _pinned_back(found[key])
    if isinstance(found.get("model"), Mapping) and isinstance(found["model"].get("tensors"), Mapping):
        tensors = {name: _tensor_back(said) for name, said in found["model"]["tensors"].items()}
        found["model"] = {**found["model"], "tensors": tensors}
    if isinstance(found.get("built"), Mapping) and isinstance(found["built"].get("measurements"), Mapping):
        found["built"] = {**found["built"], "measurements": tuple(_measured_back(found["built"]["measurements"]))}
    return found


def _pinned_back(said: Mapping[str, Any]) -> dict[str, Any]:
    choice = {key: value for key, value in said.items() if key not in ("pin", "files")}
    files = said.get("files")
    rest = {key: said[key] for key in ("pin",) if key in said}
    if not isinstance(files, Mapping) or not all(isinstance(one, Mapping) and one.keys() == {"sha256", "bytes"} for one in files.values()):
        return {"choice": choice, "files": files, "sizes": {}, **rest}
    return {
        "choice": choice,
        "files": {name: one["sha256"] for name, one in files.items()},
        "sizes": {name: one["bytes"] for name, one in files.items()},
        **rest,
    }


def _tensor_back(said: Any) -> Any:
    if not isinstance(said, Mapping) or said.keys() != {"dtype", "shape", "count"} or not isinstance(said["shape"], list):
        return said
    return {**said, "shape": tuple(said["shape"])}


def _measured_back(said: Mapping[str, Any]) -> Iterator[Any]:
    for check, measured in said.items():
        for name, one in measured.items() if isinstance(measured, Mapping) else [("", measured)]:
            if isinstance(one, Mapping) and "value" in one:
                yield {"check": check, "name": name, "low": one["value"], "high": one["value"], **one}
            else:
                yield one
