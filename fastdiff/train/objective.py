"""What training minimises: the denoising loss and the variational bound of a batch, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._arguments import integers, noise_key
from fastdiff._losses import check_mask
from fastdiff.nn import prediction_of
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import draws
from fastdiff.train.bound import PREDICTIONS, VARIANCES, vlb_coefficients

LOSSES = ("simple", "min_snr", "hybrid", "vlb")
LEARNED = ("learned", "learned_range")

MIN_SNR_GAMMA = 5.0  # the default of Hang et al. 2023


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of one batch; every field is [B] of x0's dtype, one number for each sample.

    Attributes:
        total: what to minimise; take its mean and call backward.
        mse: the unweighted squared error of the prediction, averaged over the sample's elements, of those in
            the mask if there is one.
        vlb: the term of the variational bound at the sample's time, unweighted and x0 unclipped, in bits/dim;
            None for the losses without it, "simple" and "min_snr".
    """

    total: Tensor
    mse: Tensor
    vlb: Tensor | None = None


class _Tables(NamedTuple):
    """What depends on the time alone, on a device: alpha and sigma [T, 2], the network's times [T], weights
    [T], and the coefficients of the bound [T, 8] where the loss needs them."""

    alpha_sigma: Tensor
    timesteps: Tensor
    weights: Tensor
    bound: Tensor | None


