"""How long and how fast to train: the numbers of a run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LR_SCHEDULES = ("constant", "cosine")

# They change what a run reports and keeps, or how the work is done, not what is computed, so a resumed run
# may change them. (Another cut of the batch, or a compiled network, differs in its last bits.)
_FREE = (
    "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "accumulate", "compile", "prefetch",
)  # fmt: skip


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
        ema_decay: of the averaged weights, in [0, 1), or several, each of which is kept and saved; the first
            is the one that samples.
        label_dropout: probability with which a sample's label is replaced by -1 (no class), in [0, 1];
            guidance needs it above 0. Without labels it has no effect.
        grad_clip: the gradient's largest norm, > 0; None: not clipped.
        accumulate: parts into which each process cuts its share of a batch, >= 1, to be computed one after
            the other: memory for one part, the gradient of all.
        amp: "bf16": matrix products and convolutions in bfloat16 by autocast; weights, gradients, moments,
            averages and the state x_t stay float32. None: everything in the weights' precision.
        compile: whether the network goes through torch.compile; without a compiler it runs eagerly, with a
            warning.
        flip: whether half of the images, chosen by (seed, step, sample), are mirrored left to right.
        crop: height and width of a window of each image, chosen likewise; None: whole images.
        seed: of the data's order, times, noise and dropout; a whole number of 64 bits.
        log_every: steps between two looks at the loss. Every step is logged; fewer looks wait less for a GPU.
        sample_every: steps between two sample grids; None: only at the end.
        checkpoint_every: steps between two checkpoints, >= 1; there is one at the end as well.
        keep_checkpoints: how many of the last are kept, >= 1.
        prefetch: steps whose batches are prepared ahead by a thread, >= 0; 0: no thread.
    Raises:
        ValueError: a number breaks its contract; the message names it.
    """

    steps: int = 10_000
    batch_size: int = 128
    lr: float = 2e-4
    weight_decay: float = 0.0
    warmup: int = 500
    lr_schedule: str = "constant"
    ema_decay: float | tuple[float, ...] = 0.999
    label_dropout: float = 0.1
    grad_clip: float | None = 1.0
    accumulate: int = 1
    amp: str | None = None
    compile: bool = False
    flip: bool = False
    crop: int | None = None
    seed: int = 0
    log_every: int = 10
    sample_every: int | None = 1000
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    prefetch: int = 2

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup", 0), ("log_every", 1),
                            ("checkpoint_every", 1), ("keep_checkpoints", 1), ("accumulate", 1),
                            ("prefetch", 0)):  # fmt: skip
            _whole(name, getattr(self, name), least)
        for name in ("sample_every", "crop"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in ("compile", "flip"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}")
        if self.amp not in (None, "bf16"):
            raise ValueError(f"`amp` must be 'bf16' or None, got {self.amp!r}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"`accumulate` must be at most the {self.batch_size} samples of a batch, got"
                f" {self.accumulate}"
            )
        _whole("seed", self.seed, -(2**63))
        if self.seed >= 2**64:
            raise ValueError(f"`seed` must have at most 64 bits, got {self.seed!r}")
        _real("lr", self.lr, lambda v: v > 0, "a positive number")
        _real("weight_decay", self.weight_decay, lambda v: v >= 0, "a number of at least 0")
        if not self.ema_decays or len(set(self.ema_decays)) < len(self.ema_decays):
            raise ValueError(
                f"`ema_decay` must be one decay or several different ones, got {self.ema_decay!r}"
            )
        for decay in self.ema_decays:
            _real("ema_decay", decay, lambda v: 0 <= v < 1, "a number in [0, 1), or several")
        _real("label_dropout", self.label_dropout, lambda v: 0 <= v <= 1, "a probability in [0, 1]")
        if self.grad_clip is not None:
            _real("grad_clip", self.grad_clip, lambda v: v > 0, "a positive number or None")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"`lr_schedule` must be one of {', '.join(LR_SCHEDULES)}, got {self.lr_schedule!r}"
            )

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """All decays, the one that samples first."""
        several = isinstance(self.ema_decay, tuple | list)
        return tuple(self.ema_decay) if several else (self.ema_decay,)  # type: ignore[arg-type, return-value]

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
        fixed = {key: value for key, value in asdict(self).items() if key not in _FREE}
        fixed["ema_decay"] = list(self.ema_decays)
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
