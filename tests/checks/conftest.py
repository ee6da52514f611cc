"""Scores as the score step writes them, made by hand; and the context that a check is handed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Architecture, llama_family
from buildsys.io import checkpoint
from buildsys.measurement import scores_file
from buildsys.relayout import Relayout, relayout
from buildsys.scheme import Scheme, Schemes


@dataclass(frozen=True)
class Files:
    """Stands in for steps.Inputs."""

    files: Mapping[str, Path]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def path(self, name: str) -> Path:
        return self.files[name]


def tiny() -> Architecture:
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 1,
        "head_dim": 64,
        "vocab_size": 96,
    }
    return llama_family(sizes, "config.json")


@dataclass(frozen=True)
class Context:
    facts: Mapping[str, Any] = field(default_factory=dict)
    architecture: Architecture = field(default_factory=tiny)
    schemes: Schemes = field(default_factory=lambda: Schemes(Scheme(4, 32)))
    format: ModuleType | None = None
    device: str = "cpu"

    @property
    def relayout(self) -> Relayout:
        return relayout(self.architecture, {}, "config.json", None)

    def progress(self, what: str, done: int, total: int) -> None:
        assert done <= total


def random(windows: int = 12, tokens: int = 40, harm: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
    """`harm` is the mean KL in nats; 0 is the source compared with itself."""
    generator = torch.Generator().manual_seed(seed)
    nll = 3 + torch.randn(windows, tokens, generator=generator).abs()
    noise = torch.rand(windows, tokens, generator=generator)
    return {
        "source_nll": nll,
        "quantized_nll": nll + 2 * harm * noise,
        "kl": 2 * harm * noise,
        "agree": (noise > harm).float() if harm else torch.ones(windows, tokens),
    }


def write(folder: Path, scores: Mapping[str, Tensor], policy: str = "none") -> Files:
    folder.mkdir(parents=True, exist_ok=True)
    name = scores_file(policy)
    checkpoint.save(folder / name, scores)
    return Files({name: folder / name})


@pytest.fixture
def made() -> SimpleNamespace:
    """What this file offers, without an import that would depend on how pytest finds modules."""
    return SimpleNamespace(Context=Context, Files=Files, random=random, tiny=tiny, write=write)
