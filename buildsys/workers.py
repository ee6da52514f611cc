"""The driver's side of worker.py: child processes for heavy steps, handed out, kept for the steps that follow, and ended."""

from __future__ import annotations

import json
import os
import signal
import site
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from buildsys import disk
from buildsys.bytecode import kept
from buildsys.errors import BuildError, BuildErrors
from buildsys.worker import ENVIRONMENT, STEPS, Job, Progress


class Workers:
    """Child processes for heavy steps: as many as run at one time, each kept for the steps that follow (importing torch costs seconds)."""

    def __init__(self, home: Path, steps: str = STEPS, begun: Worker | None = None) -> None:
        """`begun`: one that is there already, of use where it has the same steps."""
        self._home, self._steps = home, steps
        self._lock = threading.RLock()  # Ctrl-C calls `end` in the thread that may hold it
        self._all = [begun] if begun is not None else []
        self._idle = [worker for worker in self._all if worker.steps == steps]
        self._ended = False

    def warm(self, gpu: bool = False) -> None:
        """A heavy step will come: start a child now, so that it has imported torch by then. `gpu`: the step computes on one where there is
        one, so that it is woken too; not where somebody has it, whose memory may be measured."""
        with self._lock:
            if not any(worker.steps == self._steps for worker in self._all) and not self._ended:
                self._idle.append(self._start())
            if gpu and self._idle and not (self._home / "locks" / "gpu.holder").exists():
                self._idle[0].wake()

    def run(self, job: Job, log: Path, progress: Progress, waiting: Callable[[str], None]) -> bool:
        """`perform` in a child. An error of the step is a BuildError; the end of the child is one too, with its likely reason."""
        with self._lock:
            if self._ended:
                raise BuildError(job.name, "did not run: the build was interrupted", "run the same command again")
            worker = next((worker for worker in self._idle if worker.alive), None)
            if worker is None:
                worker = self._start()
            else:
                self._idle.remove(worker)
        done = False
        try:
            built = worker.run(job, log, progress, waiting)
            done = True
        except BuildError:
            done = worker.alive
            raise
        finally:
            with self._lock:
                if done:
                    self._idle.append(worker)
                else:
                    self._all.remove(worker)
            if not done:
                worker.kill()
        return built

    def end(self) -> None:
        """No child survives this."""
        with self._lock:
            self._ended = True
            for worker in self._all:
                worker.kill()

    def _start(self) -> Worker:
        worker = Worker(self._home, self._steps)
        self._all.append(worker)
        return worker


class Worker:
    """One child process, in a session and process group of its own."""

    def __init__(self, home: Path, steps: str = STEPS) -> None:
        self.steps = steps
        near, far = socket.socketpair()
        with disk.writing(home), far:
            (home / "logs").mkdir(parents=True, exist_ok=True)
            with (home / "logs" / "worker.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "buildsys.worker", str(far.fileno()), steps],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[far.fileno()],
                    start_new_session=True,
                    env=_environment(),
                )
        self._channel, self._woke = near, False
        self._answers = near.makefile("rb")
        self._log = home / "logs" / "worker.log"

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def wake(self) -> None:
        """Once: makes a GPU ready for the step that comes, while the child still imports."""
        if not self._woke:
            self._woke = True
            with suppress(BrokenPipeError, ConnectionResetError):  # it has ended: told when it is to run something
                self._channel.sendall(b'{"wake": "gpu"}\n')

    def run(self, job: Job, log: Path, progress: Progress, waiting: Callable[[str], None]) -> bool:
        said = self._log  # where its last words are
        try:
            self._channel.sendall(json.dumps({"job": asdict(job), "log": str(log)}).encode() + b"\n")
            for line in self._answers:
                answer = json.loads(line)
                if "began" in answer:
                    said = log
                elif "progress" in answer:
                    progress(*answer["progress"])
                elif "waiting" in answer:
                    waiting(answer["waiting"])
                elif "errors" in answer:
                    raise _error(answer["errors"])
                else:
                    return bool(answer["built"])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has ended: told below
        raise _ended(job, said, self._process)

    def kill(self) -> None:
        """The child and whatever it started."""
        if self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself meanwhile
        self._process.wait()


def _environment() -> dict[str, str]:
    """The child's environment; it imports the buildsys that its driver has, also where that is not installed."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = kept({**os.environ, **ENVIRONMENT})
    if root not in (*site.getsitepackages(), site.getusersitepackages()):
        # Parts of the path that only the driver has (a test's folder) come too.
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment


def _error(parts: list[list[str]]) -> BuildError:
    errors = [BuildError(*three) for three in parts]
    return errors[0] if len(errors) == 1 else BuildErrors(errors)


def _ended(job: Job, log: Path, process: subprocess.Popen[bytes]) -> BuildError:
    """Why a child ended in the middle of a step, as far as its exit status and its log tell."""
    status = process.wait()
    if status == -signal.SIGKILL:
        what = "was killed from outside, most likely because the machine's memory ran out"
        fix = f"give it more memory, or run with batch=1 threads=1; what it had finished is kept (its log: {log})"
        return BuildError(job.name, what, fix)
    if status < 0:
        what = f"crashed with {signal.Signals(-status).name}"
    else:
        what = f"internal error: {_last_line(log)}"
    return BuildError(job.name, what, f"this is a bug in buildsys: please report it with {log}; what the step had finished is kept")


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n")
    except OSError:
        return "its log cannot be read"
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
