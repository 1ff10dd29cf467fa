"""The coefficients of the variational bound's terms, from a schedule and what the network's output means."""

from __future__ import annotations

import numpy as np
import torch

from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.prediction import prediction_columns

PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def vlb_coefficients(
    schedule: NoiseSchedule,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: tuple[float, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The table of `ops.vlb_terms`: a row for each time of a schedule, computed in float64 and rounded once.

    At t = 0, where the posterior's variance is 0, it is `posterior_log_variance_clipped[0]`. The logarithm of
    the model's variance is that ("fixed_small"); log beta_t, at t = 0 as fixed_small ("fixed_large"); v
    ("learned"); between fixed_small's and log beta_t, as f = (v + 1) / 2 says ("learned_range").

    Args:
        prediction: what the network predicts, "eps", "x0" or "v".
        variance: "fixed_small", "fixed_large", "learned" or "learned_range".
        clip: range of the predicted x0, or None.
        dtype: float32, or float64 for x0 in float64.

    Returns:
        [T, 8] on the CPU; its columns are named in `fastdiff.kernels.vlb`.

    Raises:
        TypeError: `schedule` is no NoiseSchedule.
        ValueError: an unknown option, a range that is none, or "eps" on a schedule that ends in pure noise.

    Source: Ho et al. 2020, eq. 7; Nichol and Dhariwal 2021, eq. 15.
    """
    from fastdiff.kernels.vlb import pack

    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"`schedule` must be a NoiseSchedule, got {type(schedule).__name__}; build one with"
            " NoiseSchedule.linear(1000)"
        )
    for name, value, known in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
        if value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"`clip` must be a range (low, high), low < high, got {clip!r}")
    columns = prediction_columns(prediction, schedule.timesteps, schedule.alpha, schedule.sigma)
    small = schedule.posterior_log_variance_clipped
    large = np.log(schedule.betas)
    if variance == "fixed_large":
        large = np.concatenate((small[:1], large[1:]))
    low, high = {
        "fixed_small": (small, small),
        "fixed_large": (large, large),
        "learned": (-np.ones_like(small), np.ones_like(small)),
        "learned_range": (small, large),
    }[variance]
    mean = schedule.posterior_mean_coef1
    return pack(columns["x0_from_x"], columns["x0_from_out"], mean, small, low, high, clip, dtype)
