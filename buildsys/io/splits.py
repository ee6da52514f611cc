"""Which files of a dataset's repository hold a split: told by its README or, where that says nothing, by their names.

Follows the hub's documents (huggingface.co/docs/hub/datasets-data-files-configuration, …-file-names-and-splits, …-manual-configuration).
A loading script, which the hub once ran instead, never runs here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml
from yaml.composer import ComposerError

from buildsys.errors import BuildError
from buildsys.io import rows
from buildsys.io.globs import matching

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The splits that names tell, each with the words for it."""

README = "README.md"
BESIDE = frozenset({"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json", "metadata.jsonl"})
CONVERTED = "refs/convert/parquet"
SHOWN = 12  # names in an error
MAX_BYTES = 4 << 20  # of a README
MAX_DEPTH = 32  # of its front matter; the C composer recurses: without a limit, 100,000 brackets end the process

_WORD = {word: split for split, words in SPLITS.items() for word in words}
_IN_NAME = re.compile(rf"(?:^|(?<=[-._ 0-9]))({'|'.join(sorted(_WORD, key=len, reverse=True))})(?=[-._ 0-9]|$)")
_SHARD = re.compile(r"(?:.*/)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.[^/]*")
_CONVERTED = re.compile(r"(?P<config>[^/]+)/(?P<split>[^/]+)/\d{4}\.parquet")
_NUMBERED = re.compile(r"(?P<before>.*)(?P<number>\d{5})-of-(?P<count>\d{5})(?P<after>.*)")
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Config:
    """One of a README's `configs`."""

    name: str
    default: bool
    folder: str  # data_dir, or ""
    splits: Mapping[str, tuple[str, ...]] | None  # split -> patterns; None: names tell


class _Loader(yaml.CSafeLoader):
    """Front matter of strangers: shallow, and without merge keys, through which a few lines can mean billions."""

    depth = 0

    def descend_resolver(self, parent: Any, index: Any) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ComposerError(None, None, f"more than {MAX_DEPTH} levels of nesting", None)
        super().descend_resolver(parent, index)

    def ascend_resolver(self) -> None:
        self.depth -= 1
        super().ascend_resolver()

    def flatten_mapping(self, node: Any) -> None:
        """Not done, so that a merge key is a tag that nothing constructs."""


def choose(names: Iterable[str], readme: str, config: str | None, split: str, where: str) -> tuple[str, ...]:
    """The files of `names` that hold `split` of `config`, sorted. Ambiguity is an error that lists the choices."""
    listed = sorted(names)
    data = [name for name in listed if rows.kind(name) and PurePosixPath(name).name not in BESIDE]
    told = _configs(readme, where)
    if not told and _script(listed, where):
        what = f"is read by a script, {_script(listed, where)}, and a dataset's code never runs here"
        raise BuildError(where, what, _elsewhere())
    if not data:
        there = ", ".join(sorted({PurePosixPath(name).suffix or name for name in listed})[:SHOWN]) or "nothing"
        scripts = any(name.endswith(".py") for name in listed)
        what = f"holds no file of {', '.join(rows.KINDS)} (or packed: {', '.join(rows.PACKED)}); it holds {there}"
        raise BuildError(where, what, _elsewhere() if scripts else "convert it, or name a dataset that is parquet, JSON or text")
    chosen = _told(data, _config(told, config, where), split, where) if told else _named(data, config, split, where)
    return _single(chosen, where)


def _elsewhere() -> str:
    return f"set revision: {CONVERTED} (the hub's own conversion), name data files with files:, or a local copy with path:"


def _script(names: Sequence[str], where: str) -> str | None:
    """A loading script has its repository's name."""
    named = PurePosixPath(where).name + ".py"
    return named if named in names else None


# By the README


