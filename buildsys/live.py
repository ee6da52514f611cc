"""What the commands do that need a running engine: serve, chat, bench, web. The same under doit and without it.

Each starts the engine from artifacts/RECIPE with its own deploy/lmdeploy.yaml, unless url= names a server that runs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from buildsys import console as show
from buildsys import disk
from buildsys.driver import Session
from buildsys.errors import BuildError
from buildsys.serving import host as machine
from buildsys.serving.bench import HEAD, Prompts, row
from buildsys.serving.chat import talk
from buildsys.serving.client import Client
from buildsys.serving.host import Host
from buildsys.serving.load import BATCHES, measure
from buildsys.serving.ports import LOOPBACK, free_port, refuse_taken
from buildsys.serving.server import Server, command
from buildsys.serving.settings import PROFILE, Settings
from buildsys.serving.vram import Peak

PORT = 23333  # LMDeploy's own
ANSWER_S = 600.0  # for one answer, or one piece of a streamed one
START_S = 180.0  # for an engine to start, beside reading the weights
SLOW_DISK = 50e6  # bytes a second
LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class Deployed:
    """What artifacts/<name> leads to, and the engine's settings in it."""

    name: str
    digest: str
    folder: Path
    settings: Settings

    @property
    def start_s(self) -> float:
        """How long its engine may take to be ready: a large model may lie on a slow disk."""
        return START_S + sum(path.stat().st_size for path in self.folder.glob("*.safetensors")) / SLOW_DISK


def serve(session: Session, names: list[str], said: Mapping[str, str]) -> list[str]:
    """Runs the recipe's engine in the foreground, until Ctrl-C or its own end, which is an error."""
    name, port = _one(names, "serve"), _port(said, PORT)
    session.goodbye = f"{name}: its server stops"
    with _started(session, _deployed(session, name), machine.look(), "serve", port) as server:
        for line in _greeting(name, server.url, Client(server.url, ANSWER_S).model):
            session.console.line(line)
        raise server.wait()


def chat(session: Session, names: list[str], said: Mapping[str, str]) -> list[str]:
    """A conversation in the terminal, or with lines from a pipe."""
    name = _one(names, "chat")
    session.goodbye = ""
    with _running(session, name, "chat", said) as (client, _):
        talk(client, name, sys.stdin, sys.__stdout__ or sys.stdout)
    return []


def web(session: Session, names: list[str], said: Mapping[str, str]) -> list[str]:
    """A chat page in the browser, until Ctrl-C or the server's end."""
    from buildsys.serving.web import PORT as USUAL
    from buildsys.serving.web import page, require_gradio

    name, port = _one(names, "web"), _port(said, USUAL)
    require_gradio()
    refuse_taken(port)  # before a large model is loaded
    session.goodbye = f"{name}: its page closes"
    with _running(session, name, "web", said) as (client, check), page(client, name, port) as url:
        session.console.line(f"{name}: chat at {url}")
        session.console.line("Ctrl-C stops it")
        while True:
            check()
            time.sleep(LOOK_EVERY_S)


def bench(session: Session, names: list[str], said: Mapping[str, str]) -> list[str]:
    """Tokens a second and time to the first token at batch 1, 8 and 32, and GPU memory: as a table, and as artifacts/RECIPE.bench.json."""
    name = _one(names, "bench")
    deployed = _deployed(session, name)
    prompts = _prompts(deployed)
    session.goodbye = f"{name}: interrupted, and nothing was written of this run"
    told = {"recipe": name, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "prompts": str(prompts)}
    measured = _bench_there(session, deployed, prompts, said["url"]) if "url" in said else _bench_here(session, deployed, prompts)
    path = session.store.root / f"{name}.bench.json"
    with disk.writing(path):
        disk.write(path, (json.dumps(told | measured, indent=1) + "\n").encode())
        path.chmod(0o644)  # for others to read, whatever the temporary file was
    return [f"{name}: {path}"]


# Measuring


def _bench_there(session: Session, deployed: Deployed, prompts: Prompts, url: str) -> dict[str, Any]:
    """On a server that runs. On which GPU it does, and with which settings, is not known from here."""
    client = _client(url)
    if client.model != deployed.name:
        fix = f"name the server that `doit serve recipe={deployed.name}` starts, or leave url= away"
        raise BuildError(f"url={url}", f"serves {client.model}, not {deployed.name}", fix)
    return {"server": url, "rates": _rates(session, client, prompts)}


def _bench_here(session: Session, deployed: Deployed, prompts: Prompts) -> dict[str, Any]:
    host = machine.look()
    before = machine.memory_used()
    with _started(session, deployed, host, "bench", free_port()) as server:
        loaded = machine.memory_used()
        with Peak() as peak:
            rates = _rates(session, Client(server.url, ANSWER_S), prompts)
    sizes = f"{show.size(loaded - before)} once loaded, {show.size(peak.used_bytes - before)} at most"
    session.console.line(f"  GPU memory: {sizes}, beside {show.size(before)} that were in use before")
    return {
        "artifact": deployed.digest,
        "lmdeploy": host.lmdeploy,
        "gpus": [asdict(device) for device in host.devices],
        "settings": yaml.safe_load(deployed.settings.text()),
        "vram_bytes": {"before": before, "loaded": loaded, "peak": peak.used_bytes},
        "rates": rates,
    }


