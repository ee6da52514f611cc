"""Talks to OpenXLab with its own client, in that client's own environment: run by path, one job of JSON in, lines of JSON out.

openxlab 0.1.3 pins versions of requests and others that nothing else here can live with; so this file imports nothing of buildsys. The
calls are the client's (openxlab/model/clients, openxlab/xlab/handler); its handlers around them are not used, because they swallow
errors, print them, and report usage to a server.

Job: {"do": "send"|"read", "repo": "owner/name", …}. Answers: {"progress": bytes} …, then {"done": …} or {"error": {kind, text}}.
An error's text names our call and an exception's class, never what the client says: that may quote a signature or an access key.
Standard input stays open: when it ends, whoever asked is gone, and so is this process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

WAIT_S = 60
TRIES = 3
PIECE_BYTES = 1 << 20
PROD = "https://openapi.openxlab.org.cn"


class Failed(Exception):
    """kind: login, refused, network, other."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_asker, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the client prints: that is no answer

    def answer(**said: Any) -> None:
        answers.write(json.dumps(said) + "\n")
        answers.flush()

    try:
        answer(done=_do(job, lambda count: answer(progress=count)))
    except Failed as error:
        answer(error={"kind": error.kind, "text": error.text})


def _end_with_the_asker() -> None:
    sys.stdin.read()
    os._exit(1)


def _do(job: dict[str, Any], tick: Any) -> Any:
    try:
        hub = Hub(job)
    except (ImportError, AttributeError) as error:
        raise Failed("other", f"the client cannot be loaded ({type(error).__name__})") from None
    if job["do"] == "send":
        return hub.send(job["files"], job["create"], tick)
    return hub.read(job["names"], tick)


