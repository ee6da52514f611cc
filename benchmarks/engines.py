"""Whether LMDeploy's engines write what the arithmetic here says: a tiny artifact of every architecture and format, token by token.

    python benchmarks/engines.py [--only llama,qwen3@awq] [--folder DIR] [--out FILE]

Each case is a model of decided.py built by `doit build`, loaded in the engine that its own deploy/lmdeploy.yaml names, with 20 prompts of
token ids and 16 greedy tokens each, beside those of the dequantized model in float32. A prompt whose tokens differ is excused where, at the
first difference, the float32 model holds the two tokens less than 0.02 nats apart, and in at most 2 prompts of a case. Needs CUDA and
lmdeploy. Each case has a process of its own: an engine that crashes or hangs is that case's failure. Exit 1 where a case fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import decided
import torch
import yaml
from torch import Tensor

from buildsys import steps
from buildsys.plan import plan
from buildsys.quant.sample import greedy
from buildsys.serving.settings import PROFILE, Settings
from buildsys.step import Request, Resources
from buildsys.store import Store
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
EXCUSED_NATS, EXCUSED_PROMPTS = 0.02, 2
LIMIT_S = 120
AT_ONCE = 8  # engines on one GPU; each takes CACHE of its memory
CACHE = 0.05
THREADS = 1  # of each build and each engine: many run at a time, and models this small gain nothing from more
ANSWER = "ANSWER "

Logits = Callable[[list[int]], Tensor]  # token ids -> [tokens, vocab], of the token after each


def w8a8(kind: str) -> dict[str, Any]:
    scheme = {"bits": 8, "group_size": -1, "symmetric": True, "number": "fp8" if kind == "fp8" else "int", "activations": kind}
    return {"quantization": {**scheme, "method": ["smoothquant", "rtn"]}, "format": "smooth_quant"}


def w4(symmetric: bool, format: Any, group_size: int = 128) -> dict[str, Any]:
    return {
        "quantization": {"bits": 4, "group_size": group_size, "symmetric": symmetric, "method": ["awq", "gptq"]},
        "format": format,
    }


BUILDS: dict[str, dict[str, Any]] = {
    "awq": w4(False, "awq"),
    "awq-g64": w4(False, "awq", 64),
    "as-llama": w4(False, {"awq": {"as": "llama"}}),
    "gptq": w4(True, "gptq"),
    "ct": w4(False, "compressed_tensors"),
    "ct-g32": w4(True, "compressed_tensors", 32),
    "int8": w8a8("int8"),
    "fp8": w8a8("fp8"),
}
"""What is built of a model: keys of a recipe, by the name of the variant."""

CASES: dict[str, tuple[str, ...]] = {
    "llama": ("awq", "awq-g64", "gptq", "ct", "ct-g32", "int8", "fp8"),
    "mistral": ("awq", "int8"),
    "qwen2": ("awq", "int8"),
    "qwen3": ("awq", "gptq", "int8", "fp8"),
    "internlm2": ("awq", "as-llama", "gptq", "int8"),
    "internlm3": ("awq", "as-llama", "int8"),
    "phi3": ("awq", "as-llama", "int8"),
    "mixtral": ("awq", "ct"),
    "qwen3_moe": ("awq", "gptq", "ct"),
}
PYTORCH_MODELS = {"mistral", "phi3"}  # architectures that TurboMind lacks
PYTORCH_BUILDS = {"awq-g64", "int8", "fp8"}  # and what it lacks of the others


def engine_of(case: str) -> str:
    """The engine that serves it: TurboMind, the faster one, where it can."""
    model, _, built = case.partition("@")
    return "pytorch" if built in PYTORCH_BUILDS or (model in PYTORCH_MODELS and built != "as-llama") else "turbomind"


@dataclass(frozen=True)
class Outcome:
    """What one engine did. `excused` and `failed`: a line for each prompt that differs."""

    case: str
    engine: str
    equal: int = 0
    excused: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    least_gap: float = 0.0  # nats between the two best tokens, over every token of the reference

    @property
    def holds(self) -> bool:
        return not self.failed and len(self.excused) <= EXCUSED_PROMPTS and self.equal + len(self.excused) == decided.PROMPTS

    @staticmethod
    def read(written: str) -> Outcome:
        """The inverse of `written`."""
        said = json.loads(written)
        return Outcome(**said | {"excused": tuple(said["excused"]), "failed": tuple(said["failed"])})

    @property
    def written(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        counts = f"{self.equal:2} of {decided.PROMPTS} equal, {len(self.excused)} excused, {len(self.failed)} failed"
        lines = [f"{self.case:20} {self.engine:10} {counts}, least gap {self.least_gap:.3f} nats  {'ok' if self.holds else 'FAILED'}"]
        return "\n".join([*lines, *(f"    {line}" for line in (*self.excused, *self.failed))])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases (llama@awq) or whole models (llama), with commas between")
    parser.add_argument("--folder", type=Path, help="work here, and leave it; what is built there already is not built again")
    parser.add_argument("--out", type=Path, help="write the outcomes here too, as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    said = parser.parse_args()
    said.folder = said.folder and said.folder.resolve()
    if said.case:
        answer(said.folder, said.case)
        return 0
    if not torch.cuda.is_available() or importlib.util.find_spec("lmdeploy") is None:
        print("needs a CUDA device and lmdeploy: nothing was compared")
        return 1
    with tempfile.TemporaryDirectory() as temporary:
        found = compare(said.folder or Path(temporary), chosen(said.only))
    if said.out:
        said.out.write_text(json.dumps([asdict(one) | {"holds": one.holds} for one in found], indent=1) + "\n")
    print(f"{sum(one.holds for one in found)} of {len(found)} cases hold")
    return 0 if all(one.holds for one in found) else 1


def chosen(only: str | None) -> list[str]:
    """Names of cases; an unknown one ends the program."""
    every = [f"{model}@{build}" for model, builds in CASES.items() for build in builds]
    if only is None:
        return every
    asked = only.split(",")
    unknown = [name for name in asked if name not in every and name not in CASES]
    if unknown:
        raise SystemExit(f"--only {unknown[0]} is no case; cases: {', '.join(every)}")
    return [case for case in every if case in asked or case.partition("@")[0] in asked]


def compare(folder: Path, cases: Sequence[str]) -> list[Outcome]:
    """Builds all, then lets the engines write, some at a time; prints each outcome when it is there."""
    began = time.monotonic()
    workspace(folder, {case.partition("@")[0] for case in cases})
    unbuilt = build(folder, cases)
    print(f"{len(cases) - len(unbuilt)} of {len(cases)} artifacts built in {time.monotonic() - began:.0f} s", flush=True)
    found = [Outcome(case, "none", failed=(said,)) for case, said in unbuilt.items()]
    print("\n".join(map(str, found)), end="\n" if found else "", flush=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(partial(run, folder), [case for case in cases if case not in unbuilt]):
            print(outcome, flush=True)
            found.append(outcome)
    return found


# Artifacts


def workspace(folder: Path, models: Iterable[str]) -> None:
    """The models, and a recipe of each with a variant for each thing that is built of it."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / "dodo.py").write_text("from buildsys.tasks import *\n")
    for model in models:
        if not (folder / "recipes" / f"{model}.yaml").exists():
            decided.write(folder / "models" / model, model)
            (folder / "recipes" / f"{model}.yaml").write_text(yaml.safe_dump(recipe(model), sort_keys=False))


