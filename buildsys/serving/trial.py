"""What verify.serve finds out of one running server: whether it answers, what it writes, how fast, and in how much memory.

A trial is one server from its start to its end; steps.py runs several, with and without the KV policy, and beside the source model. All of
it is told as plain JSON: checks/serve.py makes measurements of it, and the report its table.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from buildsys.errors import BuildError
from buildsys.serving import load, plain_transformers, server
from buildsys.serving.client import Client
from buildsys.serving.host import Host, memory_each
from buildsys.serving.server import Server, command, free_port
from buildsys.serving.settings import Settings
from buildsys.serving.vram import Peak

NAME = "artifact"  # that the server gives the model
ANSWER_TOKENS = 24  # of an answer that is asked for to see that there is one
CALL_TOKENS = 256  # many times what a call of TOOL needs
DRAWS: tuple[Mapping[str, Any], ...] = ({"temperature": 0.0}, *({"temperature": 2.0, "seed": seed} for seed in range(1, 6)))
"""How a tool call is asked for until there is one: the grammar allows white space without end, and a model that knows no better writes
nothing else while it is greedy."""
ENVIRONMENT = {"TM_LOG_LEVEL": "INFO"}  # TurboMind then says how large its cache is, and little else
BUDGET = re.compile(r"Object cache budget: ([\d.]+) MB from free ([\d.]+) MB")  # turbomind.cc CreateEngine; MB are MiB

TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
"""One argument, whose values are listed: the grammar then all but writes the call, whatever the model would say."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every server. prompts: token ids, each text to be answered; loads: token ids for each batch, as many as it has."""

    prompts: tuple[tuple[int, ...], ...]
    loads: Mapping[int, tuple[tuple[int, ...], ...]]
    new_tokens: int
    repeats: int
    tools: bool
    timeout_s: float
    answers: bool = True  # whether the chat calls are tried


@dataclass(frozen=True)
class Case:
    """A model's folder with the settings that it is served with."""

    name: str
    model: Path
    settings: Settings
    token_bytes: int  # of the KV cache


