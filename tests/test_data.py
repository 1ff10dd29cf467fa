"""Training data: every source becomes images in [-1, 1], or is refused by the name of what is wrong."""

from __future__ import annotations

import builtins
import pickle

import numpy as np
import pytest
import torch

from fastdiff.train import ImageData, load_data

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
    np.save(d / "short.npy", np.zeros((2, 4, 4), np.uint8))
    (d / "short.npy").write_bytes((d / "short.npy").read_bytes()[:-1])
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
        ("short.npy", "short.npy' must hold 160 bytes, got 159: it was cut off"),
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
