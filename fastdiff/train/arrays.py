"""Arrays from outside, checked and brought into the one form that `ImageData` stores."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from torch import Tensor

from fastdiff.train.mapped import mapped

if TYPE_CHECKING:
    from PIL import Image

RESAMPLING = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

_IMAGE_KEYS, _LABEL_KEYS = ("images", "arr_0"), ("labels", "arr_1")


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Images and labels (or None) of a `.npz` or `.npy` file, and whether they are mapped; it runs no code.

    A `.npy` file is mapped: its pages are read when they are needed, and no change is written.

    Raises:
        ValueError: the file does not exist, cannot be read, holds pickled objects or no images.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".npy") or not path.exists():
        what = "is neither a folder nor a .npz or .npy file" if path.exists() else "does not exist"
        raise ValueError(
            f"`source` must be 'digits', a folder or a .npz or .npy file, but {str(path)!r} {what}"
        )
    try:
        with open(path, "rb") as file:
            if suffix == ".npy":
                shape, is_fortran, dtype = _header(file)
                offset = file.tell()
            else:
                loaded = np.load(file, allow_pickle=False)
                keys = list(loaded)
                images = next((loaded[key] for key in _IMAGE_KEYS if key in keys), None)
                labels = next((loaded[key] for key in _LABEL_KEYS if key in keys), None)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        # np.load says "pickled" of object arrays and of anything that is no NumPy file at all.
        raise ValueError(
            f"`source` must be a readable NumPy file without Python objects, but {str(path)!r} failed with:"
            f" {error}; write it again with numpy.savez(path, images=..., labels=...)"
        ) from error
    if suffix == ".npy":
        array = mapped(path, dtype, shape, offset, "F" if is_fortran else "C")
        # Of a file in Fortran's order every picture lies all over it.
        return array if array.flags.c_contiguous else np.array(array, order="C"), None, True
    if images is None:
        raise ValueError(
            f"`source` must hold `images` or `arr_0`, but {str(path)!r} holds {', '.join(keys) or 'nothing'};"
            " write it again with numpy.savez(path, images=..., labels=...)"
        )
    return images, labels, False


def _header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, type) of a `.npy` file, whose bytes begin where it leaves off."""
    readers = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
    version = read_magic(file)
    if version not in readers:  # there is a third, for names of fields beyond Latin-1
        raise ValueError(f"its header is of version {version}, which is not for numbers")
    shape, is_fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return shape, is_fortran, dtype


def as_array(images: Any, name: str) -> np.ndarray:
    """A tensor or an array-like as a NumPy array of numbers or booleans."""
    if isinstance(images, Tensor):
        images = images.detach().cpu()
        images = (images.float() if images.dtype == torch.bfloat16 else images).numpy()
    array = np.asarray(images)
    if array.dtype.kind not in "buif":
        raise TypeError(f"`images` of {name} must be numbers, got an array of {array.dtype}")
    return array


def as_nchw(images: np.ndarray, layout: str | None, name: str) -> np.ndarray:
    """[N, H, W], [N, H, W, C] or [N, C, H, W] -> [N, C, H, W]; `layout` says which where the shape cannot.

    Raises:
        ValueError: another number of dimensions, nothing in it, or a layout that the shape leaves open.
    """
    if layout not in (None, "NHWC", "NCHW"):
        raise ValueError(f"`layout` must be 'NHWC', 'NCHW' or None, got {layout!r}")
    if images.ndim not in (3, 4):
        raise ValueError(
            f"`images` of {name} must be [N, H, W], [N, H, W, C] or [N, C, H, W], got shape {images.shape}"
        )
    if images.size == 0:
        raise ValueError(f"`images` of {name} must hold at least one pixel, got shape {images.shape}")
    if images.ndim == 3:
        return images[:, None]
    if layout is None:
        first, last = images.shape[1] in (1, 3, 4), images.shape[3] in (1, 3, 4)
        if first == last:
            why = (
                "both the second and the last dimension"
                if first
                else "neither the second nor the last dimension"
            )
            raise ValueError(
                f"`layout` must be given ('NHWC' or 'NCHW') for the images of {name}: of shape"
                f" {images.shape}, {why} could be the channels (1, 3 or 4)"
            )
        layout = "NCHW" if first else "NHWC"
    return images if layout == "NCHW" else images.transpose(0, 3, 1, 2)


