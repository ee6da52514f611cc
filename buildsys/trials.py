"""The serve step: the servers that verify.serve starts, one after the other on one GPU, and what each is for.

artifact: as it is deployed. plain: the same without its KV policy. source, source_kv: the model that it was made from, without and with
that policy. transformers: the source without an engine. share_0.5: the artifact again, with another share of memory for its cache.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys import deploy
from buildsys.errors import BuildError
from buildsys.serving import trial
from buildsys.serving.host import Host, look
from buildsys.serving.settings import PROFILE, QUANT_POLICY, Settings
from buildsys.serving.trial import Asked, Case
from buildsys.step import Request
from buildsys.survey import read_config

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.model import Model

Progress = Callable[[str, int, int], None]
SERVED = "served.json"
ANSWERED = ("artifact", "plain")
"""Whose greedy tokens are held beside the dequantized model's: those of the artifact's weights."""


def serve(request: Request, prompts: list[list[int]], text: Tensor, model: Callable[[str], Model], progress: Progress) -> None:
    """Writes served.json. prompts: the recipe's own as token ids, or none; text: verify's windows, int [windows, tokens]; model: the
    dequantized artifact under a KV policy. Raises BuildError where a server does not start, dies, or hangs."""
    knobs, host, work = request.knobs, look(), request.stage / "work"
    _same_host(request, host)
    work.mkdir(exist_ok=True)
    asked = _asked(request, prompts, text)
    cases, found = list(_cases(request, work)), list[dict[str, Any]]()
    for at, case in enumerate(cases):
        found.append(_one(case, asked, host, work, lambda said, at=at: progress(said, at, len(cases) + 1)))  # type: ignore[misc]
    told: dict[str, Any] = {"host": knobs["host"], "source": knobs["source"], "trials": found}
    if "transformers" in knobs["asked"]["beside"]:
        progress("transformers", len(cases), len(cases) + 1)
        told["transformers"] = _in_transformers(request, asked, host, work)
    for one in found:
        if one["name"] in ANSWERED:
            _agreement(one, asked, model("none" if one["name"] == "plain" else knobs["kv"]), request, progress)
    shutil.rmtree(work)
    (request.stage / SERVED).write_text(json.dumps(told, indent=1, allow_nan=False) + "\n")


def _same_host(request: Request, host: Host) -> None:
    """What was planned is in the key of this step: what is measured elsewhere may not stand under it."""
    planned = request.knobs["host"]
    here = [[device.name, device.driver] for device in host.devices[: len(planned["gpus"])]]
    if {"lmdeploy": host.lmdeploy, "gpus": here} != planned:
        what = f"was planned for lmdeploy {planned['lmdeploy']} on {planned['gpus']}; here is {host.lmdeploy} on {here}"
        raise BuildError(str(request.hints["where"]), what, "run the same command again")


def _one(case: Case, asked: Asked, host: Host, work: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    log = work / f"{case.name}.log"
    ours = case.name in ANSWERED
    try:
        return trial.run(case, replace(asked, answers=ours, tools=asked.tools and ours), host, log, progress)
    finally:
        print(f"-- {case.name}\n{log.read_text(errors='replace') if log.exists() else ''}", flush=True)  # the step's own log has it all


def _asked(request: Request, prompts: list[list[int]], text: Tensor) -> Asked:
    """What every server is asked, from the recipe's prompts or from verify's text."""
    asked, tokens = request.knobs["asked"], text.flatten().tolist()
    each = min(asked["prompt_tokens"], text.shape[1])

    def cut(at: int) -> tuple[int, ...]:
        """Piece `at` of the text, which begins anew at its end."""
        start = at * each % (len(tokens) - each + 1)
        return tuple(tokens[start : start + each])

    settings = Settings.read(request.read("artifact").path(PROFILE))
    wanted, every = asked["tools"], tuple(map(tuple, prompts)) or tuple(map(cut, range(asked["prompts"])))
    _have_room(every, asked["new_tokens"], settings.engine["session_len"], str(request.hints["where"]))
    return Asked(
        prompts=every,
        loads={batch: tuple(map(cut, range(batch))) for batch in asked["batches"]},
        new_tokens=asked["new_tokens"],
        repeats=asked["repeats"],
        tools="tool_call_parser" in settings.server if wanted is None else wanted,
        timeout_s=float(request.hints["timeout_s"]),
    )


def _have_room(prompts: Sequence[Sequence[int]], new_tokens: int, session_len: int, where: str) -> None:
    """Refuses prompts that leave a session no room for their answer, before the first server starts."""
    for at, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= session_len - new_tokens:
            what = (
                f"prompt {at + 1} of {len(prompts)} has {len(prompt)} tokens, and {new_tokens} are to follow in a session of {session_len}"
            )
            raise BuildError(where, what, "shorten the prompt, or set a smaller verify.serve.new_tokens or a longer target.session_len")


def _cases(request: Request, work: Path) -> Iterator[Case]:
    """The servers, the artifact's own first: where that fails nothing else is of use."""
    knobs, bytes_of = request.knobs, request.knobs["token_bytes"]
    files = request.read("artifact").files
    ours, settings, policy = folder(work / "artifact", files), Settings.read(files[PROFILE]), knobs["kv"]
    yield Case("artifact", ours, settings, bytes_of[policy])
    if policy != "none" and "kv" in knobs["asked"]["beside"]:
        yield Case("plain", ours, settings.with_engine(quant_policy=0), bytes_of["none"])
    if "engine" in knobs["source"] and "source" in knobs["asked"]["beside"]:
        theirs = _source(request, work / "source")
        engine = {name: value for name, value in settings.engine.items() if name != "model_format"}
        plain = Settings(knobs["source"]["engine"], {**engine, "quant_policy": 0}, {})
        yield Case("source", theirs, plain, bytes_of["none"])
        if policy != "none" and "kv" in knobs["asked"]["beside"]:
            yield Case("source_kv", theirs, plain.with_engine(quant_policy=QUANT_POLICY[policy]), bytes_of[policy])
    for share in knobs["asked"]["max_entry_counts"]:
        yield Case(f"share_{share:g}", ours, settings.with_engine(cache_max_entry_count=share), bytes_of[policy])


