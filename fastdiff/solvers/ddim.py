"""DDIM: the non-Markovian family between a deterministic sampler (eta 0) and DDPM (eta 1).

Source: Song et al. 2020 (arXiv 2010.02502), eq. 12 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import X0, Row, X, Z


def ddim(levels: NoiseLevels, *, eta: float = 0.0) -> Iterator[Row]:
    """x' = alpha' x0 + sqrt(sigma'^2 - std^2) eps + std z.

        eps = (x - alpha x0)/sigma,   std = eta sigma'/sigma sqrt(sigma^2 - (alpha/alpha')^2 sigma'^2)

    Args:
        eta: share of DDPM's noise, in [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"`eta` must be in [0, 1], 0 deterministic, 1 DDPM, got {eta}")
    for now, to in levels.steps():
        eps = (X - now.alpha * X0) / now.sigma
        fresh = eta**2 * max(
            0.0, 1.0 - (now.alpha * to.sigma / (to.alpha * now.sigma)) ** 2
        )  # share of sigma'^2
        x = to.alpha * X0 + (to.sigma * math.sqrt(1.0 - fresh)) * eps
        std = to.sigma * math.sqrt(fresh)
        yield Row(now, x + std * Z if std else x)
