"""Which times a training step sees: uniform, log-normal, given probabilities, or by how large the losses are.

A sampler of times draws t and says by which weight the loss at each is to be multiplied. A draw is a function
of (seed, step, sample id) and, for `LossAwareTimes`, of the losses told so far, which are its whole state: a
few float64 arrays that a checkpoint keeps. So a run that was killed draws the same times when it goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.schedule import NoiseSchedule, check_count
from fastdiff.train import draws

NAMES = ("uniform", "loss_aware", "log_normal")


class FixedTimes:
    """Times drawn with probabilities that stay.

    Args:
        probabilities: [T] of which the times are drawn, at least 0, scaled to add up to 1.
        reweight: multiply the loss at t by 1 / (T p_t), so that its expectation is the uniform one's; else
            the probabilities change what is minimised, as a weight of T p_t on the loss would.

    Raises:
        ValueError: a probability is negative or not finite, all are 0, or one is 0 with `reweight`.
    """

    learns = False

    def __init__(self, probabilities: Sequence[float] | np.ndarray, reweight: bool = False) -> None:
        p = np.array(probabilities, dtype=np.float64)
        if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or (p < 0).any() or not p.any():
            raise ValueError(
                f"`probabilities` must be [T] finite numbers of at least 0, one above 0, got {_short(p)}"
            )
        if reweight and not p.all():
            raise ValueError(
                "`probabilities` must all be above 0 with reweight=True, as a time never drawn has no weight,"
                f" got 0 at {int((p == 0).argmax())}"
            )
        self._p, self.reweight = p / np.cumsum(p)[-1], reweight

    def probabilities(self) -> np.ndarray:
        """p_t, float64 [T]."""
        return self._p

    def draw(self, seed: int, step: int, ids: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Times int64 [B] of the samples `ids`, weights of their losses float64 [B] or None for 1."""
        return _draw(self._p, seed, step, ids, self.reweight)

    def learn(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Nothing: these probabilities stay."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to put back."""

    def to_config(self) -> dict[str, Any]:
        """What the sampler is, as JSON data."""
        if (self._p == self._p[0]).all():
            return {"name": "uniform"}
        return {"name": "fixed", "probabilities": self._p.tolist(), "reweight": self.reweight}


class LossAwareTimes:
    """Times drawn as often as their losses are large: p_t ~ sqrt(E[L_t^2]), for a steadier gradient.

        p_t = (1 - uniform) sqrt(mean of L_t^2 over its last `history` losses) / sum + uniform / T
        weight of the loss at t: 1 / (T p_t), so that its expectation is the uniform one's

    Until every time has `history` losses, times are uniform. Meant for the loss "vlb".

    Args:
        num_timesteps: T.
        history: losses kept of each time.
        uniform: share of times drawn uniformly, in (0, 1].

    Raises:
        ValueError: an argument out of its range.
    Source: Nichol & Dhariwal 2021 (2102.09672), sec. 3.3 (10 losses; the share is their code's).
    """

    learns = True

    def __init__(self, num_timesteps: int, history: int = 10, uniform: float = 0.001) -> None:
        shape = check_count("num_timesteps", num_timesteps), check_count("history", history)
        if not 0 < uniform <= 1:
            raise ValueError(f"`uniform` must be in (0, 1], got {uniform}")
        self._uniform = float(uniform)
        self._losses = np.zeros(shape)
        self._told = np.zeros(shape[0], dtype=np.int64)

    @property
    def is_warm(self) -> bool:
        """Whether every time has its `history` losses."""
        return bool((self._told >= self._losses.shape[1]).all())

    def probabilities(self) -> np.ndarray:
        """p_t now, float64 [T]."""
        steps = len(self._losses)
        if not self.is_warm:
            return np.full(steps, 1 / steps)
        # Running sums: np.sum's order depends on the machine, and so would the times.
        size = np.sqrt(np.cumsum(self._losses**2, axis=1)[:, -1])
        total = np.cumsum(size)[-1]
        if total == 0:
            return np.full(steps, 1 / steps)
        return (1 - self._uniform) * (size / total) + self._uniform / steps

    def draw(self, seed: int, step: int, ids: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Times int64 [B] of the samples `ids`, weights of their losses float64 [B] or None for 1."""
        return _draw(self.probabilities(), seed, step, ids, self.is_warm)

    def learn(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Tell the losses [B] at the times [B], before their weights, in the order of the batch.

        Several processes must each tell all of a step's losses in one order, to go on drawing alike.
        """
        told, values = np.asarray(t), np.asarray(losses, dtype=np.float64)
        if told.shape != values.shape or told.ndim != 1:
            raise ValueError(f"`t` and `losses` must be [B], got {told.shape} and {values.shape}")
        for time, value in zip(told.tolist(), values.tolist(), strict=True):
            self._losses[time, self._told[time] % self._losses.shape[1]] = value
            self._told[time] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: losses float64 [T, history], told int64 [T]; copies."""
        return {"losses": torch.tensor(self._losses), "told": torch.tensor(self._told)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put a state back, bit for bit.

        Raises:
            ValueError: it belongs to another number of times or another history.
        """
        losses, told = (state[name].cpu().numpy().copy() for name in ("losses", "told"))
        if losses.shape != self._losses.shape or told.shape != self._told.shape:
            raise ValueError(
                f"`state` must hold losses {list(self._losses.shape)}, got {list(losses.shape)}: it is of"
                " another schedule or history"
            )
        self._losses, self._told = losses, told

    def to_config(self) -> dict[str, Any]:
        """What the sampler is, as JSON data."""
        return {"name": "loss_aware", "history": self._losses.shape[1], "uniform": self._uniform}


def uniform_times(num_timesteps: int) -> FixedTimes:
    """All times alike."""
    return FixedTimes(np.ones(check_count("num_timesteps", num_timesteps)))


def log_normal_times(
    schedule: NoiseSchedule, mean: float = -1.2, std: float = 1.2, reweight: bool = False
) -> FixedTimes:
    """The time whose ln(sigma / alpha) is nearest to a normal of this mean and standard deviation.

    A time of pure noise (alpha = 0) counts as being as far beyond its neighbour as that is beyond the next.

    Args:
        schedule: whose times they are.
        mean, std: of ln(sigma / alpha); the defaults are Karras 2022's for images of standard deviation 0.5.
        reweight: as in `FixedTimes`.

    Raises:
        ValueError: `std` is not positive, or a number is not finite.
    Source: Karras et al. 2022 (2206.00364), table 1 (P_mean, P_std).
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise ValueError(f"`mean` and `std` must be finite, `std` above 0, got {mean} and {std}")
    place = -schedule.lam
    if len(place) > 2 and np.isinf(place[-1]):
        place = np.append(place[:-1], 2 * place[-2] - place[-3])
    between = (place[1:] + place[:-1]) / 2
    below = [0.5 * math.erfc((mean - edge) / (std * math.sqrt(2))) for edge in between.tolist()]
    return FixedTimes(np.diff([0.0, *below, 1.0]), reweight)


def times_of(name: str, schedule: NoiseSchedule) -> FixedTimes | LossAwareTimes:
    """The sampler of a name of `NAMES` with its usual numbers.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"`times` must be one of {', '.join(NAMES)}, got {name!r}")
    if name == "log_normal":
        return log_normal_times(schedule)
    return uniform_times(len(schedule)) if name == "uniform" else LossAwareTimes(len(schedule))


def _draw(
    p: np.ndarray, seed: int, step: int, ids: Any, reweight: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Times by the inverse of the distribution function, at a uniform number of 53 bits."""
    if (p == p[0]).all():
        return draws.times(seed, step, ids, len(p)), None
    words = draws.words(seed, draws.DOMAIN_TIME, step, ids)
    share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ends = np.cumsum(p)
    t = np.searchsorted(ends / ends[-1], share, side="right").astype(np.int64)
    return t, 1 / (len(p) * p[t]) if reweight else None


def _short(p: np.ndarray) -> str:
    return f"shape {list(p.shape)}" if p.ndim != 1 or len(p) > 8 else str(p.tolist())
