"""Conversations through the models' own templates: the same text as transformers writes, and no harm from a template that means it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from buildsys.errors import BuildError
from buildsys.io import chat, corpus
from tests import models

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INTERNLM2 = "{{ bos_token }}" + CHATML
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
"""
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last_query_index %}
            {{- '<|im_start|>assistant\\n<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' }}
        {%- endif %}
        {% generation %}{{- message.content or '' }}{% endgeneration %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set tool_call = tool_call.function or tool_call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' ~ tool_call.arguments | tojson ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if message.content is none %}{% continue %}{% endif %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES = {"chatml": CHATML, "internlm2": INTERNLM2, "llama3": LLAMA3, "qwen": QWEN, "mistral": MISTRAL}

SAID: list[dict[str, Any]] = [
    {"role": "user", "content": "  Was heißt “river”?\n<b>&</b> "},
    {"role": "assistant", "content": "Fluss — 河 🙂"},
    {"role": "user", "content": "Danke"},
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *SAID]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "when": "<now>"}}}
USED: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "look it up\n"},
    {"role": "tool", "content": '{"rain": true}', "name": None},
    {"role": "assistant", "content": "Yes.", "thinking": "it says so"},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "says “rain” & <sun>", "parameters": {"type": "object"}}}]


def model(folder: Path, template: Any = CHATML, **config: Any) -> dict[str, Path]:
    """The files of a model that say how it is talked to."""
    folder.mkdir(exist_ok=True)
    models.write_tokenizer(folder)
    told = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return models.files(folder)


@pytest.mark.parametrize("answer", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("said", [SAID, SYSTEM, USED], ids=["plain", "system", "tools"])
def test_text_is_what_transformers_writes(name: str, said: list[dict[str, Any]], answer: bool, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(model(tmp_path)["tokenizer.json"])),
        chat_template=TEMPLATES[name],
        bos_token="<s>",
        eos_token="</s>",
    )
    tools = TOOLS if said is USED else None
    render = chat.renderer(model(tmp_path, TEMPLATES[name]), "source")
    try:
        expected = theirs.apply_chat_template(said, tools=tools, tokenize=False, add_generation_prompt=answer)
    except Exception as refused:  # noqa: BLE001  transformers raises jinja's errors
        with pytest.raises(chat.Refused, match=r"chat_template|tokenizer_config") as caught:
            render(said, tools, answer)
        assert str(refused) in caught.value.what and name in ("mistral", "chatml", "internlm2")
    else:
        assert render(said, tools, answer) == expected
        assert render(said, tools, answer) == expected, "once more, by the same process"


def test_what_the_template_says_of_a_conversation_is_passed_on(tmp_path: Path) -> None:
    render = chat.renderer(model(tmp_path, MISTRAL), "source")
    with pytest.raises(chat.Refused) as caught:
        render([SAID[1]])
    assert caught.value.where == "source/tokenizer_config.json"
    assert caught.value.what.endswith("refuses it: Conversation roles must alternate user/assistant/user/assistant/...")


def test_a_file_of_its_own_goes_before_the_configuration(tmp_path: Path) -> None:
    files = model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}ö{{ bos_token }}", encoding="utf-8")
    assert chat.renderer(models.files(tmp_path), "source")([{"role": "user", "content": "x"}]) == "xö<s>"
    assert chat.renderer(files, "source")([{"role": "user", "content": "x"}]) == "<|im_start|>user\nx<|im_end|>\n"


def test_several_templates_one_for_tools(tmp_path: Path) -> None:
    both = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    render = chat.renderer(model(tmp_path, both), "source")
    assert render(SAID) == "plain" and render(SAID, TOOLS) == "1 tools"
    with pytest.raises(BuildError, match="none is the default"):
        chat.renderer(model(tmp_path, both[1:]), "source")


def test_special_tokens_come_from_an_older_file_too(tmp_path: Path) -> None:
    model(tmp_path, "{{ bos_token }}{{ eos_token }}|{{ pad_token }}", bos_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "<other>"}))
    assert chat.renderer(models.files(tmp_path), "source")(SAID) == "<s></s>|"


def test_today_is_always_the_same_day(tmp_path: Path) -> None:
    assert chat.renderer(model(tmp_path, "{{ strftime_now('%d %b %Y') }}"), "source")(SAID) == "26 Jul 2024"


