"""Conversations become text through the model's own chat template, as transformers' `apply_chat_template` does it.

A template is a program from a stranger (Jinja, jinja.palletsprojects.com): it runs in a process of its own, with limits on time and memory
(io/template.py), and sees a conversation and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from buildsys.errors import BuildError
from buildsys.io import template
from buildsys.io.added_tokens import named, read_json
from buildsys.step import digest

FILES = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json", "special_tokens_map.json")
"""Of a model: those that say how its conversations are written. The first that has a template is the one."""

REASONING = ("reasoning_content", "thinking", "reasoning")
LIMITS = MappingProxyType({"seconds": 10, "bytes": 2 << 30, "characters": 16 << 20})
"""For one conversation: processor time, memory, text."""

KEPT = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "VIRTUAL_ENV")
"""What the template's process gets of the environment: enough to find Python and Jinja, and no token."""

_AGAIN = "take the file from the model's publisher again"

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], Sequence[Any] | None], str]


class Refused(BuildError):
    """A conversation that the template does not take, or that it cannot be run for."""


class Renderer:
    """`render(messages, tools)` -> text. Its process ends with this object, with ours, and with the first conversation that is refused."""

    def __init__(self, templates: Mapping[str, str], variables: Mapping[str, str], where: str, limits: Mapping[str, int] = LIMITS) -> None:
        self.where = where
        self._names, self._limits = frozenset(templates), limits
        self._process = subprocess.Popen(
            [sys.executable, "-P", template.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name in KEPT},
        )
        self.close = weakref.finalize(self, _end, self._process)
        try:
            self._ask({"templates": templates, "variables": variables, "limits": dict(limits)})
        except Refused as error:
            self.close()
            raise BuildError(where, error.what, _AGAIN) from None

    def __call__(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, answer: bool = False) -> str:
        """The conversation as the model sees it; with `answer`, up to where the model is to speak. Raises Refused."""
        said = [_plain(message) for message in messages]
        return self._ask({"messages": said, "tools": tools, "answer": answer, "template": self._chosen(tools)})

    def _chosen(self, tools: Sequence[Any] | None) -> str:
        return "tool_use" if tools is not None and "tool_use" in self._names else "default"

    def _ask(self, question: Mapping[str, Any]) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):
            raise self._refused(self._death())
        told = json.loads(answer)
        if "text" not in told:
            raise self._refused(told["refused"])
        return str(told["text"])

    def _refused(self, why: str) -> Refused:
        return Refused(self.where, f"the model's chat template {why}", "mend the conversation: the template is written for others")

    def _death(self) -> str:
        """Why nothing came back: a limit, since what a template raises is an answer."""
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return f"runs for more than {self._limits['seconds']} s"
        return f"ended its process ({signal.Signals(-status).name if status < 0 else f'status {status}'}): out of memory?"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a question that it never read
                pipe.close()


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates expect it: no key without a value, and a model's reasoning under both of its names."""
    said = {key: value for key, value in message.items() if value is not None}
    reasoning = next((said[key] for key in REASONING if key in said), None)
    return said if reasoning is None else {"thinking": reasoning, **said, "reasoning_content": reasoning}


def renderer(files: Mapping[str, Path], where: str, limits: Mapping[str, int] = LIMITS) -> Renderer:
    """What writes conversations for the model whose `files` these are (of FILES, those that it has). `where` names the model in errors."""
    config = read_json(files, "tokenizer_config.json", where)
    found, name = _templates(files, config, where)
    return Renderer(found, named(config, read_json(files, "special_tokens_map.json", where)), f"{where}/{name}", limits)


def has_template(files: Mapping[str, Path], where: str = "source") -> bool:
    """Whether the model says how a conversation with it is written."""
    return "chat_template.jinja" in files or any(
        read_json(files, name, where).get("chat_template") for name in ("tokenizer_config.json", "chat_template.json")
    )


def fingerprint(files: Mapping[str, Path], where: str = "source") -> str:
    """Digest of the model's chat templates; "" where there is none. Which file holds them does not matter."""
    if not has_template(files, where):
        return ""
    return digest(_templates(files, read_json(files, "tokenizer_config.json", where), where)[0])


def _templates(files: Mapping[str, Path], config: Mapping[str, Any], where: str) -> tuple[dict[str, str], str]:
    """The model's templates by name, and the file that has them."""
    if "chat_template.jinja" in files:
        return {"default": _text(files, "chat_template.jinja", where)}, "chat_template.jinja"
    for name, said in (("tokenizer_config.json", config), ("chat_template.json", read_json(files, "chat_template.json", where))):
        written = said.get("chat_template")
        if isinstance(written, str):
            return {"default": written}, name
        if isinstance(written, list):
            written = {one.get("name"): one.get("template") for one in written if isinstance(one, dict)}
        if isinstance(written, dict) and written:
            if not isinstance(written.get("default"), str):
                what = f"has chat templates {', '.join(map(str, written))}, and none is the default"
                raise BuildError(f"{where}/{name}", what, "name a model with a default chat template, or give the text as text_files")
            return {key: value for key, value in written.items() if isinstance(value, str)}, name
    what = "has no chat template, neither chat_template.jinja nor one in tokenizer_config.json"
    raise BuildError(where, what, "name a chat model, or give the text as text_files")


def _text(files: Mapping[str, Path], name: str, where: str) -> str:
    try:
        return files[name].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BuildError(f"{where}/{name}", f"cannot be read: {said}", _AGAIN) from None
