"""Where a model comes from, and which of the files there make it: transformers' names, safetensors only (a pickle can run code).

A module: Knobs, VERSION, `locate`, `floats` and, where files are not on this machine, `fetch`.

    locate(knobs, folder, home) -> Located             `folder`: what relative paths are relative to; `home`: where it may remember things
    fetch(how, expected, progress) -> {name: path}     complete files, each checked against its expected sha256
    floats(knobs) -> str                               "", or what may mean another model tomorrow; asks no network
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from buildsys.errors import BuildError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BESIDE = (  # beside config and weights; globs
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v*",  # Mistral's
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = "load it with transformers and save_pretrained(…, safe_serialization=True), then name that folder as local"


def model_files(names: Iterable[str], index: Callable[[], Path], place: str, convert: str) -> list[str]:
    """Those of a folder's files that make the model.

    `index` gives the index where there is one; `place` is what errors call the folder; `convert`: what to do where there are only pickles.
    """
    there = set(names)
    if CONFIG not in there:
        raise BuildError(place, f"has no {CONFIG}", "name the folder or repository that holds the model's config.json and *.safetensors")
    named = shards(index(), f"{place}/{INDEX}") if indexed(there) else frozenset()
    return sorted({CONFIG, *beside(there), *weights(there, named, place, convert)})


def beside(names: Iterable[str]) -> list[str]:
    """Those that belong to a model beside its config and weights."""
    return [name for name in names if any(fnmatchcase(name, glob) for glob in BESIDE)]


def indexed(names: Iterable[str]) -> bool:
    """Whether the index has to be read to know the weights."""
    return INDEX in names


def weights(names: Iterable[str], named: frozenset[str], place: str, convert: str = CONVERT) -> list[str]:
    """The index and its shards, or the single file. `named`: the shards that the index names."""
    there = set(names)
    if not indexed(there) and WEIGHTS not in there:
        raise _no_weights(place, sorted(there), convert)
    if not indexed(there):
        return [WEIGHTS]
    if WEIGHTS in there:
        if named == {WEIGHTS}:
            return [WEIGHTS]  # an index that some exporters write for one file says nothing new
        what = f"holds both {WEIGHTS} and {INDEX}, which names other files"
        raise BuildError(place, what, "keep one of the two: they may be different models")
    missing = sorted(named - there)
    if missing:
        what = f"names {len(missing)} of {len(named)} shards that are not there: {_some(missing)}"
        raise BuildError(f"{place}/{INDEX}", what, "complete it: copy or download the missing shards beside the index")
    return [INDEX, *sorted(named)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if names[3:] else "")


def _no_weights(place: str, names: list[str], convert: str) -> BuildError:
    pickles = [name for name in names if any(fnmatchcase(name, glob) for glob in PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        what = f"has {_some(others)}, but neither {WEIGHTS} nor {INDEX}"
        return BuildError(place, what, f"give the single file the name {WEIGHTS}, or add the index of the shards")
    if pickles:
        what = f"has its weights as pickle only ({_some(pickles)}); opening a pickle can run code"
        return BuildError(place, what, f"convert it where you trust it: {convert}")
    what = f"has no weights: neither {WEIGHTS} nor {INDEX}"
    return BuildError(place, what, "name the folder or repository that holds the model's *.safetensors")


def convert_command(source: str, folder: str) -> str:
    """Rewrites a model's pickles as safetensors."""
    load = f"AutoModelForCausalLM.from_pretrained({source}, weights_only=True)"
    save = f"save_pretrained({folder!r}, safe_serialization=True)"
    return f'python -c "from transformers import AutoModelForCausalLM; {load}.{save}"'


def shards(index: Path, place: str) -> frozenset[str]:
    """The files that an index names: plain names in its own folder."""
    try:
        found = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        what = f"is no index of shards ({type(error).__name__}: {error})"
        raise BuildError(place, what, "copy or download it again; it holds {weight_map: {tensor: file}}") from None
    for shard in found:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BuildError(place, f"names the shard {shard!r}, which is no file name", "copy or download the index again")
    if not found:
        raise BuildError(place, "names no shard", "copy or download the index again")
    return frozenset(found)
