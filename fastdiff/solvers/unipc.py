"""UniPC: a predictor and a corrector of the same family, whose corrector costs no evaluation of the network.

Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 8 (data prediction), B(h) = e^h - 1 ("bh2").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Form, Register, Row, X
from fastdiff.solvers.steps import first_order, phi


def unipc(levels: NoiseLevels, *, order: int = 3) -> Iterator[Row]:
    """x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) (m0 + sum_i rho_i (m_i - m0)/r_i).

    m_i are x0 at this and earlier levels, r_i their distances in lam over this step's h; rho solves
    sum_i rho_i r_i^(k-1) = k! phi_{k+1}(-h) / phi_1(-h). The corrector does the step again when the network
    has been called at its end, with that m as one more node (r = 1), and replaces x; what it needs of the
    step before is one register. rho is 1/2 where it is the only one. Orders rise with the history and fall to
    1 at the end; a start at alpha 0 is of first order and leaves no history.

    Args:
        order: 1 to 3; it keeps order registers.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"`order` must be 1, 2 or 3, got {order}")
    history: list[tuple[float, Register]] = []  # (lam, m), the newest first
    known: Register | None = None  # the corrected x without the share of the new m
    share = 0.0
    for left, (now, to) in zip(range(len(levels), 0, -1), levels.steps(), strict=True):
        if not (now.alpha and to.sigma):
            yield Row(now, first_order(now, to))
            continue
        h, ratio = to.lam - now.lam, to.sigma / now.sigma
        weight = to.alpha - now.alpha * ratio
        start = ratio * (X if known is None else known + share * X0) + weight * X0
        nodes = history[: min(order, left) - 1]
        r = [(lam - now.lam) / h for lam, _ in nodes]
        changes = [(m - X0) * (weight / r_i) for r_i, (_, m) in zip(r, nodes, strict=True)]
        first = phi(1, -h)
        goal = [math.factorial(k) * phi(k + 1, -h) / first for k in range(1, len(r) + 2)]
        predictor = [0.5] if len(r) == 1 else _fit(r, goal)
        corrector = _fit([*r, 1.0], goal) if r else [0.5]
        known, share, newest = Register(), weight * corrector[-1], Register()
        corrected = _add(start, corrector, changes) - share * X0
        yield Row(now, _add(start, predictor, changes), {known: corrected, newest: X0})
        history = [(now.lam, newest), *history][: order - 1]


def _add(x: Form, rho: list[float], changes: list[Form]) -> Form:
    for factor, change in zip(rho, changes, strict=False):
        x = x + factor * change
    return x


def _fit(r: list[float], goal: list[float]) -> list[float]:
    """rho with sum_i rho_i r_i^(k-1) = goal_k: the Lagrange polynomials of r, with goal for powers.

    A factor (w - r_j) of a polynomial makes goal_{k+1} - r_j goal_k of the goals.
    """
    rho = []
    for r_i in r:
        left, scale = goal, 1.0
        for r_j in r:
            if r_j != r_i:
                left = [after - r_j * here for here, after in pairwise(left)]
                scale *= r_i - r_j
        rho.append(left[0] / scale)
    return rho
