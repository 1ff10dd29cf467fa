"""DDPM: ancestral sampling from the learned reverse chain.

Source: Ho et al. 2020 (arXiv 2006.11239), algorithm 2 with eq. 7; the learned variances are those of Nichol &
Dhariwal 2021 (arXiv 2102.09672), eq. 15.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Row, X, Z


def ddpm(levels: NoiseLevels, *, variance: str = "fixed_small") -> Iterator[Row]:
    """x' ~ q(x_s | x_t, x0): the true posterior, with the network's x0.

        a = alpha/alpha',  var = sigma^2 - a^2 sigma'^2  (beta_t),  posterior = var sigma'^2/sigma^2
        x' = alpha' var/sigma^2 x0 + a sigma'^2/sigma^2 x + std z

    Args:
        variance: std^2 is the posterior variance ("fixed_small"), var ("fixed_large"), or the network's own:
            exp(v) ("learned"), or v between both in the logarithm ("learned_range"). The last row adds none.
    """
    for now, to in levels.steps():
        a = now.alpha / to.alpha
        var = now.sigma**2 - (a * to.sigma) ** 2
        posterior = var * (to.sigma / now.sigma) ** 2
        x = (to.alpha * var / now.sigma**2) * X0 + (a * (to.sigma / now.sigma) ** 2) * X
        if not to.sigma:
            yield Row(now, x)
        elif variance == "fixed_small":
            yield Row(now, x + math.sqrt(posterior) * Z)
        elif variance == "fixed_large":
            yield Row(now, x + math.sqrt(var) * Z, exempt=("noise",))
        elif variance == "learned":
            yield Row(now, x + Z, log_var=(-1.0, 1.0), exempt=("noise",))
        else:
            yield Row(now, x + Z, log_var=(math.log(posterior), math.log(var)), exempt=("noise",))
