"""The user's own conversations, one a line, written as the model sees them: through its chat template.

Lines as OpenAI's and the hub's tools write them, {"messages": [{"role", "content"}, …], "tools": […]}, or as ShareGPT does,
{"conversations": [{"from", "value"}, …]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.io import chat, globs, rows
from buildsys.located import Located
from buildsys.slots import Frozen

VERSION = 1
READS = "chat"
PLACES = ("paths", "outside")

SUFFIXES = tuple(suffix for suffix in rows.SUFFIXES if suffix.startswith(".json"))
SHAREGPT = "conversations"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""ShareGPT's names, and the ones that templates know."""
_FIX = 'write {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


class Knobs(Frozen):
    paths: tuple[str, ...] = Field(
        min_length=1, description="files or globs (** crosses folders) of .jsonl or .json, relative to this file"
    )
    field: str = Field(default="messages", min_length=1, description="the key of each line that holds its messages")
    system: str | None = Field(default=None, min_length=1, description="a system message for conversations that have none")
    outside: bool = Field(default=False, description="let paths leave the workspace: the recipe then works on this machine only")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files, in the order of `paths` and by name within a glob; each once, numbered so that their names sort in that order."""
    return Located(globs.local(knobs.paths, folder, SUFFIXES))


def floats(knobs: Knobs) -> str:
    """Nothing: the content of the files is in the key."""
    return ""


def texts(knobs: Knobs, files: Mapping[str, Path], render: Callable[[list[dict[str, Any]], list[Any] | None], str]) -> Iterator[str]:
    """Each conversation as the model sees it. `render` is io/chat.py's, for the model that is to be quantized."""
    for name in sorted(files):
        for row in rows.read(name, files[name]):
            messages = _messages(knobs, row)
            try:
                text = render(messages, _tools(row))
            except chat.Refused as error:
                raise BuildError(row.where, error.what, f"{error.fix}; or leave it out") from None
            yield rows.checked(text, row.where, "the conversation", "remove it")


def _messages(knobs: Knobs, row: rows.Row) -> list[dict[str, Any]]:
    field = knobs.field if knobs.field in row.values or SHAREGPT not in row.values else SHAREGPT
    if field not in row.values:
        there = ", ".join(list(row.values)[: rows.SHOWN]) or "none"
        raise BuildError(row.where, f"has no field {field!r}; its fields: {there}", "set `field:` to the one that holds the messages")
    said = row.values[field]
    if not isinstance(said, list) or not said:
        raise BuildError(row.where, f"field {field!r} is {rows.named(said) if said != [] else 'empty'}, not a list of messages", _FIX)
    messages = [_message(one, f"{row.where} message {number}") for number, one in enumerate(said, start=1)]
    if knobs.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": knobs.system})
    return messages


def _message(said: Any, where: str) -> dict[str, Any]:
    if not isinstance(said, dict):
        raise BuildError(where, f"is {rows.named(said)}, not an object", _FIX)
    if "from" in said and "role" not in said:
        speaker = said["from"]
        if speaker not in ROLES:
            raise BuildError(where, f"is from {speaker!r}; known are {', '.join(ROLES)}", _FIX)
        said = {"role": ROLES[speaker], "content": said.get("value")}
    if not isinstance(said.get("role"), str):
        raise BuildError(where, f"has no role; its fields: {', '.join(said) or 'none'}", _FIX)
    if said.get("content") is None and not said.get("tool_calls"):
        raise BuildError(where, f"of {said['role']} has neither content nor tool_calls", _FIX)
    if not isinstance(said.get("content"), str | list | None):
        raise BuildError(where, f"has content that is {rows.named(said['content'])}, not text", _FIX)
    return dict(said)


def _tools(row: rows.Row) -> list[Any] | None:
    """The conversation's tools, as a list or as a list in text (tables have no other way to hold one)."""
    tools = row.values.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise BuildError(row.where, f"field 'tools' is not JSON: {error}", "write a list of tools, or leave it out") from None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BuildError(row.where, f"field 'tools' is {rows.named(tools)}, not a list", "write a list of tools, or leave it out")
    return tools
