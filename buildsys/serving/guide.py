"""How a person serves an artifact: deploy/README.md and deploy/compose.yaml, with the settings that the recipe decided.

The image: .github/workflows/docker.yml of LMDeploy, which tags a release `v<version>-cu<CUDA>`. Its CUDA 12 builds run on every GPU of
gpus.py; those with CUDA 13 leave sm70 and sm75 out (CMakeLists.txt). The compose file follows docs.docker.com/reference/compose-file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import yaml

from buildsys.architecture import Architecture
from buildsys.scheme import Schemes
from buildsys.serving.settings import LMDEPLOY, PROFILE, Settings

README = "deploy/README.md"
COMPOSE = "deploy/compose.yaml"
PORT = 23333
"""LMDeploy's own default."""

IMAGE = f"openmmlab/lmdeploy:v{LMDEPLOY}-cu12.8"
CONFIGS: Mapping[str, str] = {"turbomind": "TurbomindEngineConfig", "pytorch": "PytorchEngineConfig"}
"""The dataclass of each backend."""

HEALTHY = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PORT}/health', timeout=4)"
"""Fails unless the server is up: urlopen raises for a refused connection and for every status from 400 on."""


def files(settings: Settings, name: str, chat: bool) -> dict[str, str]:
    """Everything in deploy/, {path: text}. `name`: what the server calls the model. `chat`: the model has a chat template."""
    return {PROFILE: settings.text(), README: readme(settings, name, chat), COMPOSE: compose(settings, name)}


def model_name(model_type: str, architecture: Architecture, schemes: Schemes) -> str:
    """What a server calls the model, from what it is: equal artifacts of different recipes are one, so no recipe's name is in it."""
    weights = sum(prod(shape) for shape in architecture.tensors().values())
    unit, each = next(((unit, each) for unit, each in (("b", 1e9), ("m", 1e6)) if weights >= each), ("k", 1e3))
    kinds = schemes.kinds()
    scheme = kinds[0]
    codes = "fp8" if scheme.number == "fp8" else f"w{scheme.bits}a{16 if scheme.activations == 'none' else 8}"
    return f"{model_type or 'model'}-{weights / each:.1f}{unit}-{'mixed' if len(kinds) > 1 else codes}"


def command(settings: Settings, name: str, model: str = ".", port: int = PORT) -> list[str]:
    """Starts the server."""
    return ["lmdeploy", "serve", "api_server", model, "--model-name", name, "--server-port", str(port), *settings.arguments()]


def shell(command: Sequence[str]) -> str:
    """The command as a shell reads it, an option a line."""
    words = [shlex.quote(word) for word in command]
    return "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words).removeprefix(" ")


# deploy/README.md


def readme(settings: Settings, name: str, chat: bool) -> str:
    """Commands for whoever has the folder; each runs in it as it stands."""
    sections = [_opening(), _server(settings, name), _chat(settings), _pipeline(settings), _client(name, chat)]
    if "tool_call_parser" in settings.server:
        sections.append(_tools(name, str(settings.server["tool_call_parser"])))
    return "\n\n".join("\n".join(section) for section in (*sections, _container(settings))) + "\n"


def _opening() -> Iterator[str]:
    yield "# Serving this model"
    yield f"With [LMDeploy](https://github.com/InternLM/lmdeploy) {LMDEPLOY} on a GPU host (`pip install lmdeploy=={LMDEPLOY}`)."
    yield f"Commands run in the folder that holds config.json. Their settings are the recipe's, as they stand in `{PROFILE}`."


def _server(settings: Settings, name: str) -> Iterator[str]:
    yield "## A server that speaks the OpenAI API"
    yield from _fence("sh", shell(command(settings, name)))
    yield f"It answers on port {PORT} of every interface and asks for no key: `--server-name 127.0.0.1` keeps it to this host,"
    yield "`--api-keys KEY` has it ask for one. `GET /health` says 200 once it is up."
    if "hf_overrides" in settings.engine:
        yield ""
        yield "`--hf-overrides` stretches positions for prompts that are longer than the model was made for, each by its own length."
        yield "A shorter prompt is served as ever: its answer should end within the model's own positions."


def _chat(settings: Settings) -> Iterator[str]:
    yield "## In the terminal"
    yield from _fence("sh", shell(["lmdeploy", "chat", ".", *settings.chat_arguments()]))
    if "hf_overrides" in settings.engine:
        yield "This command cannot be told to stretch positions: a conversation ends at the model's own maximum."


