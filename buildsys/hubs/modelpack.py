"""A release as an OCI artifact of CNCF ModelPack: one raw layer a file, its name in an annotation, and a config that names every layer.

Model specification v1 (github.com/modelpack/model-spec: docs/spec.md, docs/config.md, specs-go/v1). The bytes are a function of the files
alone, so equal releases are one manifest. What refers to a manifest by `subject`: OCI image specification 1.1, manifest.md.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
EMPTY_RAW = b"{}"

MODEL = "application/vnd.cncf.model.manifest.v1+json"
CONFIG = "application/vnd.cncf.model.config.v1+json"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # the name that general clients give to a layer that they pull

LAYERS = (  # globs over names, the first that matches
    ("*.safetensors", "application/vnd.cncf.model.weight.v1.raw"),
    ("provenance/*", "application/vnd.cncf.model.doc.v1.raw"),
    ("*.md", "application/vnd.cncf.model.doc.v1.raw"),
    ("LICEN[SC]E*", "application/vnd.cncf.model.doc.v1.raw"),
    ("NOTICE*", "application/vnd.cncf.model.doc.v1.raw"),
    ("USE_POLICY*", "application/vnd.cncf.model.doc.v1.raw"),
    ("SHA256SUMS", "application/vnd.cncf.model.doc.v1.raw"),
    ("model.sig", "application/vnd.cncf.model.doc.v1.raw"),
    ("*", "application/vnd.cncf.model.weight.config.v1.raw"),
)

STATEMENTS: Mapping[str, str] = {
    "provenance/statement.intoto.jsonl": "application/vnd.dsse.envelope.v1+json",
    "provenance/statement.json": "application/vnd.in-toto+json",
}
"""Files that say where a release came from, the signed one first -> their media types."""


@dataclass(frozen=True)
class Document:
    """A small JSON object of a registry, as bytes."""

    raw: bytes

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.raw).hexdigest()

    def described(self, media_type: str) -> dict[str, Any]:
        return descriptor(media_type, self.digest, len(self.raw))


@dataclass(frozen=True)
class Packed:
    """What is pushed beside the files themselves."""

    config: Document
    manifest: Document


def document(value: Mapping[str, Any]) -> Document:
    return Document(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def descriptor(media_type: str, digest: str, size: int, **annotations: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest, "size": size} | ({"annotations": annotations} if annotations else {})


def pack(name: str, version: str, files: Mapping[str, str], sizes: Mapping[str, int], config: Mapping[str, Any]) -> Packed:
    """`files` are {name: sha256}, `config` is the model's own config.json."""
    layers = [_layer(file, files[file], sizes[file]) for file in sorted(files)]
    described = document(
        {
            "descriptor": {"name": name, "version": version} | _text(config, "model_type", "family"),
            "config": _technical(config),
            "modelfs": {"type": "layers", "diffIds": [layer["digest"] for layer in layers]},
        }
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": MODEL,
        "config": described.described(CONFIG),
        "layers": layers,
        "annotations": {TITLE: name, "org.opencontainers.image.version": version},
    }
    return Packed(described, document(manifest))


def unpack(manifest: Mapping[str, Any]) -> dict[str, str] | None:
    """The files of a manifest, {name: sha256}: the inverse of `pack`. None where it is no model, or not one raw layer a file."""
    layers = manifest.get("layers")
    if manifest.get("artifactType") != MODEL or not isinstance(layers, list) or not _is_descriptor(manifest.get("config")):
        return None
    found: dict[str, str] = {}
    for layer in layers:
        if not _is_descriptor(layer) or not layer["mediaType"].endswith(".raw"):
            return None
        annotations = layer.get("annotations")
        name = annotations.get(FILE_PATH) if isinstance(annotations, dict) else None
        if not isinstance(name, str) or name in found:
            return None
        found[name] = layer["digest"].removeprefix("sha256:")
    return found


def _is_descriptor(said: Any) -> bool:
    """Whether it has what the image specification asks of a descriptor, with the one digest that is used here."""
    if not isinstance(said, dict) or not isinstance(said.get("mediaType"), str) or type(said.get("size")) is not int:
        return False
    return isinstance(said.get("digest"), str) and re.fullmatch(r"sha256:[0-9a-f]{64}", said["digest"]) is not None


def statement(files: Mapping[str, str], sizes: Mapping[str, int], subject: Document) -> Document | None:
    """The manifest that attaches the release's provenance to the manifest `subject`; None where there is no provenance."""
    name = next((name for name in STATEMENTS if name in files), None)
    if name is None:
        return None
    layer = descriptor(STATEMENTS[name], f"sha256:{files[name]}", sizes[name], **{TITLE: name})
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "artifactType": STATEMENTS[name],
        "config": Document(EMPTY_RAW).described(EMPTY),
        "layers": [layer],
        "subject": subject.described(MANIFEST),
    }
    return document(manifest)


def referring(others: Iterable[Mapping[str, Any]], added: Document) -> Document:
    """The referrers tag's index (distribution specification, "Referrers Tag Schema") with one more entry."""
    said = json.loads(added.raw)
    entry = added.described(MANIFEST) | {"artifactType": said["artifactType"]}
    return document({"schemaVersion": 2, "mediaType": INDEX, "manifests": [*others, entry]})


def _layer(name: str, sha256: str, size: int) -> dict[str, Any]:
    media_type = next(media_type for glob, media_type in LAYERS if fnmatchcase(name, glob))
    return descriptor(media_type, f"sha256:{sha256}", size, **{FILE_PATH: name, TITLE: name})


def _technical(config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"architecture": "transformer", "format": "safetensors"}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        found |= _text(quantization, "quant_method", "quantization")
        if isinstance(quantization.get("bits"), int):
            found["precision"] = f"int{quantization['bits']}"
    return found | {"capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]}}


def _text(said: Mapping[str, Any], key: str, name: str) -> dict[str, str]:
    return {name: said[key]} if isinstance(said.get(key), str) else {}
