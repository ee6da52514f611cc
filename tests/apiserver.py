"""A small HTTP server that speaks as LMDeploy's api_server does, for tests of what talks to one: in this process, or as a program.

As a program it takes api_server's command line, `python apiserver.py … --server-port N --model-name NAME`. The words of APISERVER_FAULTS
tell it what to do wrong: `hang` (listens never), `ends` (with a message, before it listens), `deaf` (ignores SIGTERM), `child` (starts a
process of its own, and prints its number), `late:0.2` (waits before each piece of an answer), `dies:3` (by SIGKILL, in the third POST),
`garbage` (no JSON), `odd` (JSON of something else), `refuses` (400), `fails` (an error in the answer), `cut` (hangs up in the middle),
`gathers:4` (answers the first POST when there are four), `short` (fewer tokens than asked for), `ill` (/health is 503).
Its model writes the words of the last message in reverse; token ids continue by adding one. Nothing in it is LMDeploy's code.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

FAULTS = "APISERVER_FAULTS"
VOCAB = 1000
GREETING = "nothing was said"


class ApiServer:
    """In this process: `with ApiServer("late:0.1") as server`."""

    def __init__(self, *faults: str, model: str = "toy", port: int = 0) -> None:
        self.faults = {name: value for name, _, value in (fault.partition(":") for fault in faults)}
        self.model = model
        self.asked: list[tuple[str, dict[str, Any]]] = []  # path and body of each POST
        self.hold: int | None = None  # streams stop after so many pieces for as long as this is set
        self.most = 0  # POSTs in flight at a time
        self._flying = 0
        self.lock = threading.RLock()
        self.together = threading.Condition(self.lock)
        self._server = Listening(("127.0.0.1", port), type("Bound", (Handler,), {"api": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> ApiServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def serve(self) -> None:
        """In the calling thread, until the process ends."""
        self._server.serve_forever()

    def began(self, path: str, body: dict[str, Any]) -> None:
        with self.lock:
            self.asked.append((path, body))
            self._flying += 1
            self.most = max(self.most, self._flying)
            self.together.notify_all()
            self.together.wait_for(lambda: self.most >= int(self.faults.get("gathers") or 0), timeout=20)
            dies = len(self.asked) >= int(self.faults.get("dies") or 1 << 30)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def ended(self) -> None:
        with self.lock:
            self._flying -= 1

    def wait(self) -> None:
        time.sleep(float(self.faults.get("late") or 0))


class Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    api: ApiServer
    _flies = False  # whether a POST of this connection is counted
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            return self._json({"status": "healthy"}, 503 if "ill" in self.api.faults else 200)
        if self.path == "/v1/models":
            if "garbage" in self.api.faults:
                return self._text("<html>another server</html>")
            return self._json({"object": "list", "data": [{"id": self.api.model, "object": "model"}]})
        self._json({"detail": "Not Found"}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        routes = {"/v1/chat/completions": self.chat, "/v1/completions": self.complete, "/generate": self.generate}
        faults = self.api.faults
        self._flies = True
        self.api.began(self.path, body)
        try:
            if self.path not in routes:
                self._json({"detail": "Not Found"}, 404)
            elif "refuses" in faults:
                self._json({"message": "the prompt is too long", "type": "invalid_request_error", "code": 400, "object": "error"}, 400)
            elif "garbage" in faults:
                self._text("<html>another server</html>")
            elif "odd" in faults:
                self._json({"object": "something else"})
            elif body.get("model", self.api.model) != self.api.model and self.path != "/generate":
                self._json({"message": f"The model {body['model']!r} does not exist.", "object": "error"}, 404)
            else:
                routes[self.path](body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has left
        finally:
            self._landed()

    def _landed(self) -> None:
        """Said before the last that a client waits for: its next request may come before this one's thread goes on."""
        if self._flies:
            self._flies = False
            self.api.ended()

    # What the model says

    def chat(self, body: dict[str, Any]) -> None:
        said = [message for message in body["messages"] if message.get("content")]
        text = " ".join(reversed(str(said[-1]["content"]).split())) if said else GREETING
        head = {"id": "chat-1", "created": 1, "model": self.api.model}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        reason = "stop"
        if body.get("tools") and body["messages"][-1]["role"] == "user":
            call = {"name": body["tools"][0]["function"]["name"], "arguments": json.dumps({"text": text})}
            message = {"role": "assistant", "content": None, "tool_calls": [{"id": "call-1", "type": "function", "function": call}]}
            reason = "tool_calls"
        if not body.get("stream"):
            usage = {"prompt_tokens": len(body["messages"]), "completion_tokens": len(text.split()), "total_tokens": 0}
            choice = {"index": 0, "message": message, "finish_reason": reason}
            self.api.wait()
            return self._whole(head | {"object": "chat.completion", "choices": [choice], "usage": usage})
        pieces: list[dict[str, Any]] = [{"role": "assistant", "content": word} for word in _words(text)]
        if "tool_calls" in message:
            pieces = [{"role": "assistant", "tool_calls": [{"index": 0, **message["tool_calls"][0]}]}]
        deltas = [*((piece, None) for piece in pieces), ({}, reason)]
        self._stream(
            head | {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": ended}]}
            for delta, ended in deltas
        )

    def complete(self, body: dict[str, Any]) -> None:
        text = " ".join(reversed(str(body["prompt"]).split()))
        self.api.wait()
        self._whole(
            {
                "id": "text-1",
                "object": "text_completion",
                "created": 1,
                "model": self.api.model,
                "choices": [{"index": 0, "text": text, "finish_reason": "stop"}],
            }
        )

    def generate(self, body: dict[str, Any]) -> None:
        count = body["max_tokens"] // (2 if "short" in self.api.faults else 1)
        ids = continued(body["input_ids"], count)
        if "fails" in self.api.faults:
            ids = []
        ended = {"type": "error" if "fails" in self.api.faults else "length"}
        if not body.get("stream"):
            self.api.wait()
            return self._whole({"text": "", "output_ids": ids, "meta_info": {"finish_reason": ended, "completion_tokens": len(ids)}})
        told = [*(({"output_ids": [token]}, None) for token in ids), ({"output_ids": []}, ended)]
        self._stream({"text": "", **piece, "meta_info": {"finish_reason": reason}} for piece, reason in told)

    # How it is sent

    def _whole(self, body: Any) -> None:
        data = json.dumps(body).encode()
        if "cut" in self.api.faults:
            self._head(200, "application/json", {"Content-Length": str(len(data))})
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self._json(body)

    def _stream(self, pieces: Iterable[Any]) -> None:
        self._head(200, "text/event-stream", {"Transfer-Encoding": "chunked"})
        for at, piece in enumerate(pieces):
            while self.api.hold is not None and at >= self.api.hold:
                time.sleep(0.01)
            self.api.wait()
            self._chunk(f"data: {json.dumps(piece)}\n\n")
            if "cut" in self.api.faults:
                self.close_connection = True
                return
        self._landed()
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _json(self, body: Any, status: int = 200) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _text(self, body: str) -> None:
        self._send(200, "text/html", body.encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        self._head(status, kind, {"Content-Length": str(len(data))})
        self._landed()
        self.wfile.write(data)

    def _head(self, status: int, kind: str, more: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **more}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def continued(ids: Sequence[int], count: int) -> list[int]:
    """Tokens that the model writes after these."""
    return [(ids[-1] + step) % VOCAB for step in range(1, count + 1)]


def _words(text: str) -> Iterator[str]:
    for at, word in enumerate(text.split(" ")):
        yield word if at == 0 else f" {word}"


def machine(folder: Path, *faults: str, lmdeploy: str = "0.18.0") -> dict[str, str]:
    """The environment of a machine with one GPU and an interpreter that has LMDeploy, which is this program."""
    folder.mkdir(parents=True, exist_ok=True)
    listed, used = "0, GPU-1, NVIDIA H200, 570.124, 143771", "0, GPU-1, NVIDIA H200, 570.124, 2048"
    scripts = {
        "nvidia-smi": f'case "$1" in *used*) echo "{used}";; *) echo "{listed}";; esac',
        "python-of-lmdeploy": f'case "$1" in -c) echo {lmdeploy};; *) exec {sys.executable} {__file__} "$@";; esac',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    found = {"PATH": path, "BUILDSYS_LMDEPLOY": str(folder / "python-of-lmdeploy"), "CUDA_VISIBLE_DEVICES": "0", FAULTS: " ".join(faults)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server-port", type=int, required=True)
    parser.add_argument("--model-name", default="toy")
    said, _ = parser.parse_known_args()
    faults = os.environ.get(FAULTS, "").split()
    if "deaf" in faults:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if "child" in faults:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
    if "ends" in faults:
        sys.exit("ValueError: cannot load the model")
    if "hang" in faults:
        time.sleep(600)
    print(f"listens on {said.server_port} for {said.model_name}", flush=True)
    ApiServer(*faults, model=said.model_name, port=said.server_port).serve()


if __name__ == "__main__":
    main()
