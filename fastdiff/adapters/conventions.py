"""Where diffusers' schedulers keep their noise levels, and what their pipelines know about calling them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastdiff.clip import Clip, DynamicThreshold
from fastdiff.solvers.prediction import prediction_columns

_PREDICTIONS = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_UNNAMED_PREDICTIONS = {"IPNDMScheduler": "v", "DDPMWuerstchenScheduler": "eps"}
# timesteps that hold the end as well, where no network is called
_END_IN_TIMESTEPS = ("DDPMWuerstchenScheduler", "SCMScheduler")

Levels = tuple[np.ndarray, np.ndarray]


def config_of(scheduler: Any, key: str) -> Any:
    """An entry of the scheduler's config, or None."""
    return getattr(getattr(scheduler, "config", None), key, None)


def threshold_of(scheduler: Any) -> Clip:
    """The dynamic thresholding that a scheduler's config describes; with a largest value of 1 a plain range.

    Raises:
        ValueError: a quantile or a largest value out of its range.
    """
    quantile, largest = (config_of(scheduler, k) for k in ("dynamic_thresholding_ratio", "sample_max_value"))
    clip = DynamicThreshold(quantile, largest)
    return (-1.0, 1.0) if clip.largest == 1 else clip


def first_row(scheduler: Any) -> int:
    """Where an image-to-image pipeline starts in the scheduler's timesteps."""
    return getattr(scheduler, "_begin_index", None) or 0


def times_of(scheduler: Any) -> torch.Tensor:
    """[rows] times at which a pipeline calls the network, each as `step` wants it."""
    times = scheduler.timesteps[first_row(scheduler) :]
    if type(scheduler).__name__ in _END_IN_TIMESTEPS:
        times = times[:-1]
    return times[:, None] if hasattr(scheduler, "_alpha_cumprod") else times  # Würstchen's: one per sample


def levels_of(scheduler: Any, times: torch.Tensor) -> Levels | None:
    """alpha and sigma [rows+1] of the sample that enters each row and of the result, by the scheduler's own
    tables; None where it keeps none that is known.
    """
    start = first_row(scheduler)
    stop = start + len(times) + 1
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= stop:
        return _levels_of_sigmas(scheduler, start, stop)
    if hasattr(scheduler, "alphas_cumprod"):
        return _square_roots(_alpha_bar(scheduler, times))
    if hasattr(scheduler, "_alpha_cumprod"):
        return _square_roots(scheduler._alpha_cumprod(scheduler.timesteps[start:stop], times.device))
    pair = (getattr(scheduler, "alphas", None), getattr(scheduler, "betas", None))  # IPNDM's alpha and sigma
    if all(isinstance(value, torch.Tensor) and len(value) >= stop for value in pair):
        alpha, sigma = (value[start:stop].double().numpy() for value in pair if value is not None)
        return alpha, sigma
    return None


def _levels_of_sigmas(scheduler: Any, start: int, stop: int) -> Levels:
    sigma = scheduler.sigmas[start:stop].double()
    between = getattr(scheduler, "sigmas_interpol", None)
    if isinstance(between, torch.Tensor):  # KDPM2 calls the network between two levels
        sigma[1::2] = between[start + 1 : stop : 2].double()[: len(sigma[1::2])]
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
        alpha = torch.as_tensor(alpha, dtype=torch.float64).expand(len(sigma))
    else:
        alpha = 1.0 - sigma if _is_flow(scheduler) else torch.ones_like(sigma)
    return alpha.numpy().copy(), sigma.double().numpy().copy()


def _alpha_bar(scheduler: Any, times: torch.Tensor) -> torch.Tensor:
    table = scheduler.alphas_cumprod.double()
    at_times = table[times.long()]
    if hasattr(scheduler, "initial_alpha_cumprod"):  # inversion: a step goes *to* its time
        return torch.cat([torch.as_tensor(scheduler.initial_alpha_cumprod).double().reshape(1), at_times])
    end = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double()
    if type(scheduler).__name__ == "TCDScheduler":  # its last step goes to time 0
        end = table[0]
    return torch.cat([at_times, end.reshape(1)])


def _square_roots(alpha_bar: torch.Tensor) -> Levels:
    alpha_bar = alpha_bar.double()
    return alpha_bar.sqrt().numpy(), (1.0 - alpha_bar).sqrt().numpy()


def _is_flow(scheduler: Any) -> bool:
    """Whether samples are (1 - sigma) x0 + sigma noise."""
    sigmas = getattr(scheduler, "sigmas", None)
    straight = isinstance(sigmas, torch.Tensor) and float(sigmas.max()) <= 1.0
    return hasattr(scheduler, "scale_noise") or (straight and not hasattr(scheduler, "alphas_cumprod"))


def x0_columns(scheduler: Any, alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x0_from_x and x0_from_out by the prediction that the config names; NaN where it names none."""
    prediction = config_of(scheduler, "prediction_type") or ("flow_prediction" if _is_flow(scheduler) else "")
    prediction = _UNNAMED_PREDICTIONS.get(type(scheduler).__name__, _PREDICTIONS.get(prediction, ""))
    columns = np.full((2, len(alpha)), np.nan)
    says = (alpha > 0) | (prediction != "eps")  # without signal the noise says nothing about x0
    if prediction:
        # A network sees x / norm, at the level (alpha, sigma) / norm; a flow is as it is.
        norm = np.ones_like(alpha) if prediction == "flow" else np.hypot(alpha, sigma)
        found = prediction_columns(prediction, sigma[says], (alpha / norm)[says], (sigma / norm)[says])
        columns[0, says], columns[1, says] = found["x0_from_x"] / norm[says], found["x0_from_out"]
        if type(scheduler).__name__ == "MiniMaxH3Scheduler":  # its velocity points from noise to data
            columns[1] *= -1.0
    return columns[0], columns[1]


def exempt_moments(scheduler: Any, step_kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """What a scheduler's samples are not meant to keep of their levels' moments.

    LCM's boundary scaling keeps neither; the noise is not kept by `fixed_large`, a learned variance,
    s_noise != 1, and `sde-dpmsolver`, which is of first order in the noise as well.
    """
    if hasattr(scheduler, "get_scalings_for_boundary_condition_discrete"):
        return ("mean", "noise")
    variance = str(config_of(scheduler, "variance_type"))
    noisy = variance.startswith("fixed_large") or variance == "learned_range"
    noisy |= step_kwargs.get("s_noise", 1.0) != 1.0 or config_of(scheduler, "s_noise") not in (None, 1.0)
    noisy |= config_of(scheduler, "algorithm_type") == "sde-dpmsolver"
    return ("noise",) if noisy else ()


def is_inner_stage(scheduler: Any) -> bool:
    """Whether the step that just ran was a stage that another one corrects."""
    if hasattr(scheduler, "state_in_first_order"):
        return not scheduler.state_in_first_order
    if hasattr(scheduler, "prk_timesteps"):  # PNDM: four stages of Runge-Kutta, or one repeated step
        if config_of(scheduler, "skip_prk_steps"):
            return scheduler.counter == 1
        return scheduler.counter < len(scheduler.prk_timesteps) and scheduler.counter % 4 != 0
    return False
