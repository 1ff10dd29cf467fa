"""The noise of samplers that ask for increments of a Brownian path, which overlap inside a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

SAME = 1e-5  # relative; exp(log(sigma)) in float32 is off by 1e-7


class BrownianPath:
    """One Brownian path in sigma, drawn where it is asked for.

        path(a, b) = (W(a) - W(b)) / sqrt(a - b) ~ N(0, I),   a > b;   -path(b, a) otherwise

    Increments over intervals that share a part are correlated through it; others are independent. A point
    between two known ones is drawn from the Brownian bridge.

    Args:
        normal: draws z ~ N(0, I) of the state's shape.
    Source: k-diffusion's `BrownianTreeNoiseSampler`, of which this keeps the law.
    """

    def __init__(self, normal: Callable[[], torch.Tensor]) -> None:
        self._normal = normal
        self._points: list[float] = []  # rising
        self._increments: list[torch.Tensor] = []  # W between neighbours

    def __call__(self, start: Any, end: Any) -> torch.Tensor:
        start, end = float(start), float(end)
        if min(start, end) < 0 or math.isclose(start, end, rel_tol=SAME):
            raise ValueError(f"a noise sampler needs two different levels >= 0, got {start} and {end}")
        first = self._place(start)
        last = self._place(end)
        first = self._place(start)  # the second point may have moved it
        low, high = sorted((first, last))
        total = self._increments[low]
        for increment in self._increments[low + 1 : high]:
            total = total + increment
        width = self._points[high] - self._points[low]
        return total * (math.copysign(1.0, start - end) / math.sqrt(width))

    def _place(self, level: float) -> int:
        """Index of a level on the path, drawn if it is new."""
        points = self._points
        for i, known in enumerate(points):
            if math.isclose(level, known, rel_tol=SAME):
                return i
        i = sum(known < level for known in points)
        if 0 < i < len(points):
            low, high, whole = points[i - 1], points[i], self._increments[i - 1]
            share = (level - low) / (high - low)
            below = whole * share + self._normal() * math.sqrt(share * (high - level))
            self._increments[i - 1 : i] = [below, whole - below]
        elif points:
            width = abs(level - points[0 if i == 0 else -1])
            self._increments.insert(i, self._normal() * math.sqrt(width))
        points.insert(i, level)
        return i
