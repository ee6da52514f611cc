"""The same prompts every time, inside the vocabulary and the session."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.serving.bench import HEAD, Prompts, row
from buildsys.serving.load import Rate


@given(vocab_size=st.integers(2, 200_000), session_len=st.integers(4, 40_000), batch=st.integers(1, 8))
def test_prompts_fit(vocab_size: int, session_len: int, batch: int) -> None:
    prompts = Prompts.fitting(vocab_size, session_len, "here")
    drawn = prompts.draw(batch)
    assert drawn == prompts.draw(batch) and len(drawn) >= 2 * batch
    assert all(len(one) == prompts.tokens >= 1 and min(one) >= 0 and max(one) < vocab_size for one in drawn)
    assert prompts.new_tokens >= 1 and prompts.tokens + prompts.new_tokens <= session_len


def test_prompts_differ() -> None:
    drawn = Prompts.fitting(32_000, 4096, "here").draw(32)
    assert len({tuple(one) for one in drawn}) == len(drawn) and min(map(min, drawn)) >= 1000


def test_a_session_that_holds_nothing() -> None:
    with pytest.raises(BuildError, match="session_len is 3"):
        Prompts.fitting(1000, 3, "here")


def test_a_row_stands_under_its_head() -> None:
    shown = row(Rate(32, 128, 256, 2.0, 12_854.2, 0.0421))
    assert shown.split() == ["32", "12,854.2", "401.7", "42.1", "ms"] and len(shown) == len(HEAD)
