"""What a server says reaches the caller whole, and every way in which it can fail is one clear error."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import apiserver
import pytest
from apiserver import ApiServer, continued

from buildsys.errors import BuildError
from buildsys.serving.client import Client
from buildsys.serving.ports import free_port
from buildsys.serving.server import health

SAID = [{"role": "user", "content": "one two three"}]
TOOL = {"type": "function", "function": {"name": "reverse", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}}

CALLS: dict[str, Callable[[Client], Any]] = {
    "chat": lambda client: client.chat(SAID),
    "stream": lambda client: list(client.stream(SAID)),
    "generate": lambda client: client.generate([1], 4, True),
    "pieces": lambda client: list(client.pieces([1], 4, True)),
}

ODD: tuple[object, ...] = (
    *({"output_ids": [1], "meta_info": told} for told in (5, "x", {"finish_reason": "stop"}, {"finish_reason": []})),
    *({"choices": choices} for choices in (5, {"a": 1}, [None], [5], [{}], [{"message": {"content": 5}}], [{"delta": {"content": 5}}])),
    *(None, 1, [], {"error": {}}),
)


def test_chat_stream_and_tokens() -> None:
    with ApiServer(model="tiny") as server:
        client = Client(f"{server.url}/v1", 10)
        assert client.model == "tiny" and health(server.url, 5) == ""
        answer = client.chat(SAID, max_tokens=9, temperature=0.5)
        assert answer.choices[0].message.content == "three two one" and answer.choices[0].finish_reason == "stop"
        assert list(client.stream(SAID)) == ["three", " two", " one"]
        assert client.generate([5, 6], 3, True) == [7, 8, 9] == continued([5, 6], 3)
        assert list(client.pieces([5, 6], 3, False)) == [[7], [8], [9], []]
        asked = [body for _, body in server.asked]
    assert asked[0]["max_tokens"] == 9 and asked[0]["model"] == "tiny" and "stream" not in asked[0]
    greedy = {"input_ids": [5, 6], "max_tokens": 3, "top_k": 1, "repetition_penalty": 1.0}
    for body, more in ((asked[2], {"ignore_eos": True, "stream": False}), (asked[3], {"ignore_eos": False, "stream": True})):
        assert (greedy | more).items() <= body.items()


def test_a_tool_is_called_and_its_result_answered() -> None:
    with ApiServer() as server:
        client = Client(server.url, 10)
        message = client.chat(SAID, tools=[TOOL], tool_choice="auto").choices[0].message
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert call.function.name == "reverse" and json.loads(call.function.arguments) == {"text": "three two one"}
        result = {"role": "tool", "tool_call_id": call.id, "content": "done that"}
        answer = client.chat([*SAID, message.model_dump(exclude_none=True), result], tools=[TOOL])
        assert answer.choices[0].message.content == "that done"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("refuses", "answers 400: the prompt is too long"),
        ("odd", "answers what LMDeploy's api_server does not: .*something else|cut off"),
        ("cut", "cannot be reached"),
        ("late:2", r"gave no answer within 0\.3 s"),
    ],
)
def test_a_failure_is_one_clear_error(call: str, fault: str, said: str) -> None:
    with ApiServer(fault) as server, pytest.raises(BuildError, match=said) as caught:
        CALLS[call](Client(server.url, 0.3 if "late" in fault else 10))
    assert caught.value.where.startswith(server.url) and len(server.asked) == 1, "asked once, and not again"


@pytest.mark.parametrize("call", CALLS)
def test_a_server_of_something_else(call: str) -> None:
    with ApiServer("garbage") as server, pytest.raises(BuildError, match=r"LMDeploy's api_server does not: .*another server"):
        CALLS[call](Client(server.url, 10))


@pytest.mark.parametrize("call", CALLS)
def test_garbage_after_a_good_start(call: str) -> None:
    with ApiServer() as server:
        client = Client(server.url, 10)
        assert client.model
        server.faults["garbage"] = ""
        with pytest.raises(BuildError, match=r"answers what LMDeploy's api_server does not|cut off"):
            CALLS[call](client)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("said", ODD)
def test_an_odd_answer_is_an_error_or_an_answer(call: str, said: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it holds where something is expected: never another exception."""
    text = json.dumps(said).encode()
    monkeypatch.setattr(apiserver.Handler, "do_POST", lambda handler: odd(handler, text))
    with ApiServer() as server, contextlib.suppress(BuildError):
        CALLS[call](Client(server.url, 10))


def odd(handler: apiserver.Handler, text: bytes) -> None:
    streamed = json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))).get("stream")
    text = b"data: " + text + b"\n\ndata: [DONE]\n\n" if streamed else text
    handler.send_response(200)
    handler.send_header("Content-Type", "text/event-stream" if streamed else "application/json")
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


@pytest.mark.parametrize("call", CALLS)
def test_nobody_there(call: str) -> None:
    with pytest.raises(BuildError, match="cannot be reached: Connection refused"):
        CALLS[call](Client(f"http://127.0.0.1:{free_port()}", 5))


@pytest.mark.parametrize("call", ("generate", "pieces"))
def test_an_engine_that_gives_up(call: str) -> None:
    with ApiServer("fails") as server, pytest.raises(BuildError, match="finish_reason error"):
        CALLS[call](Client(server.url, 5))


def test_no_proxy_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ApiServer() as server:
        client = Client(server.url, 5)
        assert client.chat(SAID).choices and client.generate([1], 1, True) == [2] and health(server.url, 5) == ""
