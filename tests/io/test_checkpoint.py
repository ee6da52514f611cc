"""Checkpoints: the safetensors library reads what we write and we read what it writes, to the bit, in bounded memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch as library
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import checkpoint, headers
from buildsys.io.checkpoint import DTYPES, NAMES, Checkpoint, Writer, load, save
from buildsys.io.headers import INDEX, SINGLE

KINDS = ("F16", "BF16", "F32", "I32", "U8", "I64", "F8_E4M3")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Any bits: of floats too, so NaN and -0 are among them."""
    found: dict[str, Tensor] = {}
    for name in draw(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8), max_size=4, unique=True)
    ):
        dtype, shape = DTYPES[draw(st.sampled_from(KINDS))], draw(SHAPES)
        size = dtype.itemsize * torch.Size(shape).numel()
        raw = torch.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size)) + b"0"), dtype=torch.uint8)[:size].clone()
        found[name] = raw.view(dtype).reshape(shape)
    found.pop("__metadata__", None)
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    def bits(tensor: Tensor) -> bytes:
        return bytes(tensor.reshape(-1).view(torch.uint8).numpy())

    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape and bits(ours[name]) == bits(theirs[name])
        for name in ours
    )


@settings(deadline=None)
@given(held=tensors())
def test_both_read_what_the_other_wrote(held: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    save(folder / "ours", held, {"format": "pt"})
    library.save_file(held, folder / "theirs")
    assert same(library.load_file(folder / "ours"), held)
    assert same(load(folder / "theirs"), held)
    assert same(load(folder / "ours"), held)


def test_names_and_dtypes_match() -> None:
    assert {DTYPES[name].itemsize == headers.WIDTHS[name] for name in DTYPES} == {True}
    assert DTYPES.keys() == headers.WIDTHS.keys() and len(NAMES) == len(DTYPES)


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    a, b = torch.arange(6.0), torch.ones(3, dtype=torch.uint8)
    save(tmp_path / "x", {"a": a, "b": b}, {"p": "1", "q": "2"})
    save(tmp_path / "y", {"b": b, "a": a[None].expand(4, 6)[2]}, {"q": "2", "p": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert headers.read(tmp_path / "x").metadata == {"p": "1", "q": "2"}


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    grid = torch.arange(12.0).view(3, 4)
    save(tmp_path / "x", {"t": grid.t(), "part": grid[:, 1:3]})
    assert torch.equal(load(tmp_path / "x")["t"], grid.t()) and torch.equal(load(tmp_path / "x")["part"], grid[:, 1:3])


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x", {"a": torch.zeros(4)})
    before = (tmp_path / "x").read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:  # unchanged: the caller knows how to word it
        save(tmp_path / "x", {"a": torch.ones(4)})
    assert caught.value.errno == errno.ENOSPC and (tmp_path / "x").read_bytes() == before
    monkeypatch.undo()
    save(tmp_path / "x", {"a": torch.ones(4)})  # over what the failed one left
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and torch.equal(load(tmp_path / "x")["a"], torch.ones(4))


def model(folder: Path, held: dict[str, Tensor]) -> Checkpoint:
    save(folder / SINGLE, held)
    return Checkpoint({SINGLE: folder / SINGLE})


def test_load_gives_own_memory_in_the_asked_type(tmp_path: Path) -> None:
    weight = torch.randn(5, 7).bfloat16()
    found = model(tmp_path, {"w": weight, "codes": torch.arange(3, dtype=torch.int32), "scalar": torch.tensor(2.5)})
    assert found.names() == ("codes", "scalar", "w") and found.shape("w") == (5, 7) and found.dtype("w") == torch.bfloat16
    assert found.load("w").dtype == torch.float32 and torch.equal(found.load("w"), weight.float())
    assert torch.equal(found.load("w", None), weight) and torch.equal(found.load("w", torch.float16), weight.half())
    assert found.load("scalar").shape == () and torch.equal(found.load("codes", None), torch.arange(3, dtype=torch.int32))
    found.load("w").zero_()
    assert torch.equal(found.load("w", None), weight)


@pytest.mark.parametrize("piece", [8, 24, 64])
def test_pieces_make_no_difference(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {name: torch.randn(37).to(DTYPES[name]) for name in ("F64", "F32", "F16", "BF16", "F8_E4M3")}
    found = model(tmp_path, held)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece)
    assert all(torch.equal(found.load(name), held[name].float()) for name in held)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_are_refused_by_name(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    weight = torch.zeros(9)
    weight[7] = value
    found = model(tmp_path, {"model.w": weight.to(dtype)})
    with pytest.raises(BuildError, match=r"tensor model.w holds NaN or Inf") as caught:
        found.load("model.w")
    assert caught.value.where == str(tmp_path / SINGLE)
    assert found.load("model.w", None, finite=False).shape == (9,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
@pytest.mark.parametrize("piece", [8, 24, 1 << 20])
def test_a_gpu_gets_what_the_host_would(piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {name: torch.randn(37).to(DTYPES[name]) for name in ("F64", "F32", "F16", "BF16", "F8_E4M3")}
    held |= {"codes": torch.arange(37, dtype=torch.int32), "none": torch.empty(0, 3), "one": torch.tensor(2.5)}
    found = model(tmp_path, held)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", piece)
    for dtype in (None, torch.float32, torch.bfloat16):
        for name in held if dtype is None else held.keys() - {"codes"}:
            there = found.load(name, dtype, "cuda")
            assert there.is_cuda and torch.equal(there.cpu().double(), found.load(name, dtype).double()), (name, dtype)
    assert all(torch.equal(there.cpu().double(), held[name].double()) for name, there in load(tmp_path / SINGLE, "cuda").items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
def test_what_a_gpu_cannot_compute_with_is_refused_as_on_the_host(tmp_path: Path) -> None:
    held = {"fine": torch.ones(9), "nan": torch.full((9,), torch.nan), "large": torch.tensor([1e5])}
    found = model(tmp_path, held)
    assert found.load("nan", None, "cuda", finite=False).isnan().all()
    for name, dtype, what in (("nan", torch.float32, "holds NaN or Inf"), ("large", torch.float16, "does not fit torch.float16")):
        with pytest.raises(BuildError, match=f"tensor {name} {what}"):
            found.load(name, dtype, "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
def test_a_piece_is_not_read_into_before_it_was_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"w": torch.arange(1 << 16, dtype=torch.float32)}
    found = model(tmp_path, held)
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1 << 12)
    with torch.cuda.stream(checkpoint._copies("cuda")):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second in which nothing is copied
    assert torch.equal(found.load("w", device="cuda").cpu(), held["w"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
def test_memory_of_a_tensor_waits_for_whoever_reads_it(tmp_path: Path) -> None:
    held = {"a": torch.full((1 << 20,), 1.0), "b": torch.full((1 << 20,), 2.0)}
    found = model(tmp_path, held)
    first = found.load("a", device="cuda")
    torch.cuda._sleep(200_000_000)
    read = first.clone()
    del first  # and its memory is what the next one would get
    second = found.load("b", device="cuda")
    assert torch.equal(read.cpu(), held["a"]) and torch.equal(second.cpu(), held["b"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
def test_a_file_that_becomes_shorter_on_its_way_to_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model(tmp_path, {"w": torch.zeros(1 << 16)})
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1 << 12)
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size // 2)
    with pytest.raises(BuildError, match="became shorter while it was read"):
        found.load("w", device="cuda")


def test_a_value_that_the_asked_type_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"does not fit torch.float16"):
        model(tmp_path, {"w": torch.tensor([1e5])}).load("w", torch.float16)


def test_codes_are_no_floats(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="holds I32; floating-point"):
        model(tmp_path, {"w": torch.ones(2, dtype=torch.int32)}).load("w")


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has no tensor lm_head.weight"):
        model(tmp_path, {"w": torch.ones(2)}).load("lm_head.weight")


def test_a_file_cut_short_after_its_header_was_read(tmp_path: Path) -> None:
    found = model(tmp_path, {"w": torch.ones(64)})
    os.truncate(tmp_path / SINGLE, (tmp_path / SINGLE).stat().st_size - 9)
    with pytest.raises(BuildError, match="became shorter"):
        found.load("w")


def test_reading_keeps_nothing(tmp_path: Path) -> None:
    """Two tensors of 64 MiB as bf16, read to float32 one after another: 128 MiB each, and never both nor the file beside them."""
    save(tmp_path / SINGLE, {name: torch.ones(32 << 20, dtype=torch.bfloat16) for name in "ab"})
    program = f"""
from pathlib import Path
from buildsys.io.checkpoint import Checkpoint
def anonymous_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) // 1024
found = Checkpoint({{"{SINGLE}": Path({str(tmp_path / SINGLE)!r})}})
before, peak = anonymous_mib(), 0
for name in found.names():
    loaded = found.load(name)
    peak = max(peak, anonymous_mib())
    del loaded
print(peak - before, anonymous_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    peak_mib, after_mib = map(int, done.stdout.split())
    assert 128 <= peak_mib < 128 + 48 and after_mib < 32


LAYOUT = {"a": ("F16", (4,)), "b": ("I32", (2, 3)), "c": ("F16", (2,)), "d": ("U8", ()), "e": ("F32", (0, 2))}
HELD = {name: torch.arange(torch.Size(shape).numel()).to(DTYPES[kind]).reshape(shape) for name, (kind, shape) in LAYOUT.items()}


def written(folder: Path, order: str, max_shard_bytes: int) -> list[str]:
    folder.mkdir(exist_ok=True)
    writer = Writer(folder, LAYOUT, {"made_by": "tests"}, max_shard_bytes)
    for name in order:
        writer.add(name, HELD[name])
    return writer.close()


@pytest.mark.parametrize("max_shard_bytes", [1, 10, 33, 1000])
def test_shards_hold_what_was_added_in_any_order(max_shard_bytes: int, tmp_path: Path) -> None:
    names = written(tmp_path / "x", "abcde", max_shard_bytes)
    assert written(tmp_path / "y", "edcba", max_shard_bytes) == names == sorted(path.name for path in (tmp_path / "x").iterdir())
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in names)
    found = Checkpoint({name: tmp_path / "x" / name for name in names})
    assert all(torch.equal(found.load(name, None), HELD[name]) for name in LAYOUT)
    shards = [name for name in names if name != INDEX]
    assert same({name: t for shard in shards for name, t in library.load_file(tmp_path / "x" / shard).items()}, HELD)
    if max_shard_bytes == 1000:
        assert names == [SINGLE]
        assert headers.read(tmp_path / "x" / SINGLE).metadata == {"format": "pt", "made_by": "tests"}
    else:
        assert shards[0] == f"model-00001-of-{len(shards):05}.safetensors"
        index = json.loads((tmp_path / "x" / INDEX).read_text())
        assert index["metadata"]["total_size"] == 8 + 24 + 4 + 1 and index["weight_map"].keys() == LAYOUT.keys()


def waited(said: Callable[[], bool]) -> bool:
    until = time.monotonic() + 10
    while not said() and time.monotonic() < until:
        time.sleep(0.005)
    return said()


def test_a_shard_appears_when_its_last_tensor_has_come(tmp_path: Path) -> None:
    """Whole, and told of once, while a disk takes it in; the index last."""
    told: dict[str, bytes] = {}

    def finished(path: Path) -> None:
        assert path.name not in told
        told[path.name] = path.read_bytes()

    files = [f"model-0000{at}-of-00003.safetensors" for at in (1, 2, 3)]
    with Writer(tmp_path, LAYOUT, {}, 10, finished) as writer:
        for name, there in (("b", [1]), ("a", [0, 1]), ("d", [0, 1]), ("e", [0, 1]), ("c", [0, 1, 2])):
            writer.add(name, HELD[name])
            wanted = {files[at] for at in there}
            assert waited(lambda wanted=wanted: told.keys() == wanted), name
            assert {path.name for path in tmp_path.glob("model*")} == wanted
        names = writer.close()
    assert list(told)[-1] == INDEX == names[-1] and set(told) == set(names)
    assert told == {name: (tmp_path / name).read_bytes() for name in names}


def test_a_growing_shard_is_synced_before_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each so many bytes, also where it appears meanwhile; what goes wrong there is told at the end."""
    synced: list[str] = []
    sync = checkpoint._sync
    monkeypatch.setattr(checkpoint, "SYNC_BYTES", 8)
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (synced.append(path.name), sync(path))[1])
    assert written(tmp_path / "x", "abcde", 1000) == [SINGLE]
    assert (synced.count(f".{SINGLE}.partial"), synced.count(SINGLE), synced[-1]) == (2, 1, "x"), "8 and 24 bytes, the whole, its name"
    (tmp_path / "y").mkdir()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(checkpoint, "_sync_so_far", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "y", "abcde", 1000)


def test_a_writer_leaves_no_thread_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ValueError, match="a format broke"), Writer(tmp_path, LAYOUT, {}, 10) as writer:
        writer.add("a", HELD["a"])
        writer.add("b", HELD["b"])
        raise ValueError("a format broke")
    assert threading.active_count() == before and not (tmp_path / INDEX).exists()


def test_a_model_without_a_tensor_is_one_file(tmp_path: Path) -> None:
    told: list[str] = []
    with Writer(tmp_path, {}, {}, 10, lambda path: told.append(path.name)) as writer:
        assert writer.close() == [SINGLE] == told
    assert library.load_file(tmp_path / SINGLE) == {}


def test_shards_keep_their_bound(tmp_path: Path) -> None:
    names = written(tmp_path, "abcde", 33)  # a and b fill one; c, d and e the next
    found = headers.describe({name: tmp_path / name for name in names})
    assert [found[name][0][6:11] for name in "abcde"] == ["00001", "00001", "00002", "00002", "00002"]


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
import torch
from buildsys.io.checkpoint import Checkpoint, Writer
folder = Path({str(tmp_path)!r})
layout = {{f"layers.{{at}}.weight": ("F32", (3, at + 1)) for at in range(90)}}
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
writer = Writer(folder, layout, {{}}, 1)
for name in reversed(layout):
    writer.add(name, torch.full(layout[name][1], float(layout[name][1][1])))
found = Checkpoint({{name: folder / name for name in writer.close()}})
held = [found.load(name) for name in layout]
assert all(bool((tensor == tensor.shape[1]).all()) for tensor in held)
print(len({{found.where(name) for name in layout}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["90"]


def test_transformers_opens_a_shard(tmp_path: Path) -> None:
    names = written(tmp_path, "abcde", 10)
    from safetensors import safe_open

    with safe_open(tmp_path / names[1], "pt") as opened:
        assert opened.metadata() == {"format": "pt", "made_by": "tests"} and torch.equal(opened.get_tensor("b"), HELD["b"])


def test_a_writer_refuses_what_the_layout_does_not_say(tmp_path: Path) -> None:
    writer = Writer(tmp_path, LAYOUT, {}, 1000)
    writer.add("a", HELD["a"])
    for name, tensor, said in (("a", HELD["a"], "before"), ("c", HELD["c"].float(), "float32"), ("c", HELD["a"], r"\[4\]")):
        with pytest.raises(ValueError, match=said):
            writer.add(name, tensor)
    with pytest.raises(KeyError):
        writer.add("z", HELD["a"])
    with pytest.raises(ValueError, match="4 tensors were never written: b, c, d"):
        writer.close()
    assert not (tmp_path / SINGLE).exists()
