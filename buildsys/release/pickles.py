"""Whether a file can be read as a pickle, told by its first bytes: names tell less, and nothing is opened as one to find out.

Readers: pickle (docs.python.org/3/library/pickletools.html lists its opcodes), torch.load (a zip archive, before it a pickle or a tar
archive) and joblib (a compressed pickle). A reader fails at a first byte that is no opcode. Any other may lead to code further on.
"""

from __future__ import annotations

import pickletools
import tarfile
from pathlib import Path

HEAD_BYTES = 512  # a tar archive's first header
NEWEST_PROTOCOL = 5
OPCODES = frozenset(opcode.code.encode("latin-1") for opcode in pickletools.opcodes)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x04\x22\x4d\x18", b"\x5d\x00", b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")
"""gzip, bzip2, xz, lz4, lzma, zlib."""


def found(path: Path) -> str | None:
    """In what way a file is a pickle or can be read as one; None where it cannot."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return "is a pickle by its name"
    if head[:1] == b"\x80" and max(head[1:2], default=0) <= NEWEST_PROTOCOL:
        return "is a pickle"
    if head.startswith(b"PK"):
        return "is a zip archive such as PyTorch pickles into"
    if head.startswith(COMPRESSED):
        return "is compressed, as joblib's pickles are"
    return "can be read as a pickle" if head[:1] in OPCODES or _is_tar(head) else None


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
