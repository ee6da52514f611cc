"""serve, chat, bench and web as a user runs them: real processes, against a program that speaks as LMDeploy's server does."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import apiserver
import psutil
import pytest
import runs
from apiserver import ApiServer

from buildsys.serving.ports import free_port, listeners
from buildsys.serving.settings import Settings

pytestmark = pytest.mark.slow

ENDED_S = 20


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    """A workspace with the recipe `tiny`, built."""
    return runs.copy(tiny, tmp_path / "workspace")


@pytest.fixture
def engine(tmp_path: Path) -> dict[str, str]:
    """A machine that can serve."""
    return apiserver.machine(tmp_path / "machine")


class Started:
    """A command that runs until it is told to end; what it says is read line by line."""

    def __init__(self, line: list[str], workspace: Path, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            line, cwd=workspace, env=runs.environment() | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []

    def until(self, pattern: str) -> re.Match[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(self.lines))

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self, number: signal.Signals) -> str:
        self.process.send_signal(number)
        return self.rest()

    def rest(self) -> str:
        return "".join(self.lines) + self.process.communicate(timeout=ENDED_S)[0]


@contextmanager
def started(line: list[str], workspace: Path, environment: dict[str, str]) -> Iterator[Started]:
    found = Started(line, workspace, environment)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
        found.process.communicate()


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=ENDED_S)
    return not [one for one in alive if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def plain(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "buildsys", *arguments]


# serve


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)], ids=lambda value: str(value)
)
def test_serve_runs_until_it_is_ended_and_leaves_nothing(place: Path, engine: dict[str, str], number: signal.Signals, status: int) -> None:
    port = free_port()
    with started(runs.command("serve", "recipe=tiny", f"port={port}"), place, engine | {apiserver.FAULTS: "child"}) as command:
        url = command.until(r"^tiny: OpenAI's API at (http://127.0.0.1:\d+)/v1, model tiny$")[1]
        curl = command.until(r"^  (curl .*)$")[1]
        command.until("Ctrl-C stops it")
        assert url.endswith(f":{port}")
        said = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=30).stdout
        assert json.loads(said)["choices"][0]["message"]["content"] == "Hello"
        family = command.family()
        assert len(family) == 2, "the server, and what it has started"
        said = command.end(number)
    assert command.process.returncode == status and "Traceback" not in said and gone(family), said
    assert ("tiny: its server stops" in said) == (number != signal.SIGKILL) and "interrupted" not in said
    assert "starts pytorch of lmdeploy 0.18.0 on NVIDIA H200; its log: artifacts/.store/logs/serve-tiny.log" in said
    assert "--model-name" in (place / "artifacts/.store/logs/serve-tiny.log").read_text() and listeners(port) == []


def test_ctrl_c_while_the_engine_starts(place: Path, engine: dict[str, str]) -> None:
    with started(runs.command("serve", "recipe=tiny", f"port={free_port()}"), place, engine | {apiserver.FAULTS: "child hang"}) as command:
        log = place / "artifacts/.store/logs/serve-tiny.log"
        while not log.exists() or "child " not in log.read_text():
            assert command.process.poll() is None
            time.sleep(0.01)
        family = command.family()
        said = command.end(signal.SIGINT)
    assert command.process.returncode == 130 and len(family) == 2 and gone(family), said
    assert "tiny: its server stops" in said and "Traceback" not in said


def test_serve_gives_the_engine_what_the_recipe_decides(place: Path, engine: dict[str, str]) -> None:
    with started(plain("serve", "tiny", "--port", str(free_port())), place, engine) as command:
        command.until("Ctrl-C stops it")
        logged = (place / "artifacts/.store/logs/serve-tiny.log").read_text().splitlines()[0]
        line = json.loads(logged[logged.index("[") :])
        settings = Settings.read(place / "artifacts/tiny/deploy/lmdeploy.yaml")
        assert line[-len(settings.arguments()) :] == settings.arguments() and line[1:5] == ["-m", "lmdeploy", "serve", "api_server"]
        assert Path(line[5]) == (place / "artifacts/tiny").resolve() and "127.0.0.1" in line
        said = command.end(signal.SIGINT)
    assert command.process.returncode == 130 and "its server stops" in said and "Traceback" not in said


def test_a_server_that_ends_by_itself_is_an_error(place: Path, engine: dict[str, str]) -> None:
    with started(runs.command("serve", "recipe=tiny", f"port={free_port()}"), place, engine) as command:
        command.until("Ctrl-C stops it")
        command.family()[0].kill()
        said = command.rest()
    assert command.process.returncode == 1 and "was ended by SIGKILL" in said and "listens on" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("fault", "told"),
    [("ends", "ended with exit status 1; its last lines:\n      ValueError: cannot load the model"), ("busy", "is taken")],
)
def test_a_server_that_cannot_start(place: Path, engine: dict[str, str], fault: str, told: str) -> None:
    with ApiServer() as other:
        port = other.url.rpartition(":")[2] if fault == "busy" else str(free_port())
        ran = runs.doit(place, "serve", "recipe=tiny", f"port={port}", **engine | {apiserver.FAULTS: fault})
    assert ran.status == 1 and told in ran.err and "fix: " in ran.err and "Traceback" not in ran.err


def test_what_is_missing_is_one_line_and_the_command(place: Path, tmp_path: Path) -> None:
    for task in ("serve", "chat", "bench", "web"):
        ran = runs.doit(place, task, "recipe=tiny", PATH="/usr/bin:/bin", CUDA_VISIBLE_DEVICES="")
        assert ran.status == 1 and ran.err.count("\n") == 2 and "no CUDA device" in ran.err, ran.err
        assert "pip install 'buildsys[lmdeploy]'" in ran.err
    ran = runs.doit(place, "serve", "recipe=tiny", **apiserver.machine(tmp_path / "old", lmdeploy="0.17.1"))
    assert ran.status == 1 and "has lmdeploy 0.17.1" in ran.err and "-m pip install 'lmdeploy>=0.18,<0.19'" in ran.err


def test_what_is_not_built_or_has_no_engine_says_why(place: Path, engine: dict[str, str], schemes: tuple[Path, runs.Ran]) -> None:
    (place / "recipes/other.yaml").write_text((place / "recipes/tiny.yaml").read_text())
    ran = runs.doit(place, "chat", "recipe=other", **engine)
    assert ran.status == 1 and "other is not built: there is no artifacts/other" in ran.err and "`doit build recipe=other`" in ran.err
    several, built = schemes
    built.fine()
    ran = runs.doit(runs.copy(several, place.parent / "schemes"), "serve", "recipe=schemes@mixed", **engine)
    assert ran.status == 1 and "schemes@mixed has no deploy/lmdeploy.yaml: no engine of LMDeploy serves it (" in ran.err
    assert "GPTQ" in ran.err.upper() and "vLLM" in ran.err


def test_what_is_built_may_be_older_than_its_recipe(place: Path, engine: dict[str, str]) -> None:
    ran = runs.doit(place, "chat", "recipe=tiny", **engine)
    assert "is not what its recipe says now" not in ran.out
    runs.edit(place / "recipes/tiny.yaml", "kv_cache: {policy: none}", "kv_cache: {policy: none, max_entry_count: 0.3}")
    ran = runs.doit(place, "chat", "recipe=tiny", **engine)
    assert ran.status == 0 and "artifacts/tiny is not what its recipe says now; `doit build recipe=tiny` makes it so" in ran.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("serve",), "which recipe?"),
        (("serve", "recipe=tiny,other"), "takes one recipe, 2 are named"),
        (("serve", "recipe=tiny", "port=http"), "port=http  is no port"),
        (("serve", "recipe=tiny", "url=http://127.0.0.1:1"), "url=  says nothing to serve"),
        (("build", "recipe=tiny", "port=1"), "port=  says nothing to build"),
        (("chat", "recipe=tiny", "url=127.0.0.1:23333"), "is no address of a server"),
        (("chat", "recipe=tiny", "url=http://[::1"), "is no address of a server"),
        (("chat", "recipe=tiny", "url=http://a..b"), "is no address of a server"),
        (("serve", "recipe=tiny", f"port={'9' * 5000}"), "is no port"),
        (("bench", "recipe=tiny", "url=http://127.0.0.1:1"), "cannot be reached: Connection refused"),
        (("-n", "2", "serve", "recipe=tiny"), "doit -n serve  runs alone"),
    ],
)
def test_a_line_that_cannot_be_meant(place: Path, words: tuple[str, ...], told: str) -> None:
    (place / "recipes/other.yaml").write_text((place / "recipes/tiny.yaml").read_text())
    ran = runs.doit(place, *words)
    assert ran.status == 1 and told in ran.err and "fix: " in ran.err and "Traceback" not in ran.err


# chat


def ask(place: Path, text: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = runs.command("chat", "recipe=tiny", *words)
    return subprocess.run(line, cwd=place, env=runs.environment() | environment, input=text, text=True, capture_output=True, timeout=120)


def test_chat_with_lines_from_a_pipe(place: Path, engine: dict[str, str]) -> None:
    with ApiServer(model="tiny") as server:
        said = ask(place, "one two\n\nthree\n/reset\nfour five six\n/exit\nseven\n", f"url={server.url}")
        asked = [body["messages"] for _, body in server.asked]
    assert said.returncode == 0 and said.stdout == "two one\nthree\n(forgotten)\nsix five four\n", said.stdout + said.stderr
    user = [[message["content"] for message in messages] for messages in asked]
    assert user == [["one two"], ["one two", "two one", "three"], ["four five six"]]
    own = ask(place, "one two", **engine)
    assert own.returncode == 0 and own.stdout.endswith("\ntwo one\n") and "starts pytorch" in own.stdout


def test_chat_with_a_server_that_fails(place: Path, engine: dict[str, str]) -> None:
    with ApiServer("refuses", model="tiny") as server:
        said = ask(place, "one\n", f"url={server.url}")
    assert said.returncode == 1 and "the prompt is too long" in said.stderr and "Traceback" not in said.stderr
    said = ask(place, "one\ntwo\n", **engine | {apiserver.FAULTS: "dies:2"})
    assert said.returncode == 1 and "was ended by SIGKILL" in said.stderr and "chat-tiny.log" in said.stderr, said.stderr
    assert "Traceback" not in said.stderr


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, line: list[str], workspace: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            line,
            cwd=workspace,
            env=runs.environment() | {"TERM": "dumb"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.said = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """What came until, and with, this text."""
        deadline = time.monotonic() + 60
        while text not in self.said and time.monotonic() < deadline:
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self._ours, 4096).decode()
                except OSError:
                    break  # it has ended
        before, found, self.said = self.said.partition(text)
        assert found, before
        return before + found

    def close(self) -> int:
        status = self.process.wait(ENDED_S)
        os.close(self._ours)
        return status


def test_chat_on_a_terminal(place: Path) -> None:
    with ApiServer("late:0.05", model="tiny") as server:
        terminal = Terminal(runs.command("chat", "recipe=tiny", f"url={server.url}"), place)
        assert "/reset forgets" in terminal.until("> ")
        terminal.type("one two\n")
        terminal.until("two one")
        terminal.until("> ")
        server.faults["refuses"] = ""
        terminal.type("three\n")
        assert "this question is left out" in terminal.until("> ")
        del server.faults["refuses"]
        terminal.type("four\n")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.close() == 0
        asked = [[message["content"] for message in body["messages"]] for _, body in server.asked]
    assert asked == [["one two"], ["one two", "two one", "three"], ["one two", "two one", "four"]]


def test_ctrl_c_ends_a_chat(place: Path) -> None:
    with ApiServer("late:30", model="tiny") as server:
        terminal = Terminal(runs.command("chat", "recipe=tiny", f"url={server.url}"), place)
        terminal.until("> ")
        terminal.type("one two\n")
        while not server.asked:
            time.sleep(0.01)
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.close() == 130 and "Traceback" not in terminal.said


# bench


def test_bench_writes_a_table_and_what_it_was_measured_on(place: Path, engine: dict[str, str]) -> None:
    ran = runs.doit(place, "bench", "recipe=tiny", **engine).fine()
    assert re.search(r"^ +batch +tokens/s +a request +first token$", ran.out, re.M)
    assert [int(found) for found in re.findall(r"^ +(\d+) +[\d,.]+ +[\d,.]+ +[\d,.]+ ms$", ran.out, re.M)] == [1, 8, 32]
    said = json.loads((place / "artifacts/tiny.bench.json").read_text())
    assert [rate["batch"] for rate in said["rates"]] == [1, 8, 32] and all(rate["tokens_per_s"] > 0 for rate in said["rates"])
    assert said["gpus"] == [{"name": "NVIDIA H200", "driver": "570.124", "memory_bytes": 143771 << 20}] and said["lmdeploy"] == "0.18.0"
    assert said["settings"]["backend"] == "pytorch" and said["vram_bytes"] == {"before": 2 << 30, "loaded": 2 << 30, "peak": 2 << 30}
    assert said["artifact"] in os.readlink(place / "artifacts/tiny")
    assert "below" in said["prompts"] and "seed 0" in said["prompts"]


def test_bench_of_a_running_server(place: Path) -> None:
    with ApiServer("late:0.02", model="tiny") as server:
        ran = runs.doit(place, "bench", "recipe=tiny", f"url={server.url}").fine()
        assert 1 < server.most <= 32
        assert sum(body["max_tokens"] > 4 for _, body in server.asked) == 4 + 16 + 64
    said = json.loads((place / "artifacts/tiny.bench.json").read_text())
    assert said["server"] == server.url and len(said["rates"]) == 3 and "gpus" not in said and "bench.json" in ran.out
    (place / "artifacts/tiny.bench.json").unlink()
    with ApiServer(model="another") as server:
        ran = runs.doit(place, "bench", "recipe=tiny", f"url={server.url}")
    assert ran.status == 1 and "serves another, not tiny" in ran.err and not (place / "artifacts/tiny.bench.json").exists()


def test_ctrl_c_ends_a_benchmark(place: Path, engine: dict[str, str]) -> None:
    with started(runs.command("bench", "recipe=tiny"), place, engine | {apiserver.FAULTS: "late:30"}) as command:
        command.until("first token")
        family = command.family()
        said = command.end(signal.SIGINT)
    assert command.process.returncode == 130 and gone(family) and "Traceback" not in said, said
    assert "nothing was written of this run" in said and not (place / "artifacts/tiny.bench.json").exists()


def test_ctrl_c_ends_a_benchmark_of_a_server_that_hangs(place: Path) -> None:
    """It is not ours to end, and nobody waits for its answers."""
    with (
        ApiServer("late:60", model="tiny") as server,
        started(runs.command("bench", "recipe=tiny", f"url={server.url}"), place, {}) as command,
    ):
        while not server.asked:
            time.sleep(0.01)
        said = command.end(signal.SIGINT)
    assert command.process.returncode == 130 and "Traceback" not in said and "nothing was written of this run" in said, said


# web


def test_web_shows_a_page_until_it_is_ended(place: Path, engine: dict[str, str]) -> None:
    port = free_port()
    with started(runs.command("web", "recipe=tiny", f"port={port}"), place, engine) as command:
        url = command.until(r"^tiny: chat at (\S+)$")[1]
        command.until("Ctrl-C stops it")
        with urlopen(url, timeout=30) as page:
            assert '"title":"tiny"' in page.read().decode()
        family = command.family()
        said = command.end(signal.SIGINT)
    assert command.process.returncode == 130 and "its page closes" in said and "Traceback" not in said and gone(family), said
    assert listeners(port) == []


def test_web_ends_with_its_server(place: Path, engine: dict[str, str]) -> None:
    with started(plain("web", "tiny", "--port", str(free_port())), place, engine) as command:
        command.until("Ctrl-C stops it")
        command.family()[0].kill()
        said = command.rest()
    assert command.process.returncode == 1 and "was ended by SIGKILL" in said and "Traceback" not in said, said
