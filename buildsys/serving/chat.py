"""A conversation in the terminal: each answer as it is written, what was said before sent along, /reset and /exit.

Lines come from a terminal, with editing and history where Python has readline, or from a file or pipe, and then nothing is asked aloud.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

from buildsys.errors import BuildError
from buildsys.serving.client import Client
from buildsys.serving.server import health

PROMPT = "> "
HELP = "/reset forgets what was said, /exit or Ctrl-D ends it"
ALIVE_S = 5.0


def talk(client: Client, name: str, read: TextIO, out: TextIO) -> None:
    """Until the lines end. Raises BuildError where the server cannot go on; on a terminal, what it refuses is told and left out."""
    asked = _asked(read, out)
    said: list[dict[str, str]] = []
    if read.isatty():
        out.write(f"{name} at {client.url}, model {client.model}. {HELP}\n")
    while (line := asked()) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/help":
                out.write(f"{HELP}\n")
            case "/reset":
                said = []
                out.write("(forgotten)\n")
            case text:
                said = _answered(client, [*said, {"role": "user", "content": text}], read.isatty(), out)
        out.flush()


def _answered(client: Client, said: list[dict[str, str]], goes_on: bool, out: TextIO) -> list[dict[str, str]]:
    """The conversation with the answer, which is shown while it comes; without the question where it has none."""
    pieces: list[str] = []
    try:
        for piece in client.stream(said):
            pieces.append(piece)
            out.write(piece)
            out.flush()
    except BuildError as error:
        if pieces:
            out.write("\n")
        if not goes_on or health(client.url, ALIVE_S):
            raise
        out.write(f"{error.what} (this question is left out of the conversation; /reset shortens it)\n")
        return said[:-1]
    out.write("\n")
    return [*said, {"role": "assistant", "content": "".join(pieces)}]


def _asked(read: TextIO, out: TextIO) -> Callable[[], str | None]:
    """What gives the next line; None at their end."""
    if not read.isatty():
        return lambda: read.readline() or None
    with suppress(ImportError):
        import readline  # noqa: F401  input() has editing and history once it is imported

    def line() -> str | None:
        try:
            return input(PROMPT)
        except EOFError:
            out.write("\n")
            return None

    return line
