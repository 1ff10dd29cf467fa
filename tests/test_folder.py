"""Folders of pictures: every file is read rightly, or refused by its name."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.train import cache, folder, load_data


def picture(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path):
    picture(tmp_path / "zebra" / "1.png", GREY)
    picture(tmp_path / "ant" / "deep" / "2.PNG", GREY + 1)
    picture(tmp_path / "ant" / "1.bmp", GREY + 2)
    (tmp_path / "ant" / "notes.txt").write_text("passed over")
    (tmp_path / ".git").mkdir()
    data = load_data(tmp_path)
    assert data.class_names == ("ant", "zebra")
    assert data.labels.tolist() == [0, 0, 1]
    assert data.images[:, 0].tolist() == [(GREY + 2).tolist(), (GREY + 1).tolist(), GREY.tolist()]


def test_pictures_in_the_folder_itself_have_no_labels_and_one_class_is_a_class(tmp_path):
    picture(tmp_path / "flat" / "b.png", GREY)
    picture(tmp_path / "flat" / "a.png", GREY.T)
    flat = load_data(tmp_path / "flat")
    assert flat.labels is None
    assert flat.num_classes is None
    assert flat.images[0, 0].tolist() == GREY.T.tolist()
    one = load_data(tmp_path)
    assert one.labels.tolist() == [0, 0]
    assert one.class_names == ("flat",)


def test_one_coloured_picture_makes_all_of_them_rgb(tmp_path):
    picture(tmp_path / "a.png", GREY)
    picture(tmp_path / "b.png", COLOUR)
    data = load_data(tmp_path)
    assert data.images[0].tolist() == [GREY.tolist()] * 3
    assert data.images[1].permute(1, 2, 0).tolist() == COLOUR.tolist()


def one(path, **options):
    """The picture at `path` alone, [C, H, W]."""
    return load_data(path.parent, **options).images[0]


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path):
    deep = picture(tmp_path / "deep.png", GREY.astype(np.uint16) * 257)
    assert one(deep).tolist() == [GREY.tolist()]
    assert Image.open(deep).mode.startswith("I")  # or this test would not test sixteen bits


def test_transparency_lies_on_white_and_opaque_pictures_are_as_they_are(tmp_path):
    alpha = np.full((8, 8), 255, np.uint8)
    opaque = picture(tmp_path / "a" / "x.png", np.dstack([COLOUR, alpha]))
    assert one(opaque).permute(1, 2, 0).tolist() == COLOUR.tolist()
    clear = picture(tmp_path / "b" / "x.png", np.dstack([COLOUR, alpha * 0]))
    assert (one(clear) == 255).all()
    grey = picture(tmp_path / "c" / "x.png", np.dstack([GREY, GREY, GREY, alpha]), mode="LA")
    assert one(grey).tolist() == [GREY.tolist()]


def test_other_modes_become_grey_or_rgb(tmp_path):
    cmyk = picture(tmp_path / "a" / "x.jpg", np.full((8, 8, 3), (200, 30, 90), np.uint8), mode="CMYK")
    assert Image.open(cmyk).mode == "CMYK"
    assert (one(cmyk).float().mean((1, 2)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() < 4  # JPEG
    palette = picture(tmp_path / "b" / "x.gif", GREY)
    assert one(palette).tolist() == [GREY.tolist()]
    bits = picture(tmp_path / "c" / "x.png", GREY > 99)
    assert one(bits).tolist() == [np.where(GREY > 99, 255, 0).tolist()]


def test_a_turned_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    turned = picture(tmp_path / "x.png", GREY, exif=exif)
    assert one(turned).tolist() == [np.rot90(GREY, -1).tolist()]


def test_a_size_scales_the_shorter_side_and_cuts_out_the_centre(tmp_path):
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    path = picture(tmp_path / "wide.png", wide)
    assert one(path, size=4).tolist() == np.full((1, 4, 4), 200).tolist()
    assert one(path, size=8, resample="nearest").tolist() == np.full((1, 8, 8), 200).tolist()
    assert one(path, size=(2, 6), resample="box").tolist() == [wide[:2, ::2].tolist()]


def damaged(folder):
    """Four files that no decoder can use, and a good one; the names of the four."""
    good = picture(folder / "good.png", GREY)
    (folder / "cut.png").write_bytes(good.read_bytes()[:50])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.webp").write_bytes(b"")
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return ["cut.png", "empty.webp", "moving.gif", "text.jpg"]


def test_unreadable_pictures_are_all_named(tmp_path):
    names = damaged(tmp_path)
    with pytest.raises(ValueError, match=r"4 of 5 are not .*skip_bad=True") as caught:
        load_data(tmp_path)
    assert all(name in str(caught.value) for name in names)
    assert "animated" in str(caught.value)
    assert "good.png" not in str(caught.value)


def test_skip_bad_leaves_them_out_and_says_so(tmp_path):
    names = damaged(tmp_path)
    with pytest.warns(UserWarning, match="left out 4 of 5") as caught:
        data = load_data(tmp_path, skip_bad=True)
    assert len(data) == 1
    assert all(name in str(caught[0].message) for name in names)
    assert [any(name in line for line in data.skipped) for name in names] == [True] * 4


def test_skip_bad_is_silent_where_nothing_is_bad(tmp_path):
    picture(tmp_path / "x.png", GREY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_data(tmp_path, skip_bad=True).skipped == ()


def test_a_folder_that_cannot_be_learned_from_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"`source` must hold pictures .*hold none"):
        load_data(tmp_path)
    picture(tmp_path / "a" / "x.png", GREY)
    (tmp_path / "b").mkdir()
    with pytest.raises(ValueError, match="these sub-folders have none: b;"):
        load_data(tmp_path)
    (tmp_path / "b" / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"none is left in the classes b:\n.*bad.png"):
        load_data(tmp_path, skip_bad=True)
    picture(tmp_path / "loose.png", GREY)
    with pytest.raises(ValueError, match=r"holds both: loose.png and a/"):
        load_data(tmp_path)


def test_several_sizes_need_a_size(tmp_path):
    picture(tmp_path / "a.png", GREY)
    picture(tmp_path / "b.png", GREY[:4])
    with pytest.raises(ValueError, match=r"`size` must be given .*a.png is 8x8, .*b.png is 8x4"):
        load_data(tmp_path)
    assert load_data(tmp_path, size=4).shape == (1, 4, 4)


# Files and folders that are odd


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    image = Image.fromarray(GREY // 64, "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    image.save(tmp_path / "x.png", transparency=0)
    assert Image.open(tmp_path / "x.png").mode == "P"
    got = one(tmp_path / "x.png").permute(1, 2, 0)
    colours = torch.tensor([[255, 255, 255], [200, 0, 0], [0, 200, 0], [0, 0, 200]], dtype=torch.uint8)
    assert torch.equal(got, colours[torch.from_numpy(GREY // 64).long()])


def test_a_single_pixel_is_a_picture(tmp_path):
    path = picture(tmp_path / "dot.png", np.full((1, 1), 77, np.uint8))
    assert one(path).tolist() == [[[77]]]
    assert (one(path, size=8) == 77).all()


@pytest.mark.parametrize("shape", [(1, 500), (500, 1), (3, 4)])
def test_any_proportions_are_cut_to_the_size(tmp_path, shape):
    path = picture(tmp_path / "thin.png", np.full(shape, 50, np.uint8))
    assert one(path, size=(6, 4)).tolist() == np.full((1, 6, 4), 50).tolist()


def test_a_float_picture_has_no_agreed_range_and_is_named(tmp_path):
    picture(tmp_path / "depth.tif", GREY.astype(np.float32) / 255)
    with pytest.raises(ValueError, match=r"depth.tif: ValueError: its mode F has no agreed range"):
        load_data(tmp_path)


def test_more_than_sixteen_bits_are_named(tmp_path):
    Image.fromarray(GREY.astype(np.int32) * 1000, "I").save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep.tif: .* more than 16 bits"):
        load_data(tmp_path)


@pytest.mark.parametrize("suffix", ["webp", "png", "tiff"])
def test_animations_and_pages_of_every_format_are_named(tmp_path, suffix):
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / f"two.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=rf"two.{suffix}: .*animated or has several pages \(2\)"):
        load_data(tmp_path)


def test_unicode_names_are_names(tmp_path):
    picture(tmp_path / "übung 猫" / "déjà vu ☃.png", GREY)
    assert load_data(tmp_path).class_names == ("übung 猫",)
    (tmp_path / "übung 猫" / "leer ☃.png").touch()
    with pytest.raises(ValueError, match=r"übung 猫/leer ☃.png: UnidentifiedImageError"):
        load_data(tmp_path)


def test_names_that_are_no_text_are_read_printed_and_refused_as_classes(tmp_path):
    raw = os.fsencode(tmp_path / "a") + b"/\xff.png"
    picture(tmp_path / "a" / "x.png", GREY)
    os.rename(tmp_path / "a" / "x.png", raw)
    assert len(load_data(tmp_path)) == 1
    with open(raw, "wb"):
        pass
    with pytest.raises(ValueError, match=r"\\xff.png: Unidentified") as caught:
        load_data(tmp_path)
    str(caught.value).encode()  # it can be printed
    os.rename(tmp_path / "a", os.fsencode(tmp_path) + b"/\xfe")
    with pytest.raises(ValueError, match=r"class folders with names .*\\xfe; rename it"):
        load_data(tmp_path)


def test_links_to_pictures_and_folders_are_followed_and_loops_end(tmp_path):
    picture(tmp_path / "store" / "1.png", GREY)
    picture(tmp_path / "store" / "2.png", GREY.T)
    data = tmp_path / "data"
    (data / "linked").mkdir(parents=True)
    (data / "linked" / "one.png").symlink_to(tmp_path / "store" / "1.png")
    (data / "whole").symlink_to(tmp_path / "store", target_is_directory=True)
    picture(data / "nested" / "3.png", GREY)
    (data / "nested" / "more").symlink_to(tmp_path / "store", target_is_directory=True)
    (data / "nested" / "round").symlink_to(data / "nested", target_is_directory=True)
    found = load_data(data)
    assert found.class_names == ("linked", "nested", "whole")
    assert found.labels.tolist() == [0, 1, 1, 1, 2, 2]


def test_a_link_to_nowhere_is_named(tmp_path):
    picture(tmp_path / "good.png", GREY)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 2 are not .*\n.*gone.png: FileNotFoundError: No such"):
        load_data(tmp_path)


@contextmanager
def as_nobody():
    """A folder, and no right to read what is forbidden, which root would have."""
    base = Path(tempfile.mkdtemp())
    base.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield base, (lambda: os.seteuid(65534)) if root else (lambda: None)
    finally:
        if root:
            os.seteuid(0)
        for path in base.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(base)


def test_a_picture_that_may_not_be_read_is_named_and_may_be_skipped():
    with as_nobody() as (base, give_up):
        picture(base / "good.png", GREY)
        picture(base / "secret.png", GREY).chmod(0)
        give_up()
        with pytest.raises(ValueError, match=r"1 of 2 are not .*\n.*secret.png: PermissionError: Perm"):
            load_data(base)
        with pytest.warns(UserWarning, match=r"left out 1 of 2 .*\n.*secret.png"):
            assert len(load_data(base, skip_bad=True)) == 1


def test_a_folder_that_may_not_be_read_is_named_even_with_skip_bad():
    """Nobody knows how many pictures of the class it holds."""
    with as_nobody() as (base, give_up):
        picture(base / "a" / "good.png", GREY)
        picture(base / "a" / "closed" / "other.png", GREY)
        (base / "a" / "closed").chmod(0)
        give_up()
        for skip in (False, True):
            with pytest.raises(PermissionError, match="closed"):
                load_data(base, skip_bad=skip)


# Memory and the cache


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
