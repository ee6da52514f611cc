"""Files of a split: as the README says or as names tell; what is ambiguous lists its choices, and no script is ever the answer."""

from __future__ import annotations

import pytest

from buildsys.errors import BuildError
from buildsys.io import splits


def card(configs: str) -> str:
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n# A dataset\n---\nconfigs: no\n"


def choose(*names: str, readme: str = "", config: str | None = None, split: str = "train", where: str = "org/name") -> tuple[str, ...]:
    return splits.choose(names, readme, config, split, where)


def refused(*names: str, readme: str = "", config: str | None = None, split: str = "train", where: str = "org/name") -> BuildError:
    with pytest.raises(BuildError) as caught:
        choose(*names, readme=readme, config=config, split=split, where=where)
    assert caught.value.fix
    return caught.value


# By the README

WIKITEXT = card(
    """- config_name: wikitext-103-v1
  data_files:
  - {split: test, path: wikitext-103-v1/test-*}
  - {split: train, path: wikitext-103-v1/train-*}
- config_name: wikitext-2-v1
  data_files:
  - split: test
    path: wikitext-2-v1/test-*"""
)
FILES = (
    "README.md",
    "wikitext-103-v1/test-00000-of-00001.parquet",
    "wikitext-2-v1/test-00000-of-00001.parquet",
    "wikitext-103-v1/train-00000-of-00002.parquet",
    "wikitext-103-v1/train-00001-of-00002.parquet",
)


def test_a_config_and_a_split() -> None:
    assert choose(*FILES, readme=WIKITEXT, config="wikitext-103-v1") == FILES[-2:]
    assert choose(*FILES, readme=WIKITEXT, config="wikitext-2-v1", split="test") == (FILES[2],)


def test_several_configs_list_themselves() -> None:
    assert "2 configs: wikitext-103-v1, wikitext-2-v1" in refused(*FILES, readme=WIKITEXT).what
    assert "has no config x; it has wikitext-103-v1, wikitext-2-v1" in refused(*FILES, readme=WIKITEXT, config="x").what
    assert "has no split train; its splits: test" in refused(*FILES, readme=WIKITEXT, config="wikitext-2-v1").what


@pytest.mark.parametrize(
    ("configs", "chosen"),
    [
        ("- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl, default: true}", "b.jsonl"),
        ("- {config_name: a, data_files: a.jsonl}\n- {config_name: default, data_files: c.jsonl}", "c.jsonl"),
        ("- {config_name: a, data_files: [a.jsonl]}", "a.jsonl"),
        ("- {config_name: a, data_files: {train: b.jsonl, test: a.jsonl}}", "b.jsonl"),
        ("- {config_name: a, data_files: [{split: train, path: [c.jsonl]}, {split: test, path: '*.jsonl'}]}", "c.jsonl"),
        ("- {config_name: a, data_dir: ./deep/, data_files: '*.jsonl'}", "deep/d.jsonl"),
        ("- {config_name: a, data_dir: deep}", "deep/d.jsonl"),
    ],
)
def test_the_ways_to_write_configs(configs: str, chosen: str) -> None:
    assert choose("a.jsonl", "b.jsonl", "c.jsonl", "deep/d.jsonl", "name.py", readme=card(configs)) == (chosen,)


def test_windows_line_ends_and_cards_without_configs() -> None:
    readme = card("- {config_name: a, data_files: b.jsonl}").replace("\n", "\r\n")
    assert choose("a.jsonl", "b.jsonl", readme=readme) == ("b.jsonl",)
    for nothing in ("", "# Title", "---\n", "---\nlicense: mit\n---\n", "---\n- a\n---\n", "---\nconfigs: 3\n---\n"):
        assert choose("train.jsonl", readme=nothing) == ("train.jsonl",)


@pytest.mark.parametrize(
    ("configs", "what"),
    [
        ("  - [", "no YAML"),
        ("- 3", "cannot be understood"),
        ("- {config_name: a, data_files: [{split: train}]}", "cannot be understood"),
        ("- {config_name: a, data_files: 3}", "cannot be understood"),
        ("- !!python/object/apply:os.system ['true']", "no YAML"),
        ("- " + "[" * 100_000, "levels of nesting"),
        ("- &a {x: 1}\n- {<<: *a}", "no YAML"),
        ("- {config_name: a, data_files: gone-*}", "which no file of"),
        ("- {config_name: a, data_files: a.csv}", "which no file of"),
    ],
)
def test_a_card_that_cannot_be_followed(configs: str, what: str) -> None:
    error = refused("a.jsonl", "a.csv", readme=card(configs))
    assert what in error.what and "files:" in error.fix


