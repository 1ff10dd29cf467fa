"""DPM-Solver++(2M) for the diffusion SDE.

Source: Lu et al. 2022 (arXiv 2211.01095), eq. 18 and app. D; k-diffusion's `sample_dpmpp_2m_sde`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import Level, NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row, X, Z
from fastdiff.solvers.steps import first_order, phi


def dpmpp_2m_sde(
    levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> Iterator[Row]:
    """One step of length h in lam, k = (1 + eta) h, r = h_last/h.

        x' = sigma'/sigma e^(-eta h) x + alpha' ((1 - e^-k) x0 + c/r (x0 - x0_last)) + std z
        c = (1 - e^-k)/2 ("midpoint") or 1 - (1 - e^-k)/k ("heun"),   std = sigma' sqrt(1 - e^(-2 eta h))

    The first step has no x0_last, the last one is x0; a start at alpha 0 is of first order and deterministic.

    Args:
        eta: 0 is the ODE's solver, 1 the reverse SDE's.
        s_noise: factor of the fresh noise, 1 for the true marginals.
        solver_type: "midpoint" or "heun".
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"`solver_type` must be 'midpoint' or 'heun', got {solver_type!r}")
    at_least_zero(eta=eta, s_noise=s_noise)
    last: tuple[Level, Register] | None = None
    for now, to in levels.steps():
        newest = Register()
        if not (now.alpha and to.sigma):
            yield Row(now, first_order(now, to))
            continue
        h = to.lam - now.lam
        k = (1.0 + eta) * h
        x = (to.sigma / now.sigma * math.exp(-eta * h)) * X - (to.alpha * math.expm1(-k)) * X0
        if last is not None:
            level, x0_last = last
            c = -0.5 * math.expm1(-k) if solver_type == "midpoint" else k * phi(2, -k)
            x = x + (to.alpha * c * h / (now.lam - level.lam)) * (X0 - x0_last)
        if eta:
            x = x + (s_noise * to.sigma * math.sqrt(-math.expm1(-2.0 * eta * h))) * Z
        yield Row(now, x, {newest: X0}, exempt=("noise",) if eta and s_noise != 1.0 else ())
        last = (now, newest)
