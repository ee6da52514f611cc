"""Audit: one altered bit, one file more or less, another key: always found and named. Nothing in a stranger's folder ends it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import pytest
import released
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from buildsys import deploy
from buildsys.errors import BuildError
from buildsys.formats import awq
from buildsys.io.checkpoint import Checkpoint, save
from buildsys.quant.grid import min_max
from buildsys.release import pickles
from buildsys.release.audit import MAX_BYTES, Audit, audit
from buildsys.release.provenance import ENVELOPE, RECIPE, SIGNATURE, STATEMENT, SUMS, document, sums
from buildsys.release.signing import Signer, hint
from buildsys.scheme import Scheme, Schemes


def look(folder: Path, key: Path | None = None) -> Audit:
    return audit(folder, key, lambda what, done, total: None)


def found(folder: Path, key: Path | None = None) -> dict[str, str]:
    """Findings by the file that they name."""
    return {os.path.relpath(one.where.partition(":")[0].partition(" ")[0], folder): one.what for one in look(folder, key).findings}


def told(audited: Audit, part: str) -> str:
    return "; ".join(line for line in audited.lines if line.startswith(part))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return released.keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unsigned release. Nobody alters it for good."""
    return released.release(tiny, tmp_path_factory.mktemp("plain") / "release")


