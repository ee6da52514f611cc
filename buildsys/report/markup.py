"""Values become HTML here and nowhere else: escaped, cleaned and formatted, whoever wrote them.

Names, prompts and answers come from strangers. `tag` and the templates escape every string; `clean` replaces what no page can hold.
"""

from __future__ import annotations

import base64
import hashlib
import math
import unicodedata
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
NOT_A_NUMBER = "not a number"


def clean(text: str) -> str:
    """Without what HTML or UTF-8 cannot hold: control characters and lone surrogates become U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text.replace("\r\n", "\n"))


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """One element. `class_` is class, `stroke_width` is stroke-width; an attribute of None is left out."""
    said = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    head = "".join(f' {"viewBox" if key == "viewbox" else key}="{_safe(value)}"' for key, value in said.items())
    return Markup(f"<{name}{head}>{''.join(_safe(child) for child in children)}</{name}>")


def _safe(value: Any) -> str:
    return str(escape(clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value))


def join(parts: Any) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def render(template: str, **said: Any) -> str:
    """A whole page, with its style, and the policy that lets nothing else in."""
    style, script = _asset("style.css"), _asset(said["script"]) if said.get("script") else Markup("")
    allowed = [f"style-src '{_digest(style)}'"] + ([f"script-src '{_digest(script)}'"] if script else [])
    policy = "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])
    return _environment().get_template(template).render({**said, "style": style, "script": script, "policy": policy})


def _asset(name: str) -> Markup:
    return Markup((FOLDER / name).read_text(encoding="utf-8").strip())


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    made.filters.update(number=number, bytes=in_bytes, seconds=in_seconds, gib=in_gib, dotted=dotted)
    return made


def dotted(name: str) -> Markup:
    """A name that may break after its dots."""
    return Markup(".<wbr>").join(clean(part) for part in name.split("."))


# Numbers for people


def number(value: float) -> str:
    """Four digits that count; whole numbers whole."""
    if not math.isfinite(value):
        return NOT_A_NUMBER if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "\u2212")
    text = f"{value:.4g}"
    if "e" in text and 1e-4 <= abs(value) < 1e9:
        text = f"{value:,.0f}"
    return text.replace("-", "\u2212", 1) if value < 0 else text


def unit_of(size: float) -> tuple[str, float]:
    """The unit that `size` bytes are told in, and its bytes."""
    return next(((unit, width) for unit, width in BYTES if size >= width), ("B", 1.0))


def in_bytes(size: float) -> str:
    """In decimal units, as disks and hubs count."""
    unit, width = unit_of(size)
    return f"{size / width:.3g} {unit}" if width > 1 and size / width < 999.5 else f"{size / width:,.0f} {unit}"


def in_gib(value: float) -> str:
    """A column of these lines up, but for what is too small for it."""
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def in_seconds(value: float) -> str:
    """`0.49 s`, `2 min 10 s`, `3 h 12 min`."""
    if value < 120:
        return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"
