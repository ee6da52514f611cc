"""OpenXLab's client in a process and an environment of its own: makes the environment when it is first needed, and asks it.

openxlab 0.1.3 (its newest) pins requests 2.28, setuptools 60.2 and more, so it cannot be installed beside what buildsys needs.
BUILDSYS_OPENXLAB_VENV names an environment that holds it already; BUILDSYS_OPENXLAB_ENDPOINT and BUILDSYS_OPENXLAB_STORE name another
server of its API and of its object store.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from buildsys import disk
from buildsys.errors import BuildError

PIN = "openxlab==0.1.3"
RUNNER = Path(__file__).with_name("openxlab_runner.py")
PASSED = ("PATH", "TMPDIR", "LANG", "LC_ALL", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
LOGIN = "set OPENXLAB_AK and OPENXLAB_SK to an access key of openxlab.org.cn (account, key management)"
Progress = Callable[[str, int, int], None]


def environment() -> Path:
    """The environment that is used, or will be made."""
    named = os.environ.get("BUILDSYS_OPENXLAB_VENV")
    return Path(named) if named else disk.user_cache() / f"{PIN.replace('==', '-')}-py{sys.version_info.major}.{sys.version_info.minor}"


def ready() -> bool:
    if os.environ.get("BUILDSYS_OPENXLAB_VENV"):
        return True  # whoever names it made it; `python` says so if it is none
    return (environment() / "complete").exists()


def python(progress: Progress) -> Path:
    """The interpreter of the environment, made here if there is none; two processes make one."""
    folder = environment()
    interpreter = folder / "bin" / "python"
    if os.environ.get("BUILDSYS_OPENXLAB_VENV"):
        if not interpreter.exists():
            what = f"BUILDSYS_OPENXLAB_VENV names {folder}, which is no Python environment"
            raise BuildError(str(folder), what, f"run: python -m venv {folder} && {interpreter} -m pip install {PIN}; or unset it")
        return interpreter
    if not ready():
        with disk.writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make_alone(folder, interpreter, progress)
    return interpreter


def _make_alone(folder: Path, interpreter: Path, progress: Progress) -> None:
    import venv

    from filelock import FileLock

    with FileLock(f"{folder}.lock"):
        if ready():
            return  # another process made it meanwhile
        progress(f"install {PIN}", 0, 1)
        if folder.exists():
            shutil.rmtree(folder)  # half of one
        try:
            venv.create(folder, with_pip=True)
        except subprocess.CalledProcessError:
            what = "no Python environment can be made here: the standard module ensurepip does not work"
            raise BuildError(
                str(folder), what, "install it (Debian: apt install python3-venv), or name one: BUILDSYS_OPENXLAB_VENV"
            ) from None
        # pip may quote an index's address: what it says is for the user alone, who can run it.
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIN]
        if subprocess.run(install, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL).returncode:
            raise BuildError(str(folder), f"{PIN} cannot be installed", f"see why: {' '.join(install[:4])} {PIN}; then publish again")
        (folder / "complete").touch()
        progress(f"install {PIN}", 1, 1)


def ask(repo: str, job: Mapping[str, Any], where: str, progress: Progress, tick: Callable[[int], None] = lambda count: None) -> Any:
    """The runner's answer to one job (openxlab_runner.py). Raises BuildError at `where`."""
    home = disk.user_cache() / "openxlab"  # the client keeps its notes of cut uploads under its home
    with disk.writing(home):
        (home / ".openxlab").mkdir(parents=True, exist_ok=True, mode=0o700)
    told = {
        **job,
        "repo": repo,
        "login": str(Path.home() / ".openxlab" / "config.json"),
        "endpoint": os.environ.get("BUILDSYS_OPENXLAB_ENDPOINT", "").rstrip("/"),
        "store": os.environ.get("BUILDSYS_OPENXLAB_STORE", "").rstrip("/"),
    }
    # -I: nothing of this folder, where a file is called openxlab too, and nothing of the environment that buildsys runs in.
    interpreter = python(progress)
    command = [str(interpreter), "-I", "-X", "utf8", str(RUNNER)]
    try:
        for said in _talk(command, json.dumps(told), {**_around(), "HOME": str(home)}):
            if "error" in said:
                raise _explained(where, **said["error"])
            if "done" in said:
                return said["done"]
            tick(said["progress"])
    except (OSError, ValueError):
        pass  # it could not start, or what it says is no answer
    fix = f"see what is wrong with it: {interpreter} -c 'import openxlab.model'; to have it made anew, delete {environment()}"
    raise BuildError(where, f"the process that speaks for {PIN} ended without an answer", fix)


def _around() -> dict[str, str]:
    """Of the environment, what the client needs: other services' tokens are none of its business."""
    return {
        key: value for key, value in os.environ.items() if key in PASSED or key.startswith("OPENXLAB_") or key.lower().endswith("_proxy")
    }


def _talk(command: list[str], job: str, around: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """What the runner says. Its standard input is left open: it ends when we do."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    runner = subprocess.Popen(command, env=around, bufsize=0, **pipes)
    sends, says = runner.stdin, runner.stdout
    assert sends is not None and says is not None
    try:
        sends.write(job.encode() + b"\n")
        while line := says.readline():
            yield json.loads(line)
    finally:
        runner.kill()
        runner.wait()
        sends.close()
        says.close()


def _explained(where: str, kind: str, text: str) -> BuildError:
    if kind == "login":
        return BuildError(where, f"OpenXLab does not let this account in ({text})", LOGIN)
    if kind == "network":
        fix = "check the network, then run the same command again: what is complete is kept"
        return BuildError(where, f"OpenXLab cannot be reached, or stumbles ({text})", fix)
    if kind == "refused":
        fix = "check on openxlab.org.cn that the repository is there and yours; it tells no more than that"
        return BuildError(where, f"OpenXLab refuses it ({text})", fix)
    return BuildError(where, f"OpenXLab answers otherwise than {PIN} expects ({text})", "its API may have changed: publish elsewhere")
