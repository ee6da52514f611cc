"""The scripted repository, and what `doit diff` says of each change to it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import scripted
from hubserver import HubServer
from scripted import Team


@pytest.fixture(scope="session")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    place = tmp_path_factory.mktemp("team")
    with HubServer() as hub:
        older, newer = scripted.dataset(hub)
        yield Team(scripted.repository(place / "repository", older), hub, newer, place / "home")


@pytest.fixture(scope="session")
def comments(team: Team, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The comment on each change, as golden/ has it: the commit that it was made against is not the same everywhere."""
    found = {}
    for name in scripted.CHANGES:
        said = team.diff("format=markdown", folder=team.changed(name, tmp_path_factory.mktemp(name) / "repository")).fine().out
        found[name] = re.sub(r"(?<=<code>main</code> \(<code>)[0-9a-f]{12}", "COMMIT", said)
    return found
