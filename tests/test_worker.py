"""Heavy steps run in children that say what went wrong, are kept for the next step, and never outlive their driver."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import toy

from buildsys import worker
from buildsys.errors import BuildError
from buildsys.step import Request, digest
from buildsys.store import Store
from buildsys.worker import Job, perform
from buildsys.workers import Workers

HERE = Path(__file__).parent
Progress = list[tuple[str, int, int]]


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("TOY_MARKS", str(tmp_path / "marks"))
    workers = Workers(tmp_path / "artifacts" / ".store", "toy")
    yield workers
    workers.end()


def job(tmp_path: Path, name: str = "toy", **knobs: object) -> Job:
    made = {"name": name, **knobs}
    root = str(tmp_path / "artifacts")
    return Job("make", name, digest(made), made, {}, {}, root, heavy=True, device="cpu", threads=3, resumes=True)


def run(workers: Workers, asked: Job, progress: Progress | None = None, waiting: Callable[[str], None] = lambda _: None) -> bool:
    log = Store(Path(asked.root)).log(asked.kind, asked.key)
    heard: Progress = progress if progress is not None else []
    return workers.run(asked, log, lambda *said: heard.append(said), waiting)


def log_of(asked: Job) -> str:
    return Store(Path(asked.root)).log(asked.kind, asked.key).read_text()


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]


def test_step_runs_in_a_child_and_is_committed(workers: Workers, tmp_path: Path) -> None:
    progress: Progress = []
    asked = job(tmp_path, text="hello", sleep_s=0.5)
    assert run(workers, asked, progress)
    found = Store(tmp_path / "artifacts").find(asked.key)
    assert found is not None and found.meta["threads"] == 3
    assert found.meta["built"]["kind"] == "make" and found.meta["built"]["seconds"] >= 0.5 and "python" in found.meta["built"]["versions"]
    assert Store(tmp_path / "artifacts").path(found, "out.txt").read_text() == "hello()"
    assert len([said for said in progress if said[0] == "sleep"]) >= 3
    assert '"text": "hello"' in log_of(asked)
    assert not run(workers, asked), "the store has it"


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process starts anew on Linux alone")
def test_peak_memory_is_the_steps_own(workers: Workers, tmp_path: Path) -> None:
    """Both steps run in one child, the large one first."""
    found = []
    for asked in (job(tmp_path, "large", fault="grow"), job(tmp_path, "small")):
        run(workers, asked)
        made = Store(tmp_path / "artifacts").find(asked.key)
        assert made is not None
        found.append(made.meta["built"]["peak_rss_bytes"])
    assert found[0] > found[1] + (200 << 20) and found[1] > 1 << 20


def test_child_is_kept_for_the_next_step(workers: Workers, tmp_path: Path) -> None:
    workers.warm()
    workers.warm()
    run(workers, job(tmp_path, "one"))
    run(workers, job(tmp_path, "two"))
    assert len(children()) == 1


def test_two_at_a_time_take_two_children(workers: Workers, tmp_path: Path) -> None:
    threads = [threading.Thread(target=run, args=(workers, job(tmp_path, name, sleep_s=0.6))) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(children()) == 2
    workers.end()
    assert not children()


def test_bad_input_crosses_in_three_parts(workers: Workers, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as caught:
        run(workers, job(tmp_path, fault="error"))
    assert (caught.value.where, caught.value.what, caught.value.fix) == ("toy.yaml:3", "toys do not float", "get a boat")
    assert run(workers, job(tmp_path, "next")) and len(children()) == 1


@pytest.mark.parametrize(
    ("fault", "what", "fix"),
    [
        ("bug", "internal error: ValueError: a toy broke", "report it with"),
        ("killed", "memory ran out", "batch=1"),
        ("crash", "crashed with SIGSEGV", "report it with"),
        ("memory", "ran out of memory: no more", "batch=1"),
        ("full", "cannot be written: No space left on device", "doit gc"),
    ],
)
def test_end_of_a_child_is_told(workers: Workers, tmp_path: Path, fault: str, what: str, fix: str) -> None:
    asked = job(tmp_path, fault=fault)
    with pytest.raises(BuildError) as caught:
        run(workers, asked)
    assert what in caught.value.what and fix in caught.value.fix and "Traceback" not in str(caught.value)
    assert ("Traceback" in log_of(asked)) == (fault == "bug")
    assert Store(tmp_path / "artifacts").find(asked.key) is None
    assert run(workers, job(tmp_path, "next")), "the next step has another child"
    again = replace(asked, knobs={**asked.knobs, "fault": "none"})
    assert run(workers, again) and "goes on from where it was killed" in log_of(asked)


def test_steps_module_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    workers = Workers(tmp_path / "artifacts" / ".store", "no_such_module")
    with pytest.raises(BuildError, match="No module named 'no_such_module'"):
        run(workers, job(tmp_path))
    workers.end()


def test_same_step_of_two_drivers_is_built_once(workers: Workers, tmp_path: Path) -> None:
    """The first goes on until the second says that it waits: whoever is slow to start, the step runs while both ask for it."""
    asked, waits = job(tmp_path, until=str(tmp_path / "waits")), list[str]()
    other = Workers(tmp_path / "artifacts" / ".store", "toy")
    done = []
    thread = threading.Thread(target=lambda: done.append(run(other, asked)))
    thread.start()
    while not (tmp_path / "marks").exists():
        time.sleep(0.01)

    def waiting(who: str) -> None:
        waits.append(who)
        (tmp_path / "waits").touch()

    assert not run(workers, asked, waiting=waiting)
    thread.join()
    other.end()
    assert done == [True] and len(waits) == 1 and waits[0].startswith("process ")
    assert (tmp_path / "marks").read_text() == "toy\n"


def test_again_builds_what_the_store_has(workers: Workers, tmp_path: Path) -> None:
    asked = job(tmp_path)
    assert run(workers, asked) and run(workers, replace(asked, again=True))
    assert (tmp_path / "marks").read_text() == "toy\ntoy\n"


def test_perform_in_this_process(tmp_path: Path) -> None:
    asked = replace(job(tmp_path), heavy=False)
    assert perform(asked, lambda *_: None, lambda _: None, toy) and not perform(asked, lambda *_: None, lambda _: None, toy)


def test_step_tells_of_files_that_it_has_finished(tmp_path: Path) -> None:
    """Digests are taken beside it, and where it breaks its word the digest is of what is there."""

    def steps(request: Request, _: object) -> dict[str, object]:
        for name in ("kept", "broken"):
            (request.stage / name).write_text(name)
            request.finished(request.stage / name)
        time.sleep(0.1)
        was = (request.stage / "broken").stat()
        (request.stage / "broken").write_text("BROKEN")
        os.utime(request.stage / "broken", ns=(was.st_atime_ns, was.st_mtime_ns))
        if request.knobs["name"] == "fails":
            raise BuildError("toy.yaml:3", "toys do not float", "get a boat")
        return {}

    before, module = threading.active_count(), SimpleNamespace(run=steps)
    asked, fails = (replace(job(tmp_path, name), heavy=False) for name in ("toy", "fails"))
    assert perform(asked, lambda *_: None, lambda _: None, module)  # type: ignore[arg-type]
    made = Store(tmp_path / "artifacts").find(asked.key)
    assert made is not None
    for name, text in (("kept", "kept"), ("broken", "BROKEN")):
        assert made.files[name].sha256 == hashlib.sha256(text.encode()).hexdigest()
    with pytest.raises(BuildError, match="do not float"):
        perform(fails, lambda *_: None, lambda _: None, module)  # type: ignore[arg-type]
    assert threading.active_count() == before


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


DRIVER = """
    import sys
    from pathlib import Path
    from buildsys.step import Request, digest
    from buildsys.worker import Job
    from buildsys.workers import Workers
    knobs = {"name": "toy", "sleep_s": float(sys.argv[2]), "fault": sys.argv[3]}
    root = Path(sys.argv[1])
    job = Job("make", "toy", digest(knobs), knobs, {}, {}, str(root), heavy=True, device="cpu")
    workers = Workers(root / ".store", "toy")
    workers.warm()
    workers.run(job, root / ".store" / "logs" / "toy.log", lambda *_: print("runs", flush=True), print)
    print("done", flush=True)
