"""Heun's second-order method on the probability-flow ODE in sigma_ve, with EDM's churn.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import Register, Row
from fastdiff.solvers.steps import churned, first_order, noise_in


def heun(
    levels: NoiseLevels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """x'/alpha' = x/alpha + h/2 (eps + eps'),   h = sigma_ve' - sigma_ve, eps' at Euler's x'.

    The last step, and one that starts at alpha 0, is Euler's.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: fresh noise before each step, see `steps.churned`.
    """
    for step in churned(levels, s_churn, s_tmin, s_tmax, s_noise):
        now, to = step.now, step.to
        if not (to.sigma and now.alpha):
            yield step.row(step.raised(first_order(now, to)))
            continue
        half = to.alpha * 0.5 * (to.sigma_ve - now.sigma_ve)
        known = Register()  # x + h/2 eps, all that the second half needs of the first
        start = first_order(now, to)
        yield step.row(start, save={known: start - half * noise_in(now)}, ends_step=False)
        yield Row(to, step.raised(known + half * noise_in(to)))
