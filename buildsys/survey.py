"""What a source model is, from its config.json and the headers of its weights: known before anything is read or run.

A model's own code never runs. Where archs/ implements the architecture its `auto_map` is of no interest; elsewhere the model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from buildsys.architecture import Architecture
from buildsys.errors import BuildError
from buildsys.io import headers
from buildsys.locked import Model, collapsed
from buildsys.slots import modules

FLOATS = ("F16", "BF16", "F32")
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
IGNORED = (".rotary_emb.inv_freq",)  # buffers that older checkpoints saved; computed from config.json


@dataclass(frozen=True)
class Survey:
    """One model: how it is computed, its config.json, and which tensor lies in which file."""

    architecture: Architecture
    version: int  # of the module in archs/ that describes it
    turbomind: bool  # whether LMDeploy's TurboMind engine has it; its PyTorch engine has more
    config: Mapping[str, Any]
    tokenizer: str  # the file that holds it

    @property
    def computed(self) -> dict[str, Any]:
        """What goes into the key of every step that computes with this model."""
        return {"arch": self.architecture.model_type, "version": self.version}


def read_config(path: Path, where: str) -> dict[str, Any]:
    """config.json, as an object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BuildError(where, f"is not valid JSON: {error}", "take the file from the model's publisher again") from None
    if not isinstance(config, dict):
        raise BuildError(where, "is not a JSON object", "take the file from the model's publisher again")
    return config


def describe(config: Mapping[str, Any], where: str) -> tuple[Architecture, ModuleType]:
    """The architecture that config.json names and its module in archs/; refuses what is not implemented there."""
    module = implementing(config, where)
    return module.describe(config, where), module


def implementing(config: Mapping[str, Any], where: str) -> ModuleType:
    """The module in archs/ for the architecture that config.json names."""
    known = {module.HANDLES: module for module in modules("archs").values()}
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    if name not in known:
        said = f"architecture {name} is not implemented" if name else "names no architecture"
        if config.get("auto_map"):
            said += ", and running the model's own code (auto_map), which it asks for, is refused"
        fix = "use one of these, or add a module to buildsys/archs (CONTRIBUTING.md)"
        raise BuildError(where, f"{said}; implemented: {', '.join(sorted(known))}", fix)
    if config.get("quantization_config"):
        said = config["quantization_config"]
        method = said.get("quant_method", "an unknown method") if isinstance(said, dict) else said
        raise BuildError(where, f"the model is quantized already ({method})", "name the float model that it was made from as the source")
    return known[name]


def survey(files: Mapping[str, Path], sizes: Mapping[str, int] = MappingProxyType({})) -> Survey:
    """Reads config.json and every header; refuses a model whose tensors are not the architecture's.

    `sizes`: bytes of the files that are not here yet; of weights, `files` then has the header.
    """
    where = headers.place("config.json", files["config.json"])
    config = read_config(files["config.json"], where)
    architecture, module = describe(config, where)
    check_tensors(architecture, files, sizes)
    tokenizer = next((name for name in TOKENIZERS if name in files or name in sizes), None)
    if tokenizer is None:
        folder = str(files["config.json"].parent)
        raise BuildError(folder, f"has no {' or '.join(TOKENIZERS)}", "add the model's tokenizer to its folder")
    return Survey(architecture, module.VERSION, module.TURBOMIND, config, tokenizer)


def recall(model: Model, where: str) -> Survey:
    """The survey of a model of which only a lock knows, held against the shapes that the lock has. Raises BuildError."""
    architecture, module = describe(model.config, where)
    for name, expected in collapsed({name: ("", shape) for name, shape in architecture.tensors().items()}).items():
        found = model.tensors.get(name)
        if found is None or (found.shape, found.count) != (expected.shape, expected.count):
            said = "none" if found is None else f"{found.count} of {list(found.shape)}"
            what = f"the lock has {said} of tensor {name}; its config says {expected.count} of {list(expected.shape)}"
            raise BuildError(where, what, "write the lock anew with `doit lock` where the model can be reached")
    return Survey(architecture, module.VERSION, module.TURBOMIND, model.config, model.tokenizer)


def check_tensors(architecture: Architecture, files: Mapping[str, Path], sizes: Mapping[str, int] = MappingProxyType({})) -> None:
    """Each tensor of the architecture is there, in its shape and a float type, and nothing else is."""
    found = headers.describe(files, sizes)
    expected = architecture.tensors()
    again = "check that config.json and the weights are of one model"
    for name, shape in expected.items():
        if name not in found:
            raise BuildError(_weights(files), f"has no tensor {name}, which {architecture.model_type} needs", again)
        file, entry = found[name]
        where = headers.place(file, files[file])
        if entry.shape != shape:
            raise BuildError(where, f"tensor {name} is {list(entry.shape)}, config.json says {list(shape)}", again)
        if entry.dtype not in FLOATS:
            what = f"tensor {name} holds {entry.dtype}; known are {', '.join(FLOATS)}"
            raise BuildError(where, what, "name the float model as the source")
    tied = {"lm_head.weight", "output.weight"} if architecture.lm_head is None else set()
    extra = [name for name in found if name not in expected and name not in tied and not name.endswith(IGNORED)]
    if extra:
        what = f"tensor {extra[0]} (of {len(extra)} such) belongs to nothing that {architecture.model_type} computes"
        raise BuildError(_weights(files), what, "use a model of this architecture without additions; adapters have to be merged first")


def _weights(files: Mapping[str, Path]) -> str:
    name = headers.SINGLE if headers.SINGLE in files else headers.INDEX
    return headers.place(name, files[name])
