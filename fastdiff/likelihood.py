"""Bits per dimension: the variational bound of a model on images, term by term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.clip import DynamicThreshold, clip_of
from fastdiff.nn import prediction_of
from fastdiff.schedule import NoiseSchedule, check_count
from fastdiff.train import draws
from fastdiff.train.bound import vlb_coefficients


@dataclass(frozen=True, eq=False)
class BitsPerDim:
    """The bound of every image and the parts that it is the sum of; the images' mean is the model's.

        total = prior + sum_k counts[k] vlb[:, k]

    With every time evaluated, column k belongs to time k and counts are 1. Else column k stands for a stratum
    of counts[k] neighbouring times, of which every image has seen one, drawn anew: total then estimates each
    image's bound without bias.

    Attributes:
        total: [B] in bits/dim.
        prior: [B] L_T = KL(q(x_T | x_0), N(0, I)) in bits/dim.
        vlb: [B, S] in bits/dim, for t > 0 L_{t-1} = KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)), for t = 0
            -log2 p(x_0 | x_1), the discretised Gaussian.
        mse: [B, S] mean squared error of eps as the predicted x0 has it: (alpha / sigma)^2 x0_mse.
        x0_mse: [B, S] mean squared error of the predicted x0, clipped if the terms are.
        times: [B, S] int64, the time of each term, an index into the schedule.
        counts: [S] int64, how many times a column stands for; their sum is T.
    """

    total: Tensor
    prior: Tensor
    vlb: Tensor
    mse: Tensor
    x0_mse: Tensor
    times: Tensor
    counts: Tensor

    def interval(self, level: float = 0.95) -> tuple[float, float, float]:
        """The mean over images and the ends of its confidence interval, in bits/dim.

        The interval is the normal one, mean +- z std / sqrt(B): images, their noise and their times are
        independent. With one image its ends are nan.
        """
        return mean_interval(self.total, level)


def mean_interval(values: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """The mean of independent numbers [B] and the ends of its normal confidence interval."""
    if not 0 < level < 1:
        raise ValueError(f"`level` must be in (0, 1), got {level}")
    numbers = values.double().cpu()
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return mean, math.nan, math.nan
    half = NormalDist().inv_cdf((1 + level) / 2) * float(numbers.std()) / math.sqrt(len(numbers))
    return mean, mean - half, mean + half


def bits_per_dim(
    model: Any,
    schedule: NoiseSchedule,
    x0: Tensor,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: bool | tuple[float, float] = True,
    seed: int = 0,
    noise: Tensor | None = None,
    *,
    times: int | Sequence[int] | None = None,
    cond: Mapping[str, Any] | None = None,
    sample_ids: Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    callback: Callable[[int], object] | None = None,
) -> BitsPerDim:
    """The variational bound on -log2 p(x0) per dimension: what a model needs to encode each image, in bits.

        L = L_T + sum_{t=1}^{T-1} L_{t-1} + L_0,   each term at one noisy image x_t = alpha_t x0 + sigma_t z

    The result depends on seed and sample ids, not on batch sizes (the network's last bits apart).

    Args:
        model: any callable (x_t, time, **cond) -> Tensor of x0's shape, with a learned variance of twice the
            channels, or an object with `.sample`. Evaluated in eval mode; its flag is put back.
        schedule: the forward chain. The model is told `schedule.timesteps[t]`.
        x0: [B, C, ...] float32, images of 256 levels in [-1, 1], B >= 1; on the CPU also float64, and then
            all is computed in float64.
        prediction: what the network's output means: "eps", "x0" or "v".
        variance: of the reverse step: "fixed_small", "fixed_large", "learned" or "learned_range".
        clip: clip the predicted x0 to [-1, 1], or to a range of your own; False: do not.
        seed: of the noise and of the times drawn, a whole number of 64 bits.
        noise: [T, *x0.shape] of x0's dtype in place of drawn noise, row t used at time t.
        times: None: every time. A number S, 2 <= S <= T: S terms an image, an unbiased estimate of the
            whole (time 0, then one time of each of S - 1 strata, the finer the less noise). Or times of your
            own, rising: those terms alone, with counts of 1, and a `total` that is no bound.
        cond: keyword arguments for the model; tensors of B rows belong to the images, all else is passed on.
        sample_ids: [B] int64 in [0, 2^32), the images' identities for the noise; None: 0..B-1.
        batch_size: pairs of an image and a time in one evaluation of the network; None: B.
        progress: show a bar on stderr.
        callback: called after every evaluation with the number of pairs that it was for.

    Returns:
        The bound and its parts, on x0's device, in x0's dtype.

    Raises:
        TypeError, ValueError: an argument breaks its contract, or the model's output has another shape.

    Source: Ho et al. 2020 (2006.11239), eq. 5 and sec. 3.3; Nichol & Dhariwal 2021 (2102.09672), sec. 3.
    """
    learned = variance in ("learned", "learned_range")
    limits = (-1.0, 1.0) if clip is True else None if clip is False else clip_of(clip)
    if isinstance(limits, DynamicThreshold):
        raise ValueError(
            "`clip` must be True, False or a range (low, high): the bound has no term for a threshold of each"
            f" sample's own, got {clip!r}"
        )
    _check_images(x0)
    coef = vlb_coefficients(schedule, prediction, variance, limits, x0.dtype).to(x0.device)
    batch, steps = len(x0), len(schedule)
    if noise is not None and tuple(noise.shape) != (steps, *x0.shape):
        raise ValueError(
            f"`noise` must be [T, *x0.shape], {[steps, *x0.shape]}, got {list(noise.shape)}; row t is used at"
            " time t"
        )
    ids = torch.arange(batch, device=x0.device) if sample_ids is None else sample_ids
    keys, ids = ops.noise_key(seed, ids, batch, x0.device)
    t, counts = _times(times, steps, seed, ids)
    pairs = batch * t.shape[1]
    size = batch if batch_size is None else check_count("batch_size", batch_size)
    levels = _on(x0, np.stack([schedule.alpha, schedule.sigma], axis=1))
    told = torch.from_numpy(np.array(schedule.timesteps)).to(x0.device)
    terms = [torch.empty(pairs, dtype=x0.dtype, device=x0.device) for _ in range(2)]
    # Pair p is image p % B at its time p // B: a batch holds few times, and images in their order.
    flat = t.T.reshape(-1)
    was_training = isinstance(model, nn.Module) and model.training
    bar = _bar(pairs, progress)
    try:
        if was_training:
            model.eval()
        with torch.inference_mode():
            for start in range(0, pairs, size):
                at = slice(start, min(start + size, pairs))
                image = torch.arange(start, at.stop, device=x0.device) % batch
                x, s = x0[image], flat[at]
                z = None if noise is None else noise[s.to(noise.device), image.to(noise.device)].to(x0.device)
                x_t, _ = ops.q_sample(x, levels, s, keys[image], ids[image], s, noise=z)
                out = prediction_of(model(x_t, told[s], **_rows(cond, image, batch)))
                _check_output(out, x, learned)
                terms[0][at] = ops.vlb_terms(x, x_t, out, coef, s)
                terms[1][at] = _x0_error(x, x_t, out, coef[s])
                bar.update(at.stop - start)
                if callback is not None:
                    callback(at.stop - start)
    finally:
        bar.close()
        if was_training:
            model.train()
    vlb, x0_mse = (a.view(-1, batch).T.contiguous() for a in terms)
    prior = _prior(schedule, x0)
    total = prior.double() if x0.device.type != "mps" else prior
    total = total + (vlb.to(total.dtype) * counts).sum(1)
    ratio = _on(x0, (schedule.alpha / schedule.sigma) ** 2)[t]
    return BitsPerDim(total.to(x0.dtype), prior, vlb, ratio * x0_mse, x0_mse, t, counts)


def strata(terms: int, steps: int) -> np.ndarray:
    """[terms + 1] edges that cut 0..steps-1 into `terms` runs: {0}, then ever longer ones.

    Their lengths grow geometrically, as L_{t-1} falls about as 1 / t: the draw of a time within its stratum
    then adds little to the variance.
    """
    edges = np.concatenate(([0], np.rint(np.geomspace(1, steps, terms)).astype(np.int64)))
    # No run may be empty: from the left each edge at least one on, from the right at most one back.
    index = np.arange(terms + 1)
    edges = np.maximum.accumulate(edges - index) + index
    return np.minimum(edges, steps - terms + index)


def _times(times: int | Sequence[int] | None, steps: int, seed: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each image's times [B, S], and how many times a column stands for, [S]."""
    batch, device = len(ids), ids.device
    if times is None:
        times = range(steps)
    if not isinstance(times, int | np.integer):
        chosen = np.asarray(times)
        if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
            raise TypeError(f"`times` must be None, a number, or rising whole numbers, got {times!r}")
        if chosen[0] < 0 or chosen[-1] >= steps or (np.diff(chosen) <= 0).any():
            raise ValueError(f"`times` must rise within 0..{steps - 1}, got {chosen.tolist()}")
        row = torch.from_numpy(chosen.astype(np.int64)).to(device)
        return row.expand(batch, -1), torch.ones_like(row)
    if isinstance(times, bool) or not min(2, steps) <= times <= steps:
        raise ValueError(f"`times` must be a number from 2 to T = {steps}, or None for all, got {times}")
    edges = strata(int(times), steps)
    counts = np.diff(edges)
    columns = [
        edges[k] + draws.below(seed, draws.DOMAIN_STRATUM, k, ids.cpu().numpy(), int(count))
        for k, count in enumerate(counts)
    ]
    return torch.from_numpy(np.stack(columns, axis=1)).to(device), torch.from_numpy(counts).to(device)


def _x0_error(x0: Tensor, x_t: Tensor, out: Tensor, coef: Tensor) -> Tensor:
    """The mean squared error of the predicted x0, [B]; coef are the bound's rows."""
    from_x, from_out, low, high = (c.view(-1, *[1] * (x0.ndim - 1)) for c in coef.unbind(1)[:4])
    guess = from_out * out[:, : x0.shape[1]].to(x0.dtype) + from_x * x_t
    return (x0 - guess.clamp(low, high)).square().flatten(1).mean(1)


def _prior(schedule: NoiseSchedule, x0: Tensor) -> Tensor:
    """KL(N(alpha x0, sigma^2), N(0, 1)) = (alpha^2 (x0^2 - 1) - ln sigma^2) / 2 at the end, in bits/dim."""
    signal = float(schedule.alpha_bar[-1])
    nats = 0.5 * (signal * (x0.square().flatten(1).mean(1) - 1) - math.log1p(-signal))
    return nats / math.log(2)


def _on(x0: Tensor, values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(x0.dtype).to(x0.device)


def _rows(cond: Mapping[str, Any] | None, image: Tensor, batch: int) -> dict[str, Any]:
    """The condition of each pair."""
    return {
        name: value[image.to(value.device)]
        if isinstance(value, Tensor) and value.ndim and len(value) == batch
        else value
        for name, value in (cond or {}).items()
    }


def _check_images(x0: Any) -> None:
    wanted = "`x0` must be a float32 tensor [B, C, ...] of images in [-1, 1], or float64 on the CPU"
    if not isinstance(x0, Tensor) or x0.ndim < 2 or not len(x0):
        raise TypeError(f"{wanted}, got {tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__}")
    if x0.dtype != torch.float32 and not (x0.dtype == torch.float64 and x0.device.type == "cpu"):
        raise TypeError(f"{wanted}, got {x0.dtype} on {x0.device}")
    if not bool((x0.abs() <= 1 + 1e-6).all()):
        raise ValueError(
            f"`x0` must lie in [-1, 1], got {float(x0.min()):g}..{float(x0.max()):g}; scale a byte k to"
            " k / 127.5 - 1"
        )


def _check_output(out: Tensor, x0: Tensor, learned: bool) -> None:
    wanted = (x0.shape[0], x0.shape[1] * (2 if learned else 1), *x0.shape[2:])
    if tuple(out.shape) != wanted:
        kind = "as the variance is learned" if learned else "as the variance is fixed"
        raise ValueError(
            f"`model` must return {list(wanted)}, {kind}, got {list(out.shape)}; say with `variance` what the"
            " network was trained for"
        )


def _bar(total: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="bits/dim", unit="term", disable=not progress, leave=False)
