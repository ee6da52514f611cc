"""The other end of io/chat.py: a process that renders chat templates, and can do nothing else for long. It imports nothing of buildsys.

The environment is what transformers documents for templates (huggingface.co/docs/transformers/chat_templating_writing): Jinja's immutable
sandbox, trimmed blocks, `break` and `continue`, `generation` blocks, a `tojson` that escapes nothing for HTML, raise_exception and
strftime_now. Today is always the same day here: a text that changes overnight would be other tokens for the same recipe.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
"""The date that Llama 3's own template falls back to where nobody tells it one."""


def environment() -> Any:
    """Jinja, as templates of the hub expect it."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`generation` marks what the model wrote, for training; here it is transparent."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)

    class Shelf(Namespace):
        """Jinja's namespace without names that reach into Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace takes no {name}")
            super().__setitem__(name, value)

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = tojson
    made.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime, "namespace": Shelf}
    return made


def main() -> None:
    """A line of JSON in, a line of JSON out: first the templates, then conversations. Ends with its input.

    What a template raises ends this process too, after it was told: the conversation that follows would never be asked for.
    """
    sys.excepthook = _told
    first = json.loads(sys.stdin.readline())
    limits = first["limits"]
    for limited, most in ((resource.RLIMIT_AS, limits["bytes"]), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limited)[1]
        resource.setrlimit(limited, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    _timed(limits["seconds"])
    made = environment()
    templates = {name: made.from_string(text) for name, text in first["templates"].items()}
    _answer({"text": ""})
    for line in sys.stdin:
        asked = json.loads(line)
        _timed(limits["seconds"])
        text = _joined(templates[asked["template"]].generate, {**first["variables"], **_conversation(asked)}, limits["characters"])
        _answer({"text": text})


def _conversation(asked: dict[str, Any]) -> dict[str, Any]:
    return {"messages": asked["messages"], "tools": asked["tools"], "documents": None, "add_generation_prompt": asked["answer"]}


def _joined(generate: Callable[..., Any], variables: dict[str, Any], most: int) -> str:
    pieces, length = [], 0
    for piece in generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > most:
            raise ValueError(f"it writes more than {most} characters")
    return "".join(pieces)


def _timed(seconds: int) -> None:
    """Processor time from now on; the signal's own action ends the process, whatever it is in the middle of."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _answer(told: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if kind.__name__ == "TemplateError":  # what raise_exception raises: the template's own words
        _answer({"refused": f"refuses it: {error}"})
    else:
        _answer({"refused": f"cannot be applied: {kind.__name__}{f': {error}' if str(error) else ''}"})


if __name__ == "__main__":
    main()
