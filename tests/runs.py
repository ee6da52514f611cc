"""Workspaces to build in, and `doit` run in them as a user runs it: a process of its own, judged by its exit status and its words."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildsys.plan import Plan, plan
from buildsys.store import Store
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r" *(built|cached|runs\?|runs) +(\w+) +(\S.*?)(?:  .*)?")

TINY = """\
schema: 1
source: {local: {path: model}}
calibration:
  dataset: {text_files: {paths: [calibration.txt]}}
  samples: 4
  seqlen: 32
  seed: 0
quantization: {bits: 4, group_size: 32, method: [awq, gptq]}
format: awq
kv_cache: {policy: none}
verify:
  text: {text_files: {paths: [verify.txt]}}
  samples: 4
  seqlen: 32
  kl: {max_nats: 9.0}
publish: {directory: {path: ../published}}
"""

SCHEMES = """\
schema: 1
source: {local: {path: llama}}
calibration:
  dataset: {text_files: {paths: [calibration.txt]}}
  samples: 4
  seqlen: 32
quantization: {bits: 4, group_size: 32, symmetric: true, method: [awq, gptq]}
format: compressed_tensors
verify:
  text: {text_files: {paths: [verify.txt]}}
  samples: 4
  seqlen: 32
  kl: {max_nats: 0.5}
matrix:
  overrides:
    quantization:
      overrides:
        down_proj: {bits: 8, group_size: 64}
        layers.0.self_attn.o_proj: {skip: true}
        layers.1.self_attn.*: {method: rtn}
  w8a8:
    quantization: {bits: 8, group_size: -1, activations: int8, method: [smoothquant, rtn]}
    format: smooth_quant
  mixed:
    quantization: {symmetric: false, mixed: {budget_bits: 4.4, bits: [3, 4, 8]}}
    format: gptq
  relaid:
    source: {local: {path: internlm2}}
    quantization: {symmetric: false}
    format: {awq: {as: llama}}
  experts:
    source: {local: {path: mixtral}}
    quantization: {symmetric: false}
    format: awq
"""


@dataclass(frozen=True)
class Ran:
    """What one command said."""

    status: int
    out: str
    err: str

    def rows(self, *states: str) -> list[tuple[str, str]]:
        """(kind, title) of the lines in one of `states`: built, cached, runs, runs? (what is not certain before it runs)."""
        found = (ROW.fullmatch(line) for line in self.out.splitlines())
        return [(row[2], row[3]) for row in found if row is not None and row[1] in states and row[2] != "judge"]

    def fine(self) -> Ran:
        assert self.status == 0, f"exit status {self.status}\n{self.out}\n{self.err}"
        return self


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "doit", *arguments]


def environment() -> dict[str, str]:
    """The tests' own, with the buildsys that is tested first on the path. Asked for by threads, while pytest changes it for each test."""
    now = {name: value for name in list(os.environ) if (value := os.environ.get(name)) is not None}
    kept = now.get("PYTHONPATH")
    return {**now, "PYTHONPATH": os.pathsep.join([str(ROOT), *([kept] if kept else [])])}


def doit(workspace: Path, *arguments: str, before: Callable[[], None] | None = None, **more: str) -> Ran:
    """`doit ARGUMENTS` in `workspace`; `before` runs in the child before doit does, `more` is added to its environment."""
    ended = subprocess.run(
        command(*arguments), cwd=workspace, env=environment() | more, capture_output=True, text=True, timeout=240, preexec_fn=before
    )
    return Ran(ended.returncode, ended.stdout, ended.stderr)


def empty(folder: Path) -> Path:
    """A workspace without a recipe."""
    (folder / "recipes").mkdir(parents=True)
    for name in ("dodo.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def demo(folder: Path) -> Path:
    """A workspace with the recipe that is shipped with its model; the others need a hub."""
    empty(folder)
    for name in ("demo", "bases"):
        shutil.copytree(ROOT / "recipes" / name, folder / "recipes" / name)
    return folder


def tiny(folder: Path, **config: Any) -> Path:
    """A workspace with the recipe `tiny`: a random model of 0.4 M weights, and text from files."""
    import models

    empty(folder)
    models.tiny_llama(folder / "recipes" / "model", **config)
    (folder / "recipes" / "calibration.txt").write_text(models.prose(600, seed=1))
    (folder / "recipes" / "verify.txt").write_text(models.prose(600, seed=2))
    (folder / "recipes" / "tiny.yaml").write_text(TINY)
    return folder


def schemes(folder: Path) -> Path:
    """A workspace with the recipe `schemes`: a variant for each way to hold a model beyond one scheme under its own names."""
    import models

    empty(folder)
    for family in ("llama", "internlm2", "mixtral"):
        models.FAMILIES[family](folder / "recipes" / family)
    (folder / "recipes" / "calibration.txt").write_text(models.prose(600, seed=1))
    (folder / "recipes" / "verify.txt").write_text(models.prose(600, seed=2))
    (folder / "recipes" / "schemes.yaml").write_text(SCHEMES)
    return folder


def both(folder: Path) -> Path:
    """A workspace with the recipe `both` of lmdeploys.py, for the demo's model."""
    import lmdeploys
    import models

    empty(folder)
    shutil.copytree(ROOT / "recipes" / "demo" / "model", folder / "recipes" / "model")
    (folder / "recipes" / "calibration.txt").write_text(models.prose(3000, seed=1))
    (folder / "recipes" / "verify.txt").write_text(models.prose(3000, seed=2))
    (folder / "recipes" / "both.yaml").write_text(lmdeploys.TEXT)
    return folder


def copy(workspace: Path, folder: Path, built: bool = True) -> Path:
    """The same workspace elsewhere, with what was built in it or without."""
    ignore = None if built else shutil.ignore_patterns("artifacts")
    shutil.copytree(workspace, folder, symlinks=True, ignore=ignore)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    """Replaces text that is there exactly once."""
    text = path.read_text()
    assert text.count(old) == 1, f"{path} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def planned(workspace: Path, recipe: str) -> Plan:
    return plan(Workspace(workspace).load(recipe), Store(workspace / "artifacts"))


def manifests(workspace: Path) -> dict[str, dict[str, Any]]:
    """Every finished step of the store, by key; a release is none: it tells when and where the steps ran."""
    found = {path: json.loads(path.read_text()) for path in (workspace / "artifacts" / ".store" / "manifests").glob("*.json")}
    return {path.stem: manifest for path, manifest in found.items() if "release" not in manifest["meta"]}


def outputs(workspace: Path) -> dict[str, dict[str, str]]:
    """Digests of every built file: {key: {name: sha256}}."""
    return {key: {name: file["sha256"] for name, file in one["files"].items()} for key, one in manifests(workspace).items()}


def digest(workspace: Path, recipe: str) -> str | None:
    """Of the artifact that artifacts/<recipe> leads to."""
    return Store(workspace / "artifacts").linked(recipe)