def run(case: Case, asked: Asked, host: Host, log: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """One trial. Raises BuildError where the server does not start, dies, or is not done within timeout_s; it is gone then."""
    before, port, began = memory_each(), free_port(), time.monotonic()
    how = command(host, case.model, case.settings, port, NAME)
    progress(f"{case.name}: the server loads")
    with Server(how, f"http://127.0.0.1:{port}", log, asked.timeout_s, ENVIRONMENT) as server:
        load_s = time.monotonic() - began
        loaded = _more(before, memory_each())
        with _Deadline(server, asked.timeout_s, asked.timeout_s - load_s), Peak() as peak:
            found = _questions(case, asked, Client(server.url, asked.timeout_s), progress)
    budget = pool_bytes(log)
    return {
        "name": case.name,
        "engine": case.settings.backend,
        "settings": {**case.settings.engine, **case.settings.server},
        "load_s": load_s,
        "loaded_bytes": loaded,
        "vram_bytes": max(loaded, _more(before, peak.each)),
        "pool_bytes": budget,
        "pool_tokens": None if budget is None else budget // case.token_bytes,
        **found,
    }


def _questions(case: Case, asked: Asked, client: Client, progress: Callable[[str], None]) -> dict[str, Any]:
    """All that is asked of one server that runs."""
    progress(f"{case.name}: chat")
    failures = list(_failures(client, asked.tools)) if asked.answers else []
    progress(f"{case.name}: prompts")
    at_once = min(len(asked.prompts), int(case.settings.engine.get("max_batch_size", len(asked.prompts))))
    began = time.monotonic()
    texts = load.at_once(lambda ids: client.generate(ids, asked.new_tokens, True), asked.prompts, at_once)
    seconds = time.monotonic() - began
    for at, text in enumerate(texts):
        if len(text) != asked.new_tokens:  # fewer tokens agree more easily, and take less time
            wanted = f"was to be followed by {asked.new_tokens} tokens past any end of text"
            what = f"prompt {at + 1} of {len(texts)} {wanted}, and was by {len(text)}"
            raise BuildError(f"{client.url}/generate", what, "set a smaller verify.serve.new_tokens, or a longer target.session_len")
    rates = []
    for batch, prompts in asked.loads.items():
        progress(f"{case.name}: {batch} at once")
        runs = [load.measure(client, prompts, batch, asked.new_tokens) for _ in range(asked.repeats)]
        rates.append(told(runs))
    return {"failures": failures, "seconds": seconds, "texts": texts, "rates": rates}


def told(runs: Sequence[load.Rate]) -> dict[str, Any]:
    """Repetitions of one load as JSON: each run's numbers in the order of the runs."""
    one = {name: value for name, value in asdict(runs[0]).items() if name in ("batch", "prompt_tokens", "new_tokens")}
    lists = {name: [getattr(run, name) for run in runs] for name in ("seconds", "tokens_per_s", "first_token_s")}
    return {**one, **lists}


# Answers


def _failures(client: Client, tools: bool) -> Iterator[str]:
    """What is wrong with how it answers; a server that does not answer at all is an error."""
    messages = [{"role": "user", "content": "Say something about the sea."}]
    said = {"max_tokens": ANSWER_TOKENS, "temperature": 0.0, "extra_body": {"top_k": 1, "ignore_eos": True}}
    answer = client.chat(messages, **said)
    text, usage = answer.choices[0].message.content, answer.usage
    if not text:
        yield "a chat call was answered with no text"
    if usage is None or not usage.completion_tokens:
        yield "a chat call was answered without a count of its tokens"
    if not "".join(client.stream(messages, **said)):
        yield "a streamed chat call was answered with no text"
    if tools:
        yield from _tool_failures(client, said)


def _tool_failures(client: Client, said: Mapping[str, Any]) -> Iterator[str]:
    """A call that the grammar forces, its result handed back, and the answer to that: OpenAI's two turns."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Rome?"}]
    wrong = ""
    for how in DRAWS:
        answer = client.chat(messages, tools=[TOOL], tool_choice="required", max_tokens=CALL_TOKENS, **how)
        message = answer.choices[0].message
        calls = [call for call in message.tool_calls or () if call.type == "function"]
        wrong = f"asked for a tool call, it wrote {message.content!r}"
        if calls:
            wrong = unlike(calls[0].function.name, calls[0].function.arguments)
        if not wrong:
            break
    if wrong:
        yield wrong
        return
    messages += [message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": calls[0].id, "content": '{"sky": "clear"}'}]
    second = client.chat(messages, tools=[TOOL], tool_choice="none", **said)
    if not second.choices[0].message.content:
        yield "told what its tool call gave, it was silent"


def unlike(name: str, arguments: str) -> str:
    """Why a call is none of TOOL's, by the schema that it was forced by; empty where it is one."""
    wanted = TOOL["function"]
    if name != wanted["name"]:
        return f"it called {name!r}, {wanted['name']!r} is the tool that there is"
    try:
        given = json.loads(arguments)
    except ValueError:
        return f"the arguments of its tool call are no JSON: {arguments[:200]!r}"
    properties = wanted["parameters"]["properties"]
    if not isinstance(given, dict) or set(given) != set(properties):
        return f"the arguments of its tool call are {arguments[:200]}, asked are {', '.join(properties)}"
    strange = [f"{key}: {value!r}" for key, value in given.items() if value not in properties[key]["enum"]]
    return f"the arguments of its tool call break the schema: {', '.join(strange)}" if strange else ""


# What it takes


def pool_bytes(log: Path) -> int | None:
    """Of the KV cache on each GPU, as TurboMind said when it last started; None: this engine does not say."""
    said = BUDGET.findall(log.read_text(errors="replace"))
    return round(float(said[-1][0]) * 2**20) if said else None


def _more(before: Sequence[int], now: Sequence[int]) -> int:
    """On the GPU that has most of it."""
    return max(after - start for start, after in zip(before, now, strict=True))


class _Deadline:
    """Ends the server when the body takes longer: whatever waits for its answers fails then, and the server says why."""

    def __init__(self, server: Server, whole_s: float, left_s: float) -> None:
        why = f"was not done within {whole_s:g} s (verify.serve.timeout_s), and was ended"
        self._timer = threading.Timer(max(0.0, left_s), server.kill, [why])
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


# Beside the engine


def in_transformers(model: Path, asked: Asked, host: Host, log: Path, folder: Path) -> dict[str, Any]:
    """The source in plain transformers, told like a trial. Raises BuildError where it ends badly or late; no gate of ours hangs on it, so
    that a caller may go on without."""
    questions, answers = folder / "asked.json", folder / "told.json"
    said = {"model": str(model), "prompts": asked.prompts, "loads": asked.loads, "new_tokens": asked.new_tokens, "repeats": asked.repeats}
    questions.write_text(json.dumps(said))
    before = memory_each()
    with log.open("ab") as file, Peak() as peak:
        how = [host.python, plain_transformers.__file__, str(questions), str(answers)]
        environment = {**os.environ, **server.ENVIRONMENT}
        try:
            ended = subprocess.run(how, stdout=file, stderr=file, stdin=subprocess.DEVNULL, timeout=asked.timeout_s, env=environment)
        except subprocess.TimeoutExpired:
            raise BuildError("transformers", f"was not done within {asked.timeout_s:.0f} s", f"read {log}") from None
    if ended.returncode != 0:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise BuildError("transformers", f"ended with exit status {ended.returncode}: {last[:300]}", f"read {log}")
    vram = _more(before, peak.each)
    memory = {"loaded_bytes": vram, "vram_bytes": vram, "pool_bytes": None, "pool_tokens": None}
    return {"name": "transformers", "engine": "transformers", "settings": {}, "failures": [], **memory, **json.loads(answers.read_text())}
