"""LCM: multistep sampling of a consistency model.

Source: Luo et al. 2023 (arXiv 2310.04378), algorithm 3 and eq. 9 (the boundary scaling).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Row, X, Z


def lcm(
    levels: NoiseLevels, *, sigma_data: float | None = None, timestep_scaling: float = 10.0
) -> Iterator[Row]:
    """x' = alpha' d + sigma' z,   d = c_skip x + c_out x0.

        c_skip = s^2/(u^2 + s^2),   c_out = u/sqrt(u^2 + s^2),   s = sigma_data, u = timestep_scaling * t

    Args:
        sigma_data: None takes d = x0 (c_skip 0, c_out 1), which keeps the marginals; LCM's networks want 0.5.
        timestep_scaling: of the boundary scaling.
    """
    if sigma_data is not None and not sigma_data > 0:
        raise ValueError(f"`sigma_data` must be positive or None, got {sigma_data}")
    for now, to in levels.steps():
        d = X0
        if sigma_data is not None:
            norm = math.hypot(timestep_scaling * now.t, sigma_data)
            d = (sigma_data / norm) ** 2 * X + (timestep_scaling * now.t / norm) * X0
        exempt = () if sigma_data is None else ("mean", "noise")
        yield Row(now, to.alpha * d + to.sigma * Z, exempt=exempt)
