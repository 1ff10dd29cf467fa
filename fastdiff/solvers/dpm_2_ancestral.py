"""DPM-Solver-2 steps that go below the next level and return to it with fresh noise.

Source: k-diffusion's `sample_dpm_2_ancestral`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row, Z
from fastdiff.solvers.steps import ancestral, correction, first_order


def dpm_2_ancestral(levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """x' = the midpoint step of `dpm_2` to down, + up z.

    With eta 1 a long step multiplies errors of x0 by sigma_ve/sigma_ve', as its middle lies low.
    A step whose down is 0, and one that starts at alpha 0, is Euler's.

    Args:
        eta: share of fresh noise, >= 0, see `steps.ancestral`.
        s_noise: factor of the fresh noise, 1 for the true marginals.
    """
    at_least_zero(eta=eta, s_noise=s_noise)
    for now, to in levels.steps():
        down, up = ancestral(now, to, eta)
        exempt = ("noise",) if up and s_noise != 1.0 else ()
        fresh = (s_noise * up) * Z
        if not (down.sigma and now.alpha):
            yield Row(now, first_order(now, down) + fresh, exempt=exempt)
            continue
        middle = levels.at(math.sqrt(now.sigma_ve * down.sigma_ve))
        weight, known = correction(now, down, middle), Register()
        save = {known: first_order(now, down) + weight * X0}
        yield Row(now, first_order(now, middle), save, ends_step=False)
        yield Row(middle, known - weight * X0 + fresh, exempt=exempt)
