"""What can be said of a model's folder by looking at it, whoever made it: can a file of it run code, are its tensors whole and sound.

Each function yields lines for people (str) and findings (BuildError). What could not be checked is a line that says so: it is never passed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from buildsys.architecture import Architecture, Linear
from buildsys.errors import BuildError
from buildsys.io import headers
from buildsys.release import pickles
from buildsys.release.folder import AGAIN, Folder, Progress, content, is_pointer, json_object
from buildsys.scheme import Schemes
from buildsys.slots import modules
from buildsys.survey import IGNORED, describe

Said = str | BuildError

CONFIG, OLD_AWQ = "config.json", "quant_config.json"
MAX_JSON_BYTES = 64 << 20
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
CODE = ("*.py", "*.so", "*.ipynb", "*.sh")
MAPPING = (CONFIG, "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
"""Files in which `auto_map` names code that a loader runs under trust_remote_code."""


def safety(folder: Folder) -> Iterator[Said]:
    """Files that can run code when somebody opens them, and what stands in the place of a file."""
    for name, path in folder.files.items():
        if _one_of(name, PICKLES) and (what := pickles.found(path)) is not None:
            yield BuildError(str(path), f"{what}, which can run code when it is opened", "remove it; weights belong in *.safetensors")
        elif not name.endswith(".safetensors") and is_pointer(path):
            yield BuildError(str(path), "is a pointer that Git LFS left, not the file", f"run: git -C {folder.root} lfs pull")
        elif _one_of(name, PICKLES):
            yield f"code        {name} has a pickle's name, and does not begin as one"
    mapped = []
    for name in MAPPING:
        if name in folder.files:
            try:
                found = _json(folder, name).get("auto_map")
            except BuildError as error:
                yield error
                continue
            if found:
                mapped.append(name)
                what = f"auto_map names code ({_shown(found)}) that loaders run under trust_remote_code"
                yield BuildError(str(folder.files[name]), what, "read that code, or take a model that needs none of its own")
    code = [name for name in folder.files if _one_of(name, CODE)]
    if code and not mapped:
        yield f"code        {', '.join(code[:3])}{' …' if code[3:] else ''}: nothing that was checked here runs it"


def tensors(folder: Folder) -> Iterator[Said]:
    """Whether every safetensors file is whole: each byte belongs to one tensor."""
    names = [name for name in folder.files if name.endswith(".safetensors")]
    count = 0
    for name in names:
        try:
            count += len(headers.read(folder.files[name], str(folder.files[name])).tensors)
        except BuildError as error:
            yield error
        except OSError as error:
            yield BuildError(str(folder.files[name]), f"cannot be read: {error.strerror}", AGAIN)
    if not names and CONFIG not in folder.files:
        what = f"holds no model: neither {CONFIG} nor *.safetensors is there"
        yield BuildError(str(folder.root), what, f"name the folder that holds {CONFIG} and *.safetensors")
        return
    yield f"tensors     {count} in {len(names)} safetensors files" if names else "tensors     no safetensors file: no weights were checked"


# Packed weights


def weights(folder: Folder, progress: Progress) -> Iterator[Said]:
    """The lint of packed weights, for formats and architectures that are known here."""
    if CONFIG not in folder.files:
        yield f"weights     not checked: there is no {CONFIG}"
        return
    config = _json(folder, CONFIG)
    said = config.get("quantization_config")
    if said is None:
        old = OLD_AWQ in folder.files
        yield f"weights     not checked: {OLD_AWQ} is of an older kind" if old else "weights     float: nothing is packed"
        return
    method = said.get("quant_method") if isinstance(said, dict) else None
    format = next((module for module in modules("formats").values() if method == module.QUANT_METHOD), None)
    if format is None:
        yield f"weights     not checked: quant_method {_shown(method)} is not known"
        return
    found = headers.describe({name: path for name, path in folder.files.items() if "/" not in name})
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > len(found):
        what = f"num_hidden_layers is {layers}; the weights hold {len(found)} tensors"
        raise BuildError(str(folder.files[CONFIG]), what, "check that config.json and the weights are of one model")
    try:
        told = format.schemes_of(said)
        architecture = describe({key: value for key, value in config.items() if key != "quantization_config"}, CONFIG)[0]
        stored = _Stored.of(architecture, found)
        schemes = replace(told, left_float=_left_float(stored, told))
        _fits(stored, format, schemes)
    except BuildError as error:
        yield f"weights     not checked: {error.what}"
        return
    yield from _lint(folder, stored, schemes, format, found, progress)


@dataclass(frozen=True)
class _Stored:
    """An architecture with the tensors beside it that exporters write and nothing computes with, as lint asks for it."""

    architecture: Architecture
    beside: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, architecture: Architecture, found: Mapping[str, tuple[str, headers.Entry]]) -> _Stored:
        tied = [name for name in ("lm_head.weight", "output.weight") if name in found]
        if architecture.lm_head is None and tied:
            architecture = replace(architecture, lm_head=tied[0])
        return cls(architecture, {name: entry.shape for name, (_, entry) in found.items() if name.endswith(IGNORED)})

    @property
    def layers(self) -> int:
        return self.architecture.layers

    @property
    def linears(self) -> tuple[Linear, ...]:
        return self.architecture.linears

    def prefix(self, layer: int) -> str:
        return self.architecture.prefix(layer)

    def names(self) -> dict[str, Linear]:
        """Every linear of every block."""
        return {self.prefix(layer) + linear.name: linear for layer in range(self.layers) for linear in self.linears}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        return {**self.architecture.tensors(), **self.beside}


def _left_float(stored: _Stored, told: Schemes) -> frozenset[str]:
    """Linears that stay float. Readers match an entry as a part of a module's name."""
    return frozenset(name for name in stored.names() if any(entry in name for entry in told.left_float))


def _fits(stored: _Stored, format: Any, schemes: Schemes) -> None:
    for name, linear in stored.names().items():
        scheme = schemes.of(name)
        reason = None if scheme is None else format.fits(scheme, linear.in_features, linear.out_features)
        if reason is not None:
            raise BuildError(CONFIG, f"{name}: {reason}", AGAIN)


def _lint(
    folder: Folder,
    stored: _Stored,
    schemes: Schemes,
    format: Any,
    found: Mapping[str, tuple[str, headers.Entry]],
    progress: Progress,
) -> Iterator[Said]:
    lint = modules("checks")["lint"]
    context = SimpleNamespace(architecture=stored, schemes=schemes, format=format, progress=progress, device="cpu")
    packed = SimpleNamespace(files={name: path for name, path in folder.files.items() if "/" not in name})
    (measured,) = lint.measure(lint.Knobs(), {"packed": packed}, context)
    if not measured.value:
        kinds = " and ".join(f"{scheme.bits}-bit, group {scheme.group_size}" for scheme in schemes.kinds())
        yield f"weights     {len(stored.names()) - len(schemes.left_float)} packed linears are sound ({kinds})"
        return
    first = measured.detail.split()[0]
    holds = next((file for name, (file, _) in found.items() if name.startswith(first)), None)
    file = holds or next(name for name in (headers.INDEX, headers.SINGLE) if name in folder.files)
    yield BuildError(str(folder.root / file), f"{int(measured.value)} findings in packed weights: {measured.detail}", AGAIN)


def _json(folder: Folder, name: str) -> dict[str, Any]:
    return json_object(content(folder.files[name], MAX_JSON_BYTES), str(folder.files[name]))


def _one_of(name: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(Path(name).name.lower(), glob) for glob in globs)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