class Hub:
    """One repository, through the client."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.owner, self.name = job["repo"].split("/")
        _sign_in(job["login"])
        requests = importlib.import_module("requests")
        # The client waits for ever otherwise. oss2 says how long it waits, and keeps saying so.
        requests.Session.request = functools.partialmethod(requests.Session.request, timeout=WAIT_S)
        self.requests = requests
        openapi = importlib.import_module("openxlab.model.clients.openapi_client")
        self.oss = importlib.import_module("openxlab.model.clients.oss_client")
        constants = importlib.import_module("openxlab.model.common.constants")
        tokens = importlib.import_module("openxlab.xlab.handler.user_token")
        _keep_tokens_in_memory(tokens)
        endpoint = job["endpoint"] or PROD
        tokens.AUTH_CLIENT.endpoint = f"{endpoint}/api/v1/sso-be/api/v1/open/"
        self.tokens, self.api = tokens, openapi.OpenapiClient(f"{endpoint}/api/v1")
        self.store: str = job["store"] or constants.oss_endpoint
        self.domain: str | None = None if job["store"] else "bucket"

    def asking(self, what: str, call: Any, *args: Any) -> Any:
        """The client's call; asked again where the network or the server stumbles."""
        self.login()
        return self._asking(what, call, *args)

    def login(self) -> None:
        """Before every call: the client's own calls go on without a login when they cannot get one."""
        try:
            self._asking("log in", self.tokens.get_jwt)
        except Failed as error:
            raise Failed("login" if error.kind == "refused" else error.kind, error.text) from None

    def _asking(self, what: str, call: Any, *args: Any) -> Any:
        errors = self.requests.exceptions
        for attempt in range(1, TRIES + 1):
            try:
                return call(*args)
            except errors.HTTPError as error:
                status = error.response.status_code
                if status in (401, 403):
                    raise Failed("login", f"{what}: HTTP {status}") from None
                if status < 500 or attempt == TRIES:
                    raise Failed("other" if status < 500 else "network", f"{what}: HTTP {status}") from None
            except errors.RequestException as error:
                lasting = isinstance(error, ValueError)  # requests' class of what cannot be sent, or is no JSON
                if lasting or attempt == TRIES:
                    raise Failed("other" if lasting else "network", f"{what}: {type(error).__name__}") from None
            except (ValueError, KeyError, TypeError) as error:
                # ValueError: the client's word for every refusal, with the server's text in it.
                raise Failed("refused" if type(error) is ValueError else "other", f"{what}: {type(error).__name__}") from None
            time.sleep(attempt / 2)

    def names(self) -> set[str] | None:
        """Files there, each of which OpenXLab calls a model; None: no repository, or not this account's, which it does not tell apart."""
        try:
            models = self.asking("list the repository", self.api.query_models, self.name)["models"]
            return {str(model["name"]) for model in models or ()}
        except Failed as error:
            if error.kind != "refused":
                raise
            return None
        except (KeyError, TypeError):
            raise Failed("other", "list the repository: an answer that the client does not know") from None

    def send(self, files: list[dict[str, Any]], create: Any, tick: Any) -> None:
        """Files in their order, one after another: there is no other way. Makes the repository where `create` says with what."""
        if create:
            models = [
                {"Name": file["as"], "Weights": file["as"], "Results": [{"Task": "text-generation", "Dataset": "none"}]} for file in files
            ]
            collection = {"License": create["license"], "Code": {"URL": create["code"]}}
            meta = {"Collections": [collection], "Models": models}
            self.asking("create the repository", self.api.create_repository, self.name, create["private"], meta)
        there = self.names() or set()
        with tempfile.TemporaryDirectory() as folder:
            for file in files:
                link = Path(folder) / file["as"]  # the client names a file after its path
                link.symlink_to(file["path"])
                self._send(file, str(link), file["as"] in there)
                tick(os.path.getsize(file["path"]))

    def _send(self, file: dict[str, Any], path: str, known: bool) -> None:
        model = {"Name": file["as"], "Weights": path, "Results": [{"Task": "text-generation", "Dataset": "none"}]}
        new, update = ([], [model]) if known else ([model], [])
        begun = self.asking("announce a file", self.api.update_upload_status, self.name, [file["as"]], new, update, 1)
        try:
            told = next(one for one in begun["objects"] if one["modelName"] == file["as"])
            signing = self.api.get_upload_signature, begun["repositoryId"], begun["uid"], model, told
        except (StopIteration, KeyError, TypeError):
            raise Failed("other", "announce a file: an answer that the client does not know") from None
        self._put(file["sha256"], path, self.asking("sign an upload", *signing))
        self.asking("end an upload", self.api.update_upload_status, self.name, [file["as"]], None, None, 2)

    def _put(self, sha256: str, path: str, signed: dict[str, Any]) -> None:
        oss2 = importlib.import_module("oss2.exceptions")
        try:
            keys = (signed["accessKeyId"], signed["accessKeySecret"], signed["stsToken"], signed["bucket"])
            client = self.oss.OssClient(self.store, *keys)
            # Parts of a cut upload go on where they were; by content, or another file's parts would be taken for this one's.
            client.cache_upload_id_key_prefix += f":{sha256}"
            client.multipart_resume_upload(path, signed["object"], signed["callback"], signed["callbackVar"], domain=self.domain)
        except oss2.RequestError:
            raise Failed("network", "upload a file: RequestError") from None
        except oss2.OssError as error:
            raise Failed("network" if error.status >= 500 else "other", f"upload a file: HTTP {error.status}") from None
        except KeyError:
            raise Failed("other", "sign an upload: an answer that the client does not know") from None

    def read(self, names: list[str], tick: Any) -> dict[str, str] | None:
        """sha256 of those that are there and complete; None as `names` has it."""
        known = self.names()
        wanted = sorted(set(names) & (known or set()))
        if known is None or not wanted:
            return None if known is None else {}
        models, _ = self.asking("find the files", self.api.get_download_url, self.owner, self.name, wanted, None, None)
        there = {name: str(models[name]["url"]) for name in wanted if name in (models or {})}
        return {name: self._asking("read a file back", self._read, url, tick) for name, url in there.items()}

    def _read(self, url: str, tick: Any) -> str:
        found, count = hashlib.sha256(), 0
        with self.requests.get(url, stream=True) as response:
            response.raise_for_status()
            for piece in response.iter_content(PIECE_BYTES):
                found.update(piece)
                count += len(piece)
                tick(len(piece))
            if count < int(response.headers.get("Content-Length", 0)):  # urllib3 1.26, which the client is held to, does not look
                raise self.requests.exceptions.ConnectionError
        return found.hexdigest()


def _sign_in(login: str) -> None:
    """The access key and its secret: from the environment, or from where `openxlab login` has put them."""
    if os.environ.get("OPENXLAB_AK") and os.environ.get("OPENXLAB_SK"):
        return
    try:
        with open(login, encoding="utf-8") as file:
            said = json.load(file)
        os.environ["OPENXLAB_AK"], os.environ["OPENXLAB_SK"] = said["ak"], said["sk"]
    except (OSError, ValueError, KeyError, TypeError):
        raise Failed("login", "there is no access key") from None


def _keep_tokens_in_memory(tokens: Any) -> None:
    """The client writes its session token to a file that others may read."""
    kept: dict[str, Any] = {}
    tokens.UserToken.store_to_local = lambda self: kept.update(token=self)
    tokens.get_token_from_local = lambda: kept.get("token")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
