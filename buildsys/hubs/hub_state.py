"""What a repository of the Hugging Face hub is at this moment: where its branches and tags are, who committed, what its files hold.

Endpoints: huggingface_hub, HfApi.list_repo_refs, list_repo_commits, get_repo_discussions.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from buildsys.errors import BuildError
from buildsys.hubs.hub_errors import TIMEOUT_S, WAITS_S, asking, passing, patiently
from buildsys.hubs.hub_http import opened
from buildsys.hubs.hub_listing import listing
from buildsys.hubs.hub_repo import Listing, Repo, endpoint, offline, shown_endpoint
from buildsys.hubs.silent import answers

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

LIMIT_S: Final = 300.0
"""For one answer: the hub may think for minutes about a commit of many large files."""
_WORTH_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class References:
    """What the names of a repository point to: commits."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    authors: tuple[str, ...] = ()
    request: int = 0  # the pull request that was opened with it


def api() -> HfApi:
    """The client. It would wait for ever for an answer that never comes; from now on, in this process, it waits for LIMIT_S."""
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import get_session

    if get_session().timeout.read is None:
        set_client_factory(_client)
    return HfApi(endpoint=endpoint())


def _client() -> httpx2.Client:
    import httpx2
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    client.timeout = httpx2.Timeout(LIMIT_S, connect=TIMEOUT_S)
    return client


def references(repo: Repo) -> References | None:
    """None where the hub shows no such repository to this user."""
    from huggingface_hub.errors import RepositoryNotFoundError

    if offline():
        raise BuildError(str(repo), "HF_HUB_OFFLINE forbids to ask the hub", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    with _asking(repo):
        try:
            refs = patiently(lambda: api().list_repo_refs(repo.id))
        except RepositoryNotFoundError:
            return None
    answers(endpoint())
    return References(*({ref.name: ref.target_commit for ref in some} for some in (refs.branches, refs.tags)))


def role(repo: Repo) -> str | None:
    """What this machine's token is for: "read", "write", "fineGrained"; None without one, "" where the hub does not tell."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not get_token():
        return None
    with _asking(repo):
        try:
            said = api().whoami()
        except HfHubHTTPError as error:
            if error.response.status_code == 401:
                raise
            return ""  # a mirror without that endpoint, or a hub that is asked too often
        return str(said.get("auth", {}).get("accessToken", {}).get("role", ""))


@contextmanager
def _asking(repo: Repo) -> Iterator[None]:
    """As `asking`, where the client reads the answer: of a server that is no hub it says what comes to its mind."""
    with asking(repo):
        try:
            yield
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"{shown_endpoint()} answers with what is no hub's answer ({type(error).__name__})"
            raise BuildError(str(repo), what, "check HF_ENDPOINT: is it the address of a hub?") from None


def held(repo: Repo, revision: str) -> Listing:
    """What the repository holds there now. Nothing is remembered: who writes has to look each time."""
    with tempfile.TemporaryDirectory() as home:
        return listing(Repo(repo.kind, repo.id, revision), Path(home))


def history(repo: Repo, revision: str) -> list[Commit]:
    """Newest first."""
    with _asking(repo):
        found = patiently(lambda: api().list_repo_commits(repo.id, revision=revision))
    return [Commit(one.commit_id, one.title, tuple(one.authors)) for one in found]


def open_request(repo: Repo, words: str) -> int:
    """The number of the open pull request that has `words` in its title; 0 for none."""
    with _asking(repo):
        found = api().get_repo_discussions(repo.id, discussion_type="pull_request", discussion_status="open")
        return next((one.num for one in found if words in one.title), 0)


def sha256_there(listing: Listing, name: str, tick: Callable[[int], None]) -> str:
    """Digest of a file as the hub gives it now, read and not kept. After a cut it goes on where it was."""
    import httpx2

    found, have, idle = hashlib.sha256(), 0, 0
    with asking(listing.at, name):
        while True:
            before = have
            try:
                for at, piece in _pieces(listing, name, have):
                    if at < have:  # a server that knows no ranges begins anew
                        tick(-have)
                        found, have = hashlib.sha256(), 0
                    found.update(piece)
                    have += len(piece)
                    tick(len(piece))
                return found.hexdigest()
            except httpx2.HTTPError as error:
                idle = 0 if have - before > _WORTH_BYTES else idle + 1
                if idle > len(WAITS_S) or not passing(error):
                    raise
                time.sleep(WAITS_S[max(idle, 1) - 1])


def _pieces(listing: Listing, name: str, have: int) -> Iterator[tuple[int, bytes]]:
    """(where it belongs, bytes), from `have` on."""
    from huggingface_hub import hf_hub_url

    address = hf_hub_url(listing.repo.id, name, repo_type=listing.repo.kind, revision=listing.commit, endpoint=endpoint())
    with opened(address, {"Range": f"bytes={have}-"} if have else {}) as answer:
        at = have if answer.status_code == 206 else 0
        for piece in answer.iter_bytes():
            yield at, piece
            at += len(piece)
