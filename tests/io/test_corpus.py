"""Text to windows of tokens: either tokenizer, drawn the same twice, too little is an error; shared text is found wherever it stands."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import corpus
from tests import models


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece tokenizer.model, as InternLM2 and Llama 2 ship one."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(models.prose(3000).splitlines()),
        model_writer=made,
        vocab_size=200,
        model_type="bpe",
        byte_fallback=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(made.getvalue())
    return path


@pytest.fixture
def fast(tmp_path: Path) -> Path:
    models.write_tokenizer(tmp_path)
    return tmp_path / "tokenizer.json"


# Tokenizers


def test_tokenizer_json_is_read(fast: Path) -> None:
    encode = corpus.tokenizer({"tokenizer.json": fast}, "source")
    text = "The river — winter.\n\nE=mc²"
    assert encode(text) == tokenizers.Tokenizer.from_file(str(fast)).encode(text).ids and len(encode(text)) > 5
    assert encode("") == []


def test_no_token_is_added_cut_or_padded(fast: Path) -> None:
    """Whatever a publisher has set for training: a text's tokens are the text's."""
    plain = corpus.tokenizer({"tokenizer.json": fast}, "source")("river stone winter")
    raw = tokenizers.Tokenizer.from_file(str(fast))
    raw.enable_truncation(2)
    raw.enable_padding(length=64)
    raw.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    fast.write_text(raw.to_str())
    assert len(tokenizers.Tokenizer.from_file(str(fast)).encode("river stone winter").ids) == 64
    assert corpus.tokenizer({"tokenizer.json": fast}, "source")("river stone winter") == plain


def test_sentencepiece_is_read(pieces: Path) -> None:
    encode = corpus.tokenizer({"tokenizer.model": pieces}, "source")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    assert encode("the river and the stone") == theirs.encode("the river and the stone")
    assert theirs.bos_id() not in encode("the river") and all(isinstance(token, int) for token in encode("the river"))


def test_tokenizer_json_goes_before_tokenizer_model(fast: Path, pieces: Path) -> None:
    both = corpus.tokenizer({"tokenizer.model": pieces, "tokenizer.json": fast}, "source")
    assert both("winter") == corpus.tokenizer({"tokenizer.json": fast}, "source")("winter")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\x00", b"version https://git-lfs.github.com/spec/v1\n"], ids=str)
def test_a_damaged_tokenizer_is_an_error_with_its_name(name: str, raw: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(BuildError, match=r"source/tokenizer\..* +cannot be read"):
        corpus.tokenizer({name: tmp_path / name}, "source")


def test_a_model_without_a_tokenizer_is_an_error() -> None:
    with pytest.raises(BuildError, match="neither"):
        corpus.tokenizer({"config.json": Path("config.json")}, "source")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_decoder_is_the_tokenizers_inverse(name: str, fast: Path, pieces: Path) -> None:
    files = {name: fast if name == "tokenizer.json" else pieces}
    text = "the river and the winter stone."
    assert corpus.decoder(files, "source")(corpus.tokenizer(files, "source")(text)) == text
    assert corpus.decoder(files, "source")([]) == ""


def test_special_tokens_are_not_written(fast: Path) -> None:
    assert (
        corpus.decoder({"tokenizer.json": fast}, "source")(
            [models.BOS, *corpus.tokenizer({"tokenizer.json": fast}, "")("stone"), models.EOS]
        )
        == "stone"
    )


def test_a_tokenizer_of_another_model_is_refused() -> None:
    tokens = torch.tensor([[1, 319]], dtype=torch.int32)
    assert corpus.within(tokens, 320, "calibration") is tokens
    with pytest.raises(BuildError, match=r"319.*319"):
        corpus.within(tokens, 319, "calibration")


# Windows


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=30), max_size=8), st.integers(1, 12), st.integers(0, 2**31))
def test_windows_are_cut_from_the_text_each_at_most_once(texts: list[str], seqlen: int, seed: int) -> None:
    ids = letters("".join(text if text.endswith("\n") else text + "\n" for text in texts))
    whole = [ids[at : at + seqlen] for at in range(0, len(ids) - seqlen + 1, seqlen)]
    if not whole:
        with pytest.raises(BuildError):
            corpus.windows(texts, letters, 1, seqlen, seed, "calibration")
        return
    found = corpus.windows(texts, letters, len(whole), seqlen, seed, "calibration")
    assert found.dtype == torch.int32 and sorted(found.tolist()) == sorted(whole)
    assert torch.equal(found, corpus.windows(iter(texts), letters, len(whole), seqlen, seed, "calibration"))
    assert torch.equal(found[:1], corpus.windows(texts, letters, 1, seqlen, seed, "calibration"))


def test_texts_end_as_they_are_told_to() -> None:
    assert corpus.windows(["a", "b\n"], letters, 1, 4, 0, "").tolist() == [letters("a\nb\n")]
    assert corpus.windows(["a", "b\n", ""], letters, 1, 3, 0, "", end="").tolist() == [letters("ab\n")]


def test_seeds_draw_other_windows() -> None:
    text = [json.dumps(list(range(2000)))]
    runs = [corpus.windows(text, letters, 20, 16, seed, "calibration") for seed in (0, 1)]
    assert not torch.equal(runs[0], runs[1])
    assert runs[0].is_contiguous()


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(BuildError) as caught:
        corpus.windows(["a" * 99], letters, 4, 32, 0, "recipes/q.yaml:5")
    assert caught.value.where == "recipes/q.yaml:5" and "samples: 3" in caught.value.fix
    assert "100 tokens, 3 windows of 32; 4" in caught.value.what
    with pytest.raises(BuildError) as caught:
        corpus.windows(["a"], letters, 4, 32, 0, "recipes/q.yaml:5")
    assert "smaller seqlen" in caught.value.fix
    with pytest.raises(BuildError):
        corpus.windows([], letters, 1, 2, 0, "recipes/q.yaml:5")


# Shared text


def stream(length: int, seed: int) -> Tensor:
    return torch.randint(0, 5000, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def cut(ids: Tensor, seqlen: int, start: int = 0) -> Tensor:
    return ids[start : start + (len(ids) - start) // seqlen * seqlen].view(-1, seqlen)


def test_the_same_windows_are_found() -> None:
    theirs = cut(stream(1280, 1), 128)
    ours = torch.cat([cut(stream(256, 2), 128), theirs[3:4], cut(stream(128, 3), 128)])
    assert corpus.shared_windows(ours, theirs) == [2]
    assert corpus.shared_windows(theirs, theirs) == list(range(10))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 127), st.sampled_from([24, 32, 64, 100, 300]), st.sampled_from([32, 64, 128]), st.integers(0, 2**31))
def test_the_same_text_is_found_shifted_and_at_other_lengths(shift: int, ours_long: int, theirs_long: int, seed: int) -> None:
    """A window of ours may lie across two of theirs, half in each."""
    text = stream(1500, seed)
    ours, theirs = cut(text, ours_long, shift), cut(text, theirs_long)
    inside = [row for row in range(len(ours)) if shift + (row + 1) * ours_long <= theirs.numel()]
    assert set(inside) <= set(corpus.shared_windows(ours, theirs)) and inside


def test_a_quarter_of_a_window_is_enough_and_a_phrase_is_not() -> None:
    theirs = cut(stream(512, 1), 256)
    for copied, shared in ((160, [0]), (100, [0]), (40, [])):
        ours = cut(stream(256, 2), 256).clone()
        ours[0, 50 : 50 + copied] = theirs[1, 20 : 20 + copied]
        assert corpus.shared_windows(ours, theirs) == shared, copied


def test_distinct_text_passes() -> None:
    assert corpus.shared_windows(cut(stream(4096, 1), 128), cut(stream(4096, 2), 128)) == []
    texts = (models.prose(3000, seed) for seed in (1, 2))  # few words, and the same
    ours, theirs = (cut(torch.tensor(letters(text), dtype=torch.int32), 256) for text in texts)
    assert corpus.shared_windows(ours, theirs) == []


def test_runs_that_say_nothing_are_no_shared_text() -> None:
    dull = torch.tensor([7, 7, 7, 9, 7, 11], dtype=torch.int32).repeat(30)
    ours, theirs = stream(256, 1), stream(256, 2)
    ours[:180], theirs[40:220] = dull, dull
    assert corpus.shared_windows(ours[None], theirs[None]) == []
    told = stream(180, 3)
    ours[:180], theirs[40:220] = told, told
    assert corpus.shared_windows(ours[None], theirs[None]) == [0]


def test_windows_shorter_than_a_run_are_compared_too() -> None:
    text = stream(160, 1)
    assert corpus.shared_windows(cut(text, 16)[2:4], cut(text, 16)) == [0, 1]
    assert corpus.shared_windows(cut(stream(160, 2), 16), cut(text, 16)) == []


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(20, 60))
def test_runs_are_equal_exactly_where_their_hashes_are(seed: int, length: int) -> None:
    window = torch.randint(0, 3, (length,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    hashes, telling = corpus._runs(window, 8)
    runs = [tuple(window[at : at + 8].tolist()) for at in range(length - 7)]
    assert [[a == b for a in hashes.tolist()] for b in hashes.tolist()] == [[a == b for a in runs] for b in runs]
    assert telling.tolist() == [len(set(run)) >= min(corpus.DULL, 8) for run in runs]
