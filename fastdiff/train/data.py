"""Training data: from the digits, a folder of pictures, a NumPy file or Python.

Whatever the source, the trainer sees one thing: `ImageData`, whose `batch` gives float32 images in [-1, 1].
Bytes stay bytes in memory and are scaled batch by batch, so 50 000 images of 3x32x32 take 154 MB and not 614.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.train import draws
from fastdiff.train.arrays import as_array, as_nchw, read_npz, resampling, resize, to_stored, whole_labels
from fastdiff.train.folder import read_folder
from fastdiff.train.items import arrays_of

_PIECE = 4 << 20  # bytes that a look at all images takes at a time
DIGITS_ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning"
    " Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; its test part, as scikit-learn ships it"
)


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and what is known about them; immutable, made by `load_data`.

    Attributes:
        images: [N, C, H, W], uint8 (a byte k stands for k / 127.5 - 1) or float32 in [-1, 1]; N >= 1.
        labels: [N] int64, 0 <= label < num_classes, -1 where a sample has none; or None: no classes at all.
        class_names: a name for each class, in the order of the labels; empty without labels.
        attribution: whose data it is and under which terms, "" where unknown.
        value_range: the values of the source that became -1 and 1.
        held_out: the part that was split off and is not to be trained on, or None.
        skipped: files that could not be read and were left out (`skip_bad=True`).
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    attribution: str = ""
    value_range: tuple[float, float] = (0.0, 255.0)
    held_out: ImageData | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        return tuple(self.images.shape[1:])

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; None without labels."""
        return None if self.labels is None else len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and labels, which tells whether a resumed run sees the same data."""
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        # By pieces: the whole of a mapped file need not fit into memory.
        for piece in self.images.split(max(1, _PIECE // self.images[0].nbytes)):
            digest.update(piece.cpu().contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The images x0 [B, C, H, W] float32 in [-1, 1] and the labels [B] (or None) at `index` [B] int64."""
        labels = None if self.labels is None else self.labels.index_select(0, index)
        return as_images(self.images.index_select(0, index)), labels

    def rows(self, index: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """The images as they are stored and the labels (or None) at `index` [B] int64, a NumPy array.

        On the CPU by NumPy, on the calling thread alone: so a thread that prepares batches does not wake a
        second team of torch's threads against the one that trains.
        """
        if self.images.device.type == "cpu":
            stored = self.images.numpy()
            # `take` would copy all of an array that is not in C's order.
            taken = np.take(stored, index, axis=0) if stored.flags.c_contiguous else stored[index]
            images = torch.from_numpy(np.ascontiguousarray(taken))
        else:
            images = self.images.index_select(0, torch.from_numpy(index).to(self.images.device))
        return images, None if self.labels is None else self.labels[
            torch.from_numpy(index).to(self.labels.device)
        ]

    def all(self) -> tuple[Tensor, Tensor | None]:
        """Every image as float32 in [-1, 1] and every label, as `batch` gives them."""
        return self.batch(torch.arange(len(self), device=self.images.device))

    def to(self, device: str | torch.device) -> ImageData:
        """The same data with images and labels on `device`; `held_out` stays where it is."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, images=self.images.to(device), labels=labels)

    def split(self, fraction: float, seed: int = 0) -> ImageData:
        """This data less a random part, which becomes `held_out`.

        Of each class of n samples, round(fraction * n) are held out. Which they are depends on `seed`, on the
        number of samples and on the labels alone, never on a library's version.

        Args:
            fraction: 0 <= fraction < 1; 0 holds nothing out.
            seed: a whole number of 64 bits.

        Raises:
            ValueError: `fraction` is out of range, or leaves one of the two parts empty.
        """
        if not _checked_fraction(fraction):
            return replace(self, held_out=None)
        order = torch.from_numpy(draws.permutation(len(self), seed, epoch=0, domain=draws.DOMAIN_SPLIT))
        group = torch.zeros(len(self)) if self.labels is None else self.labels.cpu()[order]
        held = torch.zeros(len(self), dtype=torch.bool)
        for value in group.unique():
            members = order[group == value]
            held[members[: round(fraction * len(members))]] = True
        if not held.any() or held.all():
            raise ValueError(
                f"`holdout` must leave samples in both parts, but {fraction} of {len(self)} samples"
                f" ({len(group.unique())} classes) holds out {int(held.sum())}; choose another fraction"
            )
        return replace(self._subset(~held), held_out=replace(self._subset(held), held_out=None))

    def _subset(self, chosen: Tensor) -> ImageData:
        labels = None if self.labels is None else self.labels[chosen.to(self.labels.device)]
        return replace(self, images=self.images[chosen.to(self.images.device)], labels=labels)


def as_images(stored: Tensor) -> Tensor:
    """Images as `ImageData` stores them -> float32 in [-1, 1]; bytes k become k / 127.5 - 1."""
    return stored.float().div_(127.5).sub_(1) if stored.dtype == torch.uint8 else stored


def load_data(
    source: Any,
    *,
    size: int | tuple[int, int] | None = None,
    resample: str = "bicubic",
    holdout: float = 0.0,
    skip_bad: bool = False,
    value_range: tuple[float, float] | None = None,
    layout: str | None = None,
    class_names: Sequence[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> ImageData:
    """Images, and labels where there are some, from one of five kinds of source.

    - `"digits"`: the 1 797 handwritten digits of scikit-learn, 1x8x8, 10 classes. Needs the extra `data`.
    - a folder of pictures: sub-folders are classes, named by the folder and numbered in the order of the
      names; pictures directly in the folder have no labels. A file is a picture by its suffix
      (`folder.SUFFIXES`); others and hidden ones are passed over. Grey pictures stay one channel if all are
      grey, else all become RGB. Transparent ones are laid on white, 16 bits scaled to 8, CMYK converted;
      animated ones are refused.
    - `FILE.npz` with `images` or `arr_0` and perhaps `labels` or `arr_1`; `FILE.npy` with images only,
      whose bytes are not read into memory but mapped: it must not change while it is in use. With `holdout`
      or another `size`, and if it holds numbers that are not bytes, what becomes of it lies in memory.
    - arrays: a tensor or NumPy array of images, or a pair (images, labels) of them, labels may be None.
    - a data set in Python: a torch Dataset, or any iterable that ends, of images, pairs (image, label) or
      dicts with "image" (or "img") and "label"; images are tensors [C, H, W] or [H, W], arrays [H, W, C] or
      [H, W], or Pillow's. It is read once, in order, into memory; what is random in it (an augmentation) is
      drawn once: the trainer's own `flip` and `crop` are drawn anew in every step.

    Args:
        source: as above. `"digits"` is always the data set; write `"./digits"` for a folder of that name.
        size: scale every image to cover size x size (or (height, width)) pixels and cut out its centre; None:
            as it is, and then all pictures of a folder must have one size.
        resample: the filter for it: nearest, box, bilinear, hamming, bicubic, lanczos (Pillow's, which widen
            with the reduction). Floating-point images are clamped to their range afterwards.
        holdout: the fraction of every class to split off into `held_out`; see `ImageData.split`.
        skip_bad: leave out pictures that cannot be read, with a warning that names them, instead of refusing.
        value_range: arrays only: the values that become -1 and 1. None: (0, 255) for uint8, (0, 1) for
            booleans, (-1, 1) for floating point that has negative values; anything else must say it.
        layout: arrays only: "NHWC" or "NCHW"; None: whichever dimension is 1, 3 or 4 holds the channels.
            [N, H, W] is always one channel.
        class_names: arrays only: a name for each class; None: "0", "1", ...
        cache: folders only: a folder in which the decoded pictures are kept as a file that is mapped, so that
            they need no memory of their own and a later run need not decode them; files that changed are
            decoded anew. None: in memory.

    Returns:
        The data, in memory or mapped.

    Raises:
        ValueError, TypeError: `source` or an option breaks its contract, the source is empty, or files of it
            cannot be read; the message names them.
        ImportError: `"digits"` without scikit-learn.
    """
    _checked_fraction(holdout)
    resampling(resample)
    pixels = _size(size)
    arrays: dict[str, Any] = {"value_range": value_range, "layout": layout, "class_names": class_names}
    path = Path(source).expanduser() if isinstance(source, str | os.PathLike) else None
    if cache is not None and (source == "digits" or path is None or not path.is_dir()):
        raise ValueError(f"`cache` is for folders of pictures only, got {str(cache)!r}; leave it out")
    if cache is not None and holdout:
        raise ValueError(
            f"`holdout` must be 0 with `cache`, got {holdout}: a part of a mapped file would have to be"
            " copied into memory; put the pictures that are kept from training into a folder of their own"
        )
    if path is None:
        images, labels, arrays["layout"] = arrays_of(source, layout, pixels, resample)
        data = _from_arrays(images, labels, "source", **arrays)
    elif source == "digits":
        _refuse(arrays, "the digits")
        data = _digits()
    elif path.is_dir():
        _refuse(arrays, "a folder of pictures")
        kept = None if cache is None else Path(cache).expanduser()
        images, labels, names, skipped = read_folder(path, pixels, resample, skip_bad, kept)
        data = ImageData(images, labels, names, skipped=skipped)
    else:
        images, labels, is_mapped = read_npz(path)
        data = _from_arrays(images, labels, str(path), **arrays, is_ours=is_mapped)
    return replace(data, images=resize(data.images, pixels, resample)).split(holdout)


def _checked_fraction(fraction: Any) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction < 1:
        raise ValueError(f"`holdout` must be a fraction of the samples in [0, 1), got {fraction!r}")
    return fraction


def _refuse(options: dict[str, Any], what: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"`{name}` is for arrays only, got {value!r} with {what}; leave it out")


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = size if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise ValueError(f"`size` must be a whole number of pixels or (height, width), got {size!r}")
    return pair[0], pair[1]


def _digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is not installed; install it with"
            " `pip install scikit-learn`, or the extra `data`"
        ) from error
    digits = load_digits()
    data = _from_arrays(digits.images, digits.target, "digits", value_range=(0.0, 16.0))
    return replace(data, attribution=DIGITS_ATTRIBUTION)


def _from_arrays(
    images: Any,
    labels: Any,
    name: str,
    value_range: tuple[float, float] | None = None,
    layout: str | None = None,
    class_names: Sequence[str] | None = None,
    is_ours: bool = False,
) -> ImageData:
    whole_images = as_nchw(as_array(images, name), layout, name)
    stored, value_range = to_stored(whole_images, value_range, name, is_ours)
    if labels is None:
        if class_names is not None:
            raise ValueError("`class_names` must come with labels, got none; give labels or leave it out")
        return ImageData(stored, value_range=value_range)
    whole = whole_labels(labels, len(stored), name)
    count = int(whole.max()) + 1
    names = tuple(str(i) for i in range(count)) if class_names is None else tuple(map(str, class_names))
    if len(names) < count or not names:
        raise ValueError(
            f"`class_names` must name every class, got {len(names)} names for labels up to {count - 1}"
        )
    return ImageData(stored, whole, names, value_range=value_range)
