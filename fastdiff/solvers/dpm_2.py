"""DPM-Solver-2 in sigma_ve: a midpoint step whose middle lies at the geometric mean, with EDM's churn.

Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2 and app. B; k-diffusion's `sample_dpm_2`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row
from fastdiff.solvers.steps import churned, correction, first_order


def dpm_2(
    levels: NoiseLevels,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Iterator[Row]:
    """x'/alpha' = x/alpha + (sigma_ve' - sigma_ve) eps_mid,   eps_mid at Euler's x at the middle.

    It is Euler's x'/alpha' + (sigma_ve' - sigma_ve) (x0 - x0_mid)/sigma_ve_mid, see `steps.correction`. The
    middle is sqrt(sigma_ve sigma_ve'). The last step, and one that starts at alpha 0, is Euler's.

    Args:
        s_churn, s_tmin, s_tmax, s_noise: fresh noise before each step, see `steps.churned`.
    """
    for step in churned(levels, s_churn, s_tmin, s_tmax, s_noise):
        now, to = step.now, step.to
        if not (to.sigma and now.alpha):
            yield step.row(step.raised(first_order(now, to)))
            continue
        middle = levels.at(math.sqrt(now.sigma_ve * to.sigma_ve))
        weight, known = correction(now, to, middle), Register()
        save = {known: first_order(now, to) + weight * X0}
        yield step.row(first_order(now, middle), save=save, ends_step=False)
        yield Row(middle, step.raised(known - weight * X0))
