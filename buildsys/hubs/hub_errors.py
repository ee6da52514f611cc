"""What can go wrong between here and the hub, as an error that says what to do; and what is worth another try.

An error of the client may quote an address or a header that holds a secret, so its text is never passed on: only its kind and its status.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs.hub_repo import Repo, cache, shown_endpoint
from buildsys.hubs.silent import Unreachable

WAITS_S: Final = (0.5, 1.0, 2.0)
"""Before each further try to ask."""
TIMEOUT_S: Final = 30.0
_GOES_ON = "run the same command again: it goes on where it stopped"
_LOGIN = "run `hf auth login`, or set HF_TOKEN"

Result = TypeVar("Result")


@contextmanager
def asking(repo: Repo, about: str = "") -> Iterator[None]:
    """Around anything that talks to the hub: what a user can meet there becomes a BuildError. `about` is the file in question."""
    import httpx2
    from huggingface_hub.errors import HFValidationError

    where = f"{about} of {repo}" if about else str(repo)
    _ready(where)
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, OSError) as error:
        known = explained(error, repo, where)
        if known is None:
            raise
        raise known from None


def _ready(where: str) -> None:
    """The client can be made and its token be sent, or the environment's mistake is told. From now on it logs no addresses."""
    import httpx2
    from huggingface_hub import get_session, get_token

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        get_session()
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        what = f"HTTPS_PROXY, HTTP_PROXY or ALL_PROXY names no proxy that can be used ({type(error).__name__})"
        raise BuildError(where, what, "set it to http://host:port, or unset it") from None
    except OSError as error:
        what = f"SSL_CERT_FILE or SSL_CERT_DIR holds no certificates that can be read ({error.strerror or type(error).__name__})"
        raise BuildError(where, what, "correct it, or unset it") from None
    if not (get_token() or "").isascii():
        what = "the token of this machine has a character outside ASCII, so it cannot be sent"
        raise BuildError(where, what, f"check HF_TOKEN, or {_LOGIN}")


def explained(error: BaseException, repo: Repo, where: str) -> BuildError | None:
    """None for what is no matter of hub, network or disk."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return not_here(repo, where)
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, repo, where)
    if isinstance(error, (httpx2.InvalidURL, httpx2.UnsupportedProtocol)):
        what = f"cannot be asked for: {shown_endpoint()} is no address"
        return BuildError(where, what, "set HF_ENDPOINT to the address of a hub (https://…), or unset it")
    if isinstance(error, errors.FileMetadataError):
        what = f"{shown_endpoint()} does not answer as a hub does: no commit, size or ETag"
        return BuildError(where, what, "check HF_ENDPOINT, and what the proxy or firewall does to answers")
    if isinstance(error, errors.HFValidationError):
        return BuildError(where, "is no repository's id", "write owner/name")
    if isinstance(error, httpx2.HTTPError):
        return _unreachable(error, where)
    return disk.explained(error, cache())


def not_here(repo: Repo, where: str) -> BuildError:
    """Offline, and something is missing in the shared cache."""
    fix = f"while online, run `{repo.download}`; or unset HF_HUB_OFFLINE"
    return BuildError(where, f"is not complete in {cache()}, and HF_HUB_OFFLINE forbids to ask the hub", fix)


def _refused(error: BaseException, repo: Repo, where: str) -> BuildError:
    """The hub answered, and not with what it was asked for."""
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        what = f"is gated: {shown_endpoint()} gives it to those who accepted its terms ({_token()}; {status})"
        return BuildError(where, what, f"accept the terms at {repo.page}, then {_LOGIN}")
    if isinstance(error, errors.DisabledRepoError):
        return BuildError(where, f"was disabled on {shown_endpoint()} ({status})", f"see {repo.page}, or use another repository")
    if isinstance(error, errors.RevisionNotFoundError):
        return BuildError(where, f"has no revision {repo.revision}", f"name a branch, tag or commit of {repo.page}")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return BuildError(where, "is not there", f"see what the repository holds: {repo.page}/tree/{repo.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{shown_endpoint()} shows no such {repo.kind}: there is none, or it is private ({_token()}; {status})"
        return BuildError(where, what, f"correct the name; to read a private one {_LOGIN}")
    if status == 401:
        return BuildError(where, f"{shown_endpoint()} does not accept the token ({_token()}; 401)", _LOGIN)
    if status == 403:
        what = f"{shown_endpoint()} does not allow it with this token ({_token()}; 403)"
        return BuildError(where, what, f"use a token that may read {repo.id}: {_LOGIN}")
    if status == 429:
        return BuildError(where, f"{shown_endpoint()} is asked too often (429)", f"wait some minutes, then {_GOES_ON}")
    if status >= 500 or status == 408:
        return BuildError(where, f"{shown_endpoint()} answers {status}, again and again", f"later {_GOES_ON}")
    return BuildError(where, f"{shown_endpoint()} answers {status}", "check HF_ENDPOINT: is it the address of a hub?")


def _token() -> str:
    """Whether a token was sent, never which."""
    from huggingface_hub import get_token

    return "with the token of this machine" if get_token() else "without a token"


def _unreachable(error: BaseException, where: str) -> BuildError:
    import httpx2

    fix = (
        f"check the network and the proxy, or set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to use what {cache()} holds; then {_GOES_ON}"
    )
    if isinstance(error, httpx2.ProxyError):
        return Unreachable(
            where, f"the proxy does not let through to {shown_endpoint()}", "correct HTTPS_PROXY, or add the hub's host to NO_PROXY"
        )
    kind = Unreachable if isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)) else BuildError
    if isinstance(error, httpx2.TimeoutException):
        return kind(where, f"{shown_endpoint()} did not answer within {TIMEOUT_S:.0f} s", fix)
    return kind(where, f"{shown_endpoint()} cannot be reached: {_reason(error)}", fix)


def _reason(error: BaseException) -> str:
    """The operating system's word for it where there is one."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return os.strerror(seen.errno) if seen.errno > 0 else str(seen.strerror)
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def patiently(ask: Callable[[], Result]) -> Result:
    """`ask()`, again after a while where it failed for a moment."""
    import httpx2

    for wait_s in WAITS_S:
        try:
            return ask()
        except httpx2.HTTPError as error:  # the client's own errors are such too
            if not passing(error):
                raise
        time.sleep(wait_s)
    return ask()


def passing(error: BaseException) -> bool:
    """Whether the same question may be answered in a moment."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    if isinstance(error, httpx2.ProxyError):
        return False
    return isinstance(error, (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError))
