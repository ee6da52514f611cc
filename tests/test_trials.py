"""What a serve step refuses before it starts a server, and what of its answers is no number."""

from __future__ import annotations

from pathlib import Path

import pytest
from apiserver import ApiServer

from buildsys.errors import BuildError
from buildsys.serving import trial
from buildsys.serving.client import Client
from buildsys.serving.settings import Settings
from buildsys.trials import _have_room


@pytest.mark.parametrize("prompts", ([[1] * 20, [1] * 57], [[1], []]), ids=("long", "empty"))
def test_a_prompt_without_room_for_its_answer(prompts: list[list[int]]) -> None:
    _have_room([[1] * 56], 8, 64, "recipes/x.yaml:9")
    with pytest.raises(BuildError, match=f"prompt 2 of 2 has {len(prompts[1])} tokens, and 8 are to follow in a session of 64"):
        _have_room(prompts, 8, 64, "recipes/x.yaml:9")


def test_an_answer_that_ends_early_is_an_error() -> None:
    """Few tokens agree more easily, and answers of unequal lengths are no table."""
    asked = trial.Asked(((1, 2), (3, 4)), {1: ((1, 2),)}, 6, 1, False, 10.0, answers=False)
    with ApiServer("short") as server, pytest.raises(BuildError, match=r"prompt 1 of 2 was to be followed by 6 tokens .* and was by 3"):
        trial._questions(trial.Case("artifact", Path(), Settings("turbomind", {}), 1), asked, Client(server.url, 10), lambda _: None)
