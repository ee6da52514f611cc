"""One way to ask the hub for something: through its client's session, with its headers, and not for ever."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from buildsys.hubs.hub_errors import TIMEOUT_S
from buildsys.hubs.hub_repo import endpoint

if TYPE_CHECKING:
    import httpx2


@contextmanager
def opened(address: str, headers: Mapping[str, str] | None = None) -> Iterator[httpx2.Response]:
    """The answer to a GET, its body yet to be read. The token goes to the hub alone, wherever a page or a redirect leads."""
    from huggingface_hub import get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    ours = urlsplit(address).netloc == urlsplit(endpoint()).netloc
    said = {**build_hf_headers(token=None if ours else False), "Accept-Encoding": "identity", **(headers or {})}
    with get_session().stream("GET", address, headers=said, timeout=TIMEOUT_S) as answer:
        hf_raise_for_status(answer)
        yield answer