def to_stored(
    images: np.ndarray, value_range: tuple[float, float] | None, name: str, is_ours: bool = False
) -> tuple[Tensor, tuple[float, float]]:
    """Images of any numeric type -> (what `ImageData.images` holds, the range that was mapped to [-1, 1]).

        stored = 2 (value - low) / (high - low) - 1      in float64, rounded to float32 once; bytes stay bytes

    Args:
        is_ours: whether nobody else can change the array; bytes are then stored in its memory.
    Raises:
        ValueError: values that are not finite or lie outside the range, or a range that cannot be known.
    """
    kind = images.dtype.kind
    if kind == "f" and not np.isfinite(images).all():
        bad = np.unique(np.nonzero(~np.isfinite(images))[0])
        raise ValueError(
            f"`images` of {name} must be finite, but {len(bad)} are not, the first at index {bad[0]}"
        )
    low, high = images.min().item(), images.max().item()
    if value_range is None:
        value_range = _natural_range(images.dtype, low, high, name)
    try:
        start, end = map(float, value_range)
    except (TypeError, ValueError):
        start = end = 0.0
    if not (np.isfinite(end - start) and end > start):
        raise ValueError(f"`value_range` must be (low, high) with low < high, got {value_range!r}")
    if low < start or high > end:
        raise ValueError(
            f"`value_range` must hold all values, but the images of {name} span [{low}, {high}] and the"
            f" range is [{start:g}, {end:g}]; give value_range=(low, high)"
        )
    if images.dtype == np.uint8 and (start, end) == (0.0, 255.0):
        return torch.from_numpy(images if is_ours else images.copy(order="C")), (start, end)
    scaled = np.ascontiguousarray(
        (images.astype(np.float64) - start) * (2 / (end - start)) - 1, dtype=np.float32
    )
    return torch.from_numpy(scaled), (start, end)


def _natural_range(dtype: np.dtype, low: float, high: float, name: str) -> tuple[float, float]:
    if dtype == np.uint8:
        return 0.0, 255.0
    if dtype.kind == "b":
        return 0.0, 1.0
    if dtype.kind == "f" and -1 <= low < 0 and high <= 1:
        return -1.0, 1.0
    raise ValueError(
        f"`value_range` must be given for the images of {name}: {dtype} values in [{low}, {high}] do not say"
        " which value is black and which is white; give, say, value_range=(0, 1) or (0, 255) or (-1, 1)"
    )


def whole_labels(labels: Any, count: int, name: str) -> Tensor:
    """[N] labels as int64, checked: one for each image, whole, >= 0, or -1 for a sample without a class."""
    array = as_array(labels, name)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"`labels` of {name} must be whole numbers, got {array.dtype}; convert with astype(int)"
        )
    if array.shape != (count,):
        raise ValueError(
            f"`labels` of {name} must be one number for each of the {count} images, got shape {array.shape}"
        )
    if array.min() < -1 or array.max() >= 2**31:
        raise ValueError(
            f"`labels` of {name} must be 0, 1, ... or -1 for no class, got {array.min()} to {array.max()}"
        )
    if array.max() == -1:
        raise ValueError(f"`labels` of {name} must name a class somewhere, got only -1; give None instead")
    return torch.from_numpy(array.astype(np.int64))


def resampling(name: str) -> Image.Resampling:
    """Pillow's filter of that name."""
    from PIL import Image

    if name not in RESAMPLING:
        raise ValueError(f"`resample` must be one of {', '.join(RESAMPLING)}, got {name!r}")
    return Image.Resampling[name.upper()]


def resize(images: Tensor, size: tuple[int, int] | None, resample: str) -> Tensor:
    """[N, C, H, W] uint8 or float32 in [-1, 1] -> [N, C, *size], scaled to cover `size` and cut to it.

    Every channel is resized by itself, in its own precision; float32 is clamped, since the wider filters
    overshoot.
    """
    from PIL import Image, ImageOps

    method = resampling(resample)
    if size is None or tuple(images.shape[2:]) == size:
        return images
    n, channels = images.shape[:2]
    out = np.empty((n * channels, *size), dtype=np.uint8 if images.dtype == torch.uint8 else np.float32)
    for i, plane in enumerate(images.flatten(0, 1).numpy()):
        out[i] = ImageOps.fit(Image.fromarray(plane), (size[1], size[0]), method)
    resized = torch.from_numpy(out).unflatten(0, (n, channels))
    return resized if resized.dtype == torch.uint8 else resized.clamp_(-1, 1)
