"""Training data: every source becomes images in [-1, 1], or is refused by the name of what is wrong."""

from __future__ import annotations

import builtins
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.train import ImageData, load_data


def picture(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array))
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=-1)


# The digits


def test_the_digits_are_the_1797_of_scikit_learn_on_a_scale_of_17_shades():
    datasets = pytest.importorskip("sklearn.datasets")
    data = load_data("digits")
    x0, labels = data.all()
    assert (len(data), data.shape, data.num_classes, x0.dtype) == (1797, (1, 8, 8), 10, torch.float32)
    assert data.class_names == tuple("0123456789")
    assert data.value_range == (0, 16)
    assert torch.equal((x0[:, 0] + 1) * 8, torch.from_numpy(datasets.load_digits().images).float())
    assert labels.tolist() == datasets.load_digits().target.tolist()
    assert "Alpaydin" in data.attribution
    assert "CC BY 4.0" in data.attribution


def test_digits_scaled_up_stay_in_range_and_keep_their_mean():
    pytest.importorskip("sklearn")
    plain, _ = load_data("digits").all()
    large, _ = load_data("digits", size=16).all()
    assert large.shape == (1797, 1, 16, 16)
    assert large.min() == -1
    assert large.max() == 1
    blocks, _ = load_data("digits", size=16, resample="nearest").all()
    assert torch.equal(blocks[:, :, ::2, ::2], plain)
    assert torch.equal(blocks[:, :, 1::2, 1::2], plain)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"pip install scikit-learn.*extra .data"):
        load_data("digits")


# Arrays and NumPy files


def test_bytes_stay_bytes_and_read_as_minus_one_to_one():
    images = np.arange(2 * 6 * 7 * 3, dtype=np.uint8).reshape(2, 6, 7, 3)
    data = load_data((images, np.array([1, 0])))
    assert data.images.dtype == torch.uint8
    x0, labels = data.batch(torch.tensor([1, 1, 0]))
    wanted = torch.from_numpy(images.transpose(0, 3, 1, 2)[[1, 1, 0]]).double() / 127.5 - 1
    # half an ulp of [1, 2) for the quotient, half an ulp of [1/2, 1) for the difference
    assert (x0.double() - wanted).abs().max() <= 2**-24 + 2**-25
    assert labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("shape", "layout", "wanted"),
    [
        ((5, 8, 9), None, (1, 8, 9)),
        ((5, 8, 9, 3), None, (3, 8, 9)),
        ((5, 4, 8, 9), None, (4, 8, 9)),
        ((5, 3, 9, 3), "NCHW", (3, 9, 3)),
        ((5, 3, 9, 3), "NHWC", (3, 3, 9)),
        ((5, 8, 9, 2), "NHWC", (2, 8, 9)),
    ],
)
def test_the_channels_are_found_or_said(shape, layout, wanted):
    assert load_data((np.zeros(shape, np.uint8), None), layout=layout).shape == wanted


@pytest.mark.parametrize(
    ("images", "value_range", "stored"),
    [
        (np.array([[[-1.0, 0.5]]]), None, [-1.0, 0.5]),
        (np.array([[[0.0, 0.25]]]), (0, 1), [-1.0, -0.5]),
        (np.array([[[0, 65535]]], dtype=np.uint16), (0, 65535), [-1.0, 1.0]),
        (np.array([[[False, True]]]), None, [-1.0, 1.0]),
        (np.array([[[0, 8]]]), (0, 16), [-1.0, 0.0]),
        (np.array([[[0, 16]]], dtype=np.uint8), (0, 16), [-1.0, 1.0]),
        (torch.tensor([[[-1.0, 1.0]]]).bfloat16(), None, [-1.0, 1.0]),
    ],
)
def test_a_value_range_maps_to_minus_one_and_one(images, value_range, stored):
    x0, labels = load_data((images, None), value_range=value_range).all()
    assert x0.flatten().tolist() == stored
    assert labels is None


def test_npz_npy_and_arrays_are_the_same_data(tmp_path):
    images, labels = np.stack([COLOUR, COLOUR[::-1]]), np.array([2, 0], dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    np.savez(tmp_path / "b.npz", images, labels)
    np.save(tmp_path / "c.npy", images)
    direct = load_data((images, labels))
    assert load_data(tmp_path / "a.npz").fingerprint == direct.fingerprint
    assert load_data(str(tmp_path / "b.npz")).fingerprint == direct.fingerprint
    assert load_data(tmp_path / "c.npy").fingerprint == load_data((images, None)).fingerprint
    assert direct.class_names == ("0", "1", "2")
    assert load_data((images, labels), class_names=("a", "b", "c", "d")).num_classes == 4


def test_the_data_does_not_change_with_the_array_it_came_from():
    images = np.zeros((2, 4, 4), np.uint8)
    data = load_data((images, None))
    images += 1
    assert not data.images.any()


def test_resizing_arrays_resizes_every_channel_by_itself():
    data = load_data((np.stack([COLOUR] * 2), None), size=(4, 6), resample="box")
    assert data.shape == (3, 4, 6)
    for channel in range(3):
        alone = load_data((COLOUR[None, ..., channel], None), size=(4, 6), resample="box")
        assert torch.equal(data.images[:, channel], alone.images.expand(2, 1, 4, 6)[:, 0])


class Code:
    def __reduce__(self):
        return (print, ("never",))


def write_bad_files(d):
    np.savez(d / "ok.npz", images=np.zeros((2, 4, 4), np.uint8))
    (d / "cut.npz").write_bytes((d / "ok.npz").read_bytes()[:-30])
    (d / "text.npz").write_text("hello")
    (d / "empty.npy").write_bytes(b"")
    (d / "pickle.npy").write_bytes(pickle.dumps(Code()))
    np.save(d / "objects.npy", np.array([Code()], dtype=object), allow_pickle=True)
    np.savez(d / "keys.npz", pictures=np.zeros((2, 4, 4), np.uint8), y=np.zeros(2))
    (d / "notes.txt").write_text("hello")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut.npz", "`source` must be a readable NumPy file .*cut.npz"),
        ("text.npz", "`source` must be a readable NumPy file .*text.npz"),
        ("empty.npy", "`source` must be a readable NumPy file .*empty.npy"),
        ("pickle.npy", "`source` must be a readable NumPy file .*pickle.npy"),
        ("objects.npy", "`source` must be a readable NumPy file .*objects.npy"),
        ("keys.npz", "`source` must hold `images` or `arr_0`, .*keys.npz' holds pictures, y"),
        ("notes.txt", "`source` must be .*notes.txt' is neither a folder nor"),
        ("nowhere", "`source` must be .*nowhere' does not exist"),
    ],
)
def test_a_bad_file_is_named_and_no_code_in_it_runs(tmp_path, capsys, name, message):
    write_bad_files(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path / name)
    assert capsys.readouterr().out == ""