def _configs(readme: str, where: str) -> list[Config]:
    if len(readme.encode()) > MAX_BYTES:
        raise BuildError(f"{where}/{README}", f"is longer than {MAX_BYTES >> 20} MiB", "name data files with files:")
    found = _FRONT.match(readme.replace("\r\n", "\n"))
    if found is None:
        return []
    try:
        said = yaml.load(found[1], Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        what = f"has front matter that is no YAML: {' '.join(str(error).split())}"
        raise BuildError(f"{where}/{README}", what, "name data files with files:") from None
    configs = said.get("configs") if isinstance(said, dict) else None
    return [_read(one, where) for one in configs] if isinstance(configs, list) else []


def _read(said: Any, where: str) -> Config:
    try:
        folder = str(said.get("data_dir") or "").removeprefix("./").strip("/")
        files = said.get("data_files")
        return Config(str(said.get("config_name", "default")), said.get("default") is True, folder, _patterns(files, folder))
    except (AttributeError, KeyError, TypeError) as error:
        what = f"has configs that cannot be understood ({type(error).__name__}: {error})"
        raise BuildError(f"{where}/{README}", what, "name data files with files:") from None


def _patterns(said: Any, folder: str) -> dict[str, tuple[str, ...]] | None:
    """`data_files`: a pattern, several, or splits with theirs."""
    if not said:
        return None
    if isinstance(said, str):
        said = [said]
    if isinstance(said, dict):
        said = [{"split": split, "path": path} for split, path in said.items()]
    found: dict[str, list[str]] = {}
    for one in said:
        split, paths = (one["split"], one["path"]) if isinstance(one, dict) else ("train", one)
        within = [f"{folder}/{path}" if folder else path for path in ([paths] if isinstance(paths, str) else paths)]
        found.setdefault(str(split), []).extend(within)
    return {split: tuple(paths) for split, paths in found.items()}


def _config(told: list[Config], asked: str | None, where: str) -> Config:
    names = [one.name for one in told]
    if asked is not None:
        if asked not in names:
            raise BuildError(where, f"has no config {asked}; it has {_list(names)}", "set config: to one of them")
        return told[names.index(asked)]
    defaults = [one for one in told if one.default or one.name == "default"] or (told if len(told) == 1 else [])
    if len(defaults) != 1:
        raise BuildError(where, f"has {len(told)} configs: {_list(names)}", "set config: to one of them")
    return defaults[0]


def _told(data: list[str], config: Config, split: str, where: str) -> list[str]:
    if config.splits is None:
        return _named([name for name in data if name.startswith(f"{config.folder}/" if config.folder else "")], None, split, where)
    wanted = split if split in config.splits else next((one for one in config.splits if _same(one, split)), None)
    if wanted is None:
        raise _no_split(where, config.name, split, config.splits)
    chosen: list[str] = []
    for pattern in config.splits[wanted]:
        found = matching(pattern, data)
        if not found:
            what = f"its {README} says that {config.name} {wanted} is {pattern}, which no file of {', '.join(rows.KINDS)} matches"
            raise BuildError(where, what, "name data files with files:")
        chosen += found
    return chosen


# By names


def _named(data: list[str], config: str | None, split: str, where: str) -> list[str]:
    if data and all(_CONVERTED.fullmatch(name) for name in data):
        return _converted(data, config, split, where)
    if config is not None:
        inside = [name for name in data if name.startswith(f"{config}/")]
        if not inside:
            folders = sorted({name.split("/")[0] for name in data if "/" in name})
            raise BuildError(where, f"has no folder {config}; it has {_list(folders)}", "set config: to one of them, or leave it out")
        data = [name.removeprefix(f"{config}/") for name in inside]
        return [f"{config}/{name}" for name in _named(data, None, split, f"{where}/{config}")]
    known = {name: found for name in data if (found := split_of(name)) is not None}
    if not known:
        if _canonical(split) == "train":
            return data  # nothing names a split: the hub calls it train
        raise _no_split(where, "", split, ("train",))
    chosen = [name for name, found in known.items() if _same(found, split)]
    if not chosen:
        raise _no_split(where, "", split, known.values())
    folders = sorted({name.split("/")[0] for name in chosen})
    if len(folders) > 1 and all("/" in name and split_of(name.split("/")[0]) is None for name in chosen):
        raise BuildError(where, f"has its {split} in {len(folders)} folders: {_list(folders)}", "set config: to one of them")
    return chosen


def _converted(data: list[str], config: str | None, split: str, where: str) -> list[str]:
    """The layout of refs/convert/parquet: config/split/0000.parquet."""
    parts = {name: name.split("/") for name in data}
    configs = sorted({one for one, _, _ in parts.values()})
    if config is None and len(configs) > 1 and "default" not in configs:
        raise BuildError(where, f"has {len(configs)} configs: {_list(configs)}", "set config: to one of them")
    wanted = config or ("default" if "default" in configs else configs[0])
    if wanted not in configs:
        raise BuildError(where, f"has no config {wanted}; it has {_list(configs)}", "set config: to one of them")
    splits = {one: None for name, (found, one, _) in parts.items() if found == wanted}
    exact = split if split in splits else next((one for one in splits if _same(one, split)), None)
    if exact is None:
        raise _no_split(where, wanted, split, splits)
    return [name for name, (found, one, _) in parts.items() if (found, one) == (wanted, exact)]


def split_of(name: str) -> str | None:
    """The split that a file's name tells or, failing that, its folders', the nearest first."""
    if (shard := _SHARD.fullmatch(name)) is not None:
        return _canonical(shard["split"])
    for part in reversed(name.split("/")):
        if (found := _IN_NAME.search(part)) is not None:
            return _WORD[found[1]]
    return None


def _canonical(split: str) -> str:
    return _WORD.get(split, split)


def _same(one: str, other: str) -> bool:
    return _canonical(one) == _canonical(other)


def _single(chosen: list[str], where: str) -> tuple[str, ...]:
    """Refuses files that seem to be the same rows twice."""
    kinds = {rows.kind(name): name for name in chosen}
    plain: dict[str, str] = {}
    for name in chosen:
        twin = plain.setdefault(name.removesuffix(rows.packing(name)), name)
        if twin != name or len(kinds) > 1:
            one, other = (twin, name) if twin != name else list(kinds.values())[:2]
            raise BuildError(where, f"holds the split in more than one form: {one} and {other}", "name one of them with files:")
    return tuple(sorted(set(chosen)))


def uncertain(chosen: Iterable[str], literal: Iterable[str]) -> list[str]:
    """Those of `chosen` beside which more may belong, where only a part of the repository is known: neither named one by one nor numbered
    with all their numbers there."""
    files = set(chosen)
    return [name for name in sorted(files.difference(literal)) if not _all_numbers(name, files)]


def _all_numbers(name: str, files: set[str]) -> bool:
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return False
    every = (f"{found['before']}{number:05d}-of-{found['count']}{found['after']}" for number in range(int(found["count"])))
    return files.issuperset(every)


def _no_split(where: str, config: str, split: str, there: Iterable[str]) -> BuildError:
    of = f"{config} has" if config else "has"
    return BuildError(where, f"{of} no split {split}; its splits: {_list(sorted(set(there)))}", "set split: to one of them")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" … ({len(names)})" if len(names) > SHOWN else "") or "none"
