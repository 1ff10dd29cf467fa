"""DPM-Solver++ for the diffusion SDE, single step with a stochastic middle.

Source: k-diffusion's `sample_dpmpp_sde`, after Lu et al. 2022 (arXiv 2211.01095), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row, X, Z
from fastdiff.solvers.steps import ancestral, first_order


def dpmpp_sde(
    levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5, brownian: bool = True
) -> Iterator[Row]:
    """x' = sigma_d/sigma x + (alpha' - alpha sigma_d/sigma) ((1 - 1/2r) x0 + 1/2r x0_mid) + up z.

    x0_mid is predicted at lam + r h, from a first-order ancestral step there. Both noises are increments of
    one Brownian path in sigma_ve, which overlap: z = c z_mid + sqrt(1 - c^2) z', c^2 the overlap's share.
    Independent ones cost the second order (error of the std of data N(0, 1/4), 40 exponential steps from 100
    to 0.002: 5e-2 in place of 4e-3). The last step, and one that starts at alpha 0, is of first order.

    Args:
        eta: share of fresh noise, >= 0, see `steps.ancestral`.
        s_noise: factor of the fresh noise, 1 for the true marginals.
        r: where the middle lies, in (0, 1].
        brownian: False draws both noises independently, as k-diffusion does with a plain noise sampler.
    """
    if not 0 < r <= 1:
        raise ValueError(f"`r` must be in (0, 1], got {r}")
    at_least_zero(eta=eta, s_noise=s_noise)
    for now, to in levels.steps():
        down, up = ancestral(now, to, eta)
        exempt = ("noise",) if up and s_noise != 1.0 else ()
        if not (to.sigma and now.alpha):
            yield Row(now, first_order(now, down) + (s_noise * up) * Z, exempt=exempt)
            continue
        middle = levels.at(now.sigma_ve ** (1.0 - r) * to.sigma_ve**r)
        middle_down, middle_up = ancestral(now, middle, eta)
        ratio, start, last = down.sigma / now.sigma, Register(), 0.5 / r
        weight = down.alpha - now.alpha * ratio
        overlap = min(1.0, (now.sigma_ve - middle.sigma_ve) / (now.sigma_ve - to.sigma_ve)) * brownian
        shared, fresh = s_noise * up * math.sqrt(overlap), s_noise * up * math.sqrt(1.0 - overlap)
        save = {start: ratio * X + (weight * (1.0 - last)) * X0 + shared * Z}
        yield Row(now, first_order(now, middle_down) + (s_noise * middle_up) * Z, save, ends_step=False)
        yield Row(middle, start + (weight * last) * X0 + fresh * Z, exempt=exempt)
