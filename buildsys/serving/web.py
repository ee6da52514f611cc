"""A chat page in the browser, on a running server: Gradio's ChatInterface (gradio 6), with nothing that leaves this machine.

Gradio counts its users, looks for newer versions, and takes fonts from elsewhere unless it is told not to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from buildsys.errors import BuildError
from buildsys.serving.client import Client
from buildsys.serving.ports import LOOPBACK, refuse_taken

PORT = 7860  # Gradio's own
FONTS = ("system-ui", "sans-serif")
MONOSPACE = ("ui-monospace", "monospace")
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
FAILED = "⚠ Not answered"
STYLE = "footer {display: none !important}"


@contextmanager
def page(client: Client, title: str, port: int) -> Iterator[str]:
    """Serves the page while the body runs; gives its address. Raises BuildError: no gradio, a taken port."""
    gradio = _gradio()
    refuse_taken(port)
    model = client.model  # a server that is not there is told now, and not to the first who asks
    with gradio.Blocks(title=title, analytics_enabled=False, fill_height=True) as blocks:
        gradio.ChatInterface(
            _answers(client),
            title=title,
            description=f"model {model}" if model != title else None,
            chatbot=gradio.Chatbot(show_label=False, scale=1, buttons=["copy"], height="70vh"),
            textbox=gradio.Textbox(label="Message", placeholder="Say something", submit_btn=True, stop_btn=True, autofocus=True, scale=7),
            api_name=False,
            analytics_enabled=False,
        )
    try:
        blocks.launch(
            server_name=LOOPBACK,
            server_port=port,
            theme=gradio.themes.Base(font=FONTS, font_mono=MONOSPACE),
            css=STYLE,
            share=False,
            quiet=True,
            ssr_mode=False,
            footer_links=[],
            prevent_thread_lock=True,
            inbrowser=False,
        )
        yield f"http://{LOOPBACK}:{port}"
    finally:
        blocks.close(verbose=False)


def require_gradio() -> None:
    """Raises BuildError where there is none: before an engine starts for its page."""
    if find_spec("gradio") is None:
        raise BuildError("this Python", "has no gradio, which makes the page", "pip install 'buildsys[web]'")


def _gradio() -> Any:
    os.environ.update(QUIET)
    # It asks its own page whether it is up, through a proxy where the environment names one.
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY", ""), LOOPBACK)))
    require_gradio()
    import gradio

    return gradio


def _answers(client: Client) -> Callable[[str, Sequence[Mapping[str, Any]]], Iterator[str]]:
    """What ChatInterface asks for each message: the answer so far, again and again.

    A failure is a message too: an exception would be printed with its traceback, and leave the page locked.
    """

    def answer(text: str, history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        so_far = ""
        try:
            for piece in client.stream([*_said(history), {"role": "user", "content": text}]):
                so_far += piece
                yield so_far
        except BuildError as error:
            yield "\n\n".join(filter(None, (so_far, f"{FAILED}: {error.what}; {error.fix}")))

    return answer


def _said(history: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The conversation as OpenAI's API has it, without questions that were not answered."""
    found: list[dict[str, str]] = []
    for one in history:
        text = _text(one["content"])
        if one["role"] == "assistant" and FAILED in text:
            found.pop()
        else:
            found.append({"role": one["role"], "content": text})
    return found


def _text(content: Any) -> str:
    """Gradio keeps a message as text, or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
