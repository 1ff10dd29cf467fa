"""What training minimises: the denoising loss of a batch, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.nn import prediction_of
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import draws

PREDICTIONS = ("eps", "x0", "v")
LOSSES = ("simple", "min_snr")
VARIANCES = ("fixed_small", "fixed_large")

MIN_SNR_GAMMA = 5.0  # the default of Hang et al. 2023


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of one batch; every field is [B] float32, one number for each sample.

    Attributes:
        total: what to minimise; take its mean and call backward.
        mse: the unweighted squared error of the prediction, averaged over the sample's elements.
        vlb: one term of the variational bound in bits/dim, or None where the loss has none.
    """

    total: Tensor
    mse: Tensor
    vlb: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A training loss: immutable, stateless and deterministic, so that any step can be computed again.

        x_t = alpha_t x0 + sigma_t z,   mse = mean((model(x_t, timesteps[t]) - target)^2)
        target: z (eps), x0 (x0) or alpha_t z - sigma_t x0 (v)
        simple: total = mse;   min_snr: total = w_t mse,   with s = (alpha_t / sigma_t)^2
        w = min(s, 5) / s (eps),  min(s, 5) (x0),  min(s, 5) / (s + 1) (v)

    Args:
        schedule: the forward chain. The model is told `schedule.timesteps[t]`.
        prediction: what the network's output means: "eps", "x0" or "v".
        variance: the reverse variance that the sampler is to use, "fixed_small" or "fixed_large". It does not
            enter these losses and travels with the model.
        loss: "simple" or "min_snr".
        vlb_weight: belongs to a loss with a variational term, which is not offered yet; must be None.

    Raises:
        TypeError: `schedule` is no NoiseSchedule.
        ValueError: an option is not offered, or the schedule ends in pure noise (alpha = 0) and the
            prediction is "eps", from which x0 could not be recovered there.
    Source: Ho et al. 2020 (2006.11239), eq. 14 (simple); Salimans & Ho 2022 (2202.00512), app. D (v); Hang et
        al. 2023 (2303.09556), sec. 3 (min_snr).
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    variance: str = "fixed_small"
    loss: str = "simple"
    vlb_weight: float | None = None
    _tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, NoiseSchedule):
            raise TypeError(
                f"`schedule` must be a NoiseSchedule, got {type(self.schedule).__name__}; build one with"
                " NoiseSchedule.linear(1000) or NoiseSchedule.cosine(1000)"
            )
        _one_of("prediction", self.prediction, PREDICTIONS)
        if self.variance in ("learned", "learned_range"):
            raise ValueError(
                f"`variance` must be one of {', '.join(VARIANCES)}, got {self.variance!r}: the loss"
                f" {self.loss!r} would never train a learned variance"
            )
        _one_of("variance", self.variance, VARIANCES)
        _one_of("loss", self.loss, LOSSES)
        if self.vlb_weight is not None:
            raise ValueError(
                f"`vlb_weight` must be None for the loss {self.loss!r}, which has no variational term, got"
                f" {self.vlb_weight!r}"
            )
        if self.prediction == "eps" and self.schedule.alpha[-1] == 0:
            raise ValueError(
                "`prediction` must be 'x0' or 'v' for a schedule that ends in pure noise (alpha = 0),"
                " got 'eps'"
            )

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
    ) -> Losses:
        """The losses of the batch `x0`.

        Args:
            model: any callable (x_t, time, **cond) -> Tensor of x0's shape, or an object with `.sample`.
            x0: [B, ...] float32, images in [-1, 1]. Not changed.
            t: [B] int64 on x0's device, 0 <= t < T, an index into the schedule; on a device other than the
                CPU its range is not checked. None: uniform, a function of (seed, sample_ids, draw) alone.
            noise: [B, ...] float32 in place of the drawn noise; None: normal(seed, sample_ids, draw, element)
                in domain 2.
            seed: a whole number of 64 bits, or [B] int64.
            sample_ids: [B] int64 on x0's device; None: 0..B-1.
            draw: the optimisation step, >= 0; may be a 0-dim int64 tensor. With t=None and tensors on a
                device, drawing t reads them; pass t to avoid it.
            cond: keyword arguments for the model, such as {"labels": y}.

        Returns:
            The losses, with the graph for `losses.total.mean().backward()`.

        Raises:
            TypeError, ValueError: an argument breaks its contract, or the model's output has another shape.
        """
        _check_images(x0)
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
        alpha_sigma, timesteps, weights = self._on(x0.device)
        x_t, target = ops.q_sample(
            x0, alpha_sigma, t, seed, sample_ids, draw, noise=noise, target=self.prediction
        )
        assert target is not None  # for the type checker: q_sample was asked for one
        out = prediction_of(model(x_t, timesteps[t], **(cond or {})))
        _check_output(out, x0)
        mse = (out.float() - target).square().flatten(1).mean(1)
        return Losses(total=mse if self.loss == "simple" else mse * weights[t], mse=mse)

    def weights(self) -> np.ndarray:
        """The factor w_t of mse in total, float64 [T]."""
        if self.loss == "simple":
            return np.ones(len(self.schedule))
        # As alpha^2 and sigma^2, not as their ratio: at alpha = 0 the weights of x0 and v are 0 without a
        # warning, and eps, whose limit is 1, is refused there.
        signal, noise = self.schedule.alpha**2, self.schedule.sigma**2
        smaller = np.minimum(signal, MIN_SNR_GAMMA * noise)  # min(s, gamma) * sigma^2
        return {"eps": lambda: smaller / signal, "x0": lambda: smaller / noise, "v": lambda: smaller}[
            self.prediction
        ]()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """alpha and sigma [T, 2], timesteps [T] and weights [T] on `device`, float32, each rounded once."""
        if device not in self._tables:
            pair = np.stack([self.schedule.alpha, self.schedule.sigma], axis=1).astype(np.float32)
            self._tables[device] = (
                torch.from_numpy(pair).to(device),
                torch.from_numpy(np.array(self.schedule.timesteps)).to(device),
                torch.from_numpy(self.weights().astype(np.float32)).to(device),
            )
        return self._tables[device]


def _one_of(name: str, value: Any, offered: tuple[str, ...]) -> None:
    if value not in offered:
        raise ValueError(f"`{name}` must be one of {', '.join(offered)}, got {value!r}")


def _check_images(x0: Any) -> None:
    if not isinstance(x0, Tensor) or x0.dtype != torch.float32 or x0.ndim < 2:
        got = f"{x0.dtype} of shape {tuple(x0.shape)}" if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(f"`x0` must be a float32 tensor [B, ...], got {got}; scale images to [-1, 1] first")


def _check_vector(name: str, value: Any, x0: Tensor) -> None:
    wanted = f"[{len(x0)}] int64 on {x0.device}, one number for each sample"
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be {wanted}, got {type(value).__name__}")
    if value.shape != (len(x0),) or value.dtype != torch.int64 or value.device != x0.device:
        raise ValueError(
            f"`{name}` must be {wanted}, got {tuple(value.shape)} {value.dtype} on {value.device}"
        )


def _check_output(out: Tensor, x0: Tensor) -> None:
    if out.shape == x0.shape:
        return
    doubled = (x0.shape[0], 2 * x0.shape[1], *x0.shape[2:])
    hint = (
        "it has the channels of a learned variance, which this loss does not train; build the network without"
        if tuple(out.shape) == doubled
        else "the network and the data differ in channels or size"
    )
    raise ValueError(f"`model` must return x0's shape {tuple(x0.shape)}, got {tuple(out.shape)}; {hint}")
