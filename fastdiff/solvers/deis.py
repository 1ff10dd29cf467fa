"""DEIS: exponential integrator with a polynomial through the last eps, in log sigma_ve.

Source: Zhang & Chen 2022 (arXiv 2204.13902), tAB-DEIS in its log rho variant.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import Register, Row
from fastdiff.solvers.steps import first_order, lagrange_integrals, multistep, noise_in


def deis(levels: NoiseLevels, *, order: int = 3) -> Iterator[Row]:
    """x'/alpha' = x/alpha + integral from rho to rho' of the polynomial in log rho through the last eps.

    rho = sigma_ve. The first steps use the history that there is; the last, whose log rho has no end, and one
    that starts at alpha 0 are of first order.

    Args:
        order: how many eps the polynomial goes through, 1 to 4; it keeps order - 1 registers.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"`order` must be in 1..4, got {order}")
    history: list[tuple[float, Register]] = []  # (log rho, eps), the newest first
    for now, to in levels.steps():
        if not (now.alpha and to.sigma):
            yield Row(now, first_order(now, to))
            continue
        width = now.lam - to.lam  # of log rho; d rho = rho d(log rho)
        nodes = [0.0, *((log_rho + now.lam) / width for log_rho, _ in history)]
        weights = [now.sigma_ve * width * value for value in lagrange_integrals(nodes, 16, width)]
        newest = Register()
        yield Row(now, multistep(now, to, weights[1:], [eps for _, eps in history]), {newest: noise_in(now)})
        history = [(-now.lam, newest), *history][: order - 1]
