"""Starts the runner beside this file, shows its lines in the step's log, and tells what came of it.

The runner stays in the process group of the worker that runs the step, which its driver kills as a whole; and it ends when the pipe of its
standard input does, so it survives neither of them. BUILDSYS_LMDEPLOY names an interpreter that has LMDeploy; else it is this one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from buildsys.errors import BuildError
from buildsys.lite.runner import MARK

Progress = Callable[[str, int, int], None]
RUNNER = Path(__file__).with_name("runner.py")
VARIABLE = "BUILDSYS_LMDEPLOY"
LAST_LINES = 3
ASK = "import importlib.metadata as m; print(m.version('lmdeploy'))"

PHASES = (
    (re.compile(r"\S+, samples: \d+, "), "lite calibrates", "layers"),
    (re.compile(r"\S+ smooth weight done\."), "lite rescales", "layers"),
    (re.compile(r"\S+ weight packed\."), "lite packs", "linears"),
)
"""Lines by which lite tells that it has done one of its layers or linears."""


def interpreter() -> str:
    """The Python that has LMDeploy."""
    return os.environ.get(VARIABLE) or sys.executable


def installed(where: str) -> str | None:
    """The version of LMDeploy that the interpreter has; None: it has none. Raises BuildError where it is no interpreter."""
    try:
        asked = subprocess.run([*_command(), "-c", ASK], env=_around(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    except OSError as error:
        what = f"{VARIABLE} names {interpreter()}, which cannot be run: {error.strerror}"
        raise BuildError(where, what, f"set {VARIABLE} to the python of an environment with LMDeploy, or unset it") from None
    return asked.stdout.strip() if asked.returncode == 0 else None


def run(job: Mapping[str, Any], counts: Mapping[str, int], where: str, log: Path | None, progress: Progress) -> dict[str, Any]:
    """What the runner tells of a job that it has done (runner.py). `counts`: how many layers and linears there are. Raises BuildError."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    done: dict[str, int] = {}
    told: dict[str, Any] = {}
    runner = _start(where, job["threads"])
    try:
        assert runner.stdin is not None and runner.stdout is not None
        runner.stdin.write(f"{json.dumps(dict(job))}\n")
        runner.stdin.flush()
        for line in runner.stdout:
            if line.startswith(MARK):
                told = json.loads(line.removeprefix(MARK))
                continue
            sys.stderr.write(line)  # the step's log
            sys.stderr.flush()
            if line.strip():
                last.append(line.strip())
            _count(line, done, counts, progress)
    except BrokenPipeError:
        pass  # it has ended: told below
    finally:
        _end(runner)
    if "refused" in told:
        raise BuildError(where, told["refused"]["what"], told["refused"]["fix"])
    if "done" not in told:
        raise _failed(runner.returncode, last, where, log)
    found: dict[str, Any] = told["done"]
    return found


def _command() -> list[str]:
    """-I: nothing of this folder, and nothing of the environment that buildsys runs in. Of this interpreter all is wanted."""
    return [interpreter(), *(["-I"] if os.environ.get(VARIABLE) else []), "-X", "utf8"]


def _around(threads: int = 1) -> dict[str, str]:
    """No network, and as many threads as the step may use."""
    given = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return {**os.environ, **given, **quiet}


def _start(where: str, threads: int) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [*_command(), str(RUNNER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_around(threads),
            text=True,
            errors="replace",
        )
    except OSError as error:
        what = f"{VARIABLE} names {interpreter()}, which cannot be run: {error.strerror}"
        raise BuildError(where, what, f"set {VARIABLE} to the python of an environment with LMDeploy, or unset it") from None


def _end(runner: subprocess.Popen[str]) -> None:
    """Closing its standard input would kill it: it is waited for first, unless this is not its own end."""
    if sys.exc_info()[0] is not None:
        runner.kill()
    runner.wait()
    for pipe in (runner.stdin, runner.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # what it has not read is of no use to anyone


def _count(line: str, done: dict[str, int], counts: Mapping[str, int], progress: Progress) -> None:
    for pattern, phase, of in PHASES:
        if pattern.match(line):
            done[phase] = done.get(phase, 0) + 1
            progress(phase, done[phase], counts[of])


def _failed(status: int, last: deque[str], where: str, log: Path | None) -> BuildError:
    """Why it ended without an answer, as far as its exit status and its last lines tell."""
    seen = f"; all that it said is in {log}" if log is not None else ""
    if status == -signal.SIGKILL:
        what = "LMDeploy's process was killed from outside, most likely because the machine's memory ran out: it holds the whole model"
        return BuildError(where, what, f"give it more memory, or leave backend out{seen}")
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    said = " | ".join(last) or "it said nothing"
    return BuildError(where, f"LMDeploy {how}: {said}", f"mend what it says, or leave backend out{seen}")
