"""Runs one step at a time: `perform` wherever it is called, `Workers` in child processes that have torch and die with their driver.

A child's stdin is its lifeline: a pipe that never carries a byte and whose other end only the driver holds. When the driver ends, however
it ends, the kernel closes that end and sends the child's process group a SIGKILL (fcntl(2), F_SETSIG: no Python has to run, so a step that
sits in C code cannot delay it); elsewhere than on Linux a thread that waits on the pipe does it. Jobs and answers are lines of JSON over a
socket pair of their own, so nothing that a step prints can corrupt them: what it prints goes to the step's log.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from buildsys import disk
from buildsys.errors import BuildError, BuildErrors
from buildsys.hashing import Hashing
from buildsys.step import Request, Resources, canonical
from buildsys.store import Store
from buildsys.waking import wake_gpu, wake_triton

if TYPE_CHECKING:
    from queue import SimpleQueue

Progress = Callable[[str, int, int], None]  # what, done, of how many
Device = Literal["auto", "cpu", "cuda"]
PROGRESS_EVERY_S = 0.1
COMPUTES = ("buildsys", "torch", "numpy", "safetensors", "tokenizers", "sentencepiece")
STEPS = "buildsys.steps"
"""The module whose `run(Request(...), progress)` does the work; tests name another."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # parallelism is over fixed units of work, in our own threads: results never depend on it
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's
    # glibc raises its threshold for mapped memory to 32 MiB as it goes, and then keeps what tensors have freed: measured 1.3 GiB instead of
    # 0.6 GiB in `score`. A fixed threshold turns that off. A lower one would make each temporary of a few MB a fresh mapping, page by page.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 20),
    "MALLOC_ARENA_MAX": "2",
    # Sizes of blocks differ by much: a GPU's memory would end up in pieces, and twice of what is in use would be reserved.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    "CUDA_MODULE_LOADING": "LAZY",  # torch says so too, but we may be the first to speak to the driver
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",  # a killed step's log ends where the step did
}


@dataclass(frozen=True)
class Job:
    """A step with everything it needs to run, as plain JSON."""

    kind: str
    title: str
    key: str
    knobs: Mapping[str, Any]
    hints: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]  # role -> name -> absolute path
    root: str  # of the store
    heavy: bool
    computes: bool = False
    engine: bool = False
    threads: int = 1
    batch: int = 1
    device: Device = "auto"
    again: bool = False  # also where the store has it
    resumes: bool = False  # what a killed run of it left is of use
    meta: Mapping[str, Any] = field(default_factory=dict)  # recorded beside what the step says of itself

    @property
    def name(self) -> str:
        return f"{self.kind} {self.title}"


def perform(job: Job, progress: Progress, waiting: Callable[[str], None], steps: ModuleType) -> bool:
    """Runs the step and commits what it made. False: another process built it while this one waited."""
    store = Store(Path(job.root))
    with ExitStack() as held:
        held.enter_context(store.lock(job.key, waiting))
        if job.again:
            store.drop(job.key)
        elif store.find(job.key) is not None:
            return False
        device = _device(job)
        if device == "cuda" or job.engine:  # one step at a time on a GPU, which torch may not see
            held.enter_context(store.lock("gpu", waiting))
        inputs = {role: {name: Path(path) for name, path in files.items()} for role, files in job.inputs.items()}
        watched = _watched(inputs, store)
        stage = _stage(store, job, {"computes_on": _arithmetic(device), "watched": watched})
        began, at = time.monotonic(), _now()
        resources = Resources(threads=job.threads, batch=job.batch, device=device, gpus=_gpus(device))
        log = store.log(job.kind, job.key) if job.heavy else None
        hashing = held.enter_context(Hashing())
        request = Request(job.kind, job.knobs, job.hints, inputs, stage, resources, store.sha256, log, hashing.finished)
        _reset_peaks(device)
        try:
            facts: dict[str, Any] = dict(steps.run(request, progress))
        except OSError as error:
            known = disk.explained(error, stage)
            if known is None:
                raise
            raise known from error
        progress("writing to the store", 0, 0)
        if _watched(inputs, store) != watched:
            shutil.rmtree(stage)
            raise _changed(min(watched))
        seconds = round(time.monotonic() - began, 3)
        when = {"began": at, "ended": _now(), "seconds": seconds}
        machine = _with_tool(_machine(device), facts.pop("tool", {}))  # by now with all that the step imported
        built = {**job.meta, "kind": job.kind, "title": job.title, **when, **machine}
        store.commit(job.key, stage, {**facts, "built": built}, known=hashing.of)
    return True


