"""One optimisation step: the parts of its batch forward and backward, clipping, AdamW, the averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.train import draws
from fastdiff.train.adamw import AdamW
from fastdiff.train.config import TrainConfig
from fastdiff.train.feed import Part
from fastdiff.train.flat import Flat, FlatEMA
from fastdiff.train.network import Network
from fastdiff.train.objective import Objective
from fastdiff.train.ranks import Ranks


class Times(Protocol):
    """Chooses the times of training, and may learn from the losses; its state is part of every checkpoint.

    Attributes:
        learns: whether `learn` is to be called, which costs a synchronisation with the device each step.
    """

    learns: bool

    def draw(self, seed: int, step: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """(t [n] int64, weights [n] or None) of the samples `ids` of a step, a function of these and of the
        state; the weights are factors of the losses."""

    def learn(self, t: np.ndarray, losses: np.ndarray) -> None:
        """Take notice of the times and the losses, without weights, of a whole batch, in the order of its
        samples: the same in every process."""

    def to_config(self) -> Mapping[str, Any]:
        """What a resumed run must share, as JSON data."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors and numbers, for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`'s result."""


@dataclass(frozen=True, eq=False)
class Measured:
    """What a step came to, still on the device: of this process's samples alone but for the norm.

    Attributes:
        step: 1 for the first.
        rate: the learning rate.
        t: [n] int64, on the host.
        losses: name -> [n] float32, without the weights that `Times` gives: "total", and "mse" and
            "vlb" where the objective has them besides.
        norm: of the whole gradient, before clipping.
    """

    step: int
    rate: float
    t: np.ndarray
    losses: dict[str, Tensor]
    norm: Tensor


class Stepper:
    """Takes a model from step to step.

        loss = sum over the batch of w_i total_i / batch_size

    The sum runs over the parts of a process (gradient accumulation) and over processes: cutting the batch
    otherwise changes the order of the sum and nothing else, as times and noise belong to the sample. Only a
    network that draws random numbers (dropout) or looks at the whole batch (BatchNorm) sees the cut.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, config: TrainConfig, ranks: Ranks, times: Times
    ) -> None:
        self._model, self._objective, self._config = model, objective, config
        self._ranks, self._times = ranks, times
        self.flat = Flat(model)
        self._device = self.flat.parameters[0].device
        self._network = Network(model, config, ranks)
        self._modules = list(model.modules())
        self.optimizer = AdamW(self.flat, config.weight_decay)
        self.emas = tuple(FlatEMA(model, decay, self.flat) for decay in config.ema_decays)

    def __call__(self, step: int, parts: Sequence[Part]) -> Measured:
        """Do step `step` (0 is the first) on this process's parts of its batch."""
        config = self._config
        if not self._network.connected:
            few = {key: value[:2] for key, value in _cond(parts[0]).items()}
            self._network.connect(self._objective, parts[0].x0[:2], few)
        self.flat.begin()
        if not all(module.training for module in self._modules):  # `train` visits them 50 times as slowly
            self._model.train()
        times: list[np.ndarray] = []
        losses: list[dict[str, Tensor]] = []
        for part in parts:
            with self._ranks.watched(f"at step {step + 1}"), self._network.part(last=part is parts[-1]):
                t, found = self._part(step, part)
            times.append(t)
            losses.append(found)
        self.flat.collect()
        norm = self.flat.norm()
        scale = None
        if config.grad_clip is not None:
            # As torch.nn.utils.clip_grad_norm_ has it; the optimiser divides by it on its way.
            scale = (norm.float() + 1e-6).div_(config.grad_clip).clamp_(min=1.0)
        rate = config.lr_at(step)
        self.optimizer.step(rate, scale)
        for ema in self.emas:
            ema.update(self._model)
        whole = {name: torch.cat([found[name] for found in losses]) for name in losses[0]}
        measured = Measured(step + 1, rate, np.concatenate(times), whole, norm)
        if self._times.learns:
            t, everyone, _ = gathered([measured], int(parts[0].ids[0]), config.batch_size, self._ranks)
            self._times.learn(t[0], everyone["total"][0])
        return measured

    def _part(self, step: int, part: Part) -> tuple[np.ndarray, dict[str, Tensor]]:
        seed, device = self._config.seed, self._device
        # The model's own randomness is seeded anew for every part, by its first sample.
        word = int(draws.words(seed, draws.DOMAIN_MODEL, step, part.ids[:1])[0])
        torch.default_generator.manual_seed(word)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(word)
        t, weights = self._times.draw(seed, step, part.ids)
        losses = self._objective(
            self._network, part.x0, torch.from_numpy(t).to(device), seed=seed,
            sample_ids=torch.from_numpy(part.ids).to(device), draw=step, cond=_cond(part),
        )  # fmt: skip
        total = losses.total
        weighted = total if weights is None else total * torch.from_numpy(weights).to(total)
        # Several processes' gradients are averaged, and the sum is wanted.
        (weighted.sum() * (self._ranks.size / self._config.batch_size)).backward()
        found = {"total": total.detach()}
        if losses.mse is not total:
            found["mse"] = losses.mse.detach()
        if losses.vlb is not None:
            found["vlb"] = losses.vlb.detach()
        return t, found


def gathered(
    measured: Sequence[Measured], start: int, batch_size: int, ranks: Ranks
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """(t [n, batch_size] int64, name -> losses [n, batch_size], norms [n]) of n steps and all processes.

    Args:
        start: the place in the batch of this process's first sample.
    """
    norms = torch.stack([m.norm for m in measured])
    t = torch.from_numpy(np.stack([m.t for m in measured])).to(norms.device)
    losses = {
        name: ranks.gather(torch.stack([m.losses[name] for m in measured]), start, batch_size).cpu().numpy()
        for name in measured[0].losses
    }
    return ranks.gather(t, start, batch_size).cpu().numpy(), losses, norms.cpu().numpy()


def _cond(part: Part) -> dict[str, Tensor]:
    return {} if part.labels is None else {"labels": part.labels}