@pytest.fixture(scope="module")
def signed(tiny: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.release(tiny, tmp_path_factory.mktemp("signed") / "release", Signer.read(keys[0]))


@contextmanager
def holding(path: Path, raw: bytes) -> Iterator[None]:
    """`path` with other content for a while."""
    before = path.read_bytes()
    path.write_bytes(raw)
    try:
        yield
    finally:
        path.write_bytes(before)


# Releases


def test_a_release_is_as_it_was(plain: Path, signed: Path, keys: tuple[Path, Path]) -> None:
    for folder, key, said in (
        (plain, None, "unsigned"),
        (signed, None, "signed, not checked: give key="),
        (signed, keys[1], "signed by the key"),
    ):
        seen = look(folder, key)
        assert not seen.findings and said in told(seen, "signature") and "are as SHA256SUMS says" in told(seen, "digests")
        assert "recipe tiny, 7 input files" in told(seen, "provenance") and "14 packed linears are sound" in told(seen, "weights")


def test_a_key_for_what_is_not_signed(plain: Path, keys: tuple[Path, Path]) -> None:
    assert found(plain, keys[1])[SIGNATURE] == "is missing: the folder is not signed, and key= was given"


def test_another_key(signed: Path, tmp_path: Path) -> None:
    seen = found(signed, released.keys(tmp_path)[1])
    assert seen.keys() == {SIGNATURE, ENVELOPE} and all("was signed by the key" in what for what in seen.values())


def bits(folder: Path) -> st.SearchStrategy[tuple[str, int]]:
    """A file, and a bit in it."""
    sizes = {name: (folder / name).stat().st_size for name in released.digests(folder)}
    return st.sampled_from(sorted(sizes)).flatmap(lambda name: st.tuples(st.just(name), st.integers(0, 8 * sizes[name] - 1)))


def flip(path: Path, bit: int) -> bytes:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    return bytes(raw)


SLOW = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def test_a_bit_of_any_file_with_the_key(signed: Path, keys: tuple[Path, Path]) -> None:
    @SLOW
    @given(bits(signed))
    @example((SIGNATURE, 0))
    @example((ENVELOPE, 0))
    @example((SUMS, 0))
    @example(("model.safetensors", 0))
    def always(at: tuple[str, int]) -> None:
        name, bit = at
        with holding(signed / name, flip(signed / name, bit)):
            assert name in found(signed, keys[1])

    always()


def test_a_bit_of_any_file_without_the_key(signed: Path, plain: Path) -> None:
    """In model.sig, all but the value of the signature: what that should be, only the key can tell."""
    raw = (signed / SIGNATURE).read_bytes()
    value = json.loads(raw)["dsseEnvelope"]["signatures"][0]["sig"].encode()
    unknown = range(8 * raw.index(value), 8 * (raw.index(value) + len(value)))

    @SLOW
    @given(st.one_of(st.tuples(st.just(signed), bits(signed)), st.tuples(st.just(plain), bits(plain))))
    @example((signed, (SIGNATURE, 0)))
    @example((plain, (SUMS, 0)))
    def always(at: tuple[Path, tuple[str, int]]) -> None:
        folder, (name, bit) = at
        if name == SIGNATURE and bit in unknown:
            return
        with holding(folder / name, flip(folder / name, bit)):
            assert name in found(folder)

    always()


def test_a_bit_of_every_part_of_a_model_signature_without_the_key(signed: Path) -> None:
    """A bit in every 31st byte, in turn another one: whatever part of the file it is in."""
    raw = (signed / SIGNATURE).read_bytes()
    value = json.loads(raw)["dsseEnvelope"]["signatures"][0]["sig"].encode()
    for at in range(0, len(raw), 31):
        if not raw.index(value) <= at < raw.index(value) + len(value):
            with holding(signed / SIGNATURE, flip(signed / SIGNATURE, 8 * at + at % 7)):
                assert SIGNATURE in found(signed), f"byte {at}"


ADDED: dict[str, Callable[[Path], Any]] = {
    "notes.txt": lambda path: path.write_text("x"),
    ".hidden": lambda path: path.write_text("x"),
    "provenance/.more": lambda path: path.write_text("x"),
    "new/deep/file": lambda path: (path.parent.mkdir(parents=True), path.write_text("")),
    "link": lambda path: path.symlink_to("config.json"),
    "dead": lambda path: path.symlink_to("nowhere"),
    "folder-link": lambda path: path.symlink_to("deploy"),
    "loop": lambda path: path.symlink_to("loop"),
    "pipe": lambda path: os.mkfifo(path),
    "deploy/.gitattributes": lambda path: path.write_text("x"),
    ".cache/other": lambda path: (path.parent.mkdir(), path.write_text("x")),
    ".gitignore": lambda path: path.write_text("x"),
    ".github/workflow": lambda path: (path.parent.mkdir(), path.write_text("x")),
    "model.safetensors.bak": lambda path: path.write_text("x"),
    "\x1b[31mred\n": lambda path: path.write_text("x"),
}


@pytest.mark.parametrize("name", ADDED, ids=repr)
def test_a_file_more(name: str, plain: Path, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for number, (source, key) in enumerate(((plain, None), (signed, None), (signed, keys[1]))):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        ADDED[name](folder / name)
        where = str(folder / name).encode("unicode_escape").decode() if "\x1b" in name else str(folder / name)
        assert where in [one.where for one in look(folder, key).findings]


def test_a_file_less(signed: Path, plain: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for source, key in ((plain, None), (signed, None), (signed, keys[1])):
        for name in released.digests(source):
            folder = Path(shutil.copytree(source, tmp_path / "copy"))
            (folder / name).unlink()
            assert name in found(folder, key), name
            shutil.rmtree(folder)


def test_an_empty_folder_is_nothing(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    (folder / "empty" / "deep").mkdir(parents=True)
    assert not look(folder, keys[1]).findings


def test_what_hubs_and_clients_add_is_named_and_ignored(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    released.write(folder, {".gitattributes": b"*", ".git/HEAD": b"x", ".cache/huggingface/download/a.metadata": b"x"})
    seen = look(folder, keys[1])
    assert not seen.findings and told(seen, "ignored").startswith("ignored     .cache/huggingface, .git, .gitattributes:")


def test_what_modelscope_writes_is_named_and_ignored(plain: Path, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for number, (source, key) in enumerate(((plain, None), (signed, None), (signed, keys[1]))):
        folder = Path(shutil.copytree(source, tmp_path / str(number)))
        released.write(folder, {"configuration.json": b'{"framework":"Pytorch","task":"text-generation"}'})
        seen = look(folder, key)
        assert not seen.findings and told(seen, "ignored").startswith("ignored     configuration.json:")
        released.write(folder, {"configuration.json": b'{"framework":"Pytorch","plugins":["a-package"]}'})
        assert "was added" in found(folder, key)["configuration.json"]
        (folder / "configuration.json").unlink()
        (folder / "configuration.json").symlink_to("config.json")
        assert "a release holds files" in found(folder, key)["configuration.json"]


def test_a_configuration_of_the_release_itself_is_checked(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    released.write(folder, {"configuration.json": b'{"ours": 1}'})
    (folder / SIGNATURE).unlink()
    (folder / SIGNATURE).write_bytes(Signer.read(keys[0]).sign(folder))
    listed = (folder / SUMS).read_text()
    assert "configuration.json" in found(folder, keys[1]), "model.sig lists it, SHA256SUMS does not"
    files = {name: sha256 for name, sha256 in released.digests(folder).items() if name not in (SUMS, SIGNATURE)}
    (folder / SUMS).write_bytes(sums(files))
    (folder / SIGNATURE).write_bytes(Signer.read(keys[0]).sign(folder))
    released.write(folder, {"configuration.json": b'{"ours": 2}'})
    assert "was changed (SHA256SUMS, model.sig)" in found(folder, keys[1])["configuration.json"] and "configuration.json" not in listed


def test_a_file_is_named_once_and_says_each_thing_once(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    (folder / "tokenizer.json").write_bytes(b"{}")
    (folder / "config.json").unlink()
    (folder / "more.txt").touch()
    by = "SHA256SUMS, statement.json, model.sig"
    seen = {one.where: one.what for one in audit(folder, keys[1], lambda *step: None, "my-org/tiny").findings}
    assert seen["my-org/tiny/tokenizer.json"].startswith(f"was changed ({by}): sha256 44136fa355b3…, not ")
    assert seen["my-org/tiny/tokenizer.json"].count("was changed") == 1
    assert seen["my-org/tiny/config.json"] == f"is missing (listed in {by})"
    assert seen["my-org/tiny/more.txt"] == f"was added (not listed in {by})"
    assert set(found(folder, keys[1])) == {"tokenizer.json", "config.json", "more.txt"}, "as the user gave it, where it is a path"


def test_the_key_is_shown_as_a_build_shows_it(signed: Path, keys: tuple[Path, Path]) -> None:
    shown = hashlib.sha256(keys[1].read_bytes()).hexdigest()[:16]
    assert hint(Signer.read(keys[0]).public)[:16] == shown, "what `doit build` prints"
    assert f"signed by the key {shown}" in told(look(signed, keys[1]), "signature")
    assert f"it names the key {shown})" in told(look(signed), "signature")


def test_links_into_the_hubs_cache_are_read_and_others_are_not_trusted(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--org--name" / "blobs"
    for name, sha256 in released.digests(signed).items():
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        blobs.mkdir(exist_ok=True)
        shutil.copyfile(signed / name, blobs / sha256)
        (snapshot / name).symlink_to(os.path.relpath(blobs / sha256, (snapshot / name).parent))
    seen = look(snapshot, keys[1])
    assert not seen.findings and "lie in the hub's cache" in told(seen, "links")
    blob = (snapshot / "config.json").resolve()
    with holding(blob, b"{}"):
        assert "config.json" in found(snapshot, keys[1])
    shutil.move(blob, tmp_path / "elsewhere")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere")
    assert "a release holds files" in found(snapshot, keys[1])["config.json"]


def test_everything_rewritten_but_the_signature(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Who alters a file can make SHA256SUMS and the statement fit again. The signature is what he cannot make fit."""
    folder = Path(shutil.copytree(signed, tmp_path / "copy"))
    (folder / "README.md").write_text("# better\n")
    said = json.loads((folder / STATEMENT).read_bytes())
    for one in said["subject"]:
        if one["name"] == "README.md":
            one["digest"]["sha256"], one["annotations"]["size"] = released.digests(folder)["README.md"], 9
    (folder / STATEMENT).write_bytes(document(said))
    files = {name: sha256 for name, sha256 in released.digests(folder).items() if name not in (SUMS, SIGNATURE)}
    (folder / SUMS).write_bytes(sums(files))
    for key in (None, keys[1]):
        seen = found(folder, key)
        assert {"README.md", STATEMENT, SUMS, ENVELOPE} <= seen.keys() and "was changed (model.sig)" in seen["README.md"]
    other = released.keys(tmp_path / "other")
    (folder / ENVELOPE).write_bytes(Signer.read(other[0]).envelope((folder / STATEMENT).read_bytes()))
    (folder / SIGNATURE).unlink()
    files = {name: sha256 for name, sha256 in released.digests(folder).items() if name != SUMS}
    (folder / SUMS).write_bytes(sums(files))
    (folder / SIGNATURE).write_bytes(Signer.read(other[0]).sign(folder))
    assert not look(folder).findings, "whose key it is, nobody can tell without the right one"
    assert found(folder, keys[1]).keys() == {SIGNATURE, ENVELOPE}


def test_an_unsigned_release_that_others_signed(plain: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    command = ("sign", "key", folder, "--signature", folder / SIGNATURE, "--private_key", keys[0])
    subprocess.run([sys.executable, "-m", "model_signing", *map(str, command)], check=True, capture_output=True)
    seen = look(folder, keys[1])
    assert "signed by the key" in told(seen, "signature")
    assert found(folder, keys[1]) == {ENVELOPE: "is missing: the statement is not signed, and key= was given"}


def test_the_commands_of_the_page_on_provenance(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Others' tools, exactly as docs/provenance.md has them; and each of them finds a change."""
    page = (Path(__file__).parents[2] / "docs" / "provenance.md").read_text()
    script = page.partition("```sh\n")[2].partition("```")[0]
    assert all(tool in script for tool in ("sha256sum", "model_signing verify key", "securesystemslib"))
    shutil.copytree(signed, tmp_path / "DIR")
    shutil.copyfile(keys[1], tmp_path / "public.pem")
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def run(part: str) -> int:
        return subprocess.run(["bash", "-e", "-c", part], cwd=tmp_path, env=environment, capture_output=True, check=False).returncode

    assert run(script) == 0
    with holding(tmp_path / "DIR" / STATEMENT, b"{}"):
        sha256sum, model_signing, securesystemslib = re.split(r"^(?=model_signing|python)", script, flags=re.MULTILINE)
        assert run(sha256sum) and run(model_signing) and run(securesystemslib)


def test_a_statement_by_somebody_else(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    for change, said in (
        (lambda said: said.update(_type="x"), "_type is 'x'"),
        (lambda said: said["predicate"]["buildDefinition"].update(buildType="x"), "predicate.buildDefinition.buildType is 'x'"),
        (lambda said: said.update(predicate=[]), "buildType is None"),
        (lambda said: said.update(subject="x"), "its subjects are not files"),
        (lambda said: said["subject"].append(said["subject"][0]), "its subjects are not files"),
        (lambda said: said["subject"][0]["annotations"].update(size=1), "holds 1 bytes; it holds"),
        (lambda said: said["predicate"].update(runDetails=7), ""),
    ):
        statement = json.loads((plain / STATEMENT).read_bytes())
        change(statement)  # type: ignore[no-untyped-call]
        (folder / STATEMENT).write_bytes(document(statement))
        assert said in "; ".join(found(folder).values()) and STATEMENT in found(folder)


# Folders of strangers


def packed(folder: Path, family: str = "llama") -> Path:
    """A model quantized by rounding alone, as other tools store it: no provenance, no digests."""
    source, scheme = models.FAMILIES[family](folder / "source"), Scheme(4, 32)
    architecture = models.opened(source).architecture
    whole, tensors = Checkpoint(models.files(source)), {}
    linears = {architecture.prefix(layer) + one.name for layer in range(architecture.layers) for one in architecture.linears}
    for name in whole.names():
        stem = name.removesuffix(".weight")
        if stem in linears and name != stem:
            grid = min_max(whole.load(name), scheme)
            tensors |= {f"{stem}.{part}": tensor for part, tensor in awq.pack(grid.linear(grid.round(whole.load(name)))).items()}
        else:
            tensors[name] = whole.load(name).half()
    made = folder / "model"
    made.mkdir()
    save(made / "model.safetensors", tensors)
    said = deploy.config(json.loads((source / "config.json").read_text()), awq.config(Schemes(scheme), []))
    (made / "config.json").write_text(json.dumps(said))
    shutil.copyfile(source / "tokenizer.json", made / "tokenizer.json")
    return made


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_strangers_model_is_sound_and_what_is_unknown_is_said(family: str, tmp_path: Path) -> None:
    seen = look(packed(tmp_path, family))
    assert not seen.findings and "packed linears are sound (4-bit, group 32)" in told(seen, "weights")
    assert "what the files were when they were published is not known" in told(seen, "digests")
    assert "unsigned" in told(seen, "signature") and "none" in told(seen, "provenance")


def resaved(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    whole = Checkpoint(models.files(folder))
    tensors = {name: whole.load(name, None, finite=False) for name in whole.names()}
    change(tensors)
    save(folder / "model.safetensors", tensors)


def test_damaged_weights_name_the_layer_and_the_file(tmp_path: Path) -> None:
    folder, name = packed(tmp_path), "model.layers.1.mlp.down_proj"
    resaved(folder, lambda tensors: tensors[f"{name}.scales"].__setitem__((0, 0), float("nan")))
    assert f"{name} has 1 scales that are NaN" in found(folder)["model.safetensors"]


def test_tensors_that_old_exporters_add_are_no_findings(tmp_path: Path) -> None:
    folder = packed(tmp_path, "qwen2")
    resaved(
        folder,
        lambda tensors: tensors.update(
            {
                "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
            }
        ),
    )
    assert not look(folder).findings
    resaved(folder, lambda tensors: tensors.update({"model.adapter.weight": torch.ones(3).half()}))
    assert "model.adapter.weight belongs to no layer" in found(folder)["model.safetensors"]


def configured(folder: Path, **changed: Any) -> Path:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **changed}))
    return folder


QUANTIZED = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "hqq": ({"quantization_config": {"quant_method": "hqq", "bits": 4}}, "quant_method hqq is not known"),
    "an expression": ({"quantization_config": GPTQ | {"dynamic": {"-:.*(a+)+$": {}}}}, "names modules by the expression '.*(a+)+$'"),
    "act order": ({"quantization_config": GPTQ | {"desc_act": True}}, "has desc_act: True, not False"),
    "no groups": ({"quantization_config": {"quant_method": "compressed-tensors", "quantization_status": "compressed"}}, "no config_groups"),
    "no method": ({"quantization_config": {}}, "quant_method None is not known"),
    "no object": ({"quantization_config": [1]}, "quant_method None is not known"),
    "odd method": ({"quantization_config": {"quant_method": ["awq"]}}, "is not known"),
    "another layout": ({"quantization_config": QUANTIZED | {"version": "gemv"}}, "has version: 'gemv', not 'gemm'"),
    "an odd group": ({"quantization_config": QUANTIZED | {"group_size": 7}}, "has group_size: 7; known are 32, 64, 128, -1"),
    "does not divide": ({"intermediate_size": 264}, "groups of 32 input channels do not divide 264"),
    "an architecture": ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not implemented"),
    "no architecture": ({"architectures": [[]]}, "names no architecture"),
    "odd numbers": ({"hidden_size": -1}, "hidden_size is -1"),
    "odd skips": ({"quantization_config": QUANTIZED | {"modules_to_not_convert": {"a": 1}}}, "not a list of names"),
    "float": ({"quantization_config": None}, "float: nothing is packed"),
}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("foreign"))


@pytest.mark.parametrize(("changed", "said"), UNKNOWN.values(), ids=UNKNOWN)
def test_weights_that_cannot_be_checked_are_not_passed(changed: dict[str, Any], said: str, foreign: Path, tmp_path: Path) -> None:
    seen = look(configured(Path(shutil.copytree(foreign, tmp_path / "copy")), **changed))
    assert said in told(seen, "weights") and "sound" not in told(seen, "weights") and not seen.findings


def test_a_layer_that_stays_float(tmp_path: Path) -> None:
    """As vLLM matches: an entry is a part of a module's name."""
    folder = packed(tmp_path)
    source = Checkpoint(models.files(tmp_path / "source"))

    def leave(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.1." in name and "proj" in name]:
            del tensors[name]
        tensors.update({name: source.load(name).half() for name in source.names() if ".layers.1." in name})

    resaved(folder, leave)
    configured(folder, quantization_config=awq.config(Schemes(Scheme(4, 32)), ["model.layers.1."]))
    assert "7 packed linears are sound" in told(look(folder), "weights")
    configured(folder, quantization_config=awq.config(Schemes(Scheme(4, 32)), []))
    assert "holds a float weight; it was to be quantized" in found(folder)["model.safetensors"]


def huge(folder: Path, name: str) -> None:
    with (folder / name).open("wb") as file:
        file.truncate(MAX_BYTES + 1)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"
HOSTILE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "pointer": ("model.safetensors", lambda it: (it / "model.safetensors").write_bytes(POINTER), "pointer that Git LFS left"),
    "pointer, tokenizer": ("tokenizer.json", lambda it: (it / "tokenizer.json").write_bytes(POINTER), "pointer that Git LFS left"),
    "dead link": (
        "tokenizer.json",
        lambda it: ((it / "tokenizer.json").unlink(), (it / "tokenizer.json").symlink_to("../../blobs/x")),
        "is a link to ../../blobs/x, which is not there",
    ),
    "truncated": ("model.safetensors", lambda it: os.truncate(it / "model.safetensors", 9999), "is truncated"),
    "no header": ("model.safetensors", lambda it: (it / "model.safetensors").write_bytes(b"abc"), "no safetensors file"),
    "pickle": ("pytorch_model.bin", lambda it: (it / "pytorch_model.bin").write_bytes(b"\x80"), "is a pickle, which can run code"),
    "pickle below": ("a/B.PT", lambda it: released.write(it, {"a/B.PT": b"\x80\x05."}), "is a pickle"),
    "pickle, pointer": ("a/b.bin", lambda it: released.write(it, {"a/b.bin": POINTER}), "pointer that Git LFS left"),
    "remote code": ("config.json", lambda it: configured(it, auto_map={"AutoModel": "modeling_x.X"}), "modeling_x.X"),
    "remote tokenizer": (
        "tokenizer_config.json",
        lambda it: (it / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["o/r--t.T", null]}}'),
        "runs? under trust_remote_code|run under trust_remote_code",
    ),
    "deep JSON": ("config.json", lambda it: (it / "config.json").write_bytes(b'{"a":' * 200_000), "nested too deeply"),
    "deep list": ("config.json", lambda it: (it / "config.json").write_bytes(b"[" * 1_000_000), "nested too deeply"),
    "wide JSON": ("config.json", lambda it: huge(it, "config.json"), "at most"),
    "a large number": ("config.json", lambda it: (it / "config.json").write_bytes(b'{"a": ' + b"9" * 400 + b"}"), "has 400 digits"),
    "many layers": ("config.json", lambda it: configured(it, num_hidden_layers=10**15), "num_hidden_layers is 1000000000000000"),
    "no object": ("config.json", lambda it: (it / "config.json").write_bytes(b"7"), "is a JSON int, not an object"),
    "no text": ("config.json", lambda it: (it / "config.json").write_bytes(b"\xff\xfe"), "is not valid JSON"),
    "two keys": ("config.json", lambda it: (it / "config.json").write_bytes(b'{"a":1,"a":2}'), "a key is there twice"),
    "wrong shapes": ("model.safetensors", lambda it: configured(it, intermediate_size=512), "it was to be"),
    "an index to nowhere": (
        "model.safetensors.index.json",
        lambda it: ((it / "model.safetensors").unlink(), (it / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')),
        "of which 1 are not there",
    ),
    "deep index": (
        "model.safetensors.index.json",
        lambda it: ((it / "model.safetensors").unlink(), (it / "model.safetensors.index.json").write_bytes(b'{"a":' * 200_000)),
        "nested too deeply",
    ),
    "rubbish sums": (SUMS, lambda it: (it / SUMS).write_bytes(os.urandom(99)), ""),
    "huge sums": (SUMS, lambda it: huge(it, SUMS), "at most"),
    "rubbish signature": (SIGNATURE, lambda it: (it / SIGNATURE).write_bytes(b"{}"), "mediaType"),
    "deep signature": (SIGNATURE, lambda it: (it / SIGNATURE).write_bytes(b"[" * 1_000_000), "nested too deeply"),
    "rubbish statement": (STATEMENT, lambda it: released.write(it, {STATEMENT: b"{}"}), "spelled"),
    "recipe alone": (STATEMENT, lambda it: released.write(it, {RECIPE: b"a: 1\n"}), "is missing"),
    "a socket": ("s", lambda it: bound(it / "s"), "a pipe, a socket or a device"),
}


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))


@pytest.mark.parametrize(("name", "do", "said"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_folders_are_found_out_without_a_traceback(
    name: str, do: Callable[[Path], Any], said: str, foreign: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    do(folder)
    seen = found(folder)
    assert name in seen and re.search(said, seen[name]), seen
    assert all(one.fix for one in look(folder).findings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    (folder / "tokenizer.json").chmod(0)
    assert "cannot be read" in found(folder)["tokenizer.json"]


PICKLED: dict[str, tuple[bytes, str | None]] = {
    "protocol 4": (pickle.dumps([1], 4), "is a pickle"),
    "protocol 0, which runs code": (b"cos\nsystem\n(S'true'\ntR.", "can be read as a pickle"),
    "zip": (b"PK\x03\x04", "is a zip archive"),
    "gzip": (gzip.compress(pickle.dumps([1])), "is compressed"),
    "legacy, tar": (tarfile.TarInfo("~sys_info").tobuf(), "can be read as a pickle"),
    "sentencepiece's nfkc.bin": (b"\x00\xb4\x02\x00\x00\x84\x00\x00", None),
    "empty": (b"", None),
    "floats": (b"\x00\x00\x80\x3f" * 400, None),
}


@pytest.mark.parametrize(("raw", "said"), PICKLED.values(), ids=PICKLED)
@pytest.mark.parametrize("name", ["nfkc.bin", "x.pth", "y.PKL"])
def test_a_pickle_is_told_by_its_bytes(name: str, raw: bytes, said: str | None, foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    (folder / name).write_bytes(raw)
    seen = look(folder)
    if said is None:
        assert not seen.findings and f"{name} has a pickle's name" in told(seen, "code")
    else:
        assert f"{said}" in found(folder)[name] and "can run code" in found(folder)[name]


@given(st.binary(min_size=1, max_size=40))
def test_what_is_said_to_be_no_pickle_is_none(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "some.bin"
    path.write_bytes(raw)
    if pickles.found(path) is None:
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(raw)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert found(tmp_path) == {".": "holds no model: neither config.json nor *.safetensors is there"}


def test_code_that_nothing_names_is_said(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    (folder / "convert.py").touch()
    seen = look(folder)
    assert not seen.findings and "convert.py" in told(seen, "code")


def test_a_strangers_signature_by_certificate_is_not_passed(foreign: Path, signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    said = json.loads(Signer.read(keys[0]).sign(folder))
    said["verificationMaterial"] = {"certificate": {"rawBytes": "MII="}, "tlogEntries": []}
    (folder / SIGNATURE).write_text(json.dumps(said, indent=1))
    seen = look(folder)
    assert not seen.findings and "signed with a certificate, not checked" in told(seen, "signature")
    assert "not with a key" in found(folder, keys[1])[SIGNATURE]
    (folder / "config.json").write_bytes(b"{}")
    assert "was changed (model.sig)" in found(folder)["config.json"]


def test_a_strangers_signature_that_leaves_files_out(foreign: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    command = ("sign", "key", folder, "--signature", folder / SIGNATURE, "--private_key", keys[0])
    more = ("--ignore-paths", folder / "tokenizer.json")
    subprocess.run([sys.executable, "-m", "model_signing", *map(str, (*command, *more))], check=True, capture_output=True)
    (folder / ".gitignore").touch()
    assert "leaves out tokenizer.json" in found(folder, keys[1])[SIGNATURE]
    assert "leaves out .gitignore, tokenizer.json" in told(look(folder, keys[1]), "signature")


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name, said in (("none", "is not there"), ("file", "is a file"), ("empty", "holds no files"), ("link", "is a link to what is not")):
        with pytest.raises(BuildError, match=said) as caught:
            look(tmp_path / name)
        assert "name the folder" in caught.value.fix


def test_strangers_words_cannot_command_a_terminal(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    configured(folder, quantization_config={"quant_method": "\x1b[2J" + "x" * 10_000_000}, auto_map={"\x1b]0;title\x07": "a\u202eb"})
    seen = look(folder)
    text = "\n".join([*seen.lines, *map(str, seen.findings)])
    assert seen.findings and all(sign.isprintable() or sign == "\n" for sign in text) and len(text) < 20_000


def test_progress_is_told(foreign: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    audit(foreign, None, lambda *step: steps.append(step))
    assert ("hash", 3, 3) in steps and ("lint", 14, 14) in steps
