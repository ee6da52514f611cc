"""Every publisher of the folder: a rerun changes nothing, a dry run sends nothing, what is read back has the release's digests, an altered
file is found, an earlier release can be made the current one again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from publishers.places import PLACES, Place, release

from buildsys import slots
from buildsys.errors import BuildError
from buildsys.publishers import Receipt


def quiet(what: str, done: int, total: int) -> None:
    assert what and 0 <= done <= total


@pytest.fixture(params=slots.modules("publishers"))
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    assert request.param in PLACES, f"tests/publishers/places.py has no place for {request.param}"
    with PLACES[request.param](tmp_path, monkeypatch) as made:
        yield made


def test_rerun_is_idempotent(place: Place, tmp_path: Path) -> None:
    one = release(tmp_path / "one", "a")
    first = place.module.publish(place.knobs, one, place.to, quiet)
    before = place.state()
    assert place.module.publish(place.knobs, one, place.to, quiet) == first and place.state() == before


def test_dry_run_sends_nothing(place: Place, tmp_path: Path) -> None:
    one, two = release(tmp_path / "one", "a"), release(tmp_path / "two", "b", notes="new")
    before = place.state()
    lines = place.module.plan(place.knobs, one, place.to)
    assert lines and all(isinstance(line, str) for line in lines) and place.state() == before
    place.module.publish(place.knobs, one, place.to, quiet)
    before = place.state()
    assert place.module.plan(place.knobs, one, place.to) != lines
    assert place.module.plan(place.knobs, two, place.to) and place.state() == before


def test_read_back_digests_match(place: Place, tmp_path: Path) -> None:
    for made in (release(tmp_path / "one", "a", gone="soon"), release(tmp_path / "two", "b", notes="new")):
        receipt = place.module.publish(place.knobs, made, place.to, quiet)
        assert isinstance(receipt, Receipt) and receipt.digest == made.digest and "://" in receipt.url
        assert place.module.verify(place.knobs, made, place.to, quiet) == receipt


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_altered_file_is_found(name: str, place: Place, tmp_path: Path) -> None:
    one = release(tmp_path / "one", "a")
    with pytest.raises(BuildError):
        place.module.verify(place.knobs, one, place.to, quiet)
    place.module.publish(place.knobs, one, place.to, quiet)
    place.tamper(name)
    with pytest.raises(BuildError) as caught:
        place.module.verify(place.knobs, one, place.to, quiet)
    assert name in caught.value.what and caught.value.fix
    place.module.publish(place.knobs, one, place.to, quiet)
    assert place.module.verify(place.knobs, one, place.to, quiet).digest == one.digest


def test_rollback_restores_an_earlier_release(place: Place, tmp_path: Path) -> None:
    one, two = release(tmp_path / "one", "a", gone="soon"), release(tmp_path / "two", "b", notes="new")
    first = place.module.publish(place.knobs, one, place.to, quiet)
    place.module.publish(place.knobs, two, place.to, quiet)
    assert place.module.rollback(place.knobs, one.digest[:10], place.to, quiet) == first
    assert place.module.verify(place.knobs, one, place.to, quiet) == first
    with pytest.raises(BuildError):
        place.module.verify(place.knobs, two, place.to, quiet)
    before = place.state()
    assert place.module.rollback(place.knobs, one.digest, place.to, quiet) == first and place.state() == before, "again: nothing changes"
    assert place.module.rollback(place.knobs, two.digest, place.to, quiet).digest == two.digest


def test_rollback_to_what_is_not_there_tells_what_is(place: Place, tmp_path: Path) -> None:
    with pytest.raises(BuildError):
        place.module.rollback(place.knobs, "0" * 64, place.to, quiet)
    one = release(tmp_path / "one", "a")
    place.module.publish(place.knobs, one, place.to, quiet)
    before = place.state()
    with pytest.raises(BuildError) as caught:
        place.module.rollback(place.knobs, "0" * 64, place.to, quiet)
    assert one.digest[:16] in caught.value.what + caught.value.fix and place.state() == before


def test_a_release_is_named_alike_everywhere(place: Place, tmp_path: Path) -> None:
    one, two = release(tmp_path / "one", "a"), release(tmp_path / "two", "b")
    first = place.module.publish(place.knobs, one, place.to, quiet)
    for asked in (one.tag, f"sha256-{one.digest}", one.digest[:8], one.digest[:20], one.digest):
        place.module.publish(place.knobs, two, place.to, quiet)
        assert place.module.rollback(place.knobs, asked, place.to, quiet) == first
    before = place.state()
    for asked in ("", one.digest[:7], one.tag[:-1], f"{one.digest}0", f"sha256:{one.digest}", one.tag.upper(), "sha256-", "latest"):
        with pytest.raises(BuildError, match="names no release") as caught:
            place.module.rollback(place.knobs, asked, place.to, quiet)
        assert "8 to 64 hexadecimal digits" in caught.value.fix
    longer = one.digest[:16] + ("1" if one.digest[16] == "0" else "0") * 48
    with pytest.raises(BuildError):
        place.module.rollback(place.knobs, longer, place.to, quiet)
    assert place.state() == before, "digits beyond those of the tag count too"


def test_modules_are_slots(place: Place) -> None:
    assert isinstance(place.module.VERSION, int) and isinstance(place.knobs, slots.Frozen)
    for name, field in type(place.knobs).model_fields.items():
        assert field.description, f"{name} has no description: recipe.schema.json shows it to editors"
