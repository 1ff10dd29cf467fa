"""Heun's second-order method on the probability-flow ODE in sigma_ve, with EDM's churn.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row
from fastdiff.solvers.steps import churned, correction, first_order


def heun(
    levels: NoiseLevels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """x'/alpha' = x/alpha + h/2 (eps + eps'),   h = sigma_ve' - sigma_ve, eps' at Euler's x'.

    It is Euler's x'/alpha' + h/2 (x0 - x0')/sigma_ve', see `steps.correction`: errors of x0 grow by
    sigma_ve/(2 sigma_ve') in a long step. The last step, and one that starts at alpha 0, is Euler's.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: fresh noise before each step, see `steps.churned`.
    """
    for step in churned(levels, s_churn, s_tmin, s_tmax, s_noise):
        now, to = step.now, step.to
        if not (to.sigma and now.alpha):
            yield step.row(step.raised(first_order(now, to)))
            continue
        weight = correction(now, to, to, 0.5)
        euler, known = first_order(now, to), Register()
        yield step.row(euler, save={known: euler + weight * X0}, ends_step=False)
        yield Row(to, step.raised(known - weight * X0))
