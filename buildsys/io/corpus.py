"""Text becomes windows of tokens: pinned, the same twice, and never the same text for calibration and for verification.

No special tokens are added: a window begins in the middle of a text, as LMDeploy's and GPTQ's loaders have it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import added_tokens

RUN = 32  # tokens; two texts that share a run this long share text
DULL = 8  # fewer different tokens in a run say nothing: blank lines, rules, dots
SHARE = 0.25  # of a window's tokens that stand in runs found elsewhere, from which on the window is not new

Encode = Callable[[str], list[int]]
Decode = Callable[[Sequence[int]], str]

_AGAIN = "take the file from the model's publisher again"


def tokenizer(files: Mapping[str, Path], where: str) -> Encode:
    """The model's own tokenizer, from tokenizer.json (tokenizers) or tokenizer.model (sentencepiece); no code of the model's runs.

    No special token is added. Those that stand in the text, as a chat template writes them, become their ids.
    """
    if "tokenizer.json" in files:
        fast = _fast(files, where)
        return lambda text: list(fast.encode(text, add_special_tokens=False).ids)
    pieces = _pieces(files, where)
    return added_tokens.splitting(lambda text: list(pieces.encode(text)), added_tokens.of(files, pieces, where))


def decoder(files: Mapping[str, Path], where: str) -> Decode:
    """Token ids back to text, without special tokens: the inverse of `tokenizer` for what a model writes."""
    if "tokenizer.json" in files:
        fast = _fast(files, where)
        return lambda ids: str(fast.decode(list(ids), skip_special_tokens=True))
    pieces = _pieces(files, where)
    return added_tokens.joining(lambda ids: str(pieces.decode(list(ids))), added_tokens.of(files, pieces, where), pieces.get_piece_size())


def _fast(files: Mapping[str, Path], where: str) -> Any:
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_str(files["tokenizer.json"].read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  tokenizers raises nothing narrower
        raise BuildError(f"{where}/tokenizer.json", f"cannot be read: {error}", _AGAIN) from None
    fast.no_truncation()
    fast.no_padding()
    return fast


def _pieces(files: Mapping[str, Path], where: str) -> Any:
    if "tokenizer.model" not in files:
        raise BuildError(where, "has neither tokenizer.json nor tokenizer.model", "add the model's tokenizer to its folder")
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(files["tokenizer.model"]))
    except (RuntimeError, OSError) as error:
        raise BuildError(f"{where}/tokenizer.model", f"cannot be read: {error}", _AGAIN) from None


def windows(
    texts: Iterable[str], encode: Encode, samples: int, seqlen: int, seed: int, where: str, end: str = "\n"
) -> Tensor:  # -> int32 [samples, seqlen]
    """`samples` of the texts' consecutive windows of `seqlen` tokens, drawn without replacement. Raises where there are too few.

    Every text ends with `end`: a line of prose, and a conversation ("") as its chat template ends it.
    """
    ids = array("i")  # four bytes a token, where a list of int takes 36
    for text in texts:
        ids.extend(encode(text if text.endswith(end) else text + end))
    whole = len(ids) // seqlen
    if whole < samples:
        what = f"the text has {len(ids)} tokens, {whole} windows of {seqlen}; {samples} are needed"
        raise BuildError(where, what, f"add text, or set samples: {whole}" if whole else "add text, or set a smaller seqlen")
    drawn = torch.randperm(whole, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.tensor(ids[: whole * seqlen], dtype=torch.int32).view(whole, seqlen)[drawn].contiguous()


def within(tokens: Tensor, vocab_size: int, where: str) -> Tensor:
    """`tokens` where the model has an embedding for each; a tokenizer of another model is refused."""
    largest = int(tokens.max())
    if largest >= vocab_size:
        what = f"writes token {largest}, the model's vocabulary has {vocab_size}"
        raise BuildError(where, what, "use the tokenizer that belongs to this model")
    return tokens


def shared_windows(ours: Tensor, theirs: Tensor) -> list[int]:  # [windows, tokens] each -> rows of `ours`
    """Windows of `ours` that repeat text of `theirs`, wherever in a window it stands."""
    # Text cut at other places lies in two of their windows: half of the shorter window is what certainly stands in one piece.
    run = max(min(RUN, ours.shape[1] // 2, theirs.shape[1] // 2), 1)
    known = torch.cat([_runs(window, run)[0] for window in theirs])
    found = []
    for row, window in enumerate(ours):
        hashes, telling = _runs(window, run)
        if _covered(torch.isin(hashes, known) & telling, run) >= SHARE * len(window):
            found.append(row)
    return found


def _covered(matching: Tensor, run: int) -> int:  # bool [runs]
    """How many tokens stand in at least one of the matching runs."""
    starts = matching.nonzero()[:, 0]
    change = torch.zeros(len(matching) + run, dtype=torch.int64)
    change[starts] += 1
    change[starts + run] -= 1
    return int((change.cumsum(0) > 0).sum())


def _runs(window: Tensor, run: int) -> tuple[Tensor, Tensor]:  # [tokens] -> hashes [runs], whether each tells anything [runs]
    """A 64-bit polynomial hash of every run (wrapping arithmetic), and whether it holds enough different tokens."""
    power = torch.tensor([pow(6364136223846793005, at, 2**64) - 2**63 for at in range(run)], dtype=torch.int64)
    runs = window.long().unfold(0, run, 1)
    ordered = runs.sort(1).values
    different = (ordered[:, 1:] != ordered[:, :-1]).sum(1) + 1
    return ((runs + 1) * power).sum(1), different >= min(DULL, run)
