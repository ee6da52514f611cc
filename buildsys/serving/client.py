"""What asks a running api_server: OpenAI's chat calls through the openai package, LMDeploy's own /generate through the standard library.

Every call has a timeout and is made once: a server that fails is told, never asked again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPException, HTTPResponse
from importlib import import_module
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from buildsys.console import seconds
from buildsys.errors import BuildError

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion

Message = Mapping[str, Any]  # role, content, …, as OpenAI's API has it
SAID_CHARACTERS = 300


class Client:
    """One server. url: without /v1; timeout_s: for each call, and in a stream for each piece."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url.rstrip("/").removesuffix("/v1"), timeout_s

    @cached_property
    def model(self) -> str:
        """The name that the server gives the model."""
        said = self._ask("/v1/models")
        try:
            return str(said["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise self._unknown("/v1/models", said) from None

    # OpenAI's API

    def chat(self, messages: Iterable[Message], **more: Any) -> ChatCompletion:
        """One whole answer; `more` as the API has it: tools, max_tokens, temperature, extra_body … It has one choice at least."""
        with self._openai("/v1/chat/completions"):
            answer = self._sdk.chat.completions.create(model=self.model, messages=list(messages), **more)
        if getattr(_first(answer), "message", None) is None:  # it takes whatever it is sent
            raise self._unknown("/v1/chat/completions", answer)
        whole: ChatCompletion = answer
        return whole

    def stream(self, messages: Iterable[Message], **more: Any) -> Iterator[str]:
        """The pieces of one answer's text, as they come. Close it, or read it to its end: the server stops where nobody reads."""
        path = "/v1/chat/completions"
        with (
            self._openai(path),
            self._sdk.chat.completions.create(model=self.model, messages=list(messages), stream=True, **more) as pieces,
        ):
            ended = False
            for piece in pieces:
                if not isinstance(getattr(piece, "choices", None), list):
                    raise self._unknown(path, piece)
                first = _first(piece)
                text = getattr(getattr(first, "delta", None), "content", None)
                if isinstance(text, str) and text:
                    yield text
                ended = ended or bool(getattr(first, "finish_reason", None))
            if not ended:
                raise self._cut(path)

    @cached_property
    def _sdk(self) -> Any:
        try:
            import openai
        except ImportError:
            raise BuildError("this Python", "has no openai, which talks to the server", "pip install 'buildsys[serve]'") from None
        # The server is named by its address: no proxy of the environment stands between, and no key goes out to it.
        http = openai.DefaultHttpxClient(trust_env=False)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=self.timeout_s, http_client=http)

    @contextmanager
    def _openai(self, path: str) -> Iterator[None]:
        """Around calls of the openai package: what it raises becomes a BuildError."""
        _ = self._sdk
        import openai

        http = import_module(openai.DefaultHttpxClient.__bases__[0].__module__.partition(".")[0])  # httpx of openai 2, httpx2 of openai 3
        try:
            yield
        except openai.APITimeoutError:
            raise self._late(path) from None
        except openai.APIStatusError as error:
            raise self._refused(path, error.status_code, error.response.text) from None
        except openai.APIConnectionError as error:
            raise self._broken(path, str(error.__cause__ or error)) from None
        except openai.APIError as error:  # an error in the middle of a stream
            raise self._failed(path, str(error)) from None
        except http.TimeoutException:
            raise self._late(path) from None
        except http.HTTPError as error:
            raise self._broken(path, str(error)) from None
        except ValueError as error:  # what it sent is no JSON
            raise self._unknown(path, str(error)) from None

    # LMDeploy's own

    def generate(self, ids: Sequence[int], max_tokens: int, ignore_eos: bool) -> list[int]:
        """Greedy tokens after the prompt's."""
        said = self._ask("/generate", _greedy(ids, max_tokens, ignore_eos))
        return self._tokens(said)

    def pieces(self, ids: Sequence[int], max_tokens: int, ignore_eos: bool) -> Iterator[list[int]]:
        """The same, streamed: some tokens at a time."""
        path = "/generate"
        with self._open(path, _greedy(ids, max_tokens, ignore_eos) | {"stream": True}) as response:
            if "event-stream" not in response.headers.get("Content-Type", ""):
                raise self._unknown(path, response.read(SAID_CHARACTERS * 4).decode(errors="replace"))
            ended = False
            for line in response:
                name, _, text = line.strip().partition(b":")
                if name != b"data":
                    continue
                if text.strip() == b"[DONE]":
                    ended = True
                    break
                yield self._tokens(self._json(path, text))
            if not ended:
                raise self._cut(path)

    def _tokens(self, said: Any) -> list[int]:
        found = said.get("output_ids") if isinstance(said, dict) else None
        if isinstance(said, dict) and "error" in said:
            raise self._failed("/generate", json.dumps(said["error"]))
        if not isinstance(found, list) or not all(isinstance(token, int) for token in found):
            raise self._unknown("/generate", said)
        told = said.get("meta_info")
        reason = told.get("finish_reason") if isinstance(told, dict) else None
        if isinstance(reason, dict) and reason.get("type") == "error":
            raise self._failed("/generate", f"finish_reason error after {len(found)} tokens")
        return found

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(path, body) as response:
            return self._json(path, response.read())

    def _json(self, path: str, text: bytes) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            raise self._unknown(path, text.decode(errors="replace")) from None

    @contextmanager
    def _open(self, path: str, body: Mapping[str, Any] | None) -> Iterator[HTTPResponse]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=self.timeout_s) as response:
                yield response
        except HTTPError as error:
            with error:
                raise self._refused(path, error.code, error.read(SAID_CHARACTERS * 4).decode(errors="replace")) from None
        except TimeoutError:
            raise self._late(path) from None
        except URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._late(path) from None
            raise self._broken(path, getattr(error.reason, "strerror", None) or str(error.reason)) from None
        except (OSError, HTTPException) as error:
            raise self._broken(path, f"{type(error).__name__} {error}".strip()) from None

    # Failures

    def _error(self, path: str, what: str, fix: str) -> BuildError:
        return BuildError(f"{self.url}{path}", what, fix)

    def _late(self, path: str) -> BuildError:
        fix = "look at the server's log; a smaller batch or fewer tokens take less time"
        return self._error(path, f"gave no answer within {seconds(self.timeout_s)}", fix)

    def _refused(self, path: str, status: int, said: str) -> BuildError:
        return self._error(path, f"answers {status}: {_short(_message(said))}", "look at the server's log for the reason")

    def _broken(self, path: str, said: str) -> BuildError:
        return self._error(path, f"cannot be reached: {_short(said)}", "see that the server runs and that its address is right")

    def _cut(self, path: str) -> BuildError:
        return self._broken(path, "the stream was cut off before its end")

    def _failed(self, path: str, said: str) -> BuildError:
        return self._error(path, f"failed: {_short(said)}", "look at the server's log for the reason")

    def _unknown(self, path: str, said: object) -> BuildError:
        return self._error(path, f"answers what LMDeploy's api_server does not: {_short(str(said))}", "name the address of an api_server")


def _first(said: Any) -> Any:
    """Of an answer's choices; None where it has none."""
    choices = getattr(said, "choices", None)
    return choices[0] if isinstance(choices, list) and choices else None


def _greedy(ids: Sequence[int], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    """The model's own best tokens. What is not said here the server takes from the model's generation_config.json, and a penalty on
    repetition, which Qwen2.5 has there, changes them."""
    plain = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    return {"input_ids": list(ids), "max_tokens": max_tokens, "ignore_eos": ignore_eos, **plain, "stream": False}


def _message(said: str) -> str:
    """What an answer that refuses says for people: LMDeploy's `message`, or all of it."""
    try:
        return str(json.loads(said)["message"])
    except (ValueError, KeyError, TypeError):
        return said


def _short(said: str) -> str:
    text = " ".join(said.split())
    return f"{text[:SAID_CHARACTERS]}…" if len(text) > SAID_CHARACTERS else text or "nothing"
