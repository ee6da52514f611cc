"""What every dataset keeps: the same tokens twice, others for another seed, and too little text is a clear error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import corpus
from buildsys.slots import Frozen, modules
from buildsys.step import Resources
from tests import models

DATASETS = modules("datasets")
each = pytest.mark.parametrize("name", DATASETS)
Tokens = Callable[[int, int, int], Tensor]  # samples, seqlen, seed -> [samples, seqlen]


def text_files(folder: Path) -> dict[str, Path]:
    """What `locate` finds, as the tokens step gets it."""
    module = DATASETS["text_files"]
    (folder / "a.txt").write_text(models.prose(400, 1))
    (folder / "b.md").write_text(models.prose(400, 2))
    return dict(module.locate(module.Knobs(paths=("*.txt", "*.md")), folder))


KNOBS = {"text_files": {"paths": ("*.txt", "*.md")}, "self_generated": {}}
FILES: dict[str, Callable[[Path], dict[str, Path]]] = {"text_files": text_files}


@pytest.fixture
def tokens(name: str, tmp_path: Path) -> Tokens:
    """The dataset's tokens, made as the tokens step makes them."""
    module = DATASETS[name]
    folder = models.tiny_llama(tmp_path / "model", num_hidden_layers=1)
    knobs = module.Knobs(**KNOBS[name])
    files = FILES[name](tmp_path) if module.READS == "text" else {}

    def made(samples: int, seqlen: int, seed: int) -> Tensor:
        if module.READS == "model":
            found: Tensor = module.generate(knobs, models.opened(folder), samples, seqlen, seed, Resources(), lambda *_: None)
            return found
        encode = corpus.tokenizer(models.files(folder), "source")
        return corpus.windows(module.texts(knobs, files), encode, samples, seqlen, seed, "recipe.yaml:3")

    return made


@each
def test_a_module_is_what_the_slot_asks_for(name: str) -> None:
    module = DATASETS[name]
    assert name in KNOBS, "add your dataset to KNOBS, and to FILES where it reads text"
    assert issubclass(module.Knobs, Frozen) and isinstance(module.VERSION, int) and module.READS in ("text", "model")
    assert callable(module.generate if module.READS == "model" else module.texts)


@each
def test_the_same_tokens_twice_and_others_for_another_seed(name: str, tokens: Tokens) -> None:
    first = tokens(6, 32, 0)
    assert first.shape == (6, 32) and first.max() < models.VOCAB
    assert first.equal(tokens(6, 32, 0))
    assert not first.equal(tokens(6, 32, 1))
    assert first[:2].equal(tokens(2, 32, 0)), "fewer samples are the first of more"


@pytest.mark.parametrize("name", [name for name, module in DATASETS.items() if module.READS == "text"])
def test_too_little_text_is_a_clear_error(name: str, tokens: Tokens) -> None:
    with pytest.raises(BuildError) as caught:
        tokens(100_000, 32, 0)
    assert caught.value.where == "recipe.yaml:3" and "100000 are needed" in caught.value.what and "samples:" in caught.value.fix
