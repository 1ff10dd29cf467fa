"""A folder of pictures, decoded: each file is handled or refused by its name, none is misread silently."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastdiff.train.arrays import resampling

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm",
)  # fmt: skip
_NAMED = 10  # so many bad files are named in a message, the rest counted

Folder = tuple[Tensor, Tensor | None, tuple[str, ...], tuple[str, ...]]


def read_folder(root: Path, size: tuple[int, int] | None, resample: str, skip_bad: bool) -> Folder:
    """The pictures of a folder as (images [N, C, H, W] uint8, labels or None, class names, skipped files).

    The order is that of the sorted paths, so it is the same on every machine. See `load_data` for what is
    read and how.

    Raises:
        ValueError: no pictures, an empty class, pictures both in the folder and in sub-folders, files that
            cannot be read (unless `skip_bad`), or pictures of several sizes without `size`.
    """
    method = resampling(resample)
    names, groups = _classes(root)
    files = [(path, label) for label, group in enumerate(groups) for path in group]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(lambda item: _try_decode(item[0], size, method), files))
    good = [
        (path, label, got)
        for (path, label), got in zip(files, decoded, strict=True)
        if not isinstance(got, str)
    ]
    skipped = tuple(
        f"{path}: {got}" for (path, _), got in zip(files, decoded, strict=True) if isinstance(got, str)
    )
    if skipped:
        listed = "\n  ".join(skipped[:_NAMED]) + (
            f"\n  and {len(skipped) - _NAMED} more" if skipped[_NAMED:] else ""
        )
        if not skip_bad:
            raise ValueError(
                f"`source` must hold readable pictures, but {len(skipped)} of {len(files)} are not (mend or"
                f" remove them, or leave them out with skip_bad=True):\n  {listed}"
            )
        emptied = sorted({name for i, name in enumerate(names) if all(label != i for _, label, _ in good)})
        if not good or emptied:
            what = f"in the classes {', '.join(emptied)}" if emptied else f"in {str(root)!r}"
            raise ValueError(f"`source` must hold readable pictures, but none is left {what}:\n  {listed}")
        warnings.warn(f"left out {len(skipped)} of {len(files)} pictures:\n  {listed}", stacklevel=3)
    shapes: dict[tuple[int, ...], Path] = {}
    for path, _, pixels in good:
        shapes.setdefault(pixels.shape[:2], path)
    if len(shapes) > 1:
        seen = ", ".join(f"{path} is {width}x{height}" for (height, width), path in list(shapes.items())[:3])
        raise ValueError(f"`size` must be given for pictures of several sizes: {seen} (width x height)")
    grey = all(pixels.ndim == 2 for _, _, pixels in good)
    images = np.empty((len(good), 1 if grey else 3, *next(iter(shapes))), dtype=np.uint8)
    for i, (_, _, pixels) in enumerate(good):
        images[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    labels = torch.tensor([label for _, label, _ in good]) if names else None
    return torch.from_numpy(images), labels, names, skipped


def _classes(root: Path) -> tuple[tuple[str, ...], list[list[Path]]]:
    """(class names, their pictures); no names and one group where the pictures lie in the folder itself."""
    loose = sorted(path for path in root.iterdir() if _is_picture(path))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    groups = {path.name: sorted(_pictures(path)) for path in folders}
    if loose and any(groups.values()):
        raise ValueError(
            f"`source` must hold pictures or class folders, but {str(root)!r} holds both: {loose[0].name} and"
            f" {next(name for name, group in groups.items() if group)}/; move the loose pictures into"
            " a class folder"
        )
    if loose:
        return (), [loose]
    if not any(groups.values()):
        raise ValueError(
            f"`source` must hold pictures ({' '.join(SUFFIXES)}), but {str(root)!r} and its sub-folders hold"
            " none"
        )
    empty = [name for name, group in groups.items() if not group]
    if empty:
        raise ValueError(
            "`source` must hold pictures of every class, but these sub-folders have none:"
            f" {', '.join(empty)};"
            " a class without pictures cannot be learned: fill or remove them"
        )
    return tuple(groups), list(groups.values())


def _pictures(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        yield from (path for name in names if _is_picture(path := Path(where, name)))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _try_decode(path: Path, size: tuple[int, int] | None, method: Image.Resampling) -> np.ndarray | str:
    """uint8 [H, W] or [H, W, 3], or why not."""
    try:
        return _decode(path, size, method)
    # Decoders fail on damaged files with almost any exception (SyntaxError, struct.error, IndexError, ...);
    # all of them mean the same here, and the file's name and the reason reach the user.
    except Exception as error:
        return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _decode(path: Path, size: tuple[int, int] | None, method: Image.Resampling) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1)
        # A phone's JPEG may carry a second view or a preview (MPO); its first picture is the picture.
        if frames > 1 and opened.format != "MPO":
            raise ValueError(f"it is animated or has several pages ({frames}); write the frames as pictures")
        opened.load()
        image = _to_eight_bits(ImageOps.exif_transpose(opened))
    if size is not None and (image.height, image.width) != size:
        image = ImageOps.fit(image, (size[1], size[0]), method)
    return np.array(image)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Any picture as mode L or RGB."""
    from PIL import Image

    if image.mode in ("L", "RGB"):
        pass
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode.startswith("I"):
        # Pillow's own conversion of 16 bits to 8 cuts off everything above 255.
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"its values span [{values.min()}, {values.max()}], more than 16 bits")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        image = _grey_if_grey(image)
    elif image.mode == "P":
        image = _grey_if_grey(image.convert("RGB"))
    elif image.mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        image = image.convert("RGB")
    else:
        raise ValueError(f"its mode {image.mode} has no agreed range; write it as an 8-bit or 16-bit picture")
    return image


def _grey_if_grey(image: Image.Image) -> Image.Image:
    red, green, blue = image.split()
    return red if red.tobytes() == green.tobytes() == blue.tobytes() else image
