"""Runs LMDeploy's `lite` with given tokens, in an interpreter that has LMDeploy: run by path, one job of JSON in, answers out.

That interpreter need not have buildsys, so this file imports nothing of it. lite's own loaders of calibration text would ask a network:
they are replaced by the windows that our recipe pins. No tokenizer is loaded either, since nothing is left for one to do.

Job: {"does": "auto_awq"|"smooth_quant", "version", "model", "folder", "tokens": .npy file, "device", "threads", "arguments"}. Answers are
lines that begin with MARK, among whatever lite prints: {"done": {…}} or {"refused": {"what", "fix"}}. Standard input stays open: when it
ends, whoever asked is gone, and the kernel ends this process (fcntl(2), F_SETSIG: also while it sits in C code).
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MARK = "\x1ebuildsys "
TOOLS = ("lmdeploy", "torch", "transformers", "numpy", "safetensors")
REFUSED = 3  # the exit status


class Refused(Exception):
    """Something that a user can mend: what, fix."""


class NoTokenizer:
    """Stands where lite loads a tokenizer for its own calibration text, and saves it beside the model."""

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> NoTokenizer:
        return cls()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        pass


def main() -> None:
    job = json.loads(sys.stdin.readline())
    _die_with_the_asker()
    try:
        _checked(job)
        _run(job)
    except Refused as error:
        what, fix = error.args
        _answer(refused={"what": what, "fix": fix})
        sys.exit(REFUSED)
    _answer(done=_told(job))


def _answer(**said: Any) -> None:
    print(f"{MARK}{json.dumps(said)}", flush=True)


def _die_with_the_asker() -> None:
    if sys.platform == "linux":
        import fcntl

        fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=_wait_for_the_end, daemon=True).start()  # also for an asker that was gone before this line


def _wait_for_the_end() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def _checked(job: dict[str, Any]) -> None:
    """The pinned version, and a device that is there. The version is in the step's key: another one's codes are not what it promises."""
    wanted, install = job["version"], f"{sys.executable} -m pip install lmdeploy=={job['version']}"
    other = "or name another interpreter in BUILDSYS_LMDEPLOY"
    try:
        found = version("lmdeploy")
    except PackageNotFoundError:
        raise Refused(f"{sys.executable} has no LMDeploy; this backend is version {wanted}", f"run `{install}`, {other}") from None
    if found != wanted:
        raise Refused(f"{sys.executable} has LMDeploy {found}; this backend is version {wanted}", f"run `{install}`, {other}")
    torch = importlib.import_module("torch")
    if job["device"] == "cuda" and not torch.cuda.is_available():
        what = f"torch {torch.__version__} of {sys.executable} finds no CUDA device here"
        raise Refused(what, "say device=cpu, or install a torch with CUDA there")
    torch.set_num_threads(job["threads"])
    if job["device"] == "cpu":
        _copy_where_a_gpu_would(torch)


def _copy_where_a_gpu_would(torch: Any) -> None:
    """lite's search keeps weights by `.cpu()`, to restore them after each trial. On a CPU that is no copy, and the model would end up with
    its weights scaled and nothing to undo it: KL of a small llama 0.0131 nats, with copies 0.0084 (LMDeploy 0.18)."""
    move = torch.Tensor.cpu
    torch.Tensor.cpu = lambda tensor, *arguments, **more: move(tensor, *arguments, **more).clone()


def _run(job: dict[str, Any]) -> None:
    numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
    calibrate: Any = importlib.import_module("lmdeploy.lite.apis.calibrate")
    tokens = torch.from_numpy(numpy.load(job["tokens"])).long()  # [windows, tokens]
    calibrate.get_calib_loaders = lambda *_, **__: list(tokens.split(1))
    calibrate.AutoTokenizer = NoTokenizer
    does = getattr(importlib.import_module(f"lmdeploy.lite.apis.{job['does']}"), job["does"])
    does(
        job["model"],
        work_dir=job["folder"],
        calib_samples=tokens.shape[0],
        calib_seqlen=tokens.shape[1],
        device=job["device"],
        dtype="float16",  # what an artifact's floats are; a CPU is refused bfloat16
        trust_remote_code=False,
        **job["arguments"],
    )


def _told(job: dict[str, Any]) -> dict[str, Any]:
    """Versions of what computed this, and how much memory it took at most."""
    found: dict[str, Any] = {"versions": {name: version(name) for name in TOOLS} | {"python": platform.python_version()}}
    if sys.platform == "linux":  # getrusage's peak would hold what our parent had when it started us
        lines = Path("/proc/self/status").read_text().splitlines()
        found["peak_rss_bytes"] = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
    if job["device"] == "cuda":
        found["peak_gpu_bytes"] = importlib.import_module("torch").cuda.max_memory_reserved()
    return found


if __name__ == "__main__":
    main()
