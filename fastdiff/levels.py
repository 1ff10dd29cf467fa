"""The path of a chain: the noise levels (t, alpha, sigma) that a solver walks down, noisiest first.

A `NoiseSchedule` is what the network was trained on; `NoiseLevels` are where it will be called. They come
from a subsequence of the schedule's own times (`space_timesteps`), from given sigmas, or from a formula.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from fastdiff._arguments import as_kind
from fastdiff.schedule import NoiseSchedule, check_count, check_timesteps

Path = Literal["vp", "ve", "flow"]


class Level(NamedTuple):
    """One noise level: x = alpha x0 + sigma eps, which the network knows as time t."""

    t: float
    alpha: float
    sigma: float

    @property
    def sigma_ve(self) -> float:
        """sigma / alpha; infinite where alpha is 0."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """log(alpha / sigma), half the log-SNR; -inf where alpha is 0, inf at the clean end."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """S + 1 noise levels of a chain, noisiest first; the last is the clean end (t 0, alpha 1, sigma 0).

    Attributes:
        t: [S+1] float64, what the network is told.
        alpha, sigma: [S+1] float64, scale of signal and noise. sigma/alpha falls strictly; the first alpha
            may be 0.
        path: where levels between these lie: "vp" (alpha^2 + sigma^2 = 1), "ve" (alpha = 1) or "flow"
            (alpha + sigma = 1).
        schedule: the schedule that the levels came from, or None; it turns a noise level into a time.
        time_scale: of "flow", t = time_scale * sigma.
    Raises:
        ValueError: arrays of different lengths, levels that do not fall, or that do not end clean.
    """

    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    path: Path = "vp"
    schedule: NoiseSchedule | None = None
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("t", "alpha", "sigma"):
            array = np.array(getattr(self, name), np.float64)
            if array.ndim != 1 or len(array) < 2 or len(array) != len(self.t):
                raise ValueError(
                    f"`{name}` must be [S+1] with S >= 1, as long as `t`, got shape {list(array.shape)}"
                )
            if not np.isfinite(array).all():
                raise ValueError(
                    f"`{name}` must be finite, got {array[~np.isfinite(array)][0]} among its values"
                )
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.path not in ("vp", "ve", "flow"):
            raise ValueError(f"`path` must be 'vp', 've' or 'flow', got {self.path!r}")
        if (self.t[-1], self.alpha[-1], self.sigma[-1]) != (0.0, 1.0, 0.0):
            raise ValueError(
                "the last level must be the clean end, t 0, alpha 1, sigma 0, "
                f"got t {self.t[-1]}, alpha {self.alpha[-1]}, sigma {self.sigma[-1]}"
            )
        sigma_ve = self.sigma_ve
        if (self.alpha < 0).any() or not (sigma_ve[1:] < sigma_ve[:-1]).all():
            raise ValueError("`sigma`/`alpha` must fall strictly from level to level and `alpha` be >= 0")

    @classmethod
    def from_schedule(
        cls, schedule: NoiseSchedule, timesteps: Sequence[int] | np.ndarray | None = None
    ) -> NoiseLevels:
        """Levels at some of a schedule's own steps.

        Args:
            timesteps: [S] strictly ascending indices into `schedule`, as `space_timesteps` makes them; None
                for all.
        Raises:
            ValueError, TypeError: indices that are no integers, out of range or not ascending.
        """
        kept = check_timesteps(np.arange(len(schedule)) if timesteps is None else timesteps, len(schedule))[
            ::-1
        ]
        return cls(
            np.append(schedule.timesteps[kept], 0.0),
            np.append(schedule.alpha[kept], 1.0),
            np.append(schedule.sigma[kept], 0.0),
            "vp",
            schedule,
        )

    @classmethod
    def from_sigmas(
        cls, sigmas: Sequence[float] | np.ndarray, schedule: NoiseSchedule | None = None
    ) -> NoiseLevels:
        """Levels at given sigma_ve (the `sigmas` of EDM and k-diffusion).

        Alone they are variance exploding: alpha 1, t = sigma. With a schedule they are variance preserving,
        as its own steps are, and t is interpolated in log sigma_ve.

        Args:
            sigmas: [S] or [S+1] strictly decreasing, finite; the closing 0 is added where it is missing.
        Raises:
            ValueError: sigmas that are negative, not finite or do not fall.
        """
        values = np.array(sigmas, np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"`sigmas` must be a non-empty list of numbers, got shape {list(values.shape)}")
        if values[-1] != 0:
            values = np.append(values, 0.0)
        if not np.isfinite(values).all() or (np.diff(values) >= 0).any() or len(values) < 2:
            raise ValueError(
                "`sigmas` must be finite, positive and fall strictly (a last 0 is the clean end)"
            )
        if schedule is None:
            return cls(values, np.ones_like(values), values, "ve")
        time = _Times(schedule)
        alpha = 1.0 / np.sqrt(1.0 + values**2)
        return cls(np.array([*map(time, values[:-1].tolist()), 0.0]), alpha, values * alpha, "vp", schedule)

    @classmethod
    def karras(
        cls,
        n: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 7.0,
        schedule: NoiseSchedule | None = None,
    ) -> NoiseLevels:
        """n levels whose sigma_ve^(1/rho) are equally spaced.

            sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho

        Args:
            sigma_min, sigma_max: in sigma_ve; None takes the schedule's own.
            schedule: as in `from_sigmas`.
        Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5.
        """
        low, high = _sigma_range(sigma_min, sigma_max, schedule)
        ramp = _ramp(n, rho)
        sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        return cls.from_sigmas(sigmas, schedule)

    @classmethod
    def exponential(
        cls,
        n: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> NoiseLevels:
        """n levels equally spaced in log sigma_ve, that is in lam; arguments as in `karras`."""
        return cls.polyexponential(n, sigma_min, sigma_max, 1.0, schedule)

    @classmethod
    def polyexponential(
        cls,
        n: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        rho: float = 1.0,
        schedule: NoiseSchedule | None = None,
    ) -> NoiseLevels:
        """n levels with log sigma_ve on a power curve; arguments as in `karras`.

            log sigma_i = log sigma_min + (1 - i/(n-1))^rho log(sigma_max / sigma_min)

        Source: k-diffusion's `get_sigmas_polyexponential`.
        """
        low, high = _sigma_range(sigma_min, sigma_max, schedule)
        ramp = (1.0 - _ramp(n, rho)) ** rho
        return cls.from_sigmas(np.exp(ramp * (math.log(high) - math.log(low)) + math.log(low)), schedule)

    @classmethod
    def vp(
        cls,
        n: int,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        eps_s: float = 1e-3,
        schedule: NoiseSchedule | None = None,
    ) -> NoiseLevels:
        """The sigma_ve of the continuous VP process at n times equally spaced from 1 to `eps_s`.

            sigma_ve(u) = sqrt(exp(beta_d u^2 / 2 + beta_min u) - 1)

        Args:
            schedule: as in `from_sigmas`.
        Source: Song et al. 2021 (arXiv 2011.13456); Karras et al. 2022, table 1.
        """
        if not (beta_d >= 0 and beta_min > 0 and 0 < eps_s < 1):
            raise ValueError(
                "`beta_d` must be >= 0, `beta_min` > 0 and `eps_s` in (0, 1), "
                f"got {beta_d}, {beta_min} and {eps_s}"
            )
        u = 1.0 + _ramp(n) * (eps_s - 1.0)
        return cls.from_sigmas(np.sqrt(np.expm1(0.5 * beta_d * u**2 + beta_min * u)), schedule)

    @classmethod
    def flow(cls, n: int, shift: float = 1.0, time_scale: float = 1.0) -> NoiseLevels:
        """n steps of a rectified flow, x = (1 - s) x0 + s eps: s equally spaced from 1 to 0, then shifted.

            s' = shift s / (1 + (shift - 1) s),   t = time_scale s'

        Source: Lipman et al. 2023 (arXiv 2210.02747); Esser et al. 2024 (arXiv 2403.03206), eq. 23.
        """
        shift = as_kind("shift", shift, "float", 1.0)
        time_scale = as_kind("time_scale", time_scale, "float", 1.0)
        if not (shift > 0 and time_scale > 0):
            raise ValueError(f"`shift` and `time_scale` must be positive, got {shift} and {time_scale}")
        s = np.linspace(1.0, 0.0, check_count("n", n) + 1)
        alpha, sigma = 1.0 - s, shift * s
        total = alpha + sigma  # 1 + (shift - 1) s, and exact at both ends, where that rounds off 1
        alpha, sigma = alpha / total, sigma / total
        return cls(time_scale * sigma, alpha, sigma, "flow", None, time_scale)

    def __len__(self) -> int:
        """S, the number of steps."""
        return len(self.t) - 1

    @property
    def sigma_ve(self) -> np.ndarray:
        """[S+1] sigma / alpha; infinite where alpha is 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.sigma / self.alpha

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels as Python floats, which a solver computes with."""
        return tuple(
            Level(*row) for row in zip(self.t.tolist(), self.alpha.tolist(), self.sigma.tolist(), strict=True)
        )

    def steps(self) -> Iterator[tuple[Level, Level]]:
        """Each step's start and end."""
        return pairwise(self.levels)

    def last(self, steps: int) -> NoiseLevels:
        """The same path from the start of its last `steps` steps: a chain that begins part of the way down.

        Churn, which is spread over a path's steps, is then spread over these.

        Raises:
            ValueError, TypeError: `steps` is not in 1..S.
        """
        steps = check_count("steps", steps)
        if steps > len(self):
            raise ValueError(f"`steps` must be at most the path's {len(self)}, got {steps}")
        return replace(self, **{name: getattr(self, name)[-steps - 1 :] for name in ("t", "alpha", "sigma")})

    def at(self, sigma_ve: float) -> Level:
        """The level of a given sigma/alpha on the same path: a stage between two levels, or a churned one.

        t is interpolated in log sigma_ve over the schedule's steps and held at their ends, as k-diffusion
        does; without a schedule it is sigma_ve ("ve"), time_scale * sigma ("flow"), or interpolated over
        these levels ("vp").
        """
        if not sigma_ve >= 0:
            raise ValueError(f"`sigma_ve` must be >= 0, got {sigma_ve}")
        if sigma_ve == 0:
            return Level(0.0, 1.0, 0.0)
        if self.path == "ve":
            return Level(sigma_ve, 1.0, sigma_ve)
        if self.path == "flow":
            sigma = 1.0 if math.isinf(sigma_ve) else sigma_ve / (1.0 + sigma_ve)
            return Level(self.time_scale * sigma, 1.0 / (1.0 + sigma_ve), sigma)
        alpha = 1.0 / math.hypot(1.0, sigma_ve)
        return Level(self._time(sigma_ve), alpha, 1.0 if math.isinf(sigma_ve) else sigma_ve * alpha)

    @cached_property
    def _time(self) -> _Times:
        return _Times(self if self.schedule is None else self.schedule)


