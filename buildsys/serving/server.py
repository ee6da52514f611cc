"""LMDeploy's api_server as a process of ours: started, waited for, watched, and gone when we are gone, however we end.

It runs in a session and process group of its own (Ctrl-C on the terminal reaches us alone), tethered to us by its stdin: see tether.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from buildsys import disk
from buildsys.console import seconds
from buildsys.errors import BuildError
from buildsys.serving import tether
from buildsys.serving.host import Host
from buildsys.serving.ports import LOOPBACK, free_port, listeners, refuse_taken, taken

__all__ = ["Server", "command", "free_port"]

LOOK_EVERY_S = 0.1
ANSWER_S = 5.0  # for one look at its health
STOP_S = 10.0  # between SIGTERM and SIGKILL
NOTICE_S = 1.0  # a broken connection is seen before the end of the process behind it
LAST_LINES, LAST_BYTES = 8, 1 << 16
ENVIRONMENT = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as nvidia-smi counts them, and so host.py: CUDA's own order has the fastest first
    "PYTHONUNBUFFERED": "1",  # a killed engine's log ends where it did
    "PYTHONSAFEPATH": "1",  # `-m lmdeploy` would import what lies in the folder that we were called from
    "HF_HUB_OFFLINE": "1",  # an artifact is complete
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class Arguments(Protocol):
    """Of Settings, what a command line needs."""

    def arguments(self) -> list[str]: ...


def command(host: Host, model: Path, settings: Arguments, port: int, name: str) -> list[str]:
    """The command that serves the model's folder under that name, on this machine's loopback alone."""
    serve = [host.python, "-m", "lmdeploy", "serve", "api_server", str(model.absolute())]
    return [*serve, "--server-name", LOOPBACK, "--server-port", str(port), "--model-name", name, *settings.arguments()]


class Server:
    """A running server; `with` starts it and waits until it is healthy, and leaves nothing of it behind.

    command: what to run; url: where it will answer, on this machine's loopback; log: what it prints is added to it; timeout_s: it has to
    be healthy by then; environment: beside ours and ENVIRONMENT; waiting: told now and then how many seconds the start has taken.

    Raises BuildError: the port is taken, the log cannot be written, it ended (with its exit status and last lines), it was not healthy
    within timeout_s. An error in the body of `with` that its end explains is told as its end.
    """

    def __init__(
        self,
        command: Sequence[str],
        url: str,
        log: Path,
        timeout_s: float,
        environment: Mapping[str, str],
        waiting: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.url, self.log = url.rstrip("/"), log
        self._command, self._timeout_s, self._environment, self._waiting = list(command), timeout_s, environment, waiting
        self._port = urlsplit(url).port or 80
        self._process: subprocess.Popen[bytes] | None = None
        self._why = ""  # we ended it ourselves
        self._before = 0  # bytes of the log that are older than this run

    def __enter__(self) -> Server:
        if self._process is None:
            self.start()
        return self

    def start(self) -> None:
        """Starts it, and waits until it is healthy. `with` does so where this has not."""
        refuse_taken(self._port)
        try:
            self._process = self._start()
            self._wait(self._process)
        except BaseException:  # Ctrl-C too: nothing stays behind
            self.stop()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if isinstance(error, BuildError):
                self.check(NOTICE_S)
        finally:
            self.stop()

    def check(self, within_s: float = 0.0) -> None:
        """Raises BuildError where it has ended, or ends within that time."""
        deadline = time.monotonic() + within_s
        process = self._process
        while process is not None:
            if _status(process) is not None:
                raise self._ended(process)
            if time.monotonic() >= deadline:
                return
            time.sleep(LOOK_EVERY_S)

    def wait(self) -> BuildError:
        """Until it ends by itself; says how."""
        process = self._process
        assert process is not None, "it was not started"
        while _status(process) is None:
            time.sleep(LOOK_EVERY_S)
        return self._ended(process)

    def kill(self, why: str) -> None:
        """Ends it at once, from any thread: what waits for its answer fails, and `check` then says why. `stop` is still due."""
        process, self._why = self._process, why
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Asks it to end, ends it and whatever it started, and returns when they are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            if _status(process) is None:
                process.terminate()
                deadline = time.monotonic() + STOP_S
                while _status(process) is None and time.monotonic() < deadline:
                    time.sleep(LOOK_EVERY_S)
        finally:  # also where a second Ctrl-C cuts the waiting short
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its group is there for as long as it is not reaped
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        _until_gone(process.pid)

    # Starting

    def _start(self) -> subprocess.Popen[bytes]:
        with disk.writing(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log:
                self._before = log.tell()
                log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {json.dumps(self._command)}\n".encode())
                log.flush()
                return subprocess.Popen(
                    [sys.executable, "-I", "-S", tether.__file__, *self._command],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, **ENVIRONMENT, **self._environment},
                )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        said = "it does not listen"
        while (spent_s := time.monotonic() - began) < self._timeout_s:
            self.check()
            said = health(self.url, min(ANSWER_S, self._timeout_s - spent_s))
            if not said:
                return self._must_be_ours(process)
            self._waiting(spent_s)
            time.sleep(min(LOOK_EVERY_S, max(0.0, self._timeout_s - (time.monotonic() - began))))
        self.check()
        what = f"was not ready within {seconds(self._timeout_s)}: {said}{self._last_lines()}"
        raise BuildError(self._where(), what, f"read {self.log}; a large model on a slow disk may need a longer time to start")

    def _must_be_ours(self, process: subprocess.Popen[bytes]) -> None:
        """Engines listen when they have loaded the model: until then somebody else may have taken the port, and answers there."""
        if sys.platform == "linux" and process.pid not in {_session(pid) for pid in listeners(self._port)}:
            self.check(NOTICE_S)
            raise taken(self._port)

    # Its end

    def _where(self) -> str:
        return f"server at {self.url}"

    def _ended(self, process: subprocess.Popen[bytes]) -> BuildError:
        status = _status(process)
        if self._why:
            what = self._why
        elif status is not None and status < 0:
            killed = -status == signal.SIGKILL
            what = f"was ended by {_signal(-status)}{', as the kernel does where memory runs out' if killed else ''}"
        else:
            what = f"ended with exit status {status}"
        return BuildError(self._where(), f"{what}{self._last_lines()}", f"read {self.log}, and run the same command again")

    def _last_lines(self) -> str:
        """Of what this run printed."""
        try:
            with self.log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._before, end - LAST_BYTES))
                lines = file.read().decode(errors="replace").splitlines()[1:]  # below our own, or the part of one
        except OSError as error:
            return f"; its log cannot be read: {error.strerror}"
        kept = [line.rstrip() for line in lines if line.strip()][-LAST_LINES:]
        return "; its last lines:\n" + "\n".join(f"      {line[:200]}" for line in kept) if kept else "; it printed nothing"


def health(url: str, timeout_s: float) -> str:
    """Empty where the server answers GET /health with 200; else what it does."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/health", timeout=timeout_s):
            return ""
    except HTTPError as error:
        with error:
            return f"GET /health answers {error.code}"
    except TimeoutError:
        return f"GET /health gave no answer within {timeout_s:.1f} s"
    except URLError as error:
        return f"GET /health: {getattr(error.reason, 'strerror', None) or error.reason}"
    except (OSError, ValueError, HTTPException) as error:  # it hung up, or speaks no HTTP
        return f"GET /health: {type(error).__name__}"


def _status(process: subprocess.Popen[bytes]) -> int | None:
    """Its exit status, or minus the signal that ended it; None while it runs. It is not reaped: its number, and so its group's, stays
    its own until `stop`."""
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _session(process: int) -> int:
    with suppress(OSError):
        return os.getsid(process)
    return 0


def _until_gone(group: int) -> None:
    """The killed ones are gone in a moment; where nothing reaps orphans, they stay as names alone."""
    deadline = time.monotonic() + NOTICE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(LOOK_EVERY_S / 10)
