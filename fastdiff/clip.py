"""What happens to a predicted x0 before it is used: a range, one of each sample's own, or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
        largest: of s, at least 1; 1 is the plain range (-1, 1).
    Raises:
        ValueError: a number out of its range.
    Source: Saharia et al. 2022 (arXiv 2205.11487), sec. 2.3.
    """

    quantile: float = 0.995
    largest: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.quantile <= 1.0:
            raise ValueError(f"`quantile` must be in [0, 1], got {self.quantile!r}")
        if not self.largest >= 1.0:
            raise ValueError(f"`largest` must be at least 1, got {self.largest!r}")


Clip = tuple[float, float] | DynamicThreshold | None


def clip_of(value: Any) -> Clip:
    """A clip as it is kept, from what a user or a saved table's JSON says.

    Raises:
        ValueError: no range, or one whose ends are in the wrong order.
    """
    if value is None or isinstance(value, DynamicThreshold):
        return value
    if isinstance(value, dict):
        return DynamicThreshold(**value)
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise ValueError(f"`clip` must be None, (lo, hi) or a DynamicThreshold, got {value!r}") from None
    if not low < high:
        raise ValueError(f"`clip` must be (lo, hi) with lo < hi, got {value!r}")
    return low, high


def described(clip: Clip) -> str:
    """A clip in a few words."""
    if clip is None:
        return "no clip"
    if isinstance(clip, DynamicThreshold):
        return f"x0 within its {100 * clip.quantile:g} % quantile"
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
    q = size[:, k] + (position - k) * (size[:, min(k + 1, last)] - size[:, k])
    s = q.clip(1.0, clip.largest).reshape(-1, *[1] * (x0.ndim - 1))
    if isinstance(x0, torch.Tensor):
        return torch.minimum(torch.maximum(x0, -s), s) / s
    return x0.clip(-s, s) / s
