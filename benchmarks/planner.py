"""What `doit plan` says of a GPU's memory and speed, beside what TurboMind does there: weights, KV pool, tokens in it, memory, tokens/s.

    python benchmarks/planner.py [--only awq-0.5,fp16] [--shape "--layers 4 --hidden 3584"] [--folder DIR] [--out FILE]

A Llama of 8 layers of 7B width with random weights, packed by `doit build` in FORMATS, and the source beside it. Each case is an engine in
a process of its own. Told by the engine's log: bytes of the pool, pages and blocks in it. Asked of the driver: memory in use on the device
before, after weights, after the engine is up, and under load. One case fills the pool until sessions wait, and counts what it held. Limits:
weights 1%, tokens in the pool 3%, memory less the pool 5% or 300 MiB. Needs CUDA and lmdeploy; exit 1 where a limit is missed. The
planner's constants were fitted to the model that is made by default; --shape makes another, to which they were not.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from buildsys import footprint, gpus
from buildsys.architecture import Architecture
from buildsys.footprint import MIB, PAGE_BYTES, Asked, Serving
from buildsys.gpus import KvPolicy
from buildsys.scheme import Scheme, Schemes
from buildsys.survey import describe

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "--layers 8"  # of speed.py's model; the rest of the shape are its defaults
TEXT = ["--samples", "4", "--seqlen", "128"]
POLICIES: Mapping[KvPolicy, int] = {"none": 0, "int8": 8, "int4": 4}
LIMIT_S = 150
ANSWER = "ANSWER "
PROMPT, FEW, MANY = 1000, 16, 144  # tokens before decoding, and of the two runs whose difference is decoding alone
FILL_PROMPT, FILL_NEW = 7000, 400
MIB_OR_SHARE = (300 * MIB, 0.05)


@dataclass(frozen=True)
class Case:
    """One engine. `load`: what it is asked for; none: only started."""

    name: str
    model: str  # fp16, demo, or a format of FORMATS
    policy: KvPolicy = "none"
    share: float = 0.2
    session_len: int = 8192
    max_batch_size: int = 32
    load: str = "rates"  # none, rates, fill

    @property
    def settings(self) -> dict[str, Any]:
        """For TurbomindEngineConfig."""
        return {
            "dtype": "float16",
            "tp": 1,
            "session_len": self.session_len,
            "cache_max_entry_count": self.share,
            "quant_policy": POLICIES[self.policy],
            "max_batch_size": self.max_batch_size,
            "model_format": {"fp16": "hf", "demo": "hf", "compressed_tensors": "compressed-tensors"}.get(self.model, self.model),
        }


CASES = (
    Case("demo", "demo", session_len=1024, load="none"),  # weights of 7 MB: what is left is the context
    Case("awq-0.5", "awq", share=0.5),
    Case("awq-0.2", "awq"),
    Case("awq-int8", "awq", "int8"),
    Case("awq-int4", "awq", "int4"),
    Case("fp16", "fp16"),
    Case("awq-fill", "awq", share=0.03, load="fill"),
    Case("awq-wide", "awq", session_len=2048, max_batch_size=256, load="none"),
    Case("gptq", "gptq", load="none"),
    Case("g32", "compressed_tensors", load="none"),
)
FORMATS: Mapping[str, dict[str, Any]] = {
    "awq": {},
    "gptq": {"format": "gptq", "quantization": {"symmetric": True}},
    "compressed_tensors": {"format": "compressed_tensors", "quantization": {"group_size": 32}},
}


@dataclass(frozen=True)
class Seen:
    """What one engine told and took. Bytes; memory is the device's in use, less what was in use before the process."""

    gpu: str
    total: int
    bare: int  # a CUDA context and nothing in it
    before_weights: int = 0
    after_weights: int = 0
    weights: int = 0  # of the default memory pool
    started: int = 0
    loaded: int = 0
    kept: tuple[tuple[int, ...], ...] = ()  # Device.kept: after weights, started, loaded
    most_usage: float = 0.0  # of the KV pool
    rates: tuple[tuple[int, float], ...] = ()  # (batch, tokens a second of decoding)
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"some of {', '.join(case.name for case in CASES)}, with commas between")
    parser.add_argument("--folder", type=Path, help="work here, and leave it; what is built there already is not built again")
    parser.add_argument("--out", type=Path, help="write what was seen here too, as JSON")
    parser.add_argument("--shape", default=SHAPE, help=f"speed.py's options for another model ({SHAPE})")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.prepare:
        prepare(said.folder, said.shape)
        return 0
    if said.case:
        answer(said.folder, next(case for case in CASES if case.name == said.case))
        return 0
    if importlib.util.find_spec("lmdeploy") is None or not (smi("name") or Path("/dev/nvidiactl").exists()):
        print("needs a CUDA device and lmdeploy: nothing was measured")
        return 1
    cases = [case for case in CASES if said.only is None or case.name in said.only.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (said.folder or Path(temporary)).resolve()
        print(f"{smi('name')}, driver {smi('driver_version')}, {smi('memory.total')} MiB, {smi('memory.used')} MiB in use", flush=True)
        timed([sys.executable, __file__, "--prepare", "--folder", str(folder), "--shape", said.shape], folder)
        return measure(folder, cases, said.out)


def measure(folder: Path, cases: Sequence[Case], out: Path | None) -> int:
    kept, missed = [], 0
    for case in cases:
        seen, log = run(folder, case)
        told = Told.read(log)
        print(f"\n== {case.name}: {case.settings}", flush=True)
        print("\n".join(f"   | {line[:240]}" for line in log.splitlines() if MATTERS.search(line)), flush=True)
        if seen is None or told is None:
            print("   FAILED: " + "\n   ".join(log.splitlines()[-25:]), flush=True)
            missed += 1
            continue
        print(f"   {seen}\n   {told}\n   {work(*model(folder, case), case)}", flush=True)
        kept.append({"case": asdict(case), "seen": asdict(seen), "told": asdict(told)})
        for row in rows(folder, case, seen, told):
            missed += not row.holds
            print(f"   {row}", flush=True)
    if out is not None:
        out.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{missed} limits missed" if missed else "\nevery limit holds")
    return 1 if missed else 0


# What is measured


def prepare(folder: Path, shape: str) -> None:
    """The model, drawn on the GPU in a process that ends before anything is measured, and its artifact."""
    import speed

    sys.argv = [sys.argv[0], *shape.split(), *TEXT]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        speed.make_model(folder / "model", speed.arguments())
        speed.make_text(folder / "recipes")
        (folder / "dodo.py").write_text("from buildsys.tasks import *\n")
        (folder / "recipes" / "planner.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False))
    if not (folder / "artifacts" / "planner@awq").exists():
        timed([sys.executable, "-m", "doit", "build", "recipe=*", "device=cuda"], folder)


def recipe() -> dict[str, Any]:
    return {
        "schema": 1,
        "source": {"local": {"path": "../model"}},
        "calibration": {"dataset": {"text_files": {"paths": ["calibration.txt"]}}, "samples": 4, "seqlen": 128},
        "quantization": {"bits": 4, "group_size": 128, "method": ["rtn"]},
        "format": "awq",
        "verify": {"text": {"text_files": {"paths": ["verify.txt"]}}, "samples": 2, "seqlen": 128},
        "matrix": dict(FORMATS),
    }


def timed(command: list[str], folder: Path) -> None:
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    ran = subprocess.run(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment())
    print(f"{' '.join(command[1:3])}: {time.monotonic() - began:.0f} s\n{ran.stdout[-1500:]}", flush=True)
    if ran.returncode:
        raise SystemExit(ran.returncode)


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TM_LOG_LEVEL": "INFO", "TM_CACHE_LOG_INTERVAL": "1000000000"}


def smi(field: str) -> str:
    """Of the first GPU; empty where there is no nvidia-smi."""
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(command, text=True, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def run(folder: Path, case: Case) -> tuple[Seen | None, str]:
    """The case's process: what it saw, and all that it said."""
    path, began = folder / f"{case.name}.log", time.monotonic()
    command = [sys.executable, __file__, "--folder", str(folder), "--case", case.name]
    with path.open("w") as log:
        env = environment() | {"PLANNER_USED_MIB": smi("memory.used") or "0"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"{case.name} did not end within {LIMIT_S} s", flush=True)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    said = path.read_text(errors="replace")
    line = next((line for line in said.splitlines() if line.startswith(ANSWER)), None)
    if line is None:
        return None, said
    raw = json.loads(line.removeprefix(ANSWER))
    rates = tuple((batch, rate) for batch, rate in raw["rates"])
    return Seen(**raw | {"rates": rates, "seconds": time.monotonic() - began}), said


# In the case's own process


class Device:
    """Asked of the driver, so that nothing is allocated for the question."""

    def __init__(self) -> None:
        import torch

        torch.cuda.init()
        torch.cuda.synchronize()
        self._asks = torch.cuda.mem_get_info
        self._driver = ctypes.CDLL("libcuda.so.1")
        self.name, self.before = torch.cuda.get_device_name(), int(os.environ["PLANNER_USED_MIB"]) * MIB
        self.total = int(self._asks()[1])

    def used(self) -> int:
        free, total = self._asks()
        return int(total - free - self.before)

    def pooled(self) -> int:
        """Bytes alive in the default memory pool: weights, and the workspace of matrix products."""
        return self._pool(7)  # CU_MEMPOOL_ATTR_USED_MEM_CURRENT

    def kept(self) -> tuple[int, ...]:
        """Bytes that the default memory pool keeps from the device, the most that it kept, the most alive in it; and what torch keeps."""
        import torch

        return (self._pool(5), self._pool(6), self._pool(8), torch.cuda.memory_reserved())

    def _pool(self, attribute: int) -> int:  # CUmemPool_attribute of cuda.h
        pool, value = ctypes.c_void_p(), ctypes.c_uint64()
        self._driver.cuDeviceGetDefaultMemPool(ctypes.byref(pool), 0)
        self._driver.cuMemPoolGetAttribute(pool, attribute, ctypes.byref(value))
        return value.value


def answer(folder: Path, case: Case) -> None:
    device = Device()
    seen = Seen(device.name, device.total, device.used())
    marks = watch(device)
    from lmdeploy import TurbomindEngineConfig, pipeline

    packed = folder / "artifacts" / f"planner@{case.model}"
    path = {"fp16": folder / "model", "demo": ROOT / "recipes" / "demo" / "model"}.get(case.model, packed)
    serving = pipeline(str(path), backend_config=TurbomindEngineConfig(**case.settings), log_level="INFO")
    seen = replace(seen, started=device.used(), **marks)
    seen = replace(seen, kept=(*seen.kept, device.kept()))
    if case.load == "rates":
        speak(serving, case, 32, 300, 4)  # kernels are loaded when they are first used
        seen = replace(seen, rates=tuple((batch, rate(serving, case, batch)) for batch in (1, 32)))
    elif case.load == "fill":
        seen = replace(seen, most_usage=filled(serving, case))
    seen = replace(seen, loaded=device.used(), kept=(*seen.kept, device.kept()))
    print(f"\n{ANSWER}{json.dumps(asdict(seen))}", flush=True)
    time.sleep(1)  # the engine's log comes from a thread of its own
    os._exit(0)  # taking TurboMind down has ended processes now and then


def watch(device: Device) -> dict[str, Any]:
    """Filled in while the engine starts: what is in use before and after its weights are there."""
    from lmdeploy.turbomind.turbomind import TurboMind

    marks: dict[str, Any] = {}
    create_weight, create_engine = TurboMind._create_weight, TurboMind._create_engine

    def weighted(self: Any, *arguments: Any) -> None:
        create_weight(self, *arguments)
        marks.update(before_weights=device.used(), weights=-device.pooled())

    def started(self: Any) -> None:
        marks.update(after_weights=device.used(), weights=marks["weights"] + device.pooled(), kept=(device.kept(),))
        create_engine(self)

    TurboMind._create_weight, TurboMind._create_engine = weighted, started
    return marks


def speak(serving: Any, case: Case, batch: int, prompt: int, new: int) -> float:
    """Seconds until all of `batch` sessions have written `new` tokens."""
    from lmdeploy import GenerationConfig

    how = GenerationConfig(max_new_tokens=new, do_sample=False, top_k=1, ignore_eos=True)
    drawn = random.Random(f"{batch} {prompt} {new} {time.monotonic()}")
    requests = [
        {
            "session_id": serving.session(),
            "messages": None,
            "input_ids": drawn.choices(range(10, 2000), k=prompt),
            "gen_config": how,
            "stream_response": False,
        }
        for _ in range(batch)
    ]
    began = time.monotonic()
    written = [sum(len(part.token_ids) for part in parts) for parts in serving._infer(iter(requests), multiplex=False)]
    took = time.monotonic() - began
    if set(written) != {new}:
        print(f"asked for {new} tokens of each session, got {sorted(set(written))}")
    return took


def rate(serving: Any, case: Case, batch: int) -> float:
    few, many = (speak(serving, case, batch, PROMPT, new) for new in (FEW, MANY))
    print(f"batch {batch}: {FEW} tokens in {few:.3f} s, {MANY} in {many:.3f} s")
    return batch * (MANY - FEW) / (many - few)


def filled(serving: Any, case: Case) -> float:
    """The most of the pool that was in use while more sessions asked for room than it has."""
    engine, most, waiting, going = serving.async_engine.engine, 0.0, 0, True

    def look() -> None:
        nonlocal most, waiting
        while going:
            now = engine.get_schedule_metrics()
            most, waiting = max(most, now.cache_usage), max(waiting, now.waiting_seqs)
            time.sleep(0.002)

    thread = threading.Thread(target=look)
    thread.start()
    took = speak(serving, case, case.max_batch_size, FILL_PROMPT, FILL_NEW)
    going = False
    thread.join()
    print(f"filled in {took:.1f} s, {most:.5f} of the pool at most, {waiting} sessions waiting at most")
    return most


# Planned beside measured


MATTERS = re.compile(
    r"Object cache|slab_size|\[cache\]|Warm-up|max_context|batch 1|batch 32|filled in|asked for|rror|\[F\]|FATAL|OutOfMemory"
)


@dataclass(frozen=True)
class Told:
    """Of the engine's log: its budget and how that is cut up."""

    pool: int
    free: int
    slab: int
    block: int
    slab_blocks: int
    pages: int

    @property
    def tokens(self) -> int:
        return self.pages // (self.slab // PAGE_BYTES) * self.slab_blocks * footprint.KV_BLOCK_TOKENS

    @classmethod
    def read(cls, log: str) -> Told | None:
        budget = re.search(r"Object cache budget: ([\d.]+) MB from free ([\d.]+) MB", log)
        slab = re.search(r"slab_size (\d+), object_size (\d+), object_count (\d+)", log)
        pages = re.search(r"pages \d+/(\d+) used", log)
        if budget is None or slab is None:
            return None
        pool, free = (int(float(said) * MIB) for said in budget.groups())
        sizes = [int(said) for said in slab.groups()]
        return cls(pool, free, *sizes, int(pages[1]) if pages is not None else pool // PAGE_BYTES)


@dataclass(frozen=True)
class Row:
    what: str
    planned: float
    measured: float
    share: float | None = None  # limits; none: for information
    least: float = 0.0

    @property
    def holds(self) -> bool:
        return self.share is None or abs(self.planned - self.measured) <= max(self.share * self.measured, self.least)

    def __str__(self) -> str:
        ratio = self.planned / self.measured if self.measured else float("nan")
        verdict = "" if self.share is None else "ok" if self.holds else "MISSED"
        gap = f"{(self.planned - self.measured) / MIB:+10,.1f} MiB" if self.what.endswith("bytes") else " " * 14
        return f"{self.what:44} planned {self.planned:18,.0f}  measured {self.measured:18,.0f}  ratio {ratio:6.4f} {gap}  {verdict}"


def rows(folder: Path, case: Case, seen: Seen, told: Told) -> Iterator[Row]:
    architecture, schemes = model(folder, case)
    gpu = gpus.GPUS[next(iter(gpus.close(seen.gpu)))]
    asked = Asked(gpu, 1, case.policy, case.share, case.session_len, case.max_batch_size)
    here = footprint.held(architecture, schemes, 1, gpu.sm)
    planned = footprint.filled(architecture, schemes, here, asked)
    later = work(architecture, schemes, case)
    yield Row("memory of the GPU, bytes", planned.memory_bytes, seen.total)
    yield Row("bare CUDA context, bytes", 0, seen.bare)
    yield Row("context before weights, bytes", 0, seen.before_weights)
    yield Row("weights in the default pool, bytes", here.total_bytes, seen.weights, 0.01 if case.model != "demo" else None)
    yield Row("weights by what is in use, bytes", here.total_bytes, seen.after_weights - seen.before_weights)
    yield Row("context at CreateEngine, bytes", planned.context_bytes, seen.total - told.free - seen.weights)
    yield Row("after the pool, bytes", later.total_bytes, seen.started - told.pool - (seen.total - told.free))
    yield Row("  under load, bytes", later.total_bytes, seen.loaded - told.pool - (seen.total - told.free))
    yield Row("KV pool, bytes", planned.pool_bytes, told.pool, 0.03)
    yield Row("KV of a token (block / 64)", planned.kv_bytes_per_token, told.block / footprint.KV_BLOCK_TOKENS, 0.0)
    yield Row("tokens in the pool", planned.pool_tokens, told.tokens, 0.03)
    if seen.most_usage:
        yield Row("tokens that the full pool held", planned.pool_tokens, seen.most_usage * told.pool / told.block * 64, 0.03)
    yield from _whole(planned, seen, told)
    for batch, rate in seen.rates:
        context = PROMPT + (FEW + MANY) // 2
        expected = footprint.decode(architecture, schemes, gpu, kv_policy=case.policy, batch=batch, context_tokens=context)
        yield Row(f"decode tokens/s at batch {batch}", expected.tokens_per_s, rate)


def _whole(planned: Serving, seen: Seen, told: Told) -> Iterator[Row]:
    rest = planned.context_bytes + planned.weights_bytes + planned.workspace_bytes
    least, share = MIB_OR_SHARE
    yield Row("memory less the pool, started, bytes", rest, seen.started - told.pool, share, least)
    yield Row("memory less the pool, under load, bytes", rest, seen.loaded - told.pool, share, least)


def work(architecture: Architecture, schemes: Schemes | None, case: Case) -> footprint.Workspace:
    return footprint.workspace(architecture, case.session_len, case.max_batch_size, fused=footprint.fuses_silu(architecture, schemes))


def model(folder: Path, case: Case) -> tuple[Architecture, Schemes | None]:
    path = ROOT / "recipes" / "demo" / "model" if case.model == "demo" else folder / "model"
    architecture, _ = describe(json.loads((path / "config.json").read_text()), "config.json")
    group_size = {"awq": 128, "gptq": 128, "compressed_tensors": 32}.get(case.model)
    return architecture, Schemes(Scheme(4, group_size)) if group_size else None


if __name__ == "__main__":
    sys.exit(main())