# By names


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/validation-00000-of-00001.parquet", "validation"),
        ("data/train_sft-00000-of-00001-a1b2c3d4e5f60718.parquet", "train_sft"),
        ("my-dev.json.gz", "validation"),
        ("en/c4-train.00000-of-01024.json.gz", "train"),
        ("squad-v2.0.dev.json", "validation"),
        ("testing/part 1.txt", "test"),
        ("eval/x.jsonl", "test"),
        ("test/train.jsonl", "train"),
        ("train2.jsonl", "train"),
        ("contrain.jsonl", None),
        ("latest.jsonl", None),
        ("developer.jsonl", None),
        ("data.jsonl", None),
    ],
)
def test_names_tell_a_split(name: str, split: str | None) -> None:
    assert splits.split_of(name) == split


def test_the_files_of_a_split() -> None:
    names = ("README.md", "dataset_infos.json", "data/dev.jsonl", "data/train-1.jsonl", "data/train-2.jsonl", "notes.txt", "LICENSE")
    assert choose(*names) == ("data/train-1.jsonl", "data/train-2.jsonl")
    assert choose(*names, split="validation") == choose(*names, split="val") == ("data/dev.jsonl",)
    assert "no split test; its splits: train, validation" in refused(*names, split="test").what


def test_files_that_tell_nothing_are_train() -> None:
    assert choose("a.jsonl", "b.jsonl", "README.md") == ("a.jsonl", "b.jsonl")
    assert "no split test; its splits: train" in refused("a.jsonl", split="test").what


def test_folders_are_configs_where_several_hold_the_split() -> None:
    names = ("de/train.jsonl", "en/train.jsonl", "en/test.jsonl")
    assert "in 2 folders: de, en" in refused(*names).what and "config:" in refused(*names).fix
    assert choose(*names, config="en") == ("en/train.jsonl",)
    assert choose(*names, split="test") == ("en/test.jsonl",)
    assert "has no folder fr; it has de, en" in refused(*names, config="fr").what
    assert choose("train/a/1.jsonl", "train/b/2.jsonl") == ("train/a/1.jsonl", "train/b/2.jsonl")


def test_the_hubs_own_conversion() -> None:
    names = ("main/train/0000.parquet", "main/train/0001.parquet", "main/test/0000.parquet", "socratic/train/0000.parquet")
    assert choose(*names, config="main") == names[:2]
    assert "2 configs: main, socratic" in refused(*names).what
    assert "no config x; it has main, socratic" in refused(*names, config="x").what
    assert choose(*names[:3]) == names[:2]
    assert "main has no split validation; its splits: test, train" in refused(*names[:3], split="validation").what
    assert choose(*names, "default/partial-train/0000.parquet", split="partial-train") == ("default/partial-train/0000.parquet",)


def test_the_same_rows_twice_are_refused() -> None:
    assert "train.jsonl and train.jsonl.gz" in refused("train.jsonl", "train.jsonl.gz").what
    assert "more than one form" in refused("train.jsonl", "train.parquet").what and "files:" in refused("train.txt", "train.json").fix


# Scripts


def test_a_script_is_never_the_answer() -> None:
    error = refused("ptb_text_only.py", "README.md", "data/train.txt", where="ptb-text-only/ptb_text_only")
    assert "a script, ptb_text_only.py" in error.what and "refs/convert/parquet" in error.fix and "files:" in error.fix
    error = refused("loader.py", "raw.zip")
    assert "it holds .py, .zip" in error.what and "refs/convert/parquet" in error.fix
    assert choose("prepare.py", "train.jsonl") == ("train.jsonl",), "a script of another name made the data, and does not read it"


def test_what_cannot_be_read_is_said() -> None:
    error = refused("train.csv", "a.arrow", "README.md")
    assert "it holds .arrow, .csv, .md" in error.what and "refs/convert" not in error.fix
    assert "it holds nothing" in refused().what


def test_what_half_a_repository_cannot_tell() -> None:
    two = ["a/train-00000-of-00002.parquet", "a/train-00001-of-00002.parquet"]
    assert (
        splits.uncertain(two, []) == [] == splits.uncertain(["en/c4-train.00000-of-01024.json.gz"], ["en/c4-train.00000-of-01024.json.gz"])
    )
    assert splits.uncertain(two[:1], []) == two[:1]
    assert splits.uncertain(["train.jsonl", "b.jsonl"], ["b.jsonl"]) == ["train.jsonl"]