"""


@pytest.mark.parametrize(("fault", "wait_s"), [("none", 0.0), ("none", 0.03), ("none", 0.2), ("none", 1.0), ("spin", 1.0)])
def test_no_child_outlives_its_driver(tmp_path: Path, fault: str, wait_s: float) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    code = [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path / "artifacts"), "60" if fault == "none" else "0", fault]
    driver = subprocess.Popen(code, env=environment, stdout=subprocess.PIPE, text=True)
    watched = psutil.Process(driver.pid)
    while not watched.children(recursive=True):
        time.sleep(0.005)
    time.sleep(wait_s)
    left = watched.children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    until = time.monotonic() + 2
    while any(map(alive, left)) and time.monotonic() < until:
        time.sleep(0.01)
    assert left and not any(map(alive, left))


def reading(tmp_path: Path, original: Path) -> Job:
    """A job that reads one file that its owner keeps, through a store's blob."""
    store = Store(tmp_path / "artifacts")
    stage = store.stage("0" * 64)
    (stage / "text").symlink_to(original)
    blob = store.path(store.commit("0" * 64, stage, {}), "text")
    return replace(job(tmp_path), heavy=False, inputs={"source": {"text": str(blob)}})


@pytest.mark.parametrize("back", [False, True], ids=["stays changed", "is put back"])
def test_source_that_changes_under_a_step_is_in_no_artifact(tmp_path: Path, back: bool) -> None:
    original = tmp_path / "text"
    original.write_text("AAAA")
    asked = reading(tmp_path, original)

    def meddling(request: Request, progress: toy.Progress) -> dict[str, object]:
        original.write_text("BBBB")
        found = toy.run(request, progress)
        if back:
            original.write_text("AAAA")
        return found

    steps = SimpleNamespace(run=meddling)
    with pytest.raises(BuildError, match="changed while a build read it"):
        perform(asked, lambda *said: None, [].append, steps)  # type: ignore[arg-type]  a module is asked for
    assert Store(tmp_path / "artifacts").find(asked.key) is None
    original.write_text("AAAA")
    assert perform(asked, lambda *said: None, [].append, toy)
    assert "AAAA" in toy_output(tmp_path, asked)


