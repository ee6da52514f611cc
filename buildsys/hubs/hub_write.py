"""Writing to a repository of the Hugging Face hub: large files first, then one commit that holds all of a change, then a tag.

huggingface_hub's upload_folder makes several commits of a large upload. `create_commit` makes one and, given `parent_commit`, only on top
of the commit that was looked at (the hub answers 412 otherwise). A large file that the hub has is not sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from buildsys.errors import BuildError
from buildsys.hubs.hub_errors import explained
from buildsys.hubs.hub_repo import Repo, shown_endpoint
from buildsys.hubs.hub_state import LIMIT_S, Commit, api, history, role

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

LARGE_BYTES: Final = 10 << 20
"""Files of this size and more are sent one by one, so that progress can be told."""
_NO_GITIGNORE = "# nothing is left out\n"
_LOGIN = "run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or set HF_TOKEN"
_AGAIN = "then run the same command again: large files that arrived are not sent again"

Progress = Callable[[str, int, int], None]


def refuse_reader(repo: Repo, proposes: bool) -> None:
    """Refuses what this machine's token cannot do, before anything is sent. Who only `proposes` need not write."""
    may = role(repo)
    if may is None:
        raise BuildError(str(repo), f"{shown_endpoint()} wants to know who writes, and there is no token", _LOGIN)
    if may == "read" and not proposes:
        raise BuildError(str(repo), f"{shown_endpoint()} does not let this machine's token write: it may only read", _LOGIN)


def create(repo: Repo, private: bool) -> None:
    with _sending(repo):
        api().create_repo(repo.id, private=private, exist_ok=True)


def create_branch(repo: Repo) -> None:
    """The branch that `repo` names, at the repository's first commit: as empty as one can be."""
    first = history(repo, "main")[-1].id
    with _sending(repo):
        api().create_branch(repo.id, branch=repo.revision, revision=first, exist_ok=True)


def tag(repo: Repo, name: str, commit: str) -> None:
    """Leaves a tag of that name as it is."""
    with _sending(repo):
        api().create_tag(repo.id, tag=name, revision=commit, exist_ok=True)


def added(files: Mapping[str, Path]) -> list[CommitOperationAdd]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(name, path) for name, path in files.items()]


def copied(names: Iterable[str], commit: str) -> list[Any]:
    """The files as they were at an earlier commit; large ones are not sent again."""
    from huggingface_hub import CommitOperationCopy

    return [CommitOperationCopy(name, name, src_revision=commit) for name in names]


def deleted(names: Iterable[str]) -> list[Any]:
    from huggingface_hub import CommitOperationDelete

    return [CommitOperationDelete(name, is_folder=False) for name in names]


def send(repo: Repo, additions: Sequence[CommitOperationAdd], sha256: Mapping[str, str], propose: bool, progress: Progress) -> None:
    """Large files to the hub's storage, where no revision shows them yet. Small ones go with the commit."""
    total, done = sum(one.upload_info.size for one in additions), 0
    small = [one for one in additions if one.upload_info.size < LARGE_BYTES]
    steps = [small, *([one] for one in additions if one.upload_info.size >= LARGE_BYTES)]
    for step in filter(None, steps):
        progress("upload", done, total)
        with _sending(repo), _without_bars():
            api().preupload_lfs_files(
                repo.id, step, revision=repo.revision, create_pr=propose, free_memory=False, gitignore_content=_NO_GITIGNORE
            )
        for one in step:
            if one.upload_info.sha256.hex() != sha256[one.path_in_repo]:
                what = f"has sha256 {one.upload_info.sha256.hex()}, not {sha256[one.path_in_repo]} as when it was built"
                raise BuildError(str(one.path_or_fileobj), what, "check that disk, then build it again")
            done += one.upload_info.size
    progress("upload", done, total)


def commit(repo: Repo, operations: Sequence[Any], title: str, parent: str, propose: bool) -> Commit | None:
    """All of the change in one commit on top of `parent`, or with `propose` as a new pull request; None where another commit came first."""
    from huggingface_hub.errors import HfHubHTTPError

    with _sending(repo), _without_bars():
        try:
            made = api().create_commit(
                repo.id, operations, commit_message=title, revision=repo.revision, parent_commit=parent, create_pr=propose
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 412:
                raise
            return None
    return Commit(made.oid, title, request=made.pr_num or 0)


@contextmanager
def _without_bars() -> Iterator[None]:
    """The client draws no progress bars meanwhile: the terminal has ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _sending(repo: Repo) -> Iterator[None]:
    """Around anything that changes something there: what a user can meet becomes a BuildError."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        cause: BaseException = error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            cause = error.__cause__  # the client wraps what happens in one of its threads
        if isinstance(cause, httpx2.ReadTimeout | httpx2.WriteTimeout):
            what = f"{shown_endpoint()} said nothing for {LIMIT_S:.0f} s"
            raise BuildError(str(repo), what, f"check the network and the proxy, {_AGAIN}") from None
        known = _refused(cause, repo) if isinstance(cause, HfHubHTTPError) else explained(cause, repo, str(repo))
        raise (known or _odd(cause, repo)) from None


def _refused(error: BaseException, repo: Repo) -> BuildError | None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status, words = error.response.status_code, _words(error.server_message)
    if status == 401:
        said = "does not accept this machine's token" if get_token() else "wants to know who writes, and there is no token"
        return BuildError(str(repo), f"{shown_endpoint()} {said} (401{words})", _LOGIN)
    if status == 403:
        owner = repo.id.split("/")[0]
        what = f"{shown_endpoint()} does not let this machine's token write there (403{words})"
        return BuildError(str(repo), what, f"{_LOGIN}; it needs the right to write to {owner}")
    if status in (404, 408, 429) or status >= 500:
        return explained(error, repo, str(repo))
    return BuildError(str(repo), f"{shown_endpoint()} refuses it ({status}{words})", f"mend what it says, {_AGAIN}")


def _odd(error: BaseException, repo: Repo) -> BuildError:
    """A card that the hub does not take, xet's own errors, an answer that the client cannot read."""
    if isinstance(error, ValueError) and "README.md" in str(error):
        return BuildError(str(repo), f"the hub does not take the model card{_words(str(error))}", f"mend its metadata, {_AGAIN}")
    what = f"the hub's client gave up ({type(error).__name__})"
    if isinstance(error, RuntimeError):
        return BuildError(str(repo), what, f"set HF_HUB_DISABLE_XET=1 to send without xet, {_AGAIN}")
    return BuildError(str(repo), what, f"check HF_ENDPOINT ({shown_endpoint()}): is it the address of a hub? {_AGAIN}")


def _words(said: str | None) -> str:
    """The hub's own words, on one line; a token that they repeat is left out."""
    from huggingface_hub import get_token

    text = " ".join((said or "").split())[:300]
    token = get_token()
    return f": {text.replace(token, '…') if token else text}" if text else ""
