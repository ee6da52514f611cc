"""Tokens beside a sentencepiece model: found in a text, and only there; the rest is the model's own."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.io import added_tokens, corpus
from buildsys.io.added_tokens import Added
from tests import models


@cache
def pieces() -> bytes:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.prose(3000).splitlines()), model_writer=made, vocab_size=200, model_type="bpe", minloglevel=2
    )
    return made.getvalue()


def model(folder: Path, **said: Any) -> dict[str, Path]:
    """A model with tokenizer.model, and what is said in its other files."""
    (folder / "tokenizer.model").write_bytes(pieces())
    for name, value in said.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return models.files(folder)


def own(text: str) -> list[int]:
    return list(sentencepiece.SentencePieceProcessor(model_proto=pieces()).encode(text))


INTERNLM2 = {
    "bos_token": "<s>",
    "added_tokens_decoder": {
        "1": {"content": "<s>", "lstrip": False, "rstrip": False, "special": True},
        "2": {"content": "</s>", "special": True},
        "250": {"content": "<|im_start|>", "special": True},
        "251": {"content": "<|im_end|>", "special": True},
        "252": {"content": "<think>", "special": False},
    },
}


def test_what_a_chat_template_writes_becomes_single_tokens(tmp_path: Path) -> None:
    encode = corpus.tokenizer(model(tmp_path, tokenizer_config=INTERNLM2), "source")
    ids = encode("<s><|im_start|>user\nthe river<|im_end|>\n<think>")
    assert ids == [1, 250, *own("user\nthe river"), 251, *own("\n"), 252]
    assert encode("the river and the stone") == own("the river and the stone") and encode("") == []


def test_back_to_text_without_special_tokens(tmp_path: Path) -> None:
    files = model(tmp_path, tokenizer_config=INTERNLM2)
    ids = corpus.tokenizer(files, "source")("<s><|im_start|>the river<think>the stone<|im_end|>")
    assert corpus.decoder(files, "source")(ids) == "the river<think>the stone"
    assert corpus.decoder(files, "source")([9999, *own("the stone")]) == "the stone", "an id that no token has is no text"


def test_control_pieces_are_found_where_only_their_names_are_given(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "<absent>", "unk_token": None}
    encode = corpus.tokenizer(model(tmp_path, tokenizer_config=config), "source")
    assert encode("<s>the river</s>") == [1, *own("the river"), 2]
    assert encode("<absent>") == own("<absent>")


def test_the_file_of_older_models(tmp_path: Path) -> None:
    encode = corpus.tokenizer(model(tmp_path, added_tokens={"<extra>": 200, "<extra>s": 201}), "source")
    assert encode("the<extra>s<extra>") == [*own("the"), 201, 200], "the longest that fits is meant"


@pytest.mark.parametrize(
    ("flags", "text", "ids"),
    [
        ({}, "a <x> b", [*map(ord, "a "), -1, *map(ord, " b")]),
        ({"lstrip": True}, "a  <x> b", [ord("a"), -1, *map(ord, " b")]),
        ({"rstrip": True}, "a <x>  b", [*map(ord, "a "), -1, ord("b")]),
        ({"single_word": True}, "a<x> <x>", [*map(ord, "a<x> "), -1]),
    ],
)
def test_flags_are_heard(flags: dict[str, bool], text: str, ids: list[int]) -> None:
    assert added_tokens.splitting(lambda part: [ord(sign) for sign in part], [Added("<x>", -1, **flags)])(text) == ids


@given(st.lists(st.sampled_from(["<a>", "<ab>", "a", "b", "<", ">", " ", "\n"])))
def test_splitting_and_joining_are_inverse(parts: list[str]) -> None:
    text = "".join(parts)
    added = [Added("<a>", 1000, special=False), Added("<ab>", 1001, special=False)]
    ids = added_tokens.splitting(lambda part: [ord(sign) for sign in part], added)(text)
    assert added_tokens.joining(lambda run: "".join(map(chr, run)), added, 1000)(ids) == text
    assert ids.count(1000) == text.count("<a>") and ids.count(1001) == text.count("<ab>")


@pytest.mark.parametrize(
    ("said", "what"),
    [
        ({"tokenizer_config": "{"}, "tokenizer_config.json  is not valid JSON"),
        ({"tokenizer_config": "[]"}, "tokenizer_config.json  is not a JSON object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, "token id 'x', which is no number"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": "<x>"}}}, "no list of tokens"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "no list of tokens"),
        ({"added_tokens": {"<x>": None}}, "token id None"),
    ],
)
def test_damaged_files_are_named(said: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        corpus.tokenizer(model(tmp_path, **said), "source")
    assert what in str(caught.value) and caught.value.where.startswith("source/")
