"""Files are whole or not there, and what was written is read back bit for bit."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.files import (
    atomic_path,
    load_tensors,
    read_json,
    save_tensors,
    sha256,
    write_json,
)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit (torch.equal: -0 is 0, NaN is no NaN)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))


def test_same_bits_sees_a_sign_a_nan_a_dtype_and_a_shape():
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert same_bits(zero, torch.zeros(2))
    assert same_bits(nan, nan.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, torch.zeros(2, dtype=torch.int32))
    assert not same_bits(zero, torch.zeros(1, 2))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("old")
    return path


def test_atomic_path_shows_the_new_content_only_after_the_block(old):
    with atomic_path(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
        assert (temporary.parent, temporary.suffix) == (old.parent, old.suffix)
    assert old.read_text() == "new"
    assert os.listdir(old.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_path_leaves_the_old_file_and_nothing_else_after_an_error(old, error):
    def write_half() -> None:
        with atomic_path(old) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == ["file.txt"]


def test_atomic_path_removes_the_temporary_when_the_replacement_fails(old, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"), atomic_path(old) as temporary:
        temporary.write_text("new")
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == ["file.txt"]


def test_atomic_path_makes_folders_and_bears_the_longest_name(tmp_path):
    path = tmp_path / "a" / "b" / ("n" * 251 + ".txt")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes and links")
def test_atomic_path_keeps_modes_and_links(old):
    link = old.with_name("link.txt")
    link.symlink_to(old)
    old.chmod(0o640)
    write_json(link, 1)
    assert link.is_symlink()
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    mask = os.umask(0o027)
    try:
        save_tensors(old.with_name("t.safetensors"), {"a": torch.zeros(1)})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(old.with_name("t.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("path", [".", os.devnull])
def test_atomic_path_refuses_to_replace_a_folder_or_a_device(path):
    with pytest.raises(ValueError, match="`path` must be a file"), atomic_path(path):
        pytest.fail("the block ran")


def test_json_is_read_back(tmp_path):
    content = {"a": [1, 2.5, None, True], "ü": {"b": "x\n"}}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content


@pytest.mark.parametrize("bad", [{"a": torch.zeros(1)}, {"a": float("nan")}, [float("inf")]])
def test_what_is_no_json_is_refused_before_anything_is_written(old, bad):
    with pytest.raises((TypeError, ValueError), match="`obj` must be JSON"):
        write_json(old, bad)
    assert old.read_text() == "old"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}"])
def test_a_broken_json_file_is_named(tmp_path, content):
    (tmp_path / "broken.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"JSON file, got .*broken\.json"):
        read_json(tmp_path / "broken.json")


def test_sha256_is_that_of_the_standard(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-4's example
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_tensors_come_back_bit_for_bit(tmp_path):
    x = torch.randn(6, 4)
    tensors = {
        "dense": x,
        "same storage": x,
        "transposed": x.t(),
        "slice": x[1:3, 1:],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "bfloat16": torch.tensor([1.1, -0.0, torch.nan, torch.inf], dtype=torch.bfloat16),
        "scalar": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "empty too": torch.zeros(0),
        "double": torch.tensor([1e-300], dtype=torch.float64),
    }
    path = tmp_path / "t.safetensors"
    save_tensors(path, tensors, {"step": "7"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"step": "7"}
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_loaded_tensors_own_their_memory(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(1000.0)})
    loaded, _ = load_tensors(path)
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, as another program might
    assert torch.equal(loaded["a"], torch.arange(1000.0))


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [({"a": 1.0}, None), ({1: torch.zeros(1)}, None), ({"a": torch.zeros(1)}, {"a": 1})],
)
def test_what_is_no_tensor_or_string_is_refused(tmp_path, tensors, metadata):
    with pytest.raises(TypeError, match=r"`(tensors|metadata)` must map strings"):
        save_tensors(tmp_path / "t.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == []


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must be a safetensors file, got .*, a folder or a device"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 200, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(100), "b": torch.randn(3)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"t\.safetensors.*truncated"):
        load_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_not_read_and_the_remedy_is_named(tmp_path, zipped):
    path = tmp_path / "model.pt"
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"model\.pt.*pickle.*weights_only=True"):
        load_tensors(path)


def test_a_safetensors_file_that_begins_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"padding": ""})
    # 640 is 0x0280: a header of that length begins with the two bytes of a pickle of protocol 2.
    padding = "x" * (640 - int.from_bytes(path.read_bytes()[:8], "little"))
    save_tensors(path, {"a": torch.ones(3)}, {"padding": padding})
    assert path.read_bytes().startswith(b"\x80\x02")
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(3))


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on file sizes stands for a full disk")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: save_tensors(path, {"a": torch.zeros(100_000)}),
        lambda path: write_json(path, "x" * 400_000),
    ],
)
def test_a_full_disk_leaves_the_old_file_and_no_temporary(old, write):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError):
            write(old)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert old.read_text() == "old"
    assert os.listdir(old.parent) == ["file.txt"]