def _now() -> str:
    """UTC, as RFC 3339 and SLSA have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _stage(store: Store, job: Job, made_of: dict[str, Any]) -> Path:
    """An empty folder to write into; or what a killed run left, where the step can use it and it was made on the same terms."""
    stage, terms = store.stage(job.key), canonical(made_of)
    note = stage / ".made-of"
    if not (job.resumes and note.exists() and note.read_bytes() == terms):
        if any(stage.iterdir()):
            shutil.rmtree(stage)
            stage = store.stage(job.key)
        with disk.writing(note):
            disk.write(note, terms)
    return stage


def _watched(inputs: Mapping[str, Mapping[str, Path]], store: Store) -> dict[str, list[int]]:
    """Inputs that stay where their owner has them, with what shows a change; one that holds something else by now is refused."""
    found = {}
    for blob in {path for files in inputs.values() for path in files.values() if path.is_symlink()}:
        original = Path(os.readlink(blob))
        try:
            shown = original.stat()
            if store.sha256(original) != blob.name:
                raise _changed(str(original))
        except FileNotFoundError:
            raise _changed(str(original)) from None
        found[str(original)] = [shown.st_size, shown.st_mtime_ns, shown.st_ctime_ns, shown.st_ino]
    return found


def _changed(path: str) -> BuildError:
    return BuildError(path, "a file of this source changed while a build read it", "run the same command again when nobody writes to it")


def _machine(device: str) -> dict[str, Any]:
    """Of what computes this output: versions, processor and GPU. Recorded, and not in the key: see the design page."""
    loaded = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in COMPUTES if name in sys.modules}
    found: dict[str, Any] = {"device": device, "versions": {"python": platform.python_version(), **loaded}, "machine": _host()}
    found |= _products(device) | _peak_rss()
    if device == "cuda":
        import torch

        found["gpu"] = {"name": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "count": _gpus(device)}
        found["peak_gpu_bytes"] = max(torch.cuda.max_memory_reserved(at) for at in range(_gpus(device)))
    return found


def _with_tool(machine: dict[str, Any], tool: Mapping[str, Any]) -> dict[str, Any]:
    """What a step's child process told of itself, added: it ran beside this process, and had memory and versions of its own."""
    ours: dict[str, str] = machine["versions"]
    theirs = {name: version for name, version in tool.get("versions", {}).items() if ours.get(name) != version}
    found = {**machine, "versions": {**ours, **{f"{name} of the tool" if name in ours else name: theirs[name] for name in theirs}}}
    for key in ("peak_rss_bytes", "peak_gpu_bytes"):
        if key in tool:
            found[key] = machine.get(key, 0) + tool[key]
    return found


def _peak_rss() -> dict[str, int]:
    """The most that this process held since `_reset_peaks`, where the system tells (Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    said = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
    return {"peak_rss_bytes": said[0]} if said else {}


def _reset_peaks(device: str) -> None:
    """The peaks of memory are this step's: not those of an earlier one in this process."""
    if device == "cuda":
        _reset_gpu_peak()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak of resident memory starts anew
    except OSError:
        pass  # no Linux, or a container that forbids it: the peak is then that of all steps so far


def _reset_gpu_peak() -> None:
    """What an earlier step in this process left reserved is given back."""
    import torch

    torch.cuda.empty_cache()
    for at in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(at)


def _gpus(device: str) -> int:
    """How many GPUs a step may spread over: all that CUDA_VISIBLE_DEVICES shows."""
    if device != "cuda":
        return 1
    import torch

    return torch.cuda.device_count()


def _arithmetic(device: str) -> dict[str, Any]:
    """What a result's last bits may depend on: work that was begun elsewhere is not gone on with."""
    torch = sys.modules.get("torch")
    found = {"device": device, "torch": str(torch.__version__) if torch is not None else "", "machine": _host()} | _products(device)
    return found | ({"gpu": torch.cuda.get_device_name(), "gpus": _gpus(device)} if torch is not None and device == "cuda" else {})


