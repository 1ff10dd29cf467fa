"""Euler's method on the probability-flow ODE in sigma_ve, with EDM's churn.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without its correction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import Row
from fastdiff.solvers.steps import churned, first_order


def euler(
    levels: NoiseLevels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """x'/alpha' = x/alpha + (sigma_ve' - sigma_ve) eps.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: fresh noise before each step, see `steps.churned`.
    """
    for step in churned(levels, s_churn, s_tmin, s_tmax, s_noise):
        yield step.row(step.raised(first_order(step.now, step.to)))
