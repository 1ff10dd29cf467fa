"""Decoded folders: once in memory, or in a mapped file that needs none and is not decoded again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COLOUR, GREY, damaged, picture
from PIL import Image

from fastdiff.train import cache, folder, load_data
from fastdiff.train.mapped import mapped


@pytest.mark.parametrize("colour_at", [None, 0, 3])
def test_the_cache_holds_what_memory_would_and_is_not_decoded_again(tmp_path, monkeypatch, colour_at):
    for i in range(5):
        picture(tmp_path / "data" / f"c{i % 2}" / f"{i}.png", COLOUR if i == colour_at else GREY + i)
    plain = load_data(tmp_path / "data", size=6)
    first = load_data(tmp_path / "data", size=6, cache=tmp_path / "kept")
    assert first.fingerprint == plain.fingerprint
    assert len(list((tmp_path / "kept").iterdir())) == 2
    before = (first.images.clone(), first.labels)
    monkeypatch.setattr(folder, "_decode_all", None)  # it would fail
    again = load_data(tmp_path / "data", size=6, cache=tmp_path / "kept")
    assert torch.equal(again.images, before[0])
    again.images.zero_()  # a private copy: the file keeps what it has
    assert load_data(tmp_path / "data", size=6, cache=tmp_path / "kept").fingerprint == plain.fingerprint


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_a_cached_folder_takes_little_memory_to_decode_to_load_and_to_read(tmp_path, monkeypatch):
    """59 MB decoded: 60 pictures of 3x568x576, of which at most 4 are in flight."""
    monkeypatch.setattr(folder.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(folder, "_AHEAD", 4)
    for i in range(60):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (576, 568), (i, 0, 0)).save(tmp_path / "data" / f"{i:02d}.png")
    taken = {}
    for kept in (tmp_path / "kept", tmp_path / "kept", None):
        before = anonymous()
        data = load_data(tmp_path / "data", cache=kept)
        assert data.rows(np.arange(60)[::-1])[0][:, 0, 5, 5].tolist() == list(range(60))[::-1]
        taken[kept] = max(taken.get(kept, 0), anonymous() - before)
    total = data.images.nbytes
    assert taken[None] > 0.9 * total
    assert taken[tmp_path / "kept"] < 0.4 * total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_a_file_of_bytes_is_mapped_and_read_as_if_it_lay_in_memory(tmp_path, layout):
    """100 MB; of the order NHWC too, which is no order of the batches."""
    shape = (100, 3, 500, 680) if layout == "NCHW" else (100, 500, 680, 3)
    file = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, shape)
    for i in range(100):
        file[i] = (
            (np.arange(file[0].size, dtype=np.uint32) * (i + 1) >> 4).astype(np.uint8).reshape(shape[1:])
        )
    del file
    before = anonymous()
    data = load_data(tmp_path / "a.npy")
    index = np.array([7, 0, 99])
    rows, _ = data.rows(index)
    found = data.fingerprint
    assert anonymous() - before < 0.4 * data.images.nbytes
    assert data.shape == (3, 500, 680)
    assert rows.is_contiguous()
    whole = np.load(tmp_path / "a.npy")
    expected = load_data((whole, None))
    assert torch.equal(rows, expected.rows(index)[0])
    assert torch.equal(data.batch(torch.from_numpy(index))[0], expected.batch(torch.from_numpy(index))[0])
    assert found == expected.fingerprint
    data.images[0] = 0  # never reaches the file
    assert np.array_equal(np.load(tmp_path / "a.npy")[0], whole[0])


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux's account of memory")
def test_a_file_larger_than_memory_and_swap_is_mapped(tmp_path):
    """Of holes, which take no disk; Linux refuses it where pages that may be changed are set aside."""
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
        pytest.skip("this system sets memory aside in any case")
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("MemTotal", "SwapTotal")))
    length = 2 * total
    path = tmp_path / "holes"
    path.touch()
    try:
        os.truncate(path, length)
    except OSError:
        pytest.skip("this file system has no files of that size")
    pictures = mapped(path, np.dtype(np.uint8), (length // 4096 - 1, 1, 64, 64), offset=100)
    assert not pictures[-1].any()
    pictures[-1] = 1
    path.unlink()


@pytest.mark.parametrize(
    ("code", "remedy"), [("ENOMEM", r"`ulimit -v`"), ("ENODEV", "file system .* another disk")]
)
def test_a_file_that_the_system_cannot_map_is_named_with_the_remedy(tmp_path, monkeypatch, code, remedy):
    def refuses(*_, **__):
        raise OSError(getattr(errno, code), "for a reason")

    np.save(tmp_path / "a.npy", np.zeros((3, 1, 4, 4), np.uint8))
    monkeypatch.setattr("fastdiff.train.mapped.mmap.mmap", refuses)
    with pytest.raises(ValueError, match=rf"a\.npy' of .* cannot be mapped .*\(for a reason\): .*{remedy}"):
        load_data(tmp_path / "a.npy")


def test_a_file_in_fortran_s_order_is_the_same_data(tmp_path):
    images = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    np.save(tmp_path / "f.npy", np.asfortranarray(images))
    data = load_data(tmp_path / "f.npy")
    assert data.images.is_contiguous()
    assert torch.equal(data.images, torch.from_numpy(images))


def test_another_size_or_a_changed_file_is_decoded_anew(tmp_path):
    path = picture(tmp_path / "data" / "a.png", GREY)
    kept = tmp_path / "kept"
    load_data(tmp_path / "data", cache=kept)
    load_data(tmp_path / "data", size=4, cache=kept)
    picture(path, 255 - GREY)
    os.utime(path, ns=(1, 1))
    assert load_data(tmp_path / "data", cache=kept).images[0, 0].tolist() == (255 - GREY).tolist()
    assert len(list(kept.iterdir())) == 6


def test_bad_pictures_are_named_from_the_cache_as_well(tmp_path):
    names = damaged(tmp_path / "data")
    for _ in range(2):
        with pytest.raises(ValueError, match="4 of 5 are not") as caught:
            load_data(tmp_path / "data", cache=tmp_path / "kept")
        assert all(name in str(caught.value) for name in names)
        with pytest.warns(UserWarning, match="left out 4 of 5"):
            assert len(load_data(tmp_path / "data", cache=tmp_path / "kept", skip_bad=True)) == 1
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_an_interrupted_decoding_leaves_no_cache(tmp_path, monkeypatch):
    picture(tmp_path / "data" / "a.png", GREY)
    monkeypatch.setattr(cache.Pixels, "append", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        load_data(tmp_path / "data", cache=tmp_path / "kept")
    monkeypatch.undo()
    assert list((tmp_path / "kept").iterdir()) == []
    assert len(load_data(tmp_path / "data", cache=tmp_path / "kept")) == 1


def test_more_than_half_of_memory_needs_the_cache(tmp_path, monkeypatch):
    picture(tmp_path / "data" / "a.png", COLOUR)
    picture(tmp_path / "data" / "b.png", COLOUR)
    monkeypatch.setattr(folder, "half_of_memory", lambda: 2 * 3 * 64 - 1)
    with pytest.raises(ValueError, match=r"`cache` must name a folder for pictures that take 3\.84e-07 GB"):
        load_data(tmp_path / "data")
    assert len(load_data(tmp_path / "data", cache=tmp_path / "kept")) == 2
    monkeypatch.setattr(folder, "half_of_memory", lambda: 2 * 3 * 64)
    assert len(load_data(tmp_path / "data")) == 2


def test_the_cache_is_for_folders_and_for_all_of_them(tmp_path):
    picture(tmp_path / "a.png", GREY)
    with pytest.raises(ValueError, match="`cache` is for folders of pictures only"):
        load_data((GREY[None], None), cache=tmp_path)
    with pytest.raises(ValueError, match=r"`holdout` must be 0 with `cache`, got 0\.5"):
        load_data(tmp_path, cache=tmp_path / "kept", holdout=0.5)