def recipe(model: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "source": {"local": {"path": f"../models/{model}"}},
        "calibration": {"dataset": "self_generated", "samples": 64, "seqlen": 64},  # GPTQ fits a quarter of it, and then errs elsewhere
        **BUILDS["awq"],
        "kv_cache": {"max_entry_count": CACHE},
        "verify": {"text": "self_generated", "samples": 2, "seqlen": 32},
        "matrix": {name: BUILDS[name] for name in CASES[model]},
    }


def build(folder: Path, cases: Sequence[str]) -> dict[str, str]:
    """Builds all at once; where that fails, one by one what has no artifact then. Says of each case that cannot be built why."""
    if doit(folder, cases) is None:
        return {}
    failures = {case: doit(folder, [case]) for case in cases if not (folder / "artifacts" / case).exists()}
    return {case: said for case, said in failures.items() if said is not None}


def doit(folder: Path, cases: Sequence[str]) -> str | None:
    """None, or what a build that failed said last."""
    at_once = ["-n", str(min(16, (os.cpu_count() or 1) // THREADS))]
    asked = ["build", f"recipe={','.join(cases)}", "device=cpu", f"threads={THREADS}"]
    command = [sys.executable, "-m", "doit", *at_once, "--continue", *asked]
    ran = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    return "the build failed: " + " | ".join(ran.stdout.splitlines()[-8:])[-1500:] if ran.returncode else None


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(THREADS)}


# One case, in a process of its own


def run(folder: Path, case: str) -> Outcome:
    """The outcome that the case's process prints, or what became of it."""
    command = [sys.executable, __file__, "--folder", str(folder), "--case", case]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(), start_new_session=True
    )
    try:
        said = process.communicate(timeout=LIMIT_S)[0]
        ended = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        kill(process.pid)
        said = process.communicate()[0]
        ended = f"did not end within {LIMIT_S} s"
    kill(process.pid)  # an engine's own children may outlive it
    lines = said.splitlines()
    told = next((line.removeprefix(ANSWER) for line in lines if line.startswith(ANSWER)), None)
    return Outcome.read(told) if told is not None else Outcome(case, "none", failed=(f"{ended}: {' | '.join(lines[-6:])[-1500:]}",))


def kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def answer(folder: Path, case: str) -> None:
    """Prints the outcome of one case."""
    artifact = folder / "artifacts" / case
    profile = Settings.read(artifact / PROFILE)
    engine = profile.backend
    texts, logits = reference(folder, case)
    serving = serve(str(artifact), engine, profile.keywords())
    outcome = judged(case, engine, texts, speak(serving, decided.prompts()), logits)
    if engine != engine_of(case):
        outcome = replace(outcome, failed=(*outcome.failed, f"{PROFILE} names {engine}, {engine_of(case)} serves this"))
    print(f"\n{ANSWER}{outcome.written}", flush=True)
    # Ends with the engine alive: its threads may keep a process that is done, and destroying TurboMind has ended processes now and then
    # ("Resource deadlock avoided" in its own thread: a thread that joins itself)
    os._exit(0)


def reference(folder: Path, case: str) -> tuple[list[list[int]], Logits]:
    """Greedy tokens of the artifact's dequantized weights in float32, and their logits."""
    whole = packed(folder, case)
    with torch.inference_mode():
        texts = greedy(whole.model, decided.prompts(), decided.NEW, frozenset(), Resources(), lambda *_: None)
    return texts, whole.logits


def packed(folder: Path, case: str) -> decided.Whole:
    """The artifact's dequantized weights in float32, read as the build's own `score` step reads them."""
    os.chdir(folder)
    store = Store(Path("artifacts"))
    planned = plan(Workspace(Path()).load(case), store)
    found = store.walk(planned.steps)
    step = next(step for step in planned.steps if step.kind == "score")
    outputs = {need.role: found[need.step.planned_key].output for need in step.needs}
    inputs = {role: {name: store.path(one, name) for name in one.files} for role, one in outputs.items() if one is not None}
    request = Request(step.kind, step.knobs, step.hints, inputs, Path(), Resources(), store.sha256)
    return decided.Whole.of(steps.packed_model(request, None))


def serve(artifact: str, engine: str, settings: dict[str, Any]) -> Any:
    """LMDeploy's pipeline with that engine."""
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig, pipeline  # where there is a GPU

    if engine == "turbomind":
        configured = TurbomindEngineConfig(**settings)
    else:
        configured = PytorchEngineConfig(**settings, eager_mode=True)  # capturing graphs takes longer than all the text
    return pipeline(artifact, backend_config=configured)


def speak(serving: Any, asked: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the engine writes after each prompt, greedily."""
    from lmdeploy import GenerationConfig

    how = GenerationConfig(max_new_tokens=decided.NEW, do_sample=False, top_k=1, ignore_eos=True)
    requests = [
        {"session_id": serving.session(), "messages": None, "input_ids": list(ids), "gen_config": how, "stream_response": False}
        for ids in asked
    ]
    # `infer` takes text alone; below it token ids are taken too, so that no tokenizer stands between the two sides
    return [[token for part in parts for token in part.token_ids] for parts in serving._infer(iter(requests), multiplex=False)]


def judged(case: str, engine: str, texts: Sequence[list[int]], written: Sequence[list[int]], logits: Logits) -> Outcome:
    """Each prompt's text beside the reference's."""
    excused: list[str] = []
    failed: list[str] = []
    gaps: list[float] = []
    for at, (prompt, ours, theirs) in enumerate(zip(decided.prompts(), texts, written, strict=True)):
        seen = logits(prompt + ours)[len(prompt) - 1 : -1]  # [NEW, vocab]: what each of our tokens was chosen from
        best = seen.topk(2).values
        gaps.append(float((best[:, 0] - best[:, 1]).min()))
        if len(theirs) != len(ours):
            failed.append(f"prompt {at}: {len(theirs)} tokens, {len(ours)} were asked for")
        elif ours != theirs:
            place = next(place for place, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
            nats = float(seen[place, ours[place]] - seen[place, theirs[place]])
            line = f"prompt {at}, token {place}: {theirs[place]} for {ours[place]}, {nats:.4f} nats below"
            (excused if nats < EXCUSED_NATS else failed).append(line)
    equal = len(texts) - len(excused) - len(failed)
    return Outcome(case, engine, equal, tuple(excused), tuple(failed), min(gaps))


if __name__ == "__main__":
    sys.exit(main())