def folder(place: Path, files: Any) -> Path:
    """The files as a folder of links."""
    for name, path in files.items():
        link = place / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return place


def _source(request: Request, place: Path) -> Path:
    """The source as an engine loads it without code of the model's own."""
    files = request.read("source").files
    folder(place, {name: path for name, path in files.items() if name not in ("config.json", "tokenizer_config.json")})
    config = deploy.config(read_config(files["config.json"], "config.json"), {})
    del config["quantization_config"]
    (place / "config.json").write_text(json.dumps(config))
    if "tokenizer_config.json" in files:
        said = deploy.tokenizer_config(read_config(files["tokenizer_config.json"], "tokenizer_config.json"), "tokenizer.json" in files)
        (place / "tokenizer_config.json").write_text(json.dumps(said))
    return place


def _in_transformers(request: Request, asked: Asked, host: Host, work: Path) -> dict[str, Any]:
    """The trial, or {why} there is none: transformers lacks some models, and no gate looks at it."""
    place, log = work / "source", work / "transformers.log"
    try:
        return trial.in_transformers(place if place.exists() else _source(request, place), asked, host, log, work)
    except BuildError as error:
        return {"why": f"{error.where} {error.what}"}
    finally:
        print(f"-- transformers\n{log.read_text(errors='replace') if log.exists() else ''}", flush=True)


def _agreement(one: dict[str, Any], asked: Asked, model: Model, request: Request, progress: Progress) -> None:
    """Adds for each token by how many nats the dequantized model would rather have written another one; None: it has no such
    token, or its arithmetic is no number."""
    from buildsys.quant.agree import gaps

    found = gaps(model, asked.prompts, one["texts"], request.resources, progress)
    one["gaps"] = [[float(f"{nats:.6g}") if math.isfinite(nats) else None for nats in answer.tolist()] for answer in found]
