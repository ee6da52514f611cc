"""What every dataset keeps: the same tokens twice, others for another seed, too little text is a clear error, and places are in no key."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import chat, corpus
from buildsys.located import Located
from buildsys.slots import Frozen, modules
from buildsys.step import Resources
from tests import models
from tests.datasets import places

DATASETS = modules("datasets")
each = pytest.mark.parametrize("name", DATASETS)
Tokens = Callable[[int, int, int], Tensor]  # samples, seqlen, seed -> [samples, seqlen]

KNOBS: dict[str, dict[str, Any]] = {
    "self_generated": {},
    "text_files": {"paths": ("*.txt", "*.md")},
    "chat_jsonl": {"paths": ("chats.jsonl",), "system": "Be brief."},
    "hub_dataset": {"path": "data", "field": "body"},
    **{name: {"split": split, "path": name} for name, (_, split, _) in places.HUB.items()},
}
TALK = [
    {"messages": [{"role": "user", "content": models.prose(20, seed)}, {"role": "assistant", "content": models.prose(20, seed + 50)}]}
    for seed in range(20)
]
FILES: dict[str, bytes] = {
    "a.txt": models.prose(400, 1).encode(),
    "b.md": models.prose(400, 2).encode(),
    "chats.jsonl": places.lines(TALK),
    "data/train.parquet": places.table([{"body": models.prose(60, seed)} for seed in range(10)]),
    **{f"{name}/{file}": raw for name, (_, _, files) in places.HUB.items() for file, raw in files.items()},
}
TEMPLATE = "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def located(name: str, tmp_path: Path) -> Located:
    """What planning finds; a dataset that generates has no files."""
    module = DATASETS[name]
    if module.READS == "model":
        return Located({})
    places.write(tmp_path / "texts", FILES)
    found: Located = module.locate(module.Knobs(**KNOBS[name]), tmp_path / "texts", tmp_path / "home")
    return found


@pytest.fixture
def tokens(name: str, tmp_path: Path, located: Located) -> Tokens:
    """The dataset's tokens, made as the tokens step makes them: from the knobs that are in its key, and from files under other names."""
    module = DATASETS[name]
    folder = models.tiny_llama(tmp_path / "model", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    files = stored(located.files, tmp_path / "blobs")
    knobs = module.Knobs.model_construct(**module.Knobs(**KNOBS[name]).model_dump(exclude=set(module.PLACES)))

    def made(samples: int, seqlen: int, seed: int) -> Tensor:
        if module.READS == "model":
            found: Tensor = module.generate(knobs, models.opened(folder), samples, seqlen, seed, Resources(), lambda *_: None)
            return found
        encode = corpus.tokenizer(models.files(folder), "source")
        if module.READS == "chat":
            texts, end = module.texts(knobs, files, chat.renderer(models.files(folder), "source")), ""
        else:
            texts, end = module.texts(knobs, files), "\n"
        return corpus.windows(texts, encode, samples, seqlen, seed, "recipe.yaml:3", end)

    return made


def stored(files: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The files as a store has them: in the order of nothing, under names that tell nothing."""
    folder.mkdir()
    found = {}
    for number, (name, path) in enumerate(reversed(files.items())):
        (folder / f"{number}").write_bytes(path.read_bytes())
        found[name] = folder / f"{number}"
    return found


@each
def test_a_module_is_what_the_slot_asks_for(name: str) -> None:
    module = DATASETS[name]
    assert name in KNOBS, "add your dataset to KNOBS, and its files to FILES"
    assert issubclass(module.Knobs, Frozen) and isinstance(module.VERSION, int) and module.READS in ("text", "model", "chat")
    assert callable(module.generate if module.READS == "model" else module.texts)
    assert set(module.PLACES) <= set(module.Knobs.model_fields) and module.floats(module.Knobs(**KNOBS[name])) == ""
    assert all(field.description for field in module.Knobs.model_fields.values()), "an editor shows what a knob is for"
    on_hub = "revision" in module.Knobs.model_fields
    assert callable(getattr(module, "fetch", None)) == on_hub


@each
def test_everything_that_says_where_is_a_place(name: str) -> None:
    module = DATASETS[name]
    where = {"path", "paths", "outside", "repo", "revision", "split", "config", "files"}
    assert set(module.Knobs.model_fields) & where == set(module.PLACES)


@each
def test_files_are_found_without_a_network(name: str, located: Located) -> None:
    assert not located.how and not located.sizes
    assert all(path.is_file() and re.fullmatch(r"[^/.][^\\]*", file) for file, path in located.files.items())


@each
def test_the_same_tokens_twice_and_others_for_another_seed(name: str, tokens: Tokens) -> None:
    first = tokens(6, 32, 0)
    assert first.shape == (6, 32) and first.max() < models.VOCAB
    assert first.equal(tokens(6, 32, 0))
    assert not first.equal(tokens(6, 32, 1))
    assert first[:2].equal(tokens(2, 32, 0)), "fewer samples are the first of more"


@pytest.mark.parametrize("name", [name for name, module in DATASETS.items() if module.READS != "model"])
def test_too_little_text_is_a_clear_error(name: str, tokens: Tokens) -> None:
    with pytest.raises(BuildError) as caught:
        tokens(100_000, 32, 0)
    assert caught.value.where == "recipe.yaml:3" and "100000 are needed" in caught.value.what and "samples:" in caught.value.fix


@pytest.mark.parametrize("name", ["chat_jsonl"])
def test_conversations_follow_each_other_as_their_template_ends_them(name: str, tokens: Tokens) -> None:
    every = tokens(100, 16, 0).flatten().tolist()
    assert every.count(models.EOS) > 2 * every.count(models.BOS) > 0, "the template's special tokens are tokens"
    assert (models.EOS, models.BOS) in pairwise(every), "and nothing stands between two conversations"
