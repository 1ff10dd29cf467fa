"""Data sets given in Python, item by item, as arrays."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from fastdiff.train.arrays import as_array, as_nchw, resampling
from fastdiff.train.folder import in_eight_bits

_IMAGE_KEYS, _LABEL_KEYS = ("image", "img", "images"), ("label", "labels", "fine_label")


def arrays_of(
    source: Any, layout: str | None, size: tuple[int, int] | None, resample: str
) -> tuple[Any, Any, str | None]:
    """(images, labels or None, layout) of what `load_data` takes that is no path: arrays, a pair, or items.

    Raises:
        TypeError: it is none of these, or an item is no image.
        ValueError: it is empty, or its items differ in shape, type or in having a label.
    """
    if isinstance(source, Tensor | np.ndarray):
        return source, None, layout
    if isinstance(source, tuple) and len(source) == 2:
        return (*source, layout)
    images: list[np.ndarray] = []
    labels: list[Any] = []
    for i, item in enumerate(_items(source)):
        image, label = _parted(item)
        images.append(_plane(image, layout, size, resample, i))
        labels.append(None if label is None else _whole(label, i))
        for name, first, now in (
            ("shape", images[0].shape, images[i].shape),
            ("type", images[0].dtype, images[i].dtype),
            ("label", labels[0] is None, label is None),
        ):
            if first != now:
                remedy = {
                    "shape": "; resize them all, or give `size` for Pillow's",
                    "type": "; convert them all",
                    "label": " (whether there is none)",
                }[name]
                raise ValueError(
                    f"`source` must give items of one {name}, but item 0 has {first} and item {i} has"
                    f" {now}{remedy}"
                )
    if not images:
        raise ValueError("`source` must give at least one item, got none; is it used up?")
    return np.stack(images), None if labels[0] is None else np.array(labels), "NCHW"


def _items(source: Any) -> Iterator[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, Mapping):
        # A torch Dataset of this kind says where it ends by its length alone.
        return (source[i] for i in range(len(source)))
    if isinstance(source, Iterable) and not isinstance(source, Mapping):
        return iter(source)
    raise TypeError(
        "`source` must be 'digits', a folder, a .npz or .npy file, an array, a pair (images, labels), a torch"
        f" Dataset or an iterable of images or of (image, label), got {type(source).__name__}"
    )


def _parted(item: Any) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        if image is None:
            raise TypeError(
                f"`source` must give dicts with 'image', got one with {', '.join(map(str, item))}"
            )
        return image, next((item[key] for key in _LABEL_KEYS if key in item), None)
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if isinstance(item, tuple | list) and len(item) == 1:  # as TensorDataset(images) gives them
        return item[0], None
    return item, None


def _whole(label: Any, i: int) -> int:
    try:
        return operator.index(label)  # integers, NumPy's as well, and tensors of one integer
    except TypeError:
        raise TypeError(
            f"`source` must give each label as a whole number, got {label!r} in item {i}; number the classes"
        ) from None


def _plane(image: Any, layout: str | None, size: tuple[int, int] | None, resample: str, i: int) -> np.ndarray:
    """[C, H, W] of one image."""
    from PIL import Image

    if isinstance(image, Image.Image):
        pixels = np.array(in_eight_bits(image, size, resampling(resample)))
        return np.broadcast_to(pixels, (1, *pixels.shape)) if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if not isinstance(image, Tensor | np.ndarray) or image.ndim not in (2, 3):
        got = f"shape {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(
            "`source` must give images as tensors [C, H, W] or [H, W], arrays [H, W, C] or [H, W], or"
            f" Pillow's, got {got} in item {i}"
        )
    array = as_array(image, f"item {i}")
    if array.ndim == 3 and isinstance(image, np.ndarray):
        return as_nchw(array[None], layout, f"item {i}")[0]
    return array[None] if array.ndim == 2 else np.asarray(array)
