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
from fastdiff.train.cache import Pixels, decoded, half_of_memory

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".pnm",
)  # fmt: skip
_NAMED = 10  # so many bad files are named in a message, the rest counted
_AHEAD = 16  # pictures that a worker decodes before the finished ones are stored

Folder = tuple[Tensor, Tensor | None, tuple[str, ...], tuple[str, ...]]


def read_folder(
    root: Path, size: tuple[int, int] | None, resample: str, skip_bad: bool, cache: Path | None = None
) -> Folder:
    """The pictures of a folder as (images [N, C, H, W] uint8, labels or None, class names, skipped files).

    The order is that of the sorted paths, so it is the same on every machine. See `load_data` for what is
    read and how, and `decoded` for the cache.

    Raises:
        ValueError: no pictures, an empty class, pictures both in the folder and in sub-folders, files that
            cannot be read (unless `skip_bad`), pictures of several sizes without `size`, or more of them than
            memory holds without `cache`.
    """
    method = resampling(resample)
    names, groups = _classes(root)
    files = [(path, label) for label, group in enumerate(groups) for path in group]
    paths = [path for path, _ in files]
    images, reasons = decoded(
        lambda pixels: _decode_all(paths, size, method, pixels),
        paths,
        [size, resample],
        cache,
        half_of_memory(),
    )
    good = [label for (_, label), reason in zip(files, reasons, strict=True) if not reason]
    skipped = tuple(f"{shown(path)}: {reason}" for path, reason in zip(paths, reasons, strict=True) if reason)
    if skipped:
        listed = "\n  ".join(skipped[:_NAMED]) + (
            f"\n  and {len(skipped) - _NAMED} more" if skipped[_NAMED:] else ""
        )
        if not skip_bad:
            raise ValueError(
                f"`source` must hold readable pictures, but {len(skipped)} of {len(files)} are not (mend or"
                f" remove them, or leave them out with skip_bad=True):\n  {listed}"
            )
        emptied = sorted(name for i, name in enumerate(names) if i not in set(good))
        if not good or emptied:
            what = f"in the classes {', '.join(emptied)}" if emptied else f"in {str(root)!r}"
            raise ValueError(f"`source` must hold readable pictures, but none is left {what}:\n  {listed}")
        warnings.warn(f"left out {len(skipped)} of {len(files)} pictures:\n  {listed}", stacklevel=3)
    return torch.from_numpy(images), torch.tensor(good) if names else None, names, skipped


def _decode_all(
    paths: list[Path], size: tuple[int, int] | None, method: Image.Resampling, pixels: Pixels
) -> list[str]:
    """Append the good ones to `pixels`; why each is bad, or "". Few pictures are in flight at any time."""
    workers = os.cpu_count() or 1
    reasons: list[str] = []
    shapes: dict[tuple[int, ...], Path] = {}
    with ThreadPoolExecutor(workers) as pool:  # Pillow's decoders release the interpreter's lock
        for start in range(0, len(paths), _AHEAD * workers):
            part = paths[start : start + _AHEAD * workers]
            for path, got in zip(part, pool.map(lambda p: _try_decode(p, size, method), part), strict=True):
                reasons.append(got if isinstance(got, str) else "")
                if isinstance(got, str):
                    continue
                shapes.setdefault(got.shape[:2], path)
                if len(shapes) == 1:
                    pixels.append(got)
    if len(shapes) > 1:
        seen = ", ".join(f"{shown(path)} is {w}x{h}" for (h, w), path in list(shapes.items())[:3])
        raise ValueError(f"`size` must be given for pictures of several sizes: {seen} (width x height)")
    return reasons


def _classes(root: Path) -> tuple[tuple[str, ...], list[list[Path]]]:
    """(class names, their pictures); no names and one group where the pictures lie in the folder itself."""
    loose = sorted(path for path in root.iterdir() if _is_picture(path))
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in folders:
        if shown(path) != str(path):
            raise ValueError(
                "`source` must hold class folders with names in the system's encoding, got"
                f" {shown(path)}; rename it"
            )
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
    """The pictures at any depth. Links to folders are followed, each folder once, so that no loop is endless.

    Raises:
        OSError: a folder cannot be read; its pictures would be missing without a word.
    """
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (path for name in names if _is_picture(path := Path(where, name)))


def _raise(error: OSError) -> None:
    raise error


def shown(path: Path) -> str:
    """A path as text that can be printed and stored, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", errors="backslashreplace")


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and not path.is_dir()


def _try_decode(path: Path, size: tuple[int, int] | None, method: Image.Resampling) -> np.ndarray | str:
    """uint8 [H, W] or [H, W, 3], or why not."""
    try:
        return _decode(path, size, method)
    # Decoders fail on damaged files with almost any exception (SyntaxError, struct.error, IndexError, ...);
    # all of them mean the same here, and the file's name and the reason reach the user.
    except Exception as error:
        said = getattr(error, "strerror", None) or str(error)  # without the path, which stands before it
        return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _decode(path: Path, size: tuple[int, int] | None, method: Image.Resampling) -> np.ndarray:
    from PIL import Image

    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")  # a pipe would be waited for without end
    with Image.open(path) as opened:
        frames = getattr(opened, "n_frames", 1)
        # A phone's JPEG may carry a second view or a preview (MPO); its first picture is the picture.
        if frames > 1 and opened.format != "MPO":
            raise ValueError(f"it is animated or has several pages ({frames}); write the frames as pictures")
        return in_eight_bits(opened, size, method)


def in_eight_bits(picture: Image.Image, size: tuple[int, int] | None, method: Image.Resampling) -> np.ndarray:
    """Upright uint8 [H, W] or [H, W, 3], scaled to cover `size` and cut to it.

    Raises:
        ValueError: a mode without an agreed range.
    """
    from PIL import ImageOps

    picture.load()
    image = _to_eight_bits(ImageOps.exif_transpose(picture))
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