class _Times:
    """t as a function of sigma_ve: linear in log sigma_ve between the source's steps, held at its ends."""

    def __init__(self, source: NoiseSchedule | NoiseLevels) -> None:
        t = source.timesteps if isinstance(source, NoiseSchedule) else source.t
        sigma_ve = source.sigma_ve
        self.last = float(t[np.argmax(sigma_ve)])
        use = np.isfinite(sigma_ve) & (sigma_ve > 0)
        order = np.argsort(sigma_ve[use])
        self.log_sigma = np.log(sigma_ve[use])[order].tolist()
        self.t = np.asarray(t, np.float64)[use][order].tolist()

    def __call__(self, sigma_ve: float) -> float:
        if math.isinf(sigma_ve) or not self.t:
            return self.last
        log_sigma = math.log(sigma_ve)
        i = bisect_right(self.log_sigma, log_sigma)
        if i == 0 or i == len(self.t):
            return self.t[max(i - 1, 0)]
        low, high = self.log_sigma[i - 1], self.log_sigma[i]
        return self.t[i - 1] + (log_sigma - low) / (high - low) * (self.t[i] - self.t[i - 1])


def _ramp(n: int, rho: float = 1.0) -> np.ndarray:
    if not 0 < rho < math.inf:
        raise ValueError(f"`rho` must be positive and finite, got {rho}")
    return np.linspace(0.0, 1.0, check_count("n", n))


def _sigma_range(
    sigma_min: float | None, sigma_max: float | None, schedule: NoiseSchedule | None
) -> tuple[float, float]:
    """sigma_min and sigma_max, checked; what is None comes from the schedule."""
    if schedule is None and (sigma_min is None or sigma_max is None):
        raise ValueError("`sigma_min` and `sigma_max` must be given where no `schedule` supplies them")
    finite = np.array([]) if schedule is None else schedule.sigma_ve[np.isfinite(schedule.sigma_ve)]
    low = float(finite[0]) if sigma_min is None else float(sigma_min)
    high = float(finite[-1]) if sigma_max is None else float(sigma_max)
    if not 0 < low < high < math.inf:
        raise ValueError(
            f"`sigma_min` and `sigma_max` must satisfy 0 < sigma_min < sigma_max, got {low} and {high}"
        )
    return low, high
