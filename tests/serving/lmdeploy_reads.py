"""What LMDeploy makes of a command, a piece of Python or keywords: the engine's config, field by field. Run by a Python that has LMDeploy.

Answers each line of JSON on stdin with one on stdout. Everything is LMDeploy's own but what needs a GPU: the question whether TurboMind's
library is there, the batch size for the device, and the engine itself, which is where what it is called with is written down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import sys
import traceback
from types import SimpleNamespace
from typing import Any
from unittest import mock

BATCH = 128
"""What LMDeploy takes for a GPU that it does not know, where no batch size is said."""


class Reached(Exception):
    """The engine would start now, with what this holds."""


def main() -> None:
    spoken, sys.stdout = sys.stdout, sys.stderr  # nothing but answers on stdout
    prepare()
    asked = {"server": server, "chat": chat, "python": python, "keywords": keywords, "parsers": parsers, "rope": rope, "client": client}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            told: dict[str, Any] = {"answer": asked[question.pop("ask")](**question)}
        except BaseException:  # noqa: BLE001  (argparse exits: whatever it is, the test is to show it)
            told = {"raised": traceback.format_exc()}
        print(json.dumps(told, default=plain), file=spoken, flush=True)


def prepare() -> None:
    import lmdeploy
    import lmdeploy.turbomind

    if lmdeploy.turbomind._tm is None:  # CUDA's side of TurboMind, which does not load here
        stands_in = mock.MagicMock()
        sys.modules["lmdeploy.turbomind._turbomind"] = lmdeploy.turbomind._tm = stands_in
        lmdeploy.turbomind._turbomind = stands_in
    import lmdeploy.cli.chat
    import lmdeploy.cli.lite
    import lmdeploy.cli.serve
    import lmdeploy.serve.openai.api_server

    lmdeploy.cli.cli.CLI.add_parsers()
    lmdeploy.cli.serve.SubCliServe.add_parsers()


def plain(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return fields(value)
    return str(value)


def fields(config: Any) -> dict[str, Any]:
    return {"": type(config).__name__} | {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}


def parsed(words: list[str]) -> Any:
    """What a command of LMDeploy's reaches the engine with."""
    from lmdeploy.cli.cli import CLI

    assert words[0] == "lmdeploy"
    arguments = CLI.parser.parse_args(words[1:])
    try:
        arguments.run(arguments)
    except Reached as reached:
        return reached.args[0]
    raise AssertionError("no engine would start")


def server(words: list[str], backend: str) -> dict[str, Any]:
    def serve(path: str, **given: Any) -> None:
        raise Reached({"path": path, **given, "backend_config": fields(given["backend_config"])})

    with (
        mock.patch("lmdeploy.archs.autoget_backend", lambda *_, **__: backend),
        mock.patch("lmdeploy.cli.serve.get_max_batch_size", lambda device: BATCH),
        mock.patch("lmdeploy.serve.openai.api_server.serve", serve),
    ):
        reached: dict[str, Any] = parsed(words)
    return reached


def chat(words: list[str], backend: str) -> dict[str, Any]:
    def pipeline(path: str, backend_config: Any, **_: Any) -> None:
        raise Reached({"path": path, "backend_config": fields(backend_config)})

    with mock.patch("lmdeploy.cli.chat.autoget_backend", lambda *_, **__: backend), mock.patch("lmdeploy.cli.chat.pipeline", pipeline):
        reached: dict[str, Any] = parsed(words)
    return reached


def python(code: str) -> dict[str, Any]:
    """What a program calls `pipeline` with."""
    called: list[dict[str, Any]] = []

    def pipeline(path: str, backend_config: Any) -> Any:
        called.append({"path": path, "backend_config": fields(backend_config)})
        return lambda prompts: [SimpleNamespace(text=prompt) for prompt in prompts]

    with mock.patch("lmdeploy.pipeline", pipeline):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    (only,) = called
    return only


def keywords(config: str, given: dict[str, Any]) -> dict[str, Any]:
    import lmdeploy

    return fields(getattr(lmdeploy, config)(**given))


def parsers() -> list[str]:
    from lmdeploy.serve.parsers.tool_parser import ToolParserManager

    return sorted(ToolParserManager.module_dict)


def rope(model: str, overrides: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The rotary rule that TurboMind reads from a model's config.json with `hf_overrides` laid over it, as its converter does it."""
    from lmdeploy.archs import get_model_arch
    from lmdeploy.turbomind.converter import _apply_hf_overrides, source_model_config
    from lmdeploy.turbomind.models.utils import parse_rope_param

    config = source_model_config(get_model_arch(model)[1])
    found, positions = parse_rope_param(_apply_hf_overrides(config, overrides), head_dim)
    return {"type": found.type, "base": found.base, "factor": found.factor, "max_position_embeddings": positions}


def client(code: str) -> str:
    """What a program prints."""
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return said.getvalue()


if __name__ == "__main__":
    main()
