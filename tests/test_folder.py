"""Folders of pictures: every file is read rightly, or refused by its name."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import COLOUR, GREY, damaged, picture
from PIL import Image

from fastdiff.train import load_data


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


def sixteen_bit_png(path, pixels):
    """A PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_sixteen_bits_of_every_channel_are_scaled(tmp_path):
    wide, opaque = COLOUR.astype(np.uint16) * 257, np.full((8, 8, 1), 65535, np.uint16)
    for name, pixels, wanted in (
        ("rgb", wide, COLOUR.transpose(2, 0, 1)),
        ("rgba", np.dstack([wide, opaque]), COLOUR.transpose(2, 0, 1)),
        ("grey-alpha", np.dstack([wide[..., :1], opaque]), GREY[None]),
    ):
        (tmp_path / name).mkdir()
        sixteen_bit_png(tmp_path / name / "x.png", pixels)
        assert one(tmp_path / name / "x.png").tolist() == wanted.tolist()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm"])
def test_a_file_that_was_cut_off_is_named_in_every_format(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = picture(tmp_path / f"cut.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"1 of 1 are not .*\n.*cut.{suffix}: "):
        load_data(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    picture(tmp_path / "good.png", GREY)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe.png: ValueError: it is no regular file"):
        load_data(tmp_path)


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
