"""verify.serve from recipe to report, through doit, against LMDeploy's own server with the CPU in TurboMind's place; and its bad days.

A server that dies, hangs, or finds its port taken has to end in an error within timeout_s, with no process left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpuhost
import psutil
import pytest
import runs

from buildsys.store import Store

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).parent / "tools.jinja"
ASKED = "batches: [1, 2], new_tokens: 6, prompts: 3, prompt_tokens: 24, repeats: 1"


@pytest.fixture(scope="module")
def built(demo: tuple[Path, runs.Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, built; its recipe names an H200 and asks its server for calls of tools."""
    demo[1].fine()
    workspace = runs.copy(demo[0], tmp_path_factory.mktemp("serve") / "workspace")
    shutil.copy(TEMPLATE, workspace / "recipes" / "demo" / "model" / "chat_template.jinja")
    recipe = workspace / "recipes" / "demo" / "demo.yaml"
    runs.edit(recipe, "target: {gpu: t4}", "target: {gpu: h200, tool_call_parser: qwen3}\nkv_cache: {policy: int8, max_entry_count: 0.5}")
    return workspace


def asking(built: Path, folder: Path, serve: str) -> Path:
    """The workspace with such a check."""
    workspace = runs.copy(built, folder / "workspace")
    runs.edit(workspace / "recipes" / "demo" / "demo.yaml", "  memory: {}\n", f"  memory: {{}}\n  serve: {{{serve}}}\n")
    return workspace


def build(workspace: Path, host: dict[str, str]) -> runs.Ran:
    return runs.doit(workspace, "build", "recipe=demo", **host)


def served(workspace: Path) -> dict[str, Any]:
    store = Store(workspace / "artifacts")
    key = next(key for key, one in runs.manifests(workspace).items() if one["meta"]["built"]["kind"] == "serve")
    artifact = store.find(key)
    assert artifact is not None
    found: dict[str, Any] = json.loads(store.path(artifact, "served.json").read_text())
    return found


