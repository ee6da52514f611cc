"""Small copies of the field's datasets, in every place that they are read from: as the hub has them, as it converts them, and raw."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from tests import models

Files = Mapping[str, bytes]


def table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), sink)
    return bytes(sink.getvalue())


def lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zst(raw: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True))


def write(folder: Path, files: Files) -> Path:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def prose(seed: int) -> list[str]:
    """Lines, of which some are empty."""
    return [line if number % 4 else "" for number, line in enumerate(models.prose(600, seed).splitlines())]


WIKI = [f" {line} \n" if line else "" for line in prose(1)]
WIKI_RAW = "".join(row or " \n" for row in WIKI).encode()
PTB = [line.lower().rstrip(".") for line in prose(2)]
PTB_RAW = "".join(f" {line} \n" for line in PTB).encode()
WEB = [{"text": models.prose(40, seed), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://x/{seed}"} for seed in range(12)]
PILE = [{"text": models.prose(40, 50 + seed) + "∑ é", "meta": {"pile_set_name": "ArXiv"}} for seed in range(12)]
SUMS = [
    {"question": models.prose(30, 90 + seed).strip(), "answer": f"{seed} + {seed} = <<{seed}+{seed}>>\n#### {seed}"} for seed in range(12)
]

# name -> split -> (the hub's own files, at its revision), and other places that hold the same rows
HUB: dict[str, tuple[str, str, Files]] = {
    "wikitext2": ("Salesforce/wikitext", "test", {"wikitext-2-raw-v1/test-00000-of-00001.parquet": table([{"text": row} for row in WIKI])}),
    "ptb": ("ptb-text-only/ptb_text_only", "test", {"penn_treebank/test/0000.parquet": table([{"sentence": row} for row in PTB])}),
    "c4": ("allenai/c4", "validation", {"en/c4-validation.00000-of-00008.json.gz": gzip.compress(lines(WEB))}),
    "pileval": ("mit-han-lab/pile-val-backup", "validation", {"val.jsonl.zst": zst(lines(PILE))}),
    "gsm8k": ("openai/gsm8k", "test", {"main/test-00000-of-00001.parquet": table(SUMS)}),
}
HERE: dict[str, tuple[Files, ...]] = {
    "wikitext2": (
        {"test-00000-of-00001.parquet": table([{"text": row} for row in WIKI])},
        {"wikitext-2-raw-v1/test/0000.parquet": table([{"text": row} for row in WIKI])},
        {"wiki.test.raw": WIKI_RAW, "wiki.test.tokens": b"<unk>"},
        {"wikitext-2-raw/wiki.test.raw": WIKI_RAW.replace(b"\n", b"\r\n")},
    ),
    "ptb": (
        {"test/0000.parquet": table([{"sentence": row} for row in PTB])},
        {"ptb.test.txt": PTB_RAW, "ptb.train.txt": b"other"},
        {"data/ptb.test.txt": PTB_RAW},
    ),
    "c4": ({"c4-validation.00000-of-00008.json": lines(WEB)}, {"en/c4-validation.00000-of-00008.json.zst": zst(lines(WEB))}),
    "pileval": ({"val.jsonl": lines(PILE)}, {"val.jsonl.gz": gzip.compress(lines(PILE))}),
    "gsm8k": ({"test.jsonl": lines(SUMS), "train.jsonl": b""}, {"main/test/0000.parquet": table(SUMS)}),
}
TEXTS: dict[str, list[str]] = {
    "wikitext2": ["\n\n".join(WIKI)],
    "ptb": ["\n\n".join(PTB)],
    "c4": [row["text"] for row in WEB],
    "pileval": [str(row["text"]) for row in PILE],
    "gsm8k": [f"{row['question']}\n{row['answer']}" for row in SUMS],
}
Read = Callable[..., list[str]]