def test_special_tokens_of_a_template_are_single_tokens_and_bos_is_not_doubled(tmp_path: Path) -> None:
    files = model(tmp_path, MISTRAL)
    encode = corpus.tokenizer(files, "source")
    ids = encode(chat.renderer(files, "source")(SAID[:2]))
    assert ids[0] == models.BOS and ids.count(models.BOS) == 1 and ids[-1] == models.EOS
    assert corpus.decoder(files, "source")(ids) == "[INST]   Was heißt “river”?\n<b>&</b>  [/INST] Fluss — 河 🙂"


def test_a_model_without_a_template(tmp_path: Path) -> None:
    files = model(tmp_path, None)
    assert not chat.has_template(files) and chat.has_template(model(tmp_path / "other"))
    with pytest.raises(BuildError, match="has no chat template") as caught:
        chat.renderer(files, "source")
    assert caught.value.where == "source" and "text_files" in caught.value.fix
    with pytest.raises(BuildError, match="has no chat template"):
        chat.renderer({}, "source")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff"], ids=str)
def test_damaged_files_are_named(name: str, raw: bytes, tmp_path: Path) -> None:
    files = model(tmp_path) | {name: tmp_path / name}
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BuildError, match=f"source/{name}"):
        chat.renderer(files, "source")


# Templates that mean harm, or are broken

SMALL = {"seconds": 1, "bytes": 400 << 20, "characters": 10_000}

HARMFUL = {
    "endless": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "runs for more than 1 s"),
    "wide": ("{% for a in range(10**9) %}{% endfor %}", "OverflowError"),
    "long": ("{% for a in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}", "more than 10000 characters"),
    "huge": ("{{ 'x' * 10**10 }}", "MemoryError"),
    "doubling": ("{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "MemoryError"),
    "deep": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "power": ("{{ (9 + messages | length) ** (10 ** 9) }}", "runs for more than 1 s"),
    "reaching": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "shelf": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "SecurityError"),
    "changing": ("{{ messages.append(1) }}", "SecurityError"),
    "dividing": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "adding": ("{{ 'x' + messages }}", "TypeError"),
    "missing": ("{{ nothing.here }}", "UndefinedError"),
    "including": ("{% include '/etc/passwd' %}", "TypeError"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_no_harm_comes_from_a_template(name: str, tmp_path: Path) -> None:
    template, said = HARMFUL[name]
    render = chat.renderer(model(tmp_path, template), "source", SMALL)
    with pytest.raises(chat.Refused) as caught:
        render(SAID)
    assert said in caught.value.what and caught.value.fix
    with pytest.raises(chat.Refused):
        render(SAID)


@pytest.mark.parametrize("template", ["{% if %}", "{{ x", "{% nosuchtag %}", "{" * 5 + "%"])
def test_a_template_that_is_none_is_refused_before_any_conversation(template: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="TemplateSyntaxError") as caught:
        chat.renderer(model(tmp_path, template), "source", SMALL)
    assert caught.value.where == "source/tokenizer_config.json" and "publisher" in caught.value.fix


def test_a_template_gets_no_token_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    render = chat.renderer(model(tmp_path), "source")
    environment = Path(f"/proc/{render._process.pid}/environ").read_bytes()
    assert b"PATH=" in environment and b"canary" not in environment


@pytest.fixture
def orphan(tmp_path: Path) -> Iterator[int]:
    """The process of a renderer whose owner was killed."""
    model(tmp_path)
    code = f"""
import os, signal
from pathlib import Path
from buildsys.io import chat
render = chat.renderer({{"tokenizer_config.json": Path({str(tmp_path / "tokenizer_config.json")!r})}}, "source")
print(render._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    yield int(ran.stdout)


def test_no_process_is_left(tmp_path: Path, orphan: int) -> None:
    import psutil

    def ended(process: int) -> bool:
        try:
            psutil.Process(process).wait(20)
        except psutil.NoSuchProcess:
            pass
        return not psutil.pid_exists(process) or psutil.Process(process).status() == psutil.STATUS_ZOMBIE

    assert ended(orphan)
    render = chat.renderer(model(tmp_path), "source")
    mine = render._process.pid
    del render
    assert ended(mine)
