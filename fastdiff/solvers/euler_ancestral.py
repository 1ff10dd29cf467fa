"""Euler steps that go below the next level and return to it with fresh noise.

Source: k-diffusion's `sample_euler_ancestral`; with eta 1 it is DDPM's posterior (Ho et al. 2020, eq. 7).
"""

from __future__ import annotations

from collections.abc import Iterator

from fastdiff._arguments import at_least_zero
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.forms import Row, Z
from fastdiff.solvers.steps import ancestral, first_order


def euler_ancestral(levels: NoiseLevels, *, eta: float = 1.0, s_noise: float = 1.0) -> Iterator[Row]:
    """x' = Euler to down, + up z.

    Args:
        eta: share of fresh noise, >= 0, see `steps.ancestral`.
        s_noise: factor of the fresh noise, 1 for the true marginals.
    """
    at_least_zero(eta=eta, s_noise=s_noise)
    for now, to in levels.steps():
        down, up = ancestral(now, to, eta)
        exempt = ("noise",) if up and s_noise != 1.0 else ()
        yield Row(now, first_order(now, down) + (s_noise * up) * Z, exempt=exempt)