def _pipeline(settings: Settings) -> Iterator[str]:
    config = CONFIGS[settings.backend]
    fields = "".join(f"    {name}={value!r},\n" for name, value in settings.keywords().items())
    yield "## In Python"
    code = f'from lmdeploy import {config}, pipeline\n\nconfig = {config}(\n{fields})\npipe = pipeline(".", backend_config=config)\n'
    yield from _fence("python", code + 'print(pipe(["What is a quantized model?"])[0].text)')


def _client(name: str, chat: bool) -> Iterator[str]:
    yield "## A client"
    if chat:
        messages = '[{"role": "user", "content": "What is a quantized model?"}]'
        asked = f"answer = client.chat.completions.create(model={json.dumps(name)}, messages={messages})"
        shown = "print(answer.choices[0].message.content)"
    else:
        asked = f'answer = client.completions.create(model={json.dumps(name)}, prompt="It was the best of times,", max_tokens=64)'
        shown = "print(answer.choices[0].text)"
        yield "The model has no chat template: it continues text."
    yield from _fence("python", f"{_CONNECTED}\n{asked}\n{shown}")


_CONNECTED = f"""\
from openai import OpenAI

client = OpenAI(base_url="http://localhost:{PORT}/v1", api_key="none")"""


def _tools(name: str, parser: str) -> Iterator[str]:
    yield "## Tools"
    yield f"`--tool-call-parser {parser}` makes tool calls of what the model writes; the caller runs the tool and tells what it found."
    yield from _fence("python", _TOOLS.format(connected=_CONNECTED, model=json.dumps(name)))


_TOOLS = """\
import json

{connected}


def sky(city):
    return {{"city": city, "sky": "clear"}}


text = {{"type": "string"}}
parameters = {{"type": "object", "properties": {{"city": text}}, "required": ["city"]}}
tools = [{{"type": "function", "function": {{"name": "sky", "description": "The sky over a city now", "parameters": parameters}}}}]
messages = [{{"role": "user", "content": "What is the sky over Paris like?"}}]
answer = client.chat.completions.create(model={model}, messages=messages, tools=tools).choices[0].message
if answer.tool_calls:
    messages.append(answer)
    for call in answer.tool_calls:
        found = sky(**json.loads(call.function.arguments))
        messages.append({{"role": "tool", "tool_call_id": call.id, "content": json.dumps(found)}})
    answer = client.chat.completions.create(model={model}, messages=messages, tools=tools).choices[0].message
print(answer.content)"""


def _container(settings: Settings) -> Iterator[str]:
    gpus = "a GPU" if settings.engine.get("tp", 1) == 1 else f"{settings.engine['tp']} GPUs"
    yield "## In a container"
    yield from _fence("sh", f"docker compose -f {COMPOSE} up --detach --wait")
    yield f"Takes {gpus} through the NVIDIA container toolkit. `LMDEPLOY_PORT` names another port, `LMDEPLOY_IMAGE` another image."
    yield "The folder is mounted as it is: it has to hold the files themselves, as a published one does, and no links out of it."


def _fence(language: str, text: str) -> Iterator[str]:
    yield f"```{language}"
    yield text
    yield "```"


# deploy/compose.yaml


def compose(settings: Settings, name: str) -> str:
    """One service: the official image, this folder, the GPUs, and when it is healthy. Paths are relative to the file's own folder."""
    service: dict[str, Any] = {
        "image": f"${{LMDEPLOY_IMAGE:-{IMAGE}}}",
        # a dollar sign would be the start of a variable
        "command": [word.replace("$", "$$") for word in command(settings, name, "/model")],
        "ports": [f"${{LMDEPLOY_PORT:-{PORT}}}:{PORT}"],
        "volumes": [{"type": "bind", "source": "..", "target": "/model", "read_only": True}],
        "ipc": "host",  # several GPUs talk through shared memory, of which a container has 64 MiB
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", HEALTHY],
            "interval": "10s",
            "timeout": "5s",
            "retries": 3,
            "start_period": "15m",  # loading weights from a slow disk
        },
        "deploy": {
            "resources": {
                "reservations": {"devices": [{"driver": "nvidia", "count": settings.engine.get("tp", 1), "capabilities": ["gpu"]}]}
            }
        },
    }
    said = yaml.safe_dump({"services": {"lmdeploy": service}}, sort_keys=False, width=1000)
    return f"# docker compose -f {COMPOSE} up --detach --wait\n{said}"