def _rates(session: Session, client: Client, prompts: Prompts) -> list[dict[str, Any]]:
    session.console.line(f"  {prompts}")
    session.console.line(HEAD)
    found = []
    try:
        for batch in BATCHES:
            session.console.progress("bench", "bench", f"batch {batch}", 0, 0)
            rate = measure(client, prompts.draw(batch), batch, prompts.new_tokens)
            session.console.line(row(rate))
            found.append(asdict(rate))
    finally:
        session.console.finished("bench")
    return found


def _prompts(deployed: Deployed) -> Prompts:
    path = deployed.folder / "config.json"
    vocab_size = json.loads(path.read_text(encoding="utf-8"))["vocab_size"]
    where, session_len = str(deployed.folder / PROFILE), deployed.settings.engine.get("session_len")
    if not isinstance(session_len, int):
        raise BuildError(where, f"session_len is {session_len}", f"run `doit build recipe={deployed.name}`: the file was changed by hand")
    return Prompts.fitting(vocab_size, session_len, where)


# The engine


@contextmanager
def _running(session: Session, name: str, task: str, said: Mapping[str, str]) -> Iterator[tuple[Client, Callable[[], None]]]:
    """A client of the server that url= names, or of one that is started for it; and what raises where that one has ended."""
    if "url" in said:
        yield _client(said["url"]), lambda: None
        return
    with _started(session, _deployed(session, name), machine.look(), task, free_port()) as server:
        yield Client(server.url, ANSWER_S), server.check


@contextmanager
def _started(session: Session, deployed: Deployed, host: Host, task: str, port: int) -> Iterator[Server]:
    """The recipe's engine, ready. It is gone when the body ends, however that ends."""
    name, began = deployed.name, time.monotonic()
    log = session.store.home / "logs" / f"{task}-{name}.log"
    gpus = ", ".join(dict.fromkeys(device.name for device in host.devices))
    session.console.line(f"{name}: starts {deployed.settings.backend} of lmdeploy {host.lmdeploy} on {gpus}; its log: {log}")
    line = command(host, deployed.folder, deployed.settings, port, name)

    def waiting(_: float) -> None:
        session.console.progress(task, f"{task} {name}", "the engine starts", 0, 0)

    server = Server(line, f"http://{LOOPBACK}:{port}", log, deployed.start_s, {}, waiting)
    try:
        with session.store.in_use():  # gc lets what it loads stay
            server.start()
    finally:
        session.console.finished(task)
    with server:
        session.console.line(f"{name}: ready after {show.seconds(time.monotonic() - began)}")
        yield server


def _deployed(session: Session, name: str) -> Deployed:
    """Raises BuildError where the recipe is not built, or no engine serves it."""
    recipe, link = session.workspace.load(name), session.store.root / name
    digest = session.store.linked(name)
    if digest is None or not link.is_dir():
        raise BuildError(recipe.at(), f"{name} is not built: there is no {link}", f"run `doit build recipe={name}`")
    found = _planned(session, name)
    if not (link / PROFILE).exists():
        why = f"no engine of LMDeploy serves it ({found[1] if found else f'`doit plan recipe={name}` says why'})"
        raise BuildError(
            recipe.at("format"), f"{name} has no {PROFILE}: {why}", f"serve {link} with vLLM, or choose another format or scheme"
        )
    if found and found[0] != digest:
        session.console.line(f"{name}: {link} is not what its recipe says now; `doit build recipe={name}` makes it so")
    folder = link.resolve()  # a build in the meantime moves the link
    return Deployed(name, digest, folder, Settings.read(folder / PROFILE))


def _planned(session: Session, name: str) -> tuple[str | None, str] | None:
    """The digest of the artifact that the recipe describes now (None: not built), and what planning notes of it; None where it cannot be
    planned: what is built can be served while its hub cannot be reached."""
    try:
        session.plan([name])
    except BuildError:
        return None
    plan = session.plans[name]
    artifact = session.store.walk(session.steps(name))[plan.artifact.planned_key].artifact
    return artifact.digest() if artifact is not None else None, "; ".join(plan.notes)


def _client(url: str) -> Client:
    if not _is_address(url):
        raise BuildError(f"url={url}", "is no address of a server", f"write url=http://{LOOPBACK}:{PORT}, as `doit serve` shows it")
    return Client(url, ANSWER_S)


def _is_address(url: str) -> bool:
    """Whether it can be asked at all: an address that is none raises deep inside of whatever asks."""
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an odd bracket, port or name
        return False


def _greeting(name: str, url: str, model: str) -> list[str]:
    """How to call the server: its address, its model, one line of curl."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return [
        f"{name}: OpenAI's API at {url}/v1, model {model}",
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        f"  doit chat recipe={name} url={url}",
        "Ctrl-C stops it",
    ]


def _one(names: list[str], task: str) -> str:
    if len(names) != 1:
        raise BuildError(f"doit {task}", f"takes one recipe, {len(names)} are named", f"write doit {task} recipe={names[0]}")
    return names[0]


def _port(said: Mapping[str, str], usual: int) -> int:
    text = said.get("port", str(usual))
    if len(text) > 5 or not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise BuildError(f"port={text}", "is no port: a number from 1 to 65535", f"write port={usual}, or leave it out")
    return int(text)