def _products(device: str) -> dict[str, str]:
    """What a CPU rounds the factors of its products to where they are weighed: a virtual machine may hide what its processor can do."""
    if device != "cpu" or "torch" not in sys.modules:
        return {}
    from buildsys.quant.parallel import has_matrix_units

    return {"products": "bfloat16" if has_matrix_units() else "float32"}


@cache
def _host() -> dict[str, str]:
    """Kind of machine, never which one: an artifact carries this to whoever downloads it."""
    cpu = platform.processor() or platform.machine()
    try:
        said = Path("/proc/cpuinfo").read_text(errors="replace")
        cpu = next((line.partition(":")[2].strip() for line in said.splitlines() if line.startswith("model name")), cpu)
    except OSError:
        pass  # not Linux
    return {"os": f"{platform.system()} {platform.machine()}", "cpu": cpu}


def _device(job: Job) -> Literal["cpu", "cuda"]:
    """Where a step computes; those that do not need no torch, and no GPU."""
    if not job.computes or job.device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if job.device == "cuda":
        raise BuildError("device=cuda", f"torch {torch.__version__} finds no CUDA device here", "say device=cpu, or leave device= away")
    return "cpu"


# The child's side


def main(arguments: list[str]) -> None:
    from queue import SimpleQueue

    threading.Thread(target=_die_with_driver, daemon=True).start()
    channel = socket.socket(fileno=int(arguments[0]))
    channel.set_inheritable(False)
    asked: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, asked), daemon=True).start()
    steps = _load(arguments[1])
    while (one := asked.get()) is not None:
        _answer(channel, _serve(Job(**one["job"]), Path(one["log"]), channel, steps))
        gc.collect()  # the next step begins with this one's memory free


def _listen(channel: socket.socket, asked: SimpleQueue[dict[str, Any] | None]) -> None:
    """Hands jobs on; wakes a GPU at once, while the main thread still imports torch."""
    for line in channel.makefile("rb"):
        said = json.loads(line)
        if "wake" in said:
            threading.Thread(target=_wake, daemon=True).start()  # a job may come before it is done
        else:
            asked.put(said)
    asked.put(None)


def _wake() -> None:
    if wake_gpu():
        wake_triton()


def _load(name: str) -> ModuleType:
    """Imports what every heavy step needs, before the first one is asked for. What imports make lives as long as this process: looking
    through it for garbage takes a tenth of their time, and then some of each search that follows."""
    gc.disable()
    try:
        if name == STEPS:
            import torch

            torch.set_num_threads(1)
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def _serve(job: Job, log: Path, channel: socket.socket, steps: ModuleType) -> dict[str, Any]:
    """One job. An error that is none of ours ends this process, with its traceback in the step's log."""
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S or done == total:
            last = now
            _answer(channel, {"progress": [what, done, total]})

    def waiting(holder: str) -> None:
        _answer(channel, {"waiting": holder})

    try:
        with disk.writing(log):
            _print_to(log, job)
        _answer(channel, {"began": True})
        return {"built": perform(job, progress, waiting, steps)}
    except BuildErrors as errors:
        return {"errors": [[error.where, error.what, error.fix] for error in errors.errors]}
    except BuildError as error:
        return {"errors": [[error.where, error.what, error.fix]]}
    except MemoryError as error:
        return {"errors": [_out_of_memory(job, str(error))]}
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):  # torch's, for a GPU and for a CPU
            raise
        return {"errors": [_out_of_memory(job, str(error).partition(". ")[0])]}


def _out_of_memory(job: Job, said: str) -> list[str]:
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = f"ran out of memory: {said} (peak {peak_gib:.1f} GiB)"
    return [job.name, what, "run with batch=1 threads=1, or device=cpu; finished work is kept"]


def _print_to(log: Path, job: Job) -> None:
    """From here on, what this process prints goes to `log`, below what an earlier run of the step said there."""
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    print(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {job.name}, key {job.key}, process {os.getpid()} on {socket.gethostname()}")
    print(json.dumps({"knobs": job.knobs, "inputs": job.inputs, "threads": job.threads, "batch": job.batch, "device": job.device}))


def _answer(channel: socket.socket, answer: dict[str, Any]) -> None:
    channel.sendall(json.dumps(answer).encode() + b"\n")


def _die_with_driver() -> None:
    lifeline = 0
    if sys.platform == "linux":
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    while os.read(lifeline, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