BYTES = np.zeros((2, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (3, {}, TypeError, "`source` must be 'digits'"),
        ({"images": BYTES}, {}, TypeError, "`source` must be 'digits'"),
        ((BYTES[:0], None), {}, ValueError, "`images` .* at least one pixel"),
        ((BYTES[0], None), {}, ValueError, r"`images` .* must be \[N, H, W\]"),
        ((np.array(["a"]), None), {}, TypeError, "`images` .* must be numbers"),
        ((np.zeros((2, 3, 4, 3), np.uint8), None), {}, ValueError, "`layout` must be given .* both"),
        ((np.zeros((2, 5, 4, 5), np.uint8), None), {}, ValueError, "`layout` must be given .* neither"),
        ((BYTES, None), {"layout": "HWC"}, ValueError, "`layout` must be 'NHWC'"),
        ((BYTES / 2.0, None), {}, ValueError, "`value_range` must be given"),
        ((BYTES.astype(int), None), {}, ValueError, "`value_range` must be given .*int64"),
        ((BYTES - 2.0, None), {}, ValueError, "`value_range` must be given"),
        ((BYTES + 2, None), {"value_range": (0, 1)}, ValueError, r"`value_range` must hold .* span \[2, 2\]"),
        ((BYTES, None), {"value_range": (1, 1)}, ValueError, "`value_range` must be .* low < high"),
        ((BYTES, None), {"value_range": 1}, ValueError, "`value_range` must be .* low < high"),
        ((np.full((2, 4, 4), np.nan), None), {}, ValueError, "`images` .* finite, but 2 are not, the first"),
        ((BYTES, [0]), {}, ValueError, "`labels` .* each of the 2 images"),
        ((BYTES, [0.0, 1.0]), {}, TypeError, "`labels` .* whole numbers, got float64"),
        ((BYTES, [0, -2]), {}, ValueError, "`labels` .* -1 for no class, got -2"),
        ((BYTES, [-1, -1]), {}, ValueError, "`labels` .* name a class somewhere"),
        ((BYTES, [0, 2]), {"class_names": ["a"]}, ValueError, "`class_names` .* 1 names .* up to 2"),
        ((BYTES, None), {"class_names": ["a"]}, ValueError, "`class_names` must come with labels"),
        ((BYTES, None), {"size": 0}, ValueError, "`size` must be"),
        ((BYTES, None), {"size": (4, 4, 4)}, ValueError, "`size` must be"),
        ((BYTES, None), {"size": 8, "resample": "sinc"}, ValueError, "`resample` must be one of nearest"),
        ((BYTES, None), {"holdout": 1.0}, ValueError, r"`holdout` must be .* \[0, 1\)"),
        ((BYTES, None), {"holdout": 0.1}, ValueError, "`holdout` must leave samples in both parts"),
        ("digits", {"value_range": (0, 1)}, ValueError, "`value_range` is for arrays only"),
    ],
)
def test_bad_arguments_are_named(source, options, error, message):
    if source == "digits":
        pytest.importorskip("sklearn")
    with pytest.raises(error, match=message):
        load_data(source, **options)


# Folders


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


# Splits and devices


def test_the_held_out_part_is_disjoint_complete_balanced_and_always_the_same():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1)
    labels = np.repeat([0, 1], [80, 20])
    data = load_data((images, labels), holdout=0.1)
    held = data.held_out
    assert torch.bincount(held.labels).tolist() == [8, 2]
    shades = torch.cat([data.images, held.images]).flatten()
    assert shades.sort().values.tolist() == list(range(100))
    assert held.images.flatten().tolist() == [7, 21, 33, 43, 51, 69, 71, 74, 88, 89]  # never changes
    assert not torch.equal(load_data((images, labels)).split(0.1, seed=1).held_out.images, held.images)
    assert load_data((images, labels)).held_out is None


def test_image_data_on_a_device_keeps_its_contents():
    data = ImageData(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]), ("a", "b"))
    moved = data.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.class_names == data.class_names
