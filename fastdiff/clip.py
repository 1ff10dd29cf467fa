"""What happens to a predicted x0 before it is used: a range, one of each sample's own, or nothing."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class DynamicThreshold:
    """x0 clipped to [-s, s] and divided by s, where s is a quantile of the sample's own |x0|, at least 1.

        s = min(max(quantile of |x0|, 1), largest),   x0 = clamp(x0, -s, s) / s

    Where strong guidance drives many pixels out of [-1, 1], this keeps them from saturating.

    Args:
        quantile: in [0, 1], linear between neighbours.
        largest: of s, at least 1; None: no limit.
    Raises:
        ValueError: what is no number, or out of its range.
    Source: Saharia et al. 2022 (arXiv 2205.11487), sec. 2.3.
    """

    quantile: float = 0.995
    largest: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantile", _number("quantile", self.quantile))
        if not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"`quantile` must be in [0, 1], got {self.quantile!r}")
        if self.largest is None:
            return
        object.__setattr__(self, "largest", _number("largest", self.largest))
        if not 1.0 <= self.largest < math.inf:
            raise ValueError(f"`largest` must be at least 1, or None for no limit, got {self.largest!r}")


Clip = tuple[float, float] | DynamicThreshold | None


def clip_of(value: Any) -> Clip:
    """A clip as it is kept, from what a user says.

    Raises:
        ValueError: no range, or one whose ends are in the wrong order.
    """
    if value is None or isinstance(value, DynamicThreshold):
        return value
    try:
        low, high = (_number("clip", end) for end in value)
    except (TypeError, ValueError):
        raise ValueError(f"`clip` must be None, (lo, hi) or a DynamicThreshold, got {value!r}") from None
    if not low < high:
        raise ValueError(f"`clip` must be (lo, hi) with lo < hi, got {value!r}")
    return low, high


def clip_to_config(clip: Clip) -> Any:
    """A clip as JSON data, which `clip_from_config` reads."""
    return asdict(clip) if isinstance(clip, DynamicThreshold) else clip


def clip_from_config(value: Any) -> Clip:
    """The clip of a saved table or model.

    Raises:
        ValueError: it is damaged.
    """
    if not isinstance(value, dict):
        return clip_of(value)
    if set(value) != {"quantile", "largest"}:
        raise ValueError(f"`clip` must hold a quantile and a largest value, got {value!r}")
    return DynamicThreshold(**value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, str | bool):
        raise ValueError(f"`{name}` must be a number, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number, got {value!r}") from None


def described(clip: Clip) -> str:
    """A clip in a few words."""
    if clip is None:
        return "no clip"
    if isinstance(clip, DynamicThreshold):
        most = "" if clip.largest is None else f", at most {clip.largest:g}"
        return f"x0 within its {100 * clip.quantile:g} % quantile{most}"
    return f"x0 in [{clip[0]:g}, {clip[1]:g}]"


def clipped(x0: Any, clip: Clip) -> Any:
    """x0 [B, ...], an array or a tensor, within `clip`."""
    if clip is None:
        return x0
    if not isinstance(clip, DynamicThreshold):
        return x0.clip(*clip)
    size = abs(x0).reshape(len(x0), -1)
    position = clip.quantile * (size.shape[1] - 1)
    k, last = math.floor(position), size.shape[1] - 1
    if isinstance(x0, torch.Tensor):
        size = size.sort(dim=1).values
    else:
        size = np.partition(size, (k, min(k + 1, last)), axis=1)
    low, high, weight = size[:, k], size[:, min(k + 1, last)], position - k
    where = torch.where if isinstance(x0, torch.Tensor) else np.where
    q = low if weight == 0 else where(low == high, low, low + weight * (high - low))
    s = q.clip(1.0, clip.largest).reshape(-1, *[1] * (x0.ndim - 1))
    if isinstance(x0, torch.Tensor):
        return torch.minimum(torch.maximum(x0, -s), s) / s
    return x0.clip(-s, s) / s
