"""A git repository as a team has it: twelve recipes over three bases, two tiny models, text in git and on a hub; and changes made to it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import models
import runs
from hubserver import HubServer

TEXT = "some-org/text"
BASES = {
    "w4": "quantization: {bits: 4, group_size: 64, method: [awq, gptq]}\nformat: awq\n",
    "w8": """\
quantization: {bits: 8, group_size: -1, symmetric: true, activations: int8, method: [smoothquant, rtn]}
format: smooth_quant
""",
    "plain": "quantization: {bits: 4, group_size: 128, symmetric: true, method: [rtn]}\nformat: gptq\n",
}
RECIPE = """\
# {name}: {says}
schema: 1
extends: ../bases/{base}.yaml
source: {{local: {{path: ../models/{model}}}}}
calibration:
  dataset: {dataset}
  samples: 4
  seqlen: 32
target: {{gpu: a100-40gb, session_len: 256, max_batch_size: 8}}
verify:
  text: {{text_files: {{paths: [../text/test.txt]}}}}
  samples: 4
  seqlen: 32
  kl: {{max_nats: 9.0}}
publish: {{directory: {{path: ../../published/{name}}}}}
"""
LOCAL = "{text_files: {paths: [../text/train.txt]}}"
KV8 = """\
matrix:
  kv8:
    kv_cache: {policy: int8}
    verify: {kv: {max_increase_nats: 9.0}}
"""
TEAMS = {
    "chat": ("w4", "llama", {"alpha": "the assistant", "bravo": "the assistant, on the hub's text", "charlie": "the long sessions"}),
    "edge": ("w8", "llama", {"delta": "for batches", "echo": "for phones", "foxtrot": "for kiosks", "golf": "for cars"}),
    "lab": ("plain", "qwen", {"hotel": "a baseline", "india": "a baseline", "juliet": "a baseline", "kilo": "an old baseline"}),
}
WHEN = {"GIT_AUTHOR_DATE": "2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE": "2026-01-02T03:04:05Z"}
WHO = {
    f"GIT_{role}_{what}": f"someone{'@example.org' if what == 'EMAIL' else ''}"
    for role in ("AUTHOR", "COMMITTER")
    for what in ("NAME", "EMAIL")
}


def git(folder: Path, *arguments: str) -> str:
    quiet = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    ran = subprocess.run(["git", *arguments], cwd=folder, env={**os.environ, **WHEN, **WHO, **quiet}, capture_output=True, text=True)
    assert ran.returncode == 0, f"git {arguments}: {ran.stderr}"
    return ran.stdout.strip()


def commit(folder: Path, said: str) -> str:
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "--allow-empty", "-m", said)
    return git(folder, "rev-parse", "HEAD")


def rows(count: int) -> bytes:
    """Documents of one dataset; a larger count adds some behind the others."""
    return b"".join(json.dumps({"text": models.prose(60, seed=100 + number)}).encode() + b"\n" for number in range(count))


def dataset(hub: HubServer) -> tuple[str, str]:
    """The two commits of a dataset on the hub; the second has more documents, behind those that a recipe reads."""
    return tuple(hub.add("dataset", TEXT, {"train.jsonl": rows(count)}) for count in (12, 14))  # type: ignore[return-value]


def repository(folder: Path, revision: str) -> Path:
    """Everything on the branch main; models in git, as a team with git-lfs has them."""
    runs.empty(folder)
    recipes = folder / "recipes"
    models.tiny_llama(recipes / "models" / "llama", num_attention_heads=2, num_key_value_heads=1)
    models.tiny_qwen2(recipes / "models" / "qwen", num_attention_heads=2, num_key_value_heads=1)
    (recipes / "text").mkdir()
    (recipes / "text" / "train.txt").write_text(models.prose(600, seed=1))
    (recipes / "text" / "test.txt").write_text(models.prose(600, seed=2))
    (recipes / "bases").mkdir()
    for name, said in BASES.items():
        (recipes / "bases" / f"{name}.yaml").write_text(said)
    on_hub = f"{{hub_dataset: {{repo: {TEXT}, revision: {revision}, limit: 10}}}}"
    for team, (base, model, names) in TEAMS.items():
        (recipes / team).mkdir()
        for name, says in names.items():
            said = RECIPE.format(name=name, says=says, base=base, model=model, dataset=on_hub if name == "bravo" else LOCAL)
            (recipes / team / f"{name}.yaml").write_text(said + (KV8 if name == "charlie" else ""))
    (folder / ".gitignore").write_text("artifacts/\npublished/\n__pycache__/\n")
    git(folder, "init", "-q", "-b", "main")
    commit(folder, "Twelve recipes")
    git(folder, "switch", "-q", "-c", "change")
    return folder


def _edit(path: str, old: str, new: str) -> Callable[[Path, str], None]:
    return lambda folder, revision: runs.edit(folder / "recipes" / path, old, new)


def _rename(folder: Path, revision: str) -> None:
    shutil.move(folder / "recipes" / "edge" / "golf.yaml", folder / "recipes" / "edge" / "golf-2.yaml")
    runs.edit(folder / "recipes" / "edge" / "golf-2.yaml", "published/golf}", "published/golf-2}")


def _revision(folder: Path, revision: str) -> None:
    recipe = folder / "recipes" / "chat" / "bravo.yaml"
    before = next(part for part in recipe.read_text().split("revision: ")[1:]).partition(",")[0]
    runs.edit(recipe, before, revision)


CHANGES: dict[str, Callable[[Path, str], None]] = {
    "kv-policy": _edit("chat/alpha.yaml", "target:", "kv_cache: {policy: int8}\ntarget:"),
    "group-size": _edit("bases/w4.yaml", "group_size: 64", "group_size: 32"),
    "loosened": _edit("lab/hotel.yaml", "max_nats: 9.0", "max_nats: 12.0"),
    "revision": _revision,
    "renamed": _rename,
    "deleted": lambda folder, revision: (folder / "recipes" / "lab" / "kilo.yaml").unlink(),
}
"""What a pull request does, by name; each gets the folder and the dataset's newer commit."""


@dataclass
class Team:
    """A repository on its branch `change`, where nothing is changed yet, and the hub that it knows."""

    folder: Path
    hub: HubServer
    newer: str  # the dataset's newer commit
    home: Path

    def doit(self, *arguments: str, folder: Path | None = None) -> runs.Ran:
        told = self.hub.environment() | {"HF_HOME": str(self.home), "HF_HUB_CACHE": str(self.home / "hub")}
        return runs.doit(folder or self.folder, *arguments, **told)

    def diff(self, *arguments: str, folder: Path | None = None) -> runs.Ran:
        return self.doit("diff", "base=main", "threads=2", "device=cpu", *arguments, folder=folder)

    def changed(self, name: str, to: Path) -> Path:
        """The repository elsewhere, with one change committed on its branch."""
        folder = runs.copy(self.folder, to, built=False)
        CHANGES[name](folder, self.newer)
        commit(folder, name)
        return folder
