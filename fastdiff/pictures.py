"""Images in and out of tensors: bytes, grids of samples, strips of a chain, sample archives and loss curves.

Images are [B, C, H, W] in [-1, 1] with C = 1 (grey), 3 (RGB) or 4 (RGBA), as tensors or NumPy arrays; uint8
is taken as it is. Files are written atomically: a killed process leaves the old file or the new one, never
half of one.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.files import atomic_path

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# Without `scale=`, pictures are enlarged by whole factors until their longer side has about this many pixels,
# so that 8x8 digits can be seen; a strip has more columns and smaller pictures.
_GRID_PIXELS, _STRIP_PIXELS = 64, 48
_PART_COLOURS = ("#3f7f3f", "#c98a1b", "#c8452f", "#8f5aa8")


def to_uint8(x: Tensor | np.ndarray) -> Tensor:
    """Images in [-1, 1] as bytes: round(127.5 * (clamp(x, -1, 1) + 1)).

    The inverse of k / 127.5 - 1 for every byte k. Ties round to even.

    Args:
        x: any shape, floating point, nominally in [-1, 1], values beyond are clamped; or uint8, returned as
            it is.

    Returns:
        The same shape, uint8, on x's device.

    Raises:
        TypeError: `x` is no floating-point or uint8 tensor or array.
        ValueError: `x` holds NaN.
    """
    if isinstance(x, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(x))
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be a tensor or a NumPy array of images in [-1, 1], got {type(x).__name__}")
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise TypeError(f"`x` must be floating point in [-1, 1] or uint8, got {x.dtype}; convert it first")
    x = x.detach()
    if x.isnan().any():
        count = int(x.isnan().sum())
        raise ValueError(
            f"`x` must hold numbers, got {count} NaN of {x.numel()}; the chain or the model diverged"
        )
    return x.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def save_grid(
    x: Tensor | np.ndarray,
    path: str | os.PathLike[str],
    columns: int | None = None,
    scale: int | None = None,
    pad: int = 2,
) -> Path:
    """Write the images side by side, row by row, as one picture.

    Args:
        x: [B, C, H, W], B >= 1, in [-1, 1] or uint8.
        path: file to write; its suffix names the format (`PICTURE_SUFFIXES`); its folder exists.
        columns: images per line; None: ceil(sqrt(B)).
        scale: whole factor of enlargement, each pixel a square block; None: about 64 pixels a side.
        pad: white pixels around every image.

    Returns:
        The path written.

    Raises:
        TypeError, ValueError: an argument breaks its contract; nothing is written.
    """
    pixels = _as_images(x, "x")
    target = check_target(path)
    columns = math.ceil(math.sqrt(len(pixels))) if columns is None else _at_least("columns", columns, 1)
    pad = _at_least("pad", pad, 0)
    _save(_tile(pixels, columns, _scale(pixels, scale, _GRID_PIXELS), pad), target)
    return target


def save_strip(
    trajectory: Tensor | np.ndarray | Sequence[Tensor | np.ndarray],
    path: str | os.PathLike[str],
    columns: int = 11,
    scale: int | None = None,
    pad: int = 1,
) -> Path:
    """Write the course of a chain as one picture: a line for each sample, a column for each moment.

    Args:
        trajectory: [M, B, C, H, W] or a sequence of M tensors [B, C, H, W], first moment first; values beyond
            [-1, 1], as noise has them, are clamped.
        path: file to write, as for `save_grid`.
        columns: at most so many moments, evenly spaced, the first and the last always among them.
        scale, pad: as for `save_grid`.

    Returns:
        The path written.

    Raises:
        TypeError, ValueError: an argument breaks its contract; nothing is written.
    """
    moments = list(trajectory)
    if not moments:
        raise ValueError("`trajectory` must hold at least one moment of shape [B, C, H, W], got none")
    columns = _at_least("columns", columns, 1)
    target = check_target(path)
    pad = _at_least("pad", pad, 0)
    if len(moments) > columns:
        # With one column the moment that matters is the last.
        kept = np.linspace(len(moments) - 1, 0, columns).round().astype(int)[::-1]
        moments = [moments[i] for i in kept]
    shown = [_as_images(moment, "trajectory") for moment in moments]
    if len({pixels.shape for pixels in shown}) > 1:
        raise ValueError(f"`trajectory` must keep one shape, got {sorted({p.shape for p in shown})}")
    pixels = np.stack(shown, axis=1).reshape(-1, *shown[0].shape[1:])
    _save(_tile(pixels, len(shown), _scale(pixels, scale, _STRIP_PIXELS), pad), target)
    return target


def save_npz(
    x: Tensor | np.ndarray, path: str | os.PathLike[str], labels: Tensor | np.ndarray | None = None
) -> Path:
    """Write the images as a sample archive: `arr_0` uint8 [B, H, W, C] and, with labels, `arr_1` int64 [B].

    This is the layout that guided-diffusion's evaluator and most FID tools read. Same images, same bytes.

    Args:
        x: [B, C, H, W], in [-1, 1] or uint8.
        path: file to write, suffix .npz; its folder exists.
        labels: [B] whole numbers, or None.

    Returns:
        The path written.

    Raises:
        TypeError, ValueError: an argument breaks its contract; nothing is written.
    """
    arrays = {"arr_0": _as_images(x, "x", any_channels=True)}
    target = _checked_path(path, (".npz",))
    if labels is not None:
        array = np.asarray(torch.as_tensor(labels).cpu())
        if array.shape != (len(arrays["arr_0"]),) or array.dtype.kind not in "iu":
            raise ValueError(
                f"`labels` must be {len(arrays['arr_0'])} whole numbers, one for each image, got shape"
                f" {array.shape} of {array.dtype}"
            )
        arrays["arr_1"] = array.astype(np.int64)
    with atomic_path(target) as temporary, open(temporary, "wb") as file:
        # Through a file object: given a name, NumPy would append .npz to the temporary one.
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return target


def save_curve(
    values: Sequence[float] | np.ndarray | Tensor,
    path: str | os.PathLike[str],
    steps: Sequence[int] | np.ndarray | None = None,
    title: str = "loss",
    parts: Mapping[str, Sequence[float | None]] | None = None,
) -> Path:
    """Draw values over steps: every value light, their moving average dark.

    The average is exponential over about 2 % of the points, bias-corrected. The vertical axis is logarithmic
    when all values are positive and span more than a factor of 5. Values that are not finite leave a gap.

    Args:
        values: [n] numbers, n >= 1, at least one of them finite.
        path: file to write, as for `save_grid`.
        steps: [n] rising positions on the horizontal axis; None: 1..n.
        title: written above the curve.
        parts: more curves on the same axes, by name, [n] each: of these the moving averages alone are drawn,
            its name above in its colour; None and what is not finite leave gaps.

    Returns:
        The path written.

    Raises:
        ValueError: an argument breaks its contract; nothing is written.
    """
    y = np.asarray(torch.as_tensor(values).detach().cpu(), dtype=np.float64)
    x = np.arange(1, y.size + 1, dtype=np.float64) if steps is None else np.asarray(steps, dtype=np.float64)
    if y.ndim != 1 or not np.isfinite(y).any():
        raise ValueError(f"`values` must be [n] numbers with at least one finite, got shape {y.shape}")
    if x.shape != y.shape or (np.diff(x) <= 0).any():
        raise ValueError(f"`steps` must be {y.size} rising numbers, one for each value, got shape {x.shape}")
    target = check_target(path)
    curves = {}
    for name, part in (parts or {}).items():
        curve = np.array(part, dtype=np.float64)  # None becomes NaN
        if curve.shape != y.shape:
            raise ValueError(f"`parts[{name!r}]` must be {y.size} numbers, got shape {curve.shape}")
        if (there := np.isfinite(curve)).any():
            curves[name] = (x[there], _moving_average(curve[there]))
    finite = np.isfinite(y)
    _save(_draw_curve(x[finite], y[finite], title, curves), target)
    return target


def _as_images(x: Any, name: str, any_channels: bool = False) -> np.ndarray:
    """[B, C, H, W] of any accepted kind -> uint8 [B, H, W, C] on the host."""
    if not isinstance(x, Tensor | np.ndarray):
        raise TypeError(f"`{name}` must hold tensors or NumPy arrays of images, got {type(x).__name__}")
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"`{name}` must be [B, C, H, W] with B >= 1, got shape {tuple(x.shape)}")
    if x.shape[1] not in _MODES and not any_channels:
        raise ValueError(
            f"`{name}` must have 1 (grey), 3 (RGB) or 4 (RGBA) channels in its second dimension, got"
            f" {x.shape[1]} in {tuple(x.shape)}; choose channels, or move them there with permute(0, 3, 1, 2)"
        )
    return to_uint8(x).cpu().permute(0, 2, 3, 1).contiguous().numpy()


def _tile(pixels: np.ndarray, columns: int, scale: int, pad: int) -> Image.Image:
    """uint8 [n, H, W, C] -> one picture of `columns` a line, white where nothing lies."""
    from PIL import Image

    n, height, width, channels = pixels.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    line, cell = height * scale + pad, width * scale + pad
    canvas = np.full((rows * line + pad, columns * cell + pad, channels), 255, dtype=np.uint8)
    for i, picture in enumerate(pixels.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = (i // columns) * line + pad, (i % columns) * cell + pad
        canvas[top : top + height * scale, left : left + width * scale] = picture
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def _draw_curve(
    x: np.ndarray, y: np.ndarray, title: str, parts: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> Image.Image:
    from PIL import Image, ImageDraw

    width, height, left, right, top, bottom = 960, 480, 80, 20, 40, 40
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    shown = np.concatenate([y, *(values for _, values in parts.values())])
    log = bool((shown > 0).all() and shown.max() > 5 * shown.min())

    def scale(values: np.ndarray) -> np.ndarray:
        return np.log10(values) if log else values

    low, high = scale(shown).min(), scale(shown).max()
    margin = 0.05 * (high - low) or 0.5 * max(abs(high), 1e-12)
    low, high = low - margin, high + margin
    span = max(x[-1] - x[0], 1.0)

    def across(value: Any) -> Any:
        return left + (value - x[0]) / span * (width - left - right)

    def down(value: Any) -> Any:
        return top + (high - value) / (high - low) * (height - top - bottom)

    for tick in np.linspace(low, high, 6):
        draw.line([(left, down(tick)), (width - right, down(tick))], fill="#e4e4e4")
        draw.text((8, down(tick) - 6), f"{10**tick if log else tick:.4g}", fill="black")
    for tick in np.linspace(x[0], x[0] + span, 6):
        draw.line([(across(tick), top), (across(tick), height - bottom)], fill="#e4e4e4")
        draw.text((across(tick) - 12, height - bottom + 10), f"{tick:.0f}", fill="black")
    draw.text((left, 14), title + (" (logarithmic)" if log else ""), fill="black")
    lines = [(x, y, "#b9cfe8", 1), (x, _moving_average(y), "#1b4f8f", 3)]
    at = left + draw.textlength(title) + 120
    for (name, (steps, values)), colour in zip(parts.items(), cycle(_PART_COLOURS)):
        lines.append((steps, values, colour, 2))
        draw.text((at, 14), name, fill=colour)
        at += draw.textlength(name) + 20
    for steps, values, colour, weight in lines:
        every = max(1, len(steps) // (4 * width))  # more points than pixels only take time
        kept = down(scale(values[::every])).tolist()
        points = list(zip(across(steps[::every]).tolist(), kept, strict=True))
        if len(points) > 1:
            draw.line(points, fill=colour, width=weight, joint="curve")
        else:
            (px, py), r = points[0], weight + 2
            draw.ellipse([(px - r, py - r), (px + r, py + r)], fill=colour)
    return image


def _moving_average(y: np.ndarray) -> np.ndarray:
    """Exponential average over about 2 % of the points, without the bias of its start."""
    keep = 1 - 1 / max(1.0, 0.02 * y.size)
    average, mean, weight = np.empty_like(y), 0.0, 0.0
    for i, value in enumerate(y.tolist()):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        average[i] = mean / weight
    return average


def _save(image: Image.Image, target: Path) -> None:
    from PIL import Image

    Image.init()
    suffix = target.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".bmp") and image.mode == "RGBA":
        raise ValueError(f"`path` must end in .png or .webp for images of 4 channels, got {target.name!r}")
    with atomic_path(target) as temporary:
        image.save(temporary, format=Image.EXTENSION[suffix])


def check_target(path: str | os.PathLike[str], more_suffixes: tuple[str, ...] = ()) -> Path:
    """The path of a picture, checked before the work whose result it takes.

    Args:
        path: file to write.
        more_suffixes: what it may end in besides `PICTURE_SUFFIXES`.
    Raises:
        ValueError: another suffix, a folder that does not exist, or a folder in the file's place.
    """
    return _checked_path(path, (*PICTURE_SUFFIXES, *more_suffixes))


def _checked_path(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Path:
    target = Path(path).expanduser()
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"`path` must end in {' or '.join(suffixes)}, got {str(path)!r}")
    if not target.parent.is_dir():
        raise ValueError(
            f"`path` must lie in a folder that exists, got {str(path)!r}; create {target.parent} first"
        )
    if target.is_dir():
        raise ValueError(f"`path` must name a file, got the folder {str(path)!r}")
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}."):
            return target
    except OSError as error:
        raise ValueError(
            f"`path` must lie in a folder that can be written, got {str(path)!r}: {error}"
        ) from error


def _at_least(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")
    return int(value)


def _scale(pixels: np.ndarray, scale: int | None, wanted: int) -> int:
    if scale is None:
        return max(1, wanted // max(pixels.shape[1:3]))
    return _at_least("scale", scale, 1)
