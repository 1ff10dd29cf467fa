"""DPM-Solver++(2S) steps that go below the next level and return to it with fresh noise.

Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2; k-diffusion's sampler of this name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row, X, Z
from fastdiff.solvers.steps import ancestral, first_order


def dpmpp_2s_ancestral(levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """x' = sigma_d/sigma x + (alpha' - alpha sigma_d/sigma) x0_mid + up z,   x0_mid in the middle of lam.

    A step whose down level d has no noise, and one that starts at alpha 0, is of first order.

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
        ratio, start = down.sigma / now.sigma, Register()
        yield Row(now, first_order(now, middle), {start: ratio * X}, ends_step=False)
        yield Row(middle, start + (down.alpha - now.alpha * ratio) * X0 + fresh, exempt=exempt)
