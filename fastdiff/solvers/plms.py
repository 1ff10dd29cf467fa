"""PLMS: pseudo linear multistep, Adams-Bashforth's weights on eps and DDIM's transfer.

Source: Liu et al. 2022 (arXiv 2202.09778), as Rombach et al. 2022 start it: by a pseudo improved Euler step.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Register, Row
from fastdiff.solvers.steps import correction, first_order, multistep, noise_in

# Of the earlier eps; what is left of 1 is the newest's.
_ADAMS_BASHFORTH = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))


def plms(levels: NoiseLevels) -> Iterator[Row]:
    """x'/alpha' = x/alpha + (sigma_ve' - sigma_ve) eps',   eps' of Adams-Bashforth, order 2 to 4.

    The first step averages eps with that at its end, which makes S + 1 rows. A step that starts at alpha 0 is
    Euler's and comes before that; where the first step is the last, it is Euler's too.
    """
    history: list[Register] = []  # eps, the newest first
    for now, to in levels.steps():
        if not now.alpha or not (history or to.sigma):
            yield Row(now, first_order(now, to))
            continue
        width = to.sigma_ve - now.sigma_ve
        newest = Register()
        if history:
            weights = [width * weight for weight in _ADAMS_BASHFORTH[len(history)]]
            yield Row(now, multistep(now, to, weights, history), {newest: noise_in(now)})
        else:
            weight = correction(now, to, to, 0.5)
            euler, known = first_order(now, to), Register()
            save = {newest: noise_in(now), known: euler + weight * X0}
            yield Row(now, euler, save, ends_step=False)
            yield Row(to, known - weight * X0)
        history = [newest, *history][:3]
