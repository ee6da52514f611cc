"""What a report shows that the facts of a build do not hold: answers side by side, outliers of the activations, whether it is signed.

An outlier is a channel that is far larger than the rest of its layer: it decides the scale of its group, and the others lose their bits.
AWQ (arXiv:2306.00978, section 3) moves them out of the way.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buildsys.architecture import SITES, Site
from buildsys.errors import BuildError
from buildsys.io import headers

NO_PROMPTS = "The recipe names no prompts: report: {prompts: [What is a quine?]} would show both models' answers to them here."
NO_OUTLIERS = "The statistics that calibration kept are no longer in the store."
NO_STATISTICS = "The recipe's backend looks at activations in a process of its own, and keeps nothing of them."
_BLOCK = re.compile(r"block-(\d+)\.safetensors")


@dataclass(frozen=True)
class Generation:
    """What both models answer to one prompt, both greedily."""

    prompt: str
    source_text: str
    quantized_text: str

    @property
    def first_difference(self) -> int | None:
        """Where the texts part, at the start of the word in which they do; None where they are equal."""
        if self.source_text == self.quantized_text:
            return None
        pairs = enumerate(zip(self.source_text, self.quantized_text, strict=False))
        shorter = min(len(self.source_text), len(self.quantized_text))
        at = next((place for place, (ours, theirs) in pairs if ours != theirs), shorter)
        if any(_is_inside_word(letter) for letter in (self.source_text[at : at + 1], self.quantized_text[at : at + 1]) if letter):
            while at and _is_inside_word(self.source_text[at - 1]):
                at -= 1
        return at


def _is_inside_word(letter: str) -> bool:
    """Scripts from U+2E80 on (Chinese, Japanese, Korean, emoji) have no spaces to go back to."""
    return letter < "\u2e80" and (letter.isalnum() or unicodedata.category(letter).startswith("M"))


@dataclass(frozen=True)
class Outliers:
    """How uneven the inputs of one site of one block are. Both are ratios to the mean magnitude over all channels and tokens."""

    layer: int
    site: Site
    largest: float  # the largest single value
    channel: float  # the mean magnitude of the largest channel


@dataclass(frozen=True)
class View:
    """Beside the facts. What is empty is said to be absent, with the reason."""

    generations: tuple[Generation, ...] = ()
    no_generations: str = NO_PROMPTS
    outliers: tuple[Outliers, ...] = ()
    no_outliers: str = NO_OUTLIERS
    signature: str = "Not signed."
    catalogue: str = ""  # a link to the page of all recipes
    served: Mapping[str, Any] = field(default_factory=dict)  # of the serve step, where one ran


def generations(path: Path) -> tuple[Generation, ...]:
    """From the generate step's file: a list of {prompt, source, quantized}."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return tuple(Generation(str(one["prompt"]), str(one["source"]), str(one["quantized"])) for one in said)
    except (ValueError, TypeError, KeyError) as error:
        what = f"is no list of prompt, source and quantized ({type(error).__name__}: {error})"
        raise BuildError("the recipe's generations", what, "build the recipe again with this version of buildsys") from None


def outliers(files: Mapping[str, Path]) -> tuple[Outliers, ...]:
    """From calibration's files, name -> path. Reads two short vectors a site and none of the Gram matrices."""
    found: list[Outliers] = []
    for name, path in sorted(files.items()):
        block = _BLOCK.fullmatch(name)
        if block is None:
            continue
        header = headers.read(path, name)
        for site in SITES:
            ratios = [_ratios(path, name, header, place) for place in _places(site, header)]
            found.append(Outliers(int(block[1]), site, *map(max, zip(*ratios, strict=True))))
    return tuple(found)


def _places(site: Site, header: headers.Header) -> list[Site]:
    """The site, or where experts read in its place each of theirs."""
    named = [name.removesuffix(".absmean") for name in sorted(header.tensors) if name.startswith(f"{site}.") and name.endswith(".absmean")]
    return [site] if site in named or not named else named


def _ratios(path: Path, name: str, header: headers.Header, site: Site) -> tuple[float, float]:
    means, peaks = (_vector(path, name, header, f"{site}.{part}") for part in ("absmean", "absmax"))
    typical = sum(means) / len(means)
    return (max(peaks) / typical, max(means) / typical) if typical > 0 else (float("nan"), float("nan"))


def _vector(path: Path, name: str, header: headers.Header, tensor: str) -> list[float]:
    import numpy as np

    entry = header.tensors.get(tensor)
    if entry is None or entry.dtype != "F32" or len(entry.shape) != 1 or not entry.shape[0]:
        what = f"holds no float32 vector {tensor}, which calibration writes"
        raise BuildError(name, what, "build the recipe again with this version of buildsys")
    with path.open("rb") as file:
        file.seek(entry.start)
        values: list[float] = np.frombuffer(file.read(entry.bytes), dtype="<f4").astype(float).tolist()
    return values
