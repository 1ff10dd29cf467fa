"""What solvers share: first-order and multistep forms, fresh noise, phi functions, quadrature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from fastdiff._arguments import at_least_zero
from fastdiff.levels import Level, NoiseLevels
from fastdiff.solvers.forms import X0, Form, Register, Row, X, Z


def noise_in(level: Level) -> Form:
    """eps = (x - alpha x0)/sigma, the slope d(x/alpha)/d(sigma_ve) of the probability-flow ODE."""
    return (X - level.alpha * X0) / level.sigma


def first_order(now: Level, to: Level, x0: Form = X0) -> Form:
    """sigma'/sigma x + (alpha' - alpha sigma'/sigma) x0, exact where x0 is constant; alpha may be 0.

    It is Euler in sigma_ve, DDIM with eta 0 and DPM-Solver++ of order 1.
    """
    ratio = to.sigma / now.sigma
    return ratio * X + (to.alpha - now.alpha * ratio) * x0


def correction(now: Level, to: Level, stage: Level, share: float = 1.0) -> float:
    """c with c (x0 - x0_stage) = share alpha' (sigma_ve' - sigma_ve) (eps_stage - eps), x_stage Euler's.

    Both eps hold the same x/sigma - x0/sigma_ve and differ by (x0 - x0_stage)/sigma_ve_stage. Written so, a
    second stage does not take x apart into parts of size sigma_ve, which float32 cannot put together again.
    """
    return share * to.alpha * (to.sigma_ve - now.sigma_ve) / stage.sigma_ve


def multistep(now: Level, to: Level, weights: Sequence[float], past: Sequence[Register]) -> Form:
    """x'/alpha' = x/alpha + weights * eps, summed over earlier levels and this one.

    It is written as a correction of the first-order step, so that the parts of size sigma_ve, which cancel,
    do not appear.

    Args:
        weights: of the eps in `past`; what they leave of sigma_ve' - sigma_ve is this level's.
    """
    x = first_order(now, to) - (to.alpha * sum(weights)) * noise_in(now)
    return x + Form({eps: to.alpha * weight for weight, eps in zip(weights, past, strict=True)})


def ancestral(now: Level, to: Level, eta: float) -> tuple[Level, float]:
    """Where a deterministic step must go, at alpha', so that fresh noise of the given std leads to `to`.

        up = min(sigma_ve', eta sigma_ve' sqrt(1 - (sigma_ve'/sigma_ve)^2)),   down = sqrt(sigma_ve'^2 - up^2)

    Returns:
        The level (t', alpha', alpha' down), and alpha' up.
    Source: k-diffusion's `get_ancestral_step`.
    """
    target, share = to.sigma_ve, to.sigma_ve / now.sigma_ve
    up = min(target, eta * target * math.sqrt(1.0 - share**2))
    down = math.sqrt((target - up) * (target + up))
    return Level(to.t, to.alpha, to.alpha * down), to.alpha * up


class Step(NamedTuple):
    """A step that starts at a level to which churn has raised the noise.

    Attributes:
        now, to: start, raised; end, not raised.
        then, std: where the next step starts, and the noise that takes `to` there.
        init_scale, exempt: of the rows, as in `Row`.
    """

    now: Level
    to: Level
    then: Level
    std: float
    init_scale: float | None
    exempt: tuple[str, ...]

    def row(self, x: Form, **details: object) -> Row:
        """The row that starts this step and ends at `x`."""
        return Row(self.now, x, init_scale=self.init_scale, exempt=self.exempt, **details)  # type: ignore[arg-type]

    def raised(self, x: Form) -> Form:
        """x at level `to`, with the next step's churn."""
        return x if self.then == self.to else (self.then.alpha / self.to.alpha) * x + self.std * Z


def churned(
    levels: NoiseLevels, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Iterator[Step]:
    """The steps of a path with EDM's churn: fresh noise raises the start of each to sigma_ve (1 + gamma).

        gamma = min(s_churn/S, sqrt(2) - 1) where s_tmin <= sigma_ve <= s_tmax, else 0

    The noise of a step is added at the end of the one before, the first step's is part of x_T.

    Args:
        s_noise: the fresh noise's standard deviation, 1 for the true marginals.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2.
    """
    at_least_zero(s_churn=s_churn, s_noise=s_noise)
    gamma = min(s_churn / len(levels), math.sqrt(2.0) - 1.0)
    starts, ends = levels.levels[:-1], levels.levels[1:]
    rises = [gamma > 0 and level.alpha > 0 and s_tmin <= level.sigma_ve <= s_tmax for level in starts]
    spread = s_noise * math.sqrt(gamma * (2.0 + gamma))
    stds = [spread * level.sigma_ve if rise else 0.0 for rise, level in zip(rises, starts, strict=True)]
    raised = [
        levels.at(level.sigma_ve * (1.0 + gamma)) if rise else level
        for rise, level in zip(rises, starts, strict=True)
    ]
    exempt = ("noise",) if s_noise != 1.0 and any(rises) else ()
    init_scale = None
    if rises[0]:
        before = (1.0 if levels.path == "vp" else starts[0].sigma) / starts[0].alpha
        init_scale = raised[0].alpha * math.hypot(before, stds[0])
    for now, to, then, std in zip(raised, ends, [*raised[1:], ends[-1]], [*stds[1:], 0.0], strict=True):
        yield Step(now, to, then, then.alpha * std, init_scale, exempt)


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum_n z^n / (n + k)!: phi_0 = exp(z), phi_k = (phi_{k-1} - 1/(k-1)!) / z."""
    if abs(z) < 1.0:  # the recursion would cancel
        n, total = k, 0.0
        term = 1.0 / math.factorial(k)
        while total + term != total:
            total, n = total + term, n + 1
            term *= z / n
        return total
    if k == 1:
        return math.expm1(z) / z
    return (phi(k - 1, z) - 1.0 / math.factorial(k - 1)) / z


@cache
def _gauss_legendre(points: int) -> list[tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return list(zip((0.5 * (nodes + 1.0)).tolist(), (0.5 * weights).tolist(), strict=True))


def lagrange_integrals(nodes: Sequence[float], points: int, rate: float = 0.0) -> list[float]:
    """integral over [0, 1] of L_j(w) exp(rate w), for the Lagrange polynomials L_j of the nodes.

    Gauss-Legendre in the variable that runs from 0 to 1 over the step: monomials in the unscaled one cancel.

    Args:
        nodes: none inside (0, 1).
        points: quadrature points; exact for polynomials below degree 2 * points, where the rate is 0.
    """
    quadrature = [
        (w, share * math.exp(rate * w) * math.prod([w - node for node in nodes]))
        for w, share in _gauss_legendre(points)
    ]
    integrals = []
    for node in nodes:
        scale = math.prod([node - other for other in nodes if other != node])
        integrals.append(sum([value / (w - node) for w, value in quadrature]) / scale)
    return integrals
