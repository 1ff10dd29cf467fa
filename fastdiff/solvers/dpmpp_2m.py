"""DPM-Solver++(2M): second-order multistep in lam, on predictions of the data.

Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.levels import Level, NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row
from fastdiff.solvers.steps import first_order


def dpmpp_2m(levels: NoiseLevels) -> Iterator[Row]:
    """x' = sigma'/sigma x + (alpha' - alpha sigma'/sigma) d,   d = (1 + 1/2r) x0 - 1/2r x0_last.

    r = h_last/h, h the steps in lam. First and last step, and one that starts at alpha 0, are of first order.
    """
    last: tuple[Level, Register] | None = None
    for now, to in levels.steps():
        d = X0
        if last is not None and to.sigma:
            level, x0_last = last
            half = 0.5 * (to.lam - now.lam) / (now.lam - level.lam)
            d = (1.0 + half) * X0 - half * x0_last
        newest = Register()
        yield Row(now, first_order(now, to, d), {newest: X0})
        last = (now, newest) if now.alpha else None
