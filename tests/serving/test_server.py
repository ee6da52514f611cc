"""The engine as a process: it starts, or says why not; it ends with us, however we end. Real processes, of tests/apiserver.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import apiserver
import psutil
import pytest

from buildsys.errors import BuildError
from buildsys.serving.client import Client
from buildsys.serving.host import Host
from buildsys.serving.ports import free_port, listeners
from buildsys.serving.server import Server, command

HOST = Host(sys.executable, "0.18.0", ())


@dataclass(frozen=True)
class Arguments:
    words: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        return list(self.words)


def server(tmp_path: Path, *faults: str, port: int = 0, timeout_s: float = 30) -> Server:
    port = port or free_port()
    line = [sys.executable, apiserver.__file__, "--server-port", str(port), "--model-name", "tiny"]
    url = f"http://127.0.0.1:{port}"
    return Server(line, url, tmp_path / "logs" / "serve.log", timeout_s, {apiserver.FAULTS: " ".join(faults)})


def until(holds: Callable[[], bool], within_s: float = 20) -> bool:
    deadline = time.monotonic() + within_s
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def runs(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def child(log: Path) -> int:
    """The process that the server has started, as its log tells."""
    return next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child "))


def test_starts_answers_and_is_gone(tmp_path: Path) -> None:
    with server(tmp_path, "child") as running:
        assert Client(running.url, 10).model == "tiny"
        running.check()
        (leader,) = psutil.Process().children()
        assert os.getsid(leader.pid) == leader.pid != os.getsid(0)
        started = child(running.log)
        assert runs(started)
    assert not children() and not runs(started)
    log = running.log.read_text()
    assert log.startswith("== ") and "--model-name" in log.splitlines()[0] and "listens on" in log


def test_the_log_is_added_to_and_an_end_quotes_its_own_run(tmp_path: Path) -> None:
    with server(tmp_path):
        pass
    with pytest.raises(BuildError) as caught, server(tmp_path, "ends"):
        pass
    assert "listens on" not in caught.value.what and "listens on" in (tmp_path / "logs" / "serve.log").read_text()


def test_end_at_the_start_is_told_with_status_and_last_lines(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught, server(tmp_path, "child", "ends"):
        pass
    assert "ended with exit status 1" in caught.value.what and "ValueError: cannot load the model" in caught.value.what
    assert str(tmp_path / "logs" / "serve.log") in caught.value.fix
    assert not children() and not runs(child(tmp_path / "logs" / "serve.log"))


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"exit status 127.*\n.*no-such-python: No such file or directory"):
        Server(["/no-such-python"], f"http://127.0.0.1:{free_port()}", tmp_path / "log", 10, {}).__enter__()


@pytest.mark.parametrize("fault", ("hang", "ill"))
def test_a_start_that_hangs_ends_in_time(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buildsys.serving.server.STOP_S", 0.2)
    began = time.monotonic()
    with pytest.raises(BuildError) as caught, server(tmp_path, fault, "deaf", "child", timeout_s=1.5):
        pass
    assert time.monotonic() - began < 60 and "was not ready within 1.5 s" in caught.value.what
    assert ("answers 503" in caught.value.what) == (fault == "ill")
    assert not children() and not runs(child(tmp_path / "logs" / "serve.log"))


def test_a_taken_port_names_who_has_it(tmp_path: Path) -> None:
    with apiserver.ApiServer() as other:
        port = int(other.url.rpartition(":")[2])
        with pytest.raises(BuildError) as caught, server(tmp_path, port=port):
            pass
    assert caught.value.where == f"port={port}" and f"process {os.getpid()} (" in caught.value.what
    assert "say port=" in caught.value.fix and not (tmp_path / "logs").exists() and not children()


def test_a_port_that_is_taken_while_it_starts(tmp_path: Path) -> None:
    """Somebody else's health is not its own."""
    port = free_port()
    starting = server(tmp_path, "hang", port=port)
    others: list[apiserver.ApiServer] = []

    def waiting(_: float) -> None:
        if not others:
            others.append(apiserver.ApiServer(port=port).__enter__())

    starting._waiting = waiting
    with pytest.raises(BuildError, match=f"process {os.getpid()} "), starting:
        pass
    others[0].__exit__(None, None, None)
    assert not children()


def test_killed_in_the_middle_of_a_request(tmp_path: Path) -> None:
    """The connection that broke is not what happened: the server's end is."""
    with pytest.raises(BuildError) as caught, server(tmp_path, "dies:2", "child") as running:
        client = Client(running.url, 10)
        assert client.generate([1, 2], 3, True) == [3, 4, 5]
        client.generate([1, 2], 3, True)
    assert caught.value.what.startswith("was ended by SIGKILL") and "listens on" in caught.value.what
    assert not children() and not runs(child(tmp_path / "logs" / "serve.log"))


def test_check_and_wait_tell_an_end(tmp_path: Path) -> None:
    with server(tmp_path) as running:
        psutil.Process().children()[0].send_signal(signal.SIGSEGV)
        assert "SIGSEGV" in str(running.wait())
        with pytest.raises(BuildError, match="SIGSEGV"):
            running.check()


def test_an_error_that_is_not_the_servers_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="toys do not float"), server(tmp_path):
        raise BuildError("toy.yaml", "toys do not float", "get a boat")
    assert not children()


def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "serve.log").symlink_to("/dev/full")
    with pytest.raises(BuildError, match="No space left on device"), server(tmp_path):
        pass
    assert not children()


STARTER = """
import os, sys
from pathlib import Path
from buildsys.serving.server import Server
port, log, script = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
line = [sys.executable, script, "--server-port", str(port)]
server = Server(line, f"http://127.0.0.1:{port}", log, 30, {"APISERVER_FAULTS": sys.argv[4]})
try:
    with server:
        print("ready", flush=True)
        raise SystemExit(str(server.wait()))
except KeyboardInterrupt:
    raise SystemExit(130)
"""


@pytest.mark.parametrize(("faults", "how"), [("child deaf", signal.SIGKILL), ("child hang", signal.SIGKILL), ("child", signal.SIGTERM)])
def test_nothing_is_left_when_its_parent_is_killed(tmp_path: Path, faults: str, how: signal.Signals) -> None:
    port, log = free_port(), tmp_path / "serve.log"
    line = [sys.executable, "-c", STARTER, str(port), str(log), apiserver.__file__, faults]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        if "hang" not in faults:
            assert parent.stdout.readline() == "ready\n"
        assert until(lambda: log.exists() and "child " in log.read_text())
        family = [one.pid for one in psutil.Process(parent.pid).children(recursive=True)]
        assert child(log) in family and len(family) == 2
        parent.send_signal(how)
        assert parent.wait() == -how
        assert until(lambda: not any(map(runs, family)))
    assert listeners(port) == []


def test_ctrl_c_stops_it_cleanly(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "serve.log"
    line = [sys.executable, "-c", STARTER, str(port), str(log), apiserver.__file__, "child"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        family = [one.pid for one in psutil.Process(parent.pid).children(recursive=True)]
        parent.send_signal(signal.SIGINT)
        _, errors = parent.communicate()
        assert parent.returncode == 130 and not errors and not any(map(runs, family))


def test_the_command_is_lmdeploys(tmp_path: Path) -> None:
    line = command(HOST, Path("model"), Arguments(("--tp", "2")), 8000, "tiny")
    assert line[:6] == [sys.executable, "-m", "lmdeploy", "serve", "api_server", str(Path("model").absolute())]
    assert line[6:] == ["--server-name", "127.0.0.1", "--server-port", "8000", "--model-name", "tiny", "--tp", "2"]
