"""The third-order multistep extension of DPM-Solver++ for the diffusion SDE.

Source: Lu et al. 2022 (arXiv 2211.01095); k-diffusion's `sample_dpmpp_3m_sde`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row, X, Z
from fastdiff.solvers.steps import first_order, phi


def dpmpp_3m_sde(levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """One step of length h in lam, k = (1 + eta) h.

        x' = sigma'/sigma e^(-eta h) x + alpha' ((1 - e^-k) x0 + k phi_2(-k) d1 + k phi_3(-k) d2) + std z
        std = sigma' sqrt(1 - e^(-2 eta h))

    d1, d2: h times the first and h^2/2 times the second derivative of x0 in lam, by divided differences over
    the history that there is. A Taylor expansion would weigh d2 twice as much; k-diffusion's code has this
    weight, so the order is 2, with a small constant. The last step is x0; a start at alpha 0 is of first
    order, deterministic and leaves no history.

    Args:
        eta: 0 is the ODE's solver, 1 the reverse SDE's.
        s_noise: factor of the fresh noise, 1 for the true marginals.
    """
    at_least_zero(eta=eta, s_noise=s_noise)
    history: list[tuple[float, Register]] = []  # (lam, x0), the newest first
    for now, to in levels.steps():
        if not (now.alpha and to.sigma):
            yield Row(now, first_order(now, to))
            continue
        h = to.lam - now.lam
        k = (1.0 + eta) * h
        x = (to.sigma / now.sigma * math.exp(-eta * h)) * X - (to.alpha * math.expm1(-k)) * X0
        if history:
            lam_1, x0_1 = history[0]
            r0 = (now.lam - lam_1) / h
            d1 = (X0 - x0_1) / r0
            if len(history) == 2:
                lam_2, x0_2 = history[1]
                r1 = (lam_1 - lam_2) / h
                d2 = (d1 - (x0_1 - x0_2) / r1) / (r0 + r1)
                d1 = d1 + r0 * d2
                x = x + (to.alpha * k * phi(3, -k)) * d2
            x = x + (to.alpha * k * phi(2, -k)) * d1
        if eta:
            x = x + (s_noise * to.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))) * Z
        newest = Register()
        yield Row(now, x, {newest: X0}, exempt=("noise",) if eta and s_noise != 1.0 else ())
        history = [(now.lam, newest), *history][:2]