@dataclass(frozen=True)
class Objective:
    """A training loss: immutable, stateless and deterministic, so that any step can be computed again.

        x_t = alpha_t x0 + sigma_t z,   mse = mean((model(x_t, timesteps[t]) - target)^2)
        target: z (eps), x0 (x0) or alpha_t z - sigma_t x0 (v)
        vlb = KL(q(x_{t-1} | x_t, x0), p(x_{t-1} | x_t)) in bits/dim;  at t = 0 -log2 p(x0 | x_1)

        simple   total = mse
        min_snr  total = w_t mse,   s = (alpha_t / sigma_t)^2
                 w = min(s, 5) / s (eps),  min(s, 5) (x0),  min(s, 5) / (s + 1) (v)
        hybrid   total = mse + vlb_weight vlb,   where vlb trains the variance alone: its mean is detached
        vlb      total = T vlb

    Args:
        schedule: the forward chain. The model is told `schedule.timesteps[t]`.
        prediction: what the network's output means: "eps", "x0" or "v".
        variance: of the reverse step: "fixed_small", "fixed_large", or, for a network with twice the
            channels, "learned" (its logarithm) or "learned_range" (interpolated between the two fixed ones).
            A fixed one enters "vlb" and else only travels with the model; a learned one is trained by
            "hybrid" and "vlb".
        loss: "simple", "min_snr", "hybrid" or "vlb".
        vlb_weight: of the hybrid, at least 0; None: T / 1000.

    Raises:
        TypeError: `schedule` is no NoiseSchedule.
        ValueError: an option is not offered or belongs to another loss, or the schedule ends in pure noise
            (alpha = 0) and the prediction is "eps", from which x0 could not be recovered there.
    Source: Ho et al. 2020 (2006.11239), eq. 5 and 14; Nichol & Dhariwal 2021 (2102.09672), eq. 15 and 16
        (hybrid: lambda 0.001 times the sum of T terms); Salimans & Ho 2022 (2202.00512), app. D (v); Hang et
        al. 2023 (2303.09556), sec. 3 (min_snr).
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "simple"
    vlb_weight: float | None = None
    _tables: dict[tuple[torch.device, torch.dtype], _Tables] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(
                f"`schedule` must be a NoiseSchedule, got {type(self.schedule).__name__}; build one with"
                " NoiseSchedule.linear(1000) or NoiseSchedule.cosine(1000)"
            )
        for name, offered in (("prediction", PREDICTIONS), ("variance", VARIANCES), ("loss", LOSSES)):
            if getattr(self, name) not in offered:
                raise ValueError(f"`{name}` must be one of {', '.join(offered)}, got {getattr(self, name)!r}")
        if self.variance in LEARNED and self.loss in ("simple", "min_snr"):
            raise ValueError(
                f"`variance` must be fixed_small or fixed_large for the loss {self.loss!r}, which would never"
                f" train a learned one, got {self.variance!r}; use the loss 'hybrid'"
            )
        if self.variance not in LEARNED and self.loss == "hybrid":
            raise ValueError(
                "`variance` must be learned_range or learned for the loss 'hybrid', whose bound trains"
                f" nothing else, got {self.variance!r}; use the loss 'simple' or 'vlb'"
            )
        _check_vlb_weight(self.loss, self.vlb_weight)
        if self.prediction == "eps" and self.schedule.alpha[-1] == 0:
            raise ValueError(
                "`prediction` must be 'x0' or 'v' for a schedule that ends in pure noise (alpha = 0),"
                " got 'eps'"
            )

    @property
    def learned_variance(self) -> bool:
        """Whether the network must return twice the channels of x0."""
        return self.variance in LEARNED

    def to_config(self) -> dict[str, Any]:
        """The options as JSON data, the schedule as its own `to_config`."""
        return {
            "schedule": self.schedule.to_config(),
            "prediction": self.prediction,
            "variance": self.variance,
            "loss": self.loss,
            "vlb_weight": self.vlb_weight,
        }

    def __call__(
        self,
        model: Any,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int | Tensor = 0,
        sample_ids: Tensor | None = None,
        draw: int | Tensor = 0,
        cond: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
    ) -> Losses:
        """The losses of the batch `x0`.

        The noise is drawn twice, in x_t and in the loss, and is never in memory.

        Args:
            model: any callable (x_t, time, **cond) -> Tensor of x0's shape, with a learned variance of twice
                the channels, or an object with `.sample`.
            x0: [B, C, ...] float32, images in [-1, 1]. Not changed. On the CPU also float64: then all is
                computed in float64, the model must return it, and `torch.autograd.gradcheck` holds.
            t: [B] int64 on x0's device, 0 <= t < T, an index into the schedule; on a device other than the
                CPU its range is not checked. None: uniform, a function of (seed, sample_ids, draw) alone.
            noise: [B, C, ...] of x0's dtype in place of the drawn noise; None: normal(seed, sample_ids, draw,
                element) in domain 2.
            seed: a whole number of 64 bits, or [B] int64.
            sample_ids: [B] int64 on x0's device; None: 0..B-1.
            draw: the optimisation step, >= 0; may be a 0-dim int64 tensor. With t=None and tensors on a
                device, drawing t reads them; pass t to avoid it.
            cond: keyword arguments for the model, such as {"labels": y}.
            mask: where the loss looks, as `ops.denoising_loss` has it: the mean is each sample's over its own
                mask, such as the steps of a trajectory [B, T, A] that are no padding, [B, T, 1]. For the
                losses "simple" and "min_snr".

        Returns:
            The losses, with the graph for `losses.total.mean().backward()`.

        Raises:
            TypeError, ValueError: an argument breaks its contract, or the model's output has another shape.
        """
        _check_images(x0)
        if mask is not None:
            check_mask(mask, x0)
        if mask is not None and self.loss not in ("simple", "min_snr"):
            raise ValueError(
                f"`mask` must be None for the loss {self.loss!r}, whose bound has none, got a mask;"
                " use the loss 'simple' or 'min_snr'"
            )
        batch, steps = len(x0), len(self.schedule)
        if sample_ids is None:
            sample_ids = torch.arange(batch, device=x0.device)
        else:
            _check_vector("sample_ids", sample_ids, x0)
        if t is None:
            seeds = seed.cpu().numpy() if isinstance(seed, Tensor) else seed
            drawn = draws.times(seeds, int(draw), sample_ids.cpu().numpy(), steps)
            t = torch.from_numpy(drawn).to(x0.device)
        else:
            _check_vector("t", t, x0)
            if t.device.type == "cpu" and batch and not 0 <= int(t.min()) <= int(t.max()) < steps:
                raise ValueError(f"`t` must lie in 0..{steps - 1}, got {int(t.min())}..{int(t.max())}")
        tables = self._on(x0.device, x0.dtype)
        # As tensors, once: both operators then take them as they are.
        key = (*noise_key(seed, sample_ids, batch, x0.device), integers("draw", draw, batch, x0.device))
        x_t, _ = ops.q_sample(x0, tables.alpha_sigma, t, *key, noise=noise)
        weight = tables.weights[t] if self.loss == "min_snr" else None
        out = prediction_of(model(x_t, tables.timesteps[t], **(cond or {})))
        _check_output(out, x0, self.learned_variance)
        judged = out.detach() if self.loss == "vlb" else out  # there the mse is for the log alone
        mse = ops.denoising_loss(
            judged, x0, tables.alpha_sigma, t, *key, target=self.prediction, noise=noise, mask=mask
        )
        if tables.bound is None:
            return Losses(total=mse if weight is None else mse * weight, mse=mse)
        is_hybrid = self.loss == "hybrid"
        vlb = ops.vlb_terms(x0, x_t, out, tables.bound, t, detach_mean=is_hybrid)
        if not is_hybrid:
            return Losses(total=steps * vlb, mse=mse, vlb=vlb)
        scale = steps / 1000 if self.vlb_weight is None else self.vlb_weight
        return Losses(total=mse + scale * vlb, mse=mse, vlb=vlb)

    def weights(self) -> np.ndarray:
        """The factor w_t of mse in total, float64 [T]; 0 for the loss "vlb"."""
        if self.loss != "min_snr":
            return np.full(len(self.schedule), float(self.loss != "vlb"))
        # As alpha^2 and sigma^2, not as their ratio: at alpha = 0 the weights of x0 and v are 0 without a
        # warning, and eps, whose limit is 1, is refused there.
        signal, noise = self.schedule.alpha**2, self.schedule.sigma**2
        smaller = np.minimum(signal, MIN_SNR_GAMMA * noise)  # min(s, gamma) * sigma^2
        return {"eps": lambda: smaller / signal, "x0": lambda: smaller / noise, "v": lambda: smaller}[
            self.prediction
        ]()

    def _on(self, device: torch.device, dtype: torch.dtype) -> _Tables:
        """The tables on `device`, in `dtype`, each number rounded once."""
        if (device, dtype) not in self._tables:
            pair = np.stack([self.schedule.alpha, self.schedule.sigma], axis=1)
            bound = None
            if self.loss in ("hybrid", "vlb"):
                bound = vlb_coefficients(self.schedule, self.prediction, self.variance, dtype=dtype).to(
                    device
                )
            self._tables[device, dtype] = _Tables(
                torch.from_numpy(pair).to(device, dtype),
                torch.from_numpy(np.array(self.schedule.timesteps)).to(device),
                torch.from_numpy(self.weights()).to(device, dtype),
                bound,
            )
        return self._tables[device, dtype]


def _check_vlb_weight(loss: str, weight: Any) -> None:
    if weight is None:
        return
    if loss != "hybrid":
        raise ValueError(
            f"`vlb_weight` must be None for the loss {loss!r}, it belongs to 'hybrid', got {weight!r}"
        )
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"`vlb_weight` must be a finite number of at least 0 or None, got {weight!r}")


def _check_images(x0: Any) -> None:
    known = isinstance(x0, Tensor) and x0.ndim >= 2
    if known and (x0.dtype == torch.float32 or (x0.dtype == torch.float64 and x0.device.type == "cpu")):
        return
    got = (
        f"{x0.dtype} of shape {tuple(x0.shape)} on {x0.device}"
        if isinstance(x0, Tensor)
        else type(x0).__name__
    )
    raise TypeError(
        f"`x0` must be a float32 tensor [B, C, ...], or float64 on the CPU, got {got};"
        " scale images to [-1, 1] first"
    )


def _check_vector(name: str, value: Any, x0: Tensor) -> None:
    wanted = f"[{len(x0)}] int64 on {x0.device}, one number for each sample"
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be {wanted}, got {type(value).__name__}")
    if value.shape != (len(x0),) or value.dtype != torch.int64 or value.device != x0.device:
        raise ValueError(
            f"`{name}` must be {wanted}, got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


def _check_output(out: Tensor, x0: Tensor, is_learned: bool) -> None:
    doubled = (x0.shape[0], 2 * x0.shape[1], *x0.shape[2:])
    wanted = doubled if is_learned else tuple(x0.shape)
    if tuple(out.shape) == wanted:
        return
    if is_learned:
        hint = "a learned variance needs twice the channels, as fd.UNet(..., learned_variance=True) has them"
    elif tuple(out.shape) == doubled:
        hint = (
            "it has the channels of a learned variance, which this loss does not train; build the network"
            " without, or use the loss 'hybrid' with the variance 'learned_range'"
        )
    else:
        hint = "the network and the data differ in channels or size"
    raise ValueError(f"`model` must return the shape {wanted}, got {tuple(out.shape)}; {hint}")
