"""Tokens that stand beside a sentencepiece model, such as InternLM2's <|im_start|>: split out of a text before the model sees the rest.

tokenizer.json holds them itself. A tokenizer.model has them in tokenizer_config.json (`added_tokens_decoder`) or, in older models, in
added_tokens.json; its own control pieces (<s>, </s>) are never found in text. What lies between is encoded piece by piece, as the slow
tokenizers of transformers do it, so the sentencepiece model itself says whether a piece begins with a space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildsys.errors import BuildError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_AGAIN = "take the file from the model's publisher again"


@dataclass(frozen=True)
class Added:
    """One token, and how it is found: taking the space to its left or right with it, only as a word of its own."""

    content: str
    id: int
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    special: bool = True

    @property
    def pattern(self) -> str:
        body = re.escape(self.content)
        body = rf"(?<!\w){body}(?!\w)" if self.single_word else body
        left = r"(?:(?<!\s)\s+)?" if self.lstrip else ""
        right = r"\s*" if self.rstrip else ""
        return f"{left}({body}){right}"


def of(files: Mapping[str, Path], pieces: Any, where: str) -> tuple[Added, ...]:
    """The added tokens of the model whose sentencepiece model is `pieces`."""
    config, older = read_json(files, "tokenizer_config.json", where), read_json(files, "added_tokens.json", where)
    found = {token.content: token for token in _control(config, pieces)}
    found |= {content: Added(content, _id(id, f"{where}/added_tokens.json")) for content, id in older.items()}
    place = f"{where}/tokenizer_config.json"
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in decoder.values()):
        raise BuildError(place, "has an added_tokens_decoder that is no list of tokens", _AGAIN)
    for id, one in decoder.items():
        flags = {flag: one.get(flag) is True for flag in ("lstrip", "rstrip", "single_word", "special")}
        found[one["content"]] = Added(one["content"], _id(id, place), **flags)
    return tuple(token for token in found.values() if token.content)


def _control(config: Mapping[str, Any], pieces: Any) -> list[Added]:
    """The named tokens that are control pieces of the sentencepiece model."""
    ids = {content: pieces.piece_to_id(content) for content in named(config).values()}
    return [Added(content, id) for content, id in ids.items() if pieces.is_control(id)]


def named(*told: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and the like, each from the first file that has it: as text, or as an object that holds it."""
    found: dict[str, str] = {}
    for name in NAMED:
        for said in told:
            token = said.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(name, token)
    return found


def _id(written: Any, where: str) -> int:
    try:
        return int(written)
    except (TypeError, ValueError):
        raise BuildError(where, f"has the token id {written!r}, which is no number", _AGAIN) from None


def splitting(encode: Callable[[str], list[int]], added: Sequence[Added]) -> Callable[[str], list[int]]:
    """`encode`, for the text between added tokens alone."""
    if not added:
        return encode
    tokens = sorted(added, key=lambda token: len(token.content), reverse=True)  # the longest that fits is meant
    found = re.compile("|".join(token.pattern for token in tokens))

    def encoded(text: str) -> list[int]:
        ids: list[int] = []
        place = 0
        for match in found.finditer(text):
            assert match.lastindex is not None
            ids += encode(text[place : match.start()]) if match.start() > place else []
            ids.append(tokens[match.lastindex - 1].id)
            place = match.end()
        return ids + (encode(text[place:]) if place < len(text) else [])

    return encoded


def joining(decode: Callable[[Sequence[int]], str], added: Sequence[Added], size: int) -> Callable[[Sequence[int]], str]:
    """The inverse of `splitting`, without special tokens: `decode` gets the ids that the sentencepiece model of `size` pieces knows."""
    known = {token.id: "" if token.special else token.content for token in added}

    def decoded(ids: Sequence[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        for id in ids:
            if id in known or id >= size:
                parts += [decode(run), known.get(id, "")]
                run = []
            else:
                run.append(id)
        return "".join((*parts, decode(run)))

    return decoded


def read_json(files: Mapping[str, Path], name: str, where: str) -> Mapping[str, Any]:
    """An object, empty where there is no such file."""
    if name not in files:
        return {}
    try:
        said = json.loads(files[name].read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BuildError(f"{where}/{name}", f"is not valid JSON: {error}", _AGAIN) from None
    if not isinstance(said, dict):
        raise BuildError(f"{where}/{name}", "is not a JSON object", _AGAIN)
    return said
