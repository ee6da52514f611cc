"""A model folder on this machine, in the layout of the Hugging Face hub; the folder, or files in it, may be links.

Which files make a model follows transformers' names. Safetensors only: a pickle can run code when it is opened.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import os
from pathlib import Path

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.slots import Frozen

VERSION = 1

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
LFS_POINTER = b"version https://git-lfs"


class Knobs(Frozen):
    path: str = Field(min_length=1, description="the model's folder, relative to this file's folder")
    outside: bool = Field(default=False, description="let the path leave the workspace: the recipe then works on this machine only")


def locate(knobs: Knobs, folder: Path) -> dict[str, Path]:
    """The files that make the model, by name. `folder` is what a relative path is relative to."""
    model = Path(os.path.normpath(folder / knobs.path))
    if not model.is_dir():
        raise _no_folder(model)
    names = sorted(entry.name for entry in model.iterdir())
    if CONFIG not in names:
        raise BuildError(str(model), f"has no {CONFIG}", "name the folder that holds the model's config.json and *.safetensors")
    wanted = [CONFIG, *_weights(model, names)]
    wanted += [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in BESIDE) and not (model / name).is_dir()]
    found = {name: model / name for name in sorted(set(wanted))}
    for name, path in found.items():
        _readable(name, path)
    return found


def _no_folder(model: Path) -> BuildError:
    if model.is_symlink():
        return BuildError(str(model), f"is a link to {model.readlink()}, which is not there", "mend the link, or correct the path")
    if model.exists():
        return BuildError(str(model), "is a file, not a model's folder", f"name its folder: {model.parent}")
    siblings = sorted(entry.name for entry in model.parent.iterdir() if entry.is_dir()) if model.parent.is_dir() else []
    near = difflib.get_close_matches(model.name, siblings, n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else "correct the path; it is relative to the folder of the file that wrote it"
    return BuildError(str(model), "there is no such folder", fix)


def _weights(model: Path, names: list[str]) -> list[str]:
    """The index and its shards, or the single file."""
    if INDEX in names:
        shards = _shards(model / INDEX)
        if shards == {WEIGHTS} and WEIGHTS in names:
            return [WEIGHTS]  # an index that some exporters write for one file says nothing new
        if WEIGHTS in names:
            what = f"holds both {WEIGHTS} and {INDEX}, which names other files"
            raise BuildError(str(model), what, "keep one of the two: they may be different models")
        missing = sorted(shards - set(names))
        if missing:
            what = f"names {len(missing)} of {len(shards)} shards that are not there: {', '.join(missing[:3])}{' …' if missing[3:] else ''}"
            raise BuildError(str(model / INDEX), what, "copy or download the missing shards into the folder")
        return [INDEX, *shards]
    if WEIGHTS in names:
        return [WEIGHTS]
    raise _no_weights(model, names)


def _no_weights(model: Path, names: list[str]) -> BuildError:
    pickles = [name for name in names if any(fnmatch.fnmatchcase(name, glob) for glob in PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        what = f"has {', '.join(others[:3])}{' …' if others[3:] else ''}, but neither {WEIGHTS} nor {INDEX}"
        return BuildError(str(model), what, f"give the single file the name {WEIGHTS}, or add the index of the shards")
    if pickles:
        what = f"has its weights as pickle only ({', '.join(pickles[:3])}{' …' if pickles[3:] else ''}); opening a pickle can run code"
        load = f"AutoModelForCausalLM.from_pretrained({str(model)!r}, weights_only=True)"
        save = f"save_pretrained({str(model)!r}, safe_serialization=True)"
        command = f'python -c "from transformers import AutoModelForCausalLM; {load}.{save}"'
        return BuildError(str(model), what, f"convert it where you trust it: {command}")
    return BuildError(str(model), f"has no weights: neither {WEIGHTS} nor {INDEX}", "name the folder that holds the model's *.safetensors")


def _shards(index: Path) -> set[str]:
    """The files that an index names: plain names in its own folder."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        what = f"is no index of shards ({type(error).__name__}: {error})"
        raise BuildError(str(index), what, "copy or download it again; it holds {weight_map: {tensor: file}}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise BuildError(str(index), f"names the shard {shard!r}, which is no file name", "copy or download the index again")
    if not shards:
        raise BuildError(str(index), "names no shard", "copy or download the index again")
    return shards


def _readable(name: str, path: Path) -> None:
    if not path.is_file():
        what = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is not a file"
        raise BuildError(str(path), what, "mend the link, or copy the file itself into the folder")
    if name.endswith(".safetensors") and path.stat().st_size < 1024:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BuildError(str(path), "is a Git LFS pointer, not the weights", f"run: git -C {path.parent} lfs pull")
