"""Who one is to a registry: credentials from the environment, docker's configuration or a credential helper, and the tokens they buy.

docker-login(1) and github.com/docker/docker-credential-helpers for the files; distribution.github.io/distribution/spec/auth for tokens.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buildsys.errors import BuildError

USER, PASSWORD = "BUILDSYS_REGISTRY_USER", "BUILDSYS_REGISTRY_PASSWORD"
DOCKER_HUB = "docker.io"
HUB_KEY = "https://index.docker.io/v1/"  # what docker calls its own hub in config.json
HELPER_WAIT_S = 60
IDENTITY = "<token>"  # the user name under which helpers keep an identity token


@dataclass(frozen=True)
class Credentials:
    """One login. The secret is in no repr, so that no message can show it by accident."""

    user: str
    secret: str = field(repr=False)
    source: str  # where they were found, for people
    identity: bool = False  # `secret` is a refresh token, not a password

    @property
    def basic(self) -> str:
        """The Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


def credentials(host: str) -> Credentials | None:
    """For the registry `host`; None where nobody has logged in. The environment comes before the files."""
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if user and password:
        return Credentials(user, password, f"{USER} and {PASSWORD}")
    for path in _files():
        config = _read(path)
        found = _helped(config, host, path) or _written(config, host, path)
        if found is not None:
            return found
    return None


def _files() -> Iterator[Path]:
    """Docker's configuration, then podman's login files."""
    docker = os.environ.get("DOCKER_CONFIG")
    candidates = [Path(docker) if docker else Path.home() / ".docker"]
    paths = [folder / "config.json" for folder in candidates]
    if named := os.environ.get("REGISTRY_AUTH_FILE"):
        paths.append(Path(named))
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        paths.append(Path(runtime) / "containers" / "auth.json")
    return (path for path in paths if path.is_file())


def _read(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        # A parser's message may quote what it read, and that is where passwords lie.
        raise BuildError(str(path), f"cannot be read as JSON ({type(error).__name__})", "repair it, or run `docker login` again") from None
    return config if isinstance(config, dict) else {}


def _names(host: str) -> tuple[str, ...]:
    """The keys under which logins of `host` are kept."""
    own = (HUB_KEY, "index.docker.io", DOCKER_HUB) if host == DOCKER_HUB else ()
    return (*own, host, f"https://{host}", f"http://{host}", f"https://{host}/v2/", f"https://{host}/v1/")


def _helped(config: Mapping[str, Any], host: str, path: Path) -> Credentials | None:
    """From the credential helper that the configuration names for this host, or for all."""
    helpers = config.get("credHelpers")
    helpers = helpers if isinstance(helpers, dict) else {}
    named = next((helpers[name] for name in _names(host) if name in helpers), None) or config.get("credsStore")
    if not named:
        return None
    program = f"docker-credential-{named}"
    if not re.fullmatch(r"[\w.-]+", program):
        raise BuildError(
            str(path), f"names the credential helper {named!r}, which is no program's name", "correct credsStore or credHelpers"
        )
    said = _ask(program, HUB_KEY if host == DOCKER_HUB else host, path)
    if said is None:
        return None
    user, secret = said.get("Username"), said.get("Secret")
    if not isinstance(user, str) or not isinstance(secret, str) or not secret:
        raise BuildError(program, "answered no Username and Secret", f"run `docker login {host}` again")
    return Credentials(user, secret, program, identity=user == IDENTITY)


def _ask(program: str, server: str, path: Path) -> Mapping[str, Any] | None:
    """What the helper says; None where it knows no login of `server`."""
    try:
        ended = subprocess.run([program, "get"], input=server, capture_output=True, text=True, timeout=HELPER_WAIT_S)
    except FileNotFoundError:
        fix = f"install {program}, or remove it from that file and run `docker login` again"
        raise BuildError(str(path), f"names the credential helper {program}, which is not on the PATH", fix) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = f"try it by hand: echo {server} | {program} get"
        raise BuildError(program, f"did not answer ({type(error).__name__})", fix) from None
    if ended.returncode:
        return None  # by the helpers' protocol the one way to say that there is none
    try:
        said = json.loads(ended.stdout)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise BuildError(program, "answered something that is not JSON", f"try it by hand: echo {server} | {program} get")
    return said


def _written(config: Mapping[str, Any], host: str, path: Path) -> Credentials | None:
    """From `auths` in the file itself."""
    auths = config.get("auths")
    auths = auths if isinstance(auths, dict) else {}
    entry: Mapping[str, Any] = next((auths[name] for name in _names(host) if isinstance(auths.get(name), dict)), {})
    if token := entry.get("identitytoken"):
        return Credentials(IDENTITY, str(token), str(path), identity=True)
    if isinstance(entry.get("username"), str) and isinstance(entry.get("password"), str):
        return Credentials(entry["username"], entry["password"], str(path))
    if not entry.get("auth"):
        return None
    try:
        user, colon, secret = base64.b64decode(str(entry["auth"]), validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise BuildError(str(path), f"holds no login of {host} that can be read", f"run `docker login {host}` again")
    return Credentials(user, secret.rstrip("\0"), str(path))


# Challenges


@dataclass(frozen=True)
class Challenge:
    """What a registry asks for in WWW-Authenticate."""

    scheme: str  # "basic" or "bearer"
    realm: str = ""
    service: str = ""
    scope: str = ""


def challenge(header: str) -> Challenge | None:
    """The first challenge in `header` that can be met here; a token is better than a password."""
    found: dict[str, Challenge] = {}
    for match in re.finditer(r"(?i)\b(basic|bearer)\b((?:\s*,?\s*[\w-]+=(?:\"[^\"]*\"|[^\s,]+))*)", header):
        parts = {key.lower(): quoted or bare for key, quoted, bare in re.findall(r"([\w-]+)=(?:\"([^\"]*)\"|([^\s,]+))", match[2])}
        scheme = match[1].lower()
        found.setdefault(scheme, Challenge(scheme, parts.get("realm", ""), parts.get("service", ""), parts.get("scope", "")))
    return found.get("bearer") or found.get("basic")
