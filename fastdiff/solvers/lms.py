"""Linear multistep: Adams-Bashforth for unequal steps, on the probability-flow ODE in sigma_ve.

Source: Karras et al. 2022's ODE with k-diffusion's `sample_lms`.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import Register, Row
from fastdiff.solvers.steps import first_order, lagrange_integrals, multistep, noise_in


def lms(levels: NoiseLevels, *, order: int = 4) -> Iterator[Row]:
    """x'/alpha' = x/alpha + integral from sigma_ve to sigma_ve' of the polynomial through the last eps.

    The first steps use the history that there is; a start at alpha 0 is Euler's and leaves none. The last
    step, to sigma_ve 0, extrapolates like the others: where those before it are much shorter it multiplies
    errors of x0, float32's and the network's, by some 4 with 50 rows of a Karras path and by 350 with 250
    (order 6: 8 and 6 500). With many rows take a lower order.

    Args:
        order: how many eps the polynomial goes through, 1 to 8; it keeps order - 1 registers.
    """
    if not 1 <= order <= 8:
        raise ValueError(f"`order` must be in 1..8, got {order}")
    history: list[tuple[float, Register]] = []  # (sigma_ve, eps), the newest first
    for now, to in levels.steps():
        if not now.alpha:
            yield Row(now, first_order(now, to))
            continue
        width = to.sigma_ve - now.sigma_ve
        nodes = [0.0, *((sigma_ve - now.sigma_ve) / width for sigma_ve, _ in history)]
        weights = [width * weight for weight in lagrange_integrals(nodes, order // 2 + 1)]
        newest = Register()
        yield Row(now, multistep(now, to, weights[1:], [eps for _, eps in history]), {newest: noise_in(now)})
        history = [(now.sigma_ve, newest), *history][: order - 1]
