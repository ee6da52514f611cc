"""Conversations from the user's files, in the forms that people have them in; a bad one is named by its line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from buildsys.datasets import chat_jsonl
from buildsys.datasets.chat_jsonl import Knobs
from buildsys.errors import BuildError
from buildsys.io import chat
from tests.datasets import places

ASK = {"role": "user", "content": "Rain?"}
SAY = {"role": "assistant", "content": "Yes."}
TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}


def written(messages: Sequence[Any], tools: Sequence[Any] | None) -> str:
    """Stands for the model's template: all that it was given."""
    return json.dumps([messages, tools])


def read(folder: Path, *lines: Any, **knobs: Any) -> list[Any]:
    places.write(folder, {"a.jsonl": places.lines(lines)})
    chosen = Knobs(paths=("a.jsonl",), **knobs)
    found = chat_jsonl.locate(chosen, folder, folder)
    assert list(found.files) == ["00000-a.jsonl"] and not found.how and chat_jsonl.floats(chosen) == ""
    return [json.loads(text) for text in chat_jsonl.texts(chosen, found.files, written)]


def refused(folder: Path, line: Any) -> BuildError:
    with pytest.raises(BuildError) as caught:
        read(folder, {"messages": [ASK, SAY]}, line)
    assert caught.value.fix and caught.value.where.startswith(f"{folder / 'a.jsonl'}:2")
    return caught.value


def test_messages_and_tools(tmp_path: Path) -> None:
    found = read(tmp_path, {"messages": [ASK, SAY]}, {"messages": [ASK, CALL], "tools": [TOOL]}, {"messages": [ASK], "tools": "[{}]"})
    assert found == [[[ASK, SAY], None], [[ASK, CALL], [TOOL]], [[ASK], [{}]]]
    for none in (None, [], "", " "):
        assert read(tmp_path, {"messages": [ASK], "tools": none}) == [[[ASK], None]]


def test_the_way_of_sharegpt(tmp_path: Path) -> None:
    line = {"id": "x", "conversations": [{"from": "human", "value": "Rain?"}, {"from": "gpt", "value": "Yes."}]}
    assert read(tmp_path, line) == [[[ASK, SAY], None]]
    assert read(tmp_path, {"conversations": [ASK, SAY]}) == [[[ASK, SAY], None]]


def test_another_field_and_a_system_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert read(tmp_path, {"chat": [ASK]}, {"chat": [{"role": "system", "content": "Sing."}, ASK]}, field="chat", system="Be brief.") == [
        [[system, ASK], None],
        [[{"role": "system", "content": "Sing."}, ASK], None],
    ]


def test_packed_files_and_lists(tmp_path: Path) -> None:
    rows = [{"messages": [ASK]}, {"messages": [SAY]}]
    places.write(tmp_path, {"a.jsonl.zst": places.zst(places.lines(rows)), "b.json": json.dumps(rows).encode(), "c.txt": b""})
    chosen = Knobs(paths=("*.json*",))
    assert len(list(chat_jsonl.texts(chosen, chat_jsonl.locate(chosen, tmp_path, tmp_path).files, written))) == 4
    with pytest.raises(BuildError, match=r"is \.txt; text files are .*\.jsonl"):
        chat_jsonl.locate(Knobs(paths=("c.txt",)), tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ({"text": "x"}, "has no field 'messages'; its fields: text"),
        ({"messages": []}, "is empty, not a list of messages"),
        ({"messages": "x"}, "is text, not a list of messages"),
        ({"messages": None}, "is null"),
        ({"messages": [ASK, "x"]}, "is text, not an object"),
        ({"messages": [{"content": "x"}]}, "has no role; its fields: content"),
        ({"messages": [{"role": "user"}]}, "of user has neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, "has content that is a number, not text"),
        ({"messages": [{"from": "martian", "value": "x"}]}, "is from 'martian'; known are human"),
        ({"messages": [ASK], "tools": "[oops"}, "'tools' is not JSON"),
        ({"messages": [ASK], "tools": {"a": 1}}, "'tools' is an object, not a list"),
        ([1], "is a list, not a JSON object"),
    ],
)
def test_a_bad_line_is_named(line: Any, what: str, tmp_path: Path) -> None:
    assert what in refused(tmp_path, line).what


def test_what_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}{{ messages[0].content }}"
    config = {"chat_template": template}
    places.write(tmp_path, {"tokenizer_config.json": json.dumps(config).encode()})
    places.write(tmp_path, {"a.jsonl": places.lines([{"messages": [ASK]}, {"messages": [SAY]}])})
    chosen = Knobs(paths=("a.jsonl",))
    render = chat.renderer({"tokenizer_config.json": tmp_path / "tokenizer_config.json"}, "source")
    found = chat_jsonl.texts(chosen, chat_jsonl.locate(chosen, tmp_path, tmp_path).files, render)
    assert next(found) == "Rain?"
    with pytest.raises(BuildError, match=r"begin with the user.*\n.*leave it out") as caught:
        next(found)
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:2"


def test_half_a_character_is_refused_at_its_line(tmp_path: Path) -> None:
    places.write(tmp_path, {"a.jsonl": b'{"messages": [{"role": "user", "content": "cut \\ud83d"}]}'})
    chosen = Knobs(paths=("a.jsonl",))
    with pytest.raises(BuildError, match="half of a character") as caught:
        list(
            chat_jsonl.texts(
                chosen, chat_jsonl.locate(chosen, tmp_path, tmp_path).files, lambda messages, tools: str(messages[0]["content"])
            )
        )
    assert caught.value.where == f"{tmp_path / 'a.jsonl'}:1"


def test_paths_are_needed() -> None:
    with pytest.raises(ValidationError):
        Knobs(paths=())