def toy_output(tmp_path: Path, asked: Job) -> str:
    store = Store(tmp_path / "artifacts")
    artifact = store.find(asked.key)
    assert artifact is not None
    return store.path(artifact, "out.txt").read_text()


@pytest.mark.parametrize(("resumes", "kept"), [(True, True), (False, False)])
def test_only_a_step_that_resumes_finds_what_a_killed_run_left(tmp_path: Path, resumes: bool, kept: bool) -> None:
    asked = replace(job(tmp_path, fault="bug"), heavy=False, resumes=resumes)
    with pytest.raises(ValueError, match="a toy broke"):
        perform(asked, lambda *said: None, [].append, toy)
    stage = Store(tmp_path / "artifacts").stage(asked.key)
    (stage / "left.txt").write_text("from before")
    perform(replace(asked, knobs={"name": "toy"}), lambda *said: None, [].append, toy)
    artifact = Store(tmp_path / "artifacts").find(asked.key)
    assert artifact is not None and ("left.txt" in artifact.files) == kept


def test_stage_made_on_other_terms_starts_afresh(tmp_path: Path) -> None:
    asked = replace(job(tmp_path, fault="bug"), heavy=False)
    with pytest.raises(ValueError, match="a toy broke"):
        perform(asked, lambda *said: None, [].append, toy)
    stage = Store(tmp_path / "artifacts").stage(asked.key)
    (stage / "left.txt").write_text("made with another torch")
    (stage / ".made-of").write_text("{}")
    perform(replace(asked, knobs={"name": "toy"}), lambda *said: None, [].append, toy)
    artifact = Store(tmp_path / "artifacts").find(asked.key)
    assert artifact is not None and "left.txt" not in artifact.files
    assert artifact.meta["built"]["device"] == "cpu" and "python" in artifact.meta["built"]["versions"]


def test_what_was_begun_is_gone_on_with_whatever_else_a_process_has_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = worker._arithmetic("cpu")
    monkeypatch.setitem(sys.modules, "tokenizers", type(sys)("tokenizers"))
    monkeypatch.setitem(sys.modules, "sentencepiece", type(sys)("sentencepiece"))
    assert worker._arithmetic("cpu") == before and before["device"] == "cpu"
