"""Data sets given in Python: arrays, torch's Datasets, anything that gives images one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, TensorDataset
from training_runs import Tiny, trainer

from fastdiff.train import load_data

BYTES = np.random.default_rng(0).integers(0, 256, (6, 7, 5, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 2, 1, 0]
PLANES = torch.from_numpy(BYTES.transpose(0, 3, 1, 2).copy())


class Indexed(Dataset):
    """As torchvision's: items by number, no end but its length."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i % len(self.images)], LABELS[i % 6]


class Streamed(IterableDataset):
    def __iter__(self):
        yield from zip(PLANES, torch.tensor(LABELS), strict=True)


def pillow(arrays=BYTES):
    return [Image.fromarray(array) for array in arrays]


@pytest.mark.parametrize(
    "source",
    [
        Indexed(PLANES),
        Indexed(list(BYTES)),
        Indexed(pillow()),
        Streamed(),
        TensorDataset(PLANES, torch.tensor(LABELS)),
        list(zip(pillow(), LABELS, strict=True)),
        [{"image": image, "label": label} for image, label in zip(pillow(), LABELS, strict=True)],
        [{"img": image, "label": np.int64(label)} for image, label in zip(BYTES, LABELS, strict=True)],
        (pair for pair in zip(PLANES, LABELS, strict=True)),
        torch.utils.data.DataLoader(Indexed(PLANES), batch_size=None),
    ],
    ids=["planes", "arrays", "pillow", "stream", "tensors", "list", "dicts", "img", "generator", "loader"],
)
def test_items_of_every_kind_are_the_same_data(source):
    wanted = load_data((BYTES, LABELS))
    assert load_data(source).fingerprint == wanted.fingerprint


@pytest.mark.parametrize(
    "source", [PLANES, BYTES, list(PLANES), TensorDataset(PLANES), pillow(), (image for image in BYTES)]
)
def test_images_alone_have_no_labels(source):
    data = load_data(source)
    assert data.labels is None
    assert torch.equal(data.images, PLANES)


def test_options_for_arrays_hold_for_items():
    floats = PLANES.double() / 255
    data = load_data(Indexed(floats), value_range=(0, 1), class_names=["a", "b", "c", "d"], holdout=0.5)
    assert data.num_classes == 4
    assert len(data) == len(data.held_out) == 3
    with pytest.raises(ValueError, match=r"`value_range` must be given .*float64 values in \[0"):
        load_data(Indexed(floats))
    thin = [np.zeros((3, 4, 3), np.uint8)] * 2
    with pytest.raises(ValueError, match="`layout` must be given"):
        load_data(thin)
    assert load_data(thin, layout="NHWC").shape == (3, 3, 4)
    assert load_data([torch.zeros(3, 4, 3, dtype=torch.uint8)]).shape == (3, 4, 3)  # a tensor is [C, H, W]


def test_pillow_s_pictures_are_read_as_files_are():
    sizes = [Image.fromarray(BYTES[0]), Image.fromarray(BYTES[1, :3])]
    with pytest.raises(ValueError, match=r"items of one shape, .*item 1 has \(3, 3, 5\); .*give `size`"):
        load_data(sizes)
    assert load_data(sizes, size=4).shape == (3, 4, 4)
    clear = Image.fromarray(np.dstack([BYTES[0], np.zeros((7, 5), np.uint8)]))
    assert (load_data([clear]).images == 255).all()


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], ValueError, "at least one item, got none"),
        (iter([]), ValueError, "at least one item, got none; is it used up"),
        (
            [(BYTES[0], 1), (BYTES[1], None)],
            ValueError,
            "items of one label, but item 0 has False and",
        ),
        (
            [BYTES[0], BYTES[1] / 2.0],
            ValueError,
            "items of one type, but item 0 has uint8 and",
        ),
        ([3], TypeError, "`source` must give images .* got int in item 0"),
        ([torch.zeros(2, 3, 4, 5)], TypeError, r"got shape \(2, 3, 4, 5\) in item 0"),
        ([{"pixels": BYTES[0]}], TypeError, "dicts with 'image', got one with pixels"),
        ({"image": BYTES}, TypeError, "`source` must be .* got dict"),
        (3.5, TypeError, "`source` must be .* got float"),
        ([(BYTES[0], "cat")], TypeError, "label .*whole number.* got 'cat' in item 0"),
        ([(BYTES[0], 0.5)], TypeError, "label .*whole number.* got 0.5 in item 0"),
    ],
)
def test_items_that_are_no_data_set_are_named(source, error, message):
    with pytest.raises(error, match=message):
        load_data(source)


def test_a_data_set_in_python_trains(tmp_path):
    images = [torch.rand(1, 6, 6) * 2 - 1 for _ in range(12)]
    run = trainer(tmp_path / "run", data=load_data([(image, i % 3) for i, image in enumerate(images)]))
    assert isinstance(run.model, Tiny)
    assert run.run(progress=False).steps == 12
