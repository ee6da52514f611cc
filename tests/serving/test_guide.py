"""deploy/README.md and deploy/compose.yaml: their lines do what they say, asked of LMDeploy's parser, its dataclasses and openai."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from lmdeployed import Asked

from buildsys.architecture import Rope
from buildsys.scheme import Scheme, Schemes
from buildsys.serving import guide
from buildsys.serving.settings import PROFILE, Settings, settings
from buildsys.survey import describe

SCRIPT = Path(__file__).parent / "lmdeploy_reads.py"
NAME = "llama-8.0b-w4a16"
KV = {"policy": "int4", "max_entry_count": 0.5}
TARGET = {"gpu": "a10", "count": 2, "session_len": 4096, "max_batch_size": 16}
LONG = TARGET | {"count": 1, "session_len": 20480, "rope_scaling": "dynamic", "tool_call_parser": "qwen3"}

CASES = {
    "no target": settings("turbomind", "awq", KV, None, 8192, Rope(1e6)),
    "target": settings("turbomind", "gptq", KV, TARGET, 8192, Rope(1e6)),
    "long": settings("turbomind", "compressed-tensors", KV, LONG, 8192, Rope(1e6)),
    "pytorch": settings("pytorch", "awq", KV, TARGET, 8192, Rope(1e6)),
}


@pytest.fixture(scope="module")
def ask() -> Iterator[Asked]:
    with Asked(SCRIPT) as asked:
        yield asked


def blocks(made: Settings, language: str, chat: bool = True) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", guide.readme(made, NAME, chat), re.MULTILINE | re.DOTALL)


def words(line: str) -> list[str]:
    return shlex.split(line.replace("\\\n", " "))


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest) -> Settings:
    return CASES[request.param]


def test_the_commands_are_those_of_the_settings(made: Settings) -> None:
    server, chat, container = blocks(made, "sh")
    assert words(server) == guide.command(made, NAME)
    assert words(chat) == ["lmdeploy", "chat", ".", *made.chat_arguments()]
    assert words(container) == ["docker", "compose", "-f", guide.COMPOSE, "up", "--detach", "--wait"]


def test_the_commands_and_the_python_start_one_engine(ask: Asked, made: Settings) -> None:
    config = ask({"ask": "keywords", "config": guide.CONFIGS[made.backend], "given": made.keywords()})
    server, chat, _ = blocks(made, "sh")
    served = ask({"ask": "server", "words": words(server), "backend": made.backend})
    by_device = {} if "max_batch_size" in made.engine else {"max_batch_size": 128}
    assert served["backend_config"] == config | by_device and served["path"] == "." and served["model_name"] == NAME
    assert served["tool_call_parser"] == made.server.get("tool_call_parser")
    assert ask({"ask": "python", "code": blocks(made, "python")[0]}) == {"path": ".", "backend_config": config}
    talked = ask({"ask": "chat", "words": words(chat), "backend": made.backend})["backend_config"]
    differ = {name for name, value in talked.items() if value != config[name]}
    assert differ <= {"enable_metrics", "max_batch_size", "hf_overrides", "session_len"}
    assert "session_len" not in differ or made is CASES["long"]


def test_the_container_runs_the_same_command(made: Settings) -> None:
    said = yaml.safe_load(guide.compose(made, NAME))
    assert list(said) == ["services"] and list(said["services"]) == ["lmdeploy"]
    service = said["services"]["lmdeploy"]
    mounted = service["volumes"][0]
    assert service["command"] == ["lmdeploy", "serve", "api_server", mounted["target"], *guide.command(made, NAME)[4:]]
    assert mounted["source"] == ".." and mounted["read_only"], "the folder around deploy/"
    assert service["image"] == "${LMDEPLOY_IMAGE:-openmmlab/lmdeploy:v0.18.0-cu12.8}"
    assert service["ports"] == ["${LMDEPLOY_PORT:-23333}:23333"] and service["command"][6:8] == ["--server-port", "23333"]
    (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": made.engine["tp"], "capabilities": ["gpu"]}


def test_files_are_the_three() -> None:
    made = CASES["long"]
    found = guide.files(made, NAME, True)
    assert set(found) == {PROFILE, "deploy/README.md", "deploy/compose.yaml"}
    assert found[PROFILE] == made.text() and all(text.endswith("\n") for text in found.values())


def test_tools_are_told_where_there_is_a_parser() -> None:
    assert "## Tools" in guide.readme(CASES["long"], NAME, True) and len(blocks(CASES["long"], "python")) == 3
    assert "## Tools" not in guide.readme(CASES["target"], NAME, True) and len(blocks(CASES["target"], "python")) == 2


def test_a_name_says_what_the_model_is() -> None:
    config = json.loads((Path(__file__).parents[2] / "recipes/demo/model/config.json").read_text())
    architecture = describe(config, "config.json")[0]
    four, eight = Scheme(4, 128), Scheme(8, -1, True, "int", "int8")
    assert guide.model_name("llama", architecture, Schemes(four)) == "llama-3.4m-w4a16"
    assert guide.model_name("llama", architecture, Schemes(eight)) == "llama-3.4m-w8a8"
    assert guide.model_name("llama", architecture, Schemes(Scheme(8, -1, True, "fp8", "fp8"))) == "llama-3.4m-fp8"
    assert guide.model_name("", architecture, Schemes(four, own={"x": eight})) == "model-3.4m-mixed"


# The clients' lines, with openai's own package


class Server(BaseHTTPRequestHandler):
    """Speaks enough of the API to answer, with a tool call where there are tools and no tool has spoken yet."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        said = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, **said})
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        if self.path == "/v1/completions":
            choice["text"] = "it was the worst of times"
        elif said.get("tools") and said["messages"][-1]["role"] == "user":
            call = {"id": "call-1", "type": "function", "function": {"name": "sky", "arguments": '{"city": "Paris"}'}}
            choice |= {"message": {"role": "assistant", "content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}
        else:
            choice["message"] = {"role": "assistant", "content": f"heard {len(said['messages'])} messages"}
        body = json.dumps({"id": "1", "object": "x", "created": 0, "model": said["model"], "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def speaks() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    seen: list[dict[str, Any]] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Seen", (Server,), {"seen": seen})) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
        server.shutdown()
        thread.join()


def run(ask: Asked, code: str, url: str) -> str:
    assert code.count("http://localhost:23333/v1") == 1
    said: str = ask({"ask": "client", "code": code.replace("http://localhost:23333/v1", url)})
    return said


def test_a_client_asks_the_model(ask: Asked, speaks: tuple[str, list[dict[str, Any]]]) -> None:
    url, seen = speaks
    assert run(ask, blocks(CASES["target"], "python")[1], url) == "heard 1 messages\n"
    assert [(one["path"], one["model"]) for one in seen] == [("/v1/chat/completions", NAME)]


def test_a_client_of_a_base_model_asks_for_text(ask: Asked, speaks: tuple[str, list[dict[str, Any]]]) -> None:
    url, seen = speaks
    assert run(ask, blocks(CASES["target"], "python", chat=False)[1], url) == "it was the worst of times\n"
    assert [(one["path"], one["model"]) for one in seen] == [("/v1/completions", NAME)]


def test_a_client_calls_a_tool_and_tells_what_it_found(ask: Asked, speaks: tuple[str, list[dict[str, Any]]]) -> None:
    url, seen = speaks
    assert run(ask, blocks(CASES["long"], "python")[2], url) == "heard 3 messages\n"
    first, second = seen
    assert first["tools"][0]["function"]["name"] == "sky" and len(first["messages"]) == 1
    user, call, tool = second["messages"]
    assert user["role"] == "user" and call["tool_calls"][0]["id"] == tool["tool_call_id"] == "call-1"
    assert tool["role"] == "tool" and json.loads(tool["content"]) == {"city": "Paris", "sky": "clear"}


def test_the_health_check_asks_whether_the_server_is_up(speaks: tuple[str, list[dict[str, Any]]]) -> None:
    port = speaks[0].removesuffix("/v1").rpartition(":")[2]
    code = yaml.safe_load(guide.compose(CASES["target"], NAME))["services"]["lmdeploy"]["healthcheck"]["test"][3]

    def passes(code: str) -> bool:
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 0

    assert passes(code.replace("23333", port))
    assert not passes(code.replace("23333/health", f"{port}/other")), "404"
    assert not passes(code.replace("23333", "1")), "nobody listens"
