"""How long and how fast to train: the numbers of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LR_SCHEDULES = ("constant", "cosine")

# They change what a run reports and keeps, not what it computes, so a resumed run may change them.
_REPORTING = ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints")


@dataclass(frozen=True)
class TrainConfig:
    """The numbers of a training run.

    Attributes:
        steps: optimisation steps, >= 1.
        batch_size: samples in each, >= 1; may exceed the data set.
        lr: AdamW's learning rate after the warm-up, > 0.
        weight_decay: AdamW's decoupled decay, >= 0.
        warmup: steps over which the rate rises linearly from lr / warmup; 0: none.
        lr_schedule: "constant", or "cosine": the rate falls to 0 at `steps` along half a cosine.
        ema_decay: of the averaged weights, in [0, 1); they are what samples and is saved.
        label_dropout: probability with which a sample's label is replaced by -1 (no class), in [0, 1];
            guidance needs it above 0. Without labels it has no effect.
        grad_clip: the gradient's largest norm, > 0; None: not clipped.
        seed: of the data's order, times, noise and dropout; a whole number of 64 bits.
        log_every: steps between two looks at the loss. Every step is logged; fewer looks wait less for a GPU.
        sample_every: steps between two sample grids; None: only at the end.
        checkpoint_every: steps between two checkpoints, >= 1; there is one at the end as well.
        keep_checkpoints: how many of the last are kept, >= 1.
    Raises:
        ValueError: a number breaks its contract; the message names it.
    """

    steps: int = 10_000
    batch_size: int = 128
    lr: float = 2e-4
    weight_decay: float = 0.0
    warmup: int = 500
    lr_schedule: str = "constant"
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    grad_clip: float | None = 1.0
    seed: int = 0
    log_every: int = 10
    sample_every: int | None = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("log_every", 1),
                            ("checkpoint_every", 1), ("keep_checkpoints", 1)):  # fmt: skip
            _whole(name, getattr(self, name), least)
        if self.sample_every is not None:
            _whole("sample_every", self.sample_every, 1)
        _whole("seed", self.seed, -(2**63))
        if self.seed >= 2**64:
            raise ValueError(f"`seed` must have at most 64 bits, got {self.seed!r}")
        _real("lr", self.lr, lambda v: v > 0, "a positive number")
        _real("weight_decay", self.weight_decay, lambda v: v >= 0, "a number of at least 0")
        _real("ema_decay", self.ema_decay, lambda v: 0 <= v < 1, "a number in [0, 1)")
        _real("label_dropout", self.label_dropout, lambda v: 0 <= v <= 1, "a probability in [0, 1]")
        if self.grad_clip is not None:
            _real("grad_clip", self.grad_clip, lambda v: v > 0, "a positive number or None")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"`lr_schedule` must be one of {', '.join(LR_SCHEDULES)}, got {self.lr_schedule!r}"
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0 <= step < steps.

        lr * (step + 1) / warmup while it warms up; then lr, or for cosine lr * (1 + cos(pi p)) / 2 with
        p = (step - warmup) / (steps - warmup).
        """
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def identity(self) -> dict[str, Any]:
        """The numbers that decide the result of every step, which a resumed run must share.

        The number of steps is one of them only where the learning rate depends on it.
        """
        fixed = {key: value for key, value in asdict(self).items() if key not in _REPORTING}
        if self.lr_schedule == "constant":
            del fixed["steps"]
        return fixed


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}")


def _real(name: str, value: Any, holds: Any, wanted: str) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not holds(value)
    ):
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}")