@pytest.fixture
def host(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A machine with a GPU; in the end no process of it may be left."""
    found = gpuhost.environment(tmp_path / "host")
    yield found
    assert left(found) == [], "processes of an engine outlive the command"


def left(host: dict[str, str], within_s: float = 5.0) -> list[str]:
    """Command lines of this host's engines that still run."""
    deadline = time.monotonic() + within_s
    while True:
        running = [process.cmdline() for process in psutil.process_iter() if _is_of(process, host)]
        if not running or time.monotonic() > deadline:
            return [" ".join(line)[:200] for line in running]
        time.sleep(0.05)


def _is_of(process: psutil.Process, host: dict[str, str]) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("GPUHOST") == host["GPUHOST"]
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_every_answer_of_the_server_reaches_the_verdict(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    gates = "min_speedup: 0.001, max_vram_gib: 2.0, min_agreement: 0.8"
    workspace = asking(built, tmp_path, f"required: always, max_entry_counts: [0.2], {ASKED}, {gates}")
    ran = build(workspace, host).fine()
    for told in ("serve     speedup", "serve     vram_gib", "serve     agreement 1 of tokens", "serve     failures 0 answers"):
        assert f"passed  {told}" in ran.out
    found = served(workspace)
    trials = {trial["name"]: trial for trial in found["trials"]}
    assert list(trials) == ["artifact", "plain", "source", "source_kv", "share_0.2"]
    assert {name: trial["settings"]["quant_policy"] for name, trial in trials.items()} == {
        **{"artifact": 8, "plain": 0, "source": 0, "source_kv": 8, "share_0.2": 8}
    }
    assert trials["share_0.2"]["pool_bytes"] * 5 == trials["artifact"]["pool_bytes"] * 2 == gpuhost.FREE_MIB << 20
    assert trials["artifact"]["pool_tokens"] > 1.8 * trials["plain"]["pool_tokens"], "int8 holds nearly twice the tokens"
    assert [rate["batch"] for rate in found["transformers"]["rates"]] == [1, 2], found["transformers"]
    assert all(rate["tokens_per_s"][0] > 0 for trial in trials.values() for rate in trial["rates"])
    again = build(workspace, host).fine()
    assert "19 steps, all cached" in again.out, again.out
    limit = runs.doit(runs.copy(workspace, tmp_path / "other"), "plan", "recipe=demo", **gpuhost.environment(tmp_path / "l4", "NVIDIA L4"))
    assert "verify.serve is skipped here: the target is 1 x h200, here is NVIDIA L4" in limit.fine().out


def test_another_run_is_held_beside_as_numbers(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    """No two runs of a server take the same time: that makes no reproduction fail, and is in no digest."""
    workspace = asking(built, tmp_path, f"beside: [], {ASKED}")
    (workspace / "recipes" / "demo" / "demo.lock").unlink()  # of the demo as it is shipped
    build(workspace, host).fine()
    told = [runs.doit(workspace, "reproduce", "recipe=demo", *words, **host).fine().out for words in ((), ("device=cpu",))]
    assert "  measured  serve     a server on NVIDIA H200" in told[0] and "  measured  measure   serve" in told[0]
    assert re.search(r"^ +tokens_per_s_1 +\S+ -> \S+ tokens/s$", told[0], re.MULTILINE)
    digests = [re.findall(r"^demo: identical, 17 steps, digest \w{64}$", text, re.MULTILINE) for text in told]
    assert digests[0] == digests[1] and len(digests[0]) == 1
    assert "note      not built here: measure serve, serve" in told[1]


def test_without_a_gpu_it_is_skipped_and_never_passed(built: Path, tmp_path: Path) -> None:
    workspace = asking(built, tmp_path, "min_speedup: 1.1")
    bare = {"PATH": "/nonexistent"}
    ran = build(workspace, bare).fine()
    assert "skipped serve     this machine: no CUDA device" in ran.out and "1 checks skipped" in ran.out
    assert "passed  serve" not in ran.out
    refused = runs.doit(workspace, "publish", "recipe=demo", **bare)
    assert refused.status == 1 and "serve was skipped" in refused.err and "publish: {waive: [serve]}" in refused.err
    runs.edit(workspace / "recipes" / "demo" / "demo.yaml", "publish:\n", "publish:\n  waive: [serve]\n")
    assert "published demo" in runs.doit(workspace, "publish", "recipe=demo", **bare).fine().out
    assert "skipped" in (workspace / "published" / "demo" / "README.md").read_text(), "whoever takes it is told"


def test_required_always_fails_where_it_cannot_run(built: Path, tmp_path: Path) -> None:
    workspace = asking(built, tmp_path, "required: always")
    before = runs.digest(workspace, "demo")
    ran = build(workspace, {"PATH": "/nonexistent"})
    assert ran.status == 1 and "required is always" in ran.err and "Traceback" not in ran.err
    assert "build on a machine with the target's GPU" in ran.err and "quantize less" not in ran.err
    assert runs.digest(workspace, "demo") == before, "what has to be served and was not is no artifact; an earlier one stays"


def test_a_device_that_was_said_is_not_gone_round(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    workspace = asking(built, tmp_path, ASKED)
    assert "skipped serve     device=cpu was said" in runs.doit(workspace, "build", "recipe=demo", "device=cpu", **host).fine().out


# Bad days


def failing(host: dict[str, str], script: str) -> dict[str, str]:
    """The host with another interpreter: `script` runs in the place of `lmdeploy`, $PORT being the server's; REAL is the working one."""
    path = Path(host["BUILDSYS_LMDEPLOY"])
    real = path.rename(path.with_name("real"))
    finds = 'for one in "$@"; do [ "$before" = --server-port ] && PORT=$one; before=$one; done'
    path.write_text(f'#!/bin/sh\nREAL={real}\nif [ "$1 $2" = "-m lmdeploy" ]; then {finds}\n{script}\nfi\nexec "$REAL" "$@"\n')
    path.chmod(0o755)
    return host


def refused(workspace: Path, host: dict[str, str], within_s: float) -> str:
    """What the build says that has to fail in time and leave nothing."""
    began, before = time.monotonic(), runs.digest(workspace, "demo")
    ran = build(workspace, host)
    assert ran.status == 1 and "Traceback" not in ran.err + ran.out, ran.err
    assert time.monotonic() - began < within_s
    assert left(host) == []
    assert runs.digest(workspace, "demo") == before, "the earlier artifact stays"
    return ran.err


def test_a_server_that_hangs_at_start(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    workspace = asking(built, tmp_path, f"timeout_s: 3, {ASKED}")
    said = refused(workspace, failing(host, "echo loading; exec sleep 600"), 60)
    assert "was not ready within 3.0 s" in said and "loading" in said and "fix:" in said


def test_a_server_whose_port_is_taken(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    """Somebody else listens there, and is even healthy, before the engine does."""
    takes = "import http.server as h; h.BaseHTTPRequestHandler.do_GET = lambda s: (s.send_response(200), s.end_headers()); "
    takes += "h.HTTPServer(('127.0.0.1', $PORT), h.BaseHTTPRequestHandler).serve_forever()"
    script = f'setsid "$REAL" -c "{takes}" & echo $! > {tmp_path}/other; sleep 2; exec "$REAL" "$@"'
    workspace = asking(built, tmp_path, f"timeout_s: 60, {ASKED}")
    host = failing(host, script)
    try:
        ran = build(workspace, host)
    finally:
        psutil.Process(int((tmp_path / "other").read_text())).kill()
    assert ran.status == 1 and "port" in ran.err and "Traceback" not in ran.err, ran.err


def test_a_server_that_is_killed_while_it_is_asked(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    """By whatever it is: here it ends itself when the first question has come."""
    workspace = asking(built, tmp_path, f"timeout_s: 100, {ASKED}")
    script = '( until grep -q "POST /v1/chat" /proc/$$/fd/1 2>/dev/null; do sleep 0.1; done; kill -9 $$ ) & exec "$REAL" "$@"'
    said = refused(workspace, failing(host, script), 100)
    assert "was ended by SIGKILL" in said and "fix:" in said


def test_a_server_that_answers_too_slowly(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    """It is healthy, and then the whole trial takes longer than it may."""
    workspace = asking(built, tmp_path, "timeout_s: 20, batches: [64], new_tokens: 512, prompts: 64, repeats: 50, prompt_tokens: 64")
    said = refused(workspace, host, 100)
    assert "was not done within 20 s" in said


def test_killing_the_build_kills_the_server(built: Path, host: dict[str, str], tmp_path: Path) -> None:
    workspace = asking(built, tmp_path, f"timeout_s: 100, {ASKED}")
    with subprocess.Popen(
        runs.command("build", "recipe=demo"),
        cwd=workspace,
        env=runs.environment() | host,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as driver:
        deadline = time.monotonic() + 60
        while not any(Path(host["GPUHOST"]).iterdir()):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(driver.pid, signal.SIGKILL)
    assert left(host) == []
