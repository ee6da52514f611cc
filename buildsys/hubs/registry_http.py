"""HTTP as registries want it: log in when asked, try again when that can help, and say plainly why when it cannot.

OCI Distribution Specification 1.1 for statuses and error bodies; distribution.github.io/distribution/spec/auth/token for the login.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2

from buildsys.errors import BuildError
from buildsys.hubs.registry_login import DOCKER_HUB, PASSWORD, USER, Credentials, challenge, credentials

MAX_ANSWER_BYTES = 8 << 20
WAIT_S = 60.0
RETRIED = (408, 429, 500, 502, 503, 504)
UNKNOWN_HOST = ("Name or service not known", "nodename nor servname", "name resolution", "No address associated")

Body = Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Ask:
    """One request. `body` opens its bytes anew for every attempt."""

    method: str
    where: str  # relative to the repository, or a whole address
    accept: tuple[int, ...]  # statuses that are answers, not refusals
    headers: Mapping[str, str]
    body: Body | None = None
    wait_s: float = WAIT_S


def is_loopback(host: str) -> bool:
    """Whether `host[:port]` is this machine itself, where docker too speaks plain http."""
    name = urlsplit(f"//{host}").hostname or ""
    try:
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Connection:
    """To one repository of one registry. Remembers its sockets, its login and its token, and nothing else."""

    def __init__(self, host: str, repository: str, insecure: bool, waits_s: tuple[float, ...]) -> None:
        self.host, self.repository, self.waits_s = host, repository, waits_s
        api = "registry-1.docker.io" if host == DOCKER_HUB else host
        self.base = f"{'http' if insecure else 'https'}://{api}/v2/{repository}/"
        self.name = f"{host}/{repository}"
        self._insecure = insecure
        self._client = _client(host, self.name)
        self._login: Credentials | None = None
        self._looked = False
        self._authorization = ""

    def close(self) -> None:
        self._client.close()

    def ask(self, ask: Ask) -> httpx2.Response:
        """The whole answer, which is short."""
        return self._again(ask, lambda: self._whole(self._send(ask)))

    def once(self, ask: Ask) -> httpx2.Response:
        """The same without a second attempt, whatever the status; raises httpx2.RequestError."""
        return self._whole(self._send(ask))

    def opened(self, ask: Ask) -> httpx2.Response:
        """An answer of any length; the caller reads and closes it."""
        return self._again(ask, lambda: self._send(ask))

    def location(self, answer: httpx2.Response, before: str) -> str:
        """Where an upload goes on."""
        try:
            url = urljoin(before, answer.headers.get("Location", ""))
        except ValueError:
            raise self._nowhere() from None
        # Behind a proxy that ends TLS many a registry believes that it is spoken to in plain http.
        if self.base.startswith("https:") and url.startswith(f"http://{urlsplit(self.base).netloc}/"):
            url = "https" + url.removeprefix("http")
        return url

    # Sending

    def _again(self, ask: Ask, attempt: Callable[[], httpx2.Response]) -> httpx2.Response:
        """The first answer that is one, after as many attempts as `waits_s` allows."""
        for pause_s in (*self.waits_s, None):
            try:
                answer = attempt()
                if answer.status_code in ask.accept:
                    return answer
                answer = self._whole(answer)
            except httpx2.RequestError as error:
                if pause_s is None or is_tls(error):
                    raise self.unreachable(error) from None
            else:
                if pause_s is None or answer.status_code not in RETRIED:
                    raise self.refused(ask.method, answer)
                pause_s = max(pause_s, _retry_after(answer))
            time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _send(self, ask: Ask) -> httpx2.Response:
        """Asks; where the registry wants a login, logs in and asks once more."""
        answer = self._client.send(self._request(ask), stream=True, follow_redirects=ask.method in ("GET", "HEAD"))
        if answer.status_code == 401 and self._is_ours(urljoin(self.base, ask.where)) and self._log_in(answer):
            answer.close()
            answer = self._client.send(self._request(ask), stream=True, follow_redirects=ask.method in ("GET", "HEAD"))
        return answer

    def _request(self, ask: Ask) -> httpx2.Request:
        try:
            url = urljoin(self.base, ask.where)
            # Only the registry's own origin gets to know who asks: an upload's location may be a bucket elsewhere.
            login = {"Authorization": self._authorization} if self._authorization and self._is_ours(url) else {}
            timeout = httpx2.Timeout(ask.wait_s, connect=WAIT_S)
            content = ask.body() if ask.body is not None else None
            return self._client.build_request(ask.method, url, headers={**ask.headers, **login}, content=content, timeout=timeout)
        except (httpx2.InvalidURL, ValueError):
            raise self._nowhere() from None

    def _nowhere(self) -> BuildError:
        return BuildError(self.name, "sends to an address that is none", "check that it is an OCI registry")

    def _is_ours(self, url: str) -> bool:
        ours, theirs = urlsplit(self.base), urlsplit(url)
        return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)

    def _whole(self, answer: httpx2.Response) -> httpx2.Response:
        """A short answer, read and closed."""
        read: list[bytes] = []
        try:
            for piece in answer.iter_bytes():
                read.append(piece)
                if sum(map(len, read)) > MAX_ANSWER_BYTES:
                    what = f"answered more than {MAX_ANSWER_BYTES:,} bytes where a manifest was asked for"
                    raise BuildError(self.name, what, "check that it is an OCI registry")
        finally:
            answer.close()
        packed = ("content-encoding", "transfer-encoding", "content-length")
        headers = [(name, value) for name, value in answer.headers.multi_items() if name.lower() not in packed]
        return httpx2.Response(answer.status_code, headers=headers, content=b"".join(read), request=answer.request)

    # Login

    def _log_in(self, answer: httpx2.Response) -> bool:
        """Whether there is now something else to say than what was just refused."""
        asked = challenge(answer.headers.get("WWW-Authenticate", ""))
        if not self._looked:
            self._login, self._looked = credentials(self.host), True
        before = self._authorization
        if asked is not None and asked.scheme == "bearer":
            scope = asked.scope or f"repository:{self.repository}:pull,push"
            self._authorization = f"Bearer {self._token(asked.realm, asked.service, scope)}"
        elif asked is not None and self._login is not None and not self._login.identity:
            self._authorization = self._login.basic
        return self._authorization not in ("", before)

    def _token(self, realm: str, service: str, scope: str) -> str:
        """What the login, or nobody's name, buys at the registry's token server."""
        host = urlsplit(realm).hostname or ""
        if not realm.startswith("https://") and not (realm.startswith("http://") and (self._insecure or is_loopback(host))):
            raise BuildError(
                self.name, f"wants the login sent to {host or 'nowhere'} without TLS", "use a registry with TLS for its tokens"
            )
        login, request = self._login, partial(self._client.build_request, timeout=WAIT_S)
        if login is not None and login.identity:
            form = {"grant_type": "refresh_token", "refresh_token": login.secret, "service": service, "scope": scope}
            made = request("POST", realm, data={**form, "client_id": "buildsys"})
        else:
            headers = {"Authorization": login.basic} if login is not None else {}
            made = request("GET", realm, params={"service": service, "scope": scope}, headers=headers)
        answer = self._whole(self._client.send(made, stream=True))
        if answer.status_code in (400, 401, 403):
            raise self._login_refused(f"{host} answers {answer.status_code}")
        said = content(answer)
        token = said.get("token") or said.get("access_token")
        if not isinstance(token, str):
            raise BuildError(self.name, f"{host} answers {answer.status_code} without a token", "try again, then ask its operator")
        return token

    # Refusals

    def _login_refused(self, what: str) -> BuildError:
        fix = f"`docker login {self.host}`, or set {USER} and {PASSWORD}"
        if self._login is None:
            return BuildError(self.name, f"asks for a login, and there is none ({what})", fix)
        return BuildError(self.name, f"refuses the login from {self._login.source} ({what})", fix)

    def refused(self, method: str, answer: httpx2.Response) -> BuildError:
        """What a status means for the user, with the registry's own words where it has any."""
        status, words = answer.status_code, self._words(answer)
        what = f"answers {status}{f' ({words})' if words else ''} to {method}"
        if status == 401:
            return self._login_refused(what)
        if status == 403:
            who = f"the login from {self._login.source} may not do this" if self._login is not None else "there is no login"
            fix = f"ask for the right to push to {self.repository}, or log in as somebody who has it: `docker login {self.host}`"
            return BuildError(self.name, f"{what}; {who}", fix)
        if status == 404:
            return BuildError(self.name, what, "check publish.oci.repo; on some registries a repository has to be made first")
        if status == 413:
            return BuildError(self.name, what, "something before the registry limits a request: set publish.oci.chunk_mib: 64")
        if status == 400 and "DIGEST_INVALID" in words:
            return BuildError(self.name, f"{what}: other bytes came than were meant", "publish again; if it stays so, check this disk")
        if status in RETRIED:
            return BuildError(self.name, f"{what}, {1 + len(self.waits_s)} times", "publish again later: what was sent is kept")
        return BuildError(self.name, what, "check that it is an OCI registry, and its log")

    def _words(self, answer: httpx2.Response) -> str:
        """Code and message of the first error that the registry tells: short, printable, and with nothing secret in it."""
        said = content(answer).get("errors")
        first = said[0] if isinstance(said, list) and said and isinstance(said[0], dict) else {}
        words = ": ".join(str(first[key]) for key in ("code", "message") if first.get(key))
        login = (self._login.secret, self._login.basic.partition(" ")[2]) if self._login is not None else ()
        for secret in (*login, self._authorization.partition(" ")[2]):
            words = words.replace(secret, "***") if secret else words
        return "".join(sign if sign.isprintable() else " " for sign in words)[:200]

    def unreachable(self, error: httpx2.RequestError) -> BuildError:
        """A connection that was not made or did not last."""
        reasons = " ".join(str(seen) for seen in _causes(error))
        shown = (str(error) or type(error).__name__)[:200]
        if is_tls(error):
            plain_http = any(sign in reasons for sign in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"))
            fix = "have its authority's certificate trusted (SSL_CERT_FILE), or correct the host"
            fix = "it speaks plain http, it seems: set publish.oci.insecure: true if the network is to be trusted" if plain_http else fix
            return BuildError(self.name, f"no TLS connection ({shown})", fix)
        if any(sign in reasons for sign in UNKNOWN_HOST):
            return BuildError(
                self.name, f"the host {self.host} is not known here ({shown})", "correct publish.oci.repo, or mend the network"
            )
        if "refused" in reasons:
            return BuildError(self.name, f"nothing listens there ({shown})", "start the registry, or correct publish.oci.repo")
        fix = "check the network (HTTPS_PROXY is obeyed), then run it again: what was sent is kept"
        return BuildError(self.name, f"the connection failed {1 + len(self.waits_s)} times ({shown})", fix)


def _client(host: str, name: str) -> httpx2.Client:
    """With the environment's proxies and certificates; between this machine and itself they have nothing to say."""
    try:
        return httpx2.Client(trust_env=not is_loopback(host))
    except (httpx2.InvalidURL, ValueError, ImportError) as error:
        what = f"HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names no proxy that can be used ({type(error).__name__})"
        raise BuildError(name, what, "set it to http://host:port, or unset it") from None
    except OSError as error:
        what = f"SSL_CERT_FILE or SSL_CERT_DIR holds no certificates that can be read ({error.strerror or error})"
        raise BuildError(name, what, "correct it, or unset it") from None


def content(answer: httpx2.Response) -> dict[str, Any]:
    """The JSON object of an answer, or an empty one."""
    try:
        said = answer.json()
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def is_tls(error: BaseException) -> bool:
    """Whether a handshake failed: another attempt would end no other way."""
    return any(isinstance(seen, ssl.SSLError) for seen in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _retry_after(answer: httpx2.Response) -> float:
    said = answer.headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdecimal() else 0.0
