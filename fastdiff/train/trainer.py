"""The training loop: AdamW, averaged weights, a log, pictures, and checkpoints that a kill cannot spoil."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.nn import EMA
from fastdiff.pictures import save_curve, save_grid
from fastdiff.train import draws
from fastdiff.train.checkpoint import checkpoint_path, checkpoints, load_checkpoint, prune, save_checkpoint
from fastdiff.train.config import TrainConfig
from fastdiff.train.data import ImageData
from fastdiff.train.log import StepLog
from fastdiff.train.objective import Objective
from fastdiff.train.rundir import RunDir

# Data sets up to this size move to the model's device at once; larger ones go batch by batch.
_RESIDENT_BYTES = 4 << 30
_LAST_LOSSES = 100  # `TrainResult.loss` is their mean


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: steps done, resumed ones included.
        loss: mean of the last 100 steps' losses.
        seconds: time spent in steps, resumed ones included; samples, pictures and checkpoints not counted.
        samples_per_s: training samples per second of this call; nan if it had nothing left to do.
        model_path: the folder of the averaged model, or None for a model without `save_pretrained`.
    """

    steps: int
    loss: float
    seconds: float
    samples_per_s: float
    model_path: Path | None


class Trainer:
    """Trains `model` on `data` by `objective`, and writes all that a run leaves into one folder:

        run.json                          what the run is: configuration, objective, data, network
        log.jsonl                         a line for each step: step, loss, lr, grad_norm, samples_per_s
        loss.png                          its curve
        samples/step-00001000.png         grids of `sample_fn`
        checkpoints/step-00001000.safetensors
        model/                            the averaged model with its diffusion settings, at the end

    The same arguments give the same weights bit for bit on the same device with the same number of threads
    (on a GPU, as far as torch's operations are deterministic there), and so does a run that was killed at any
    moment and resumed.

    Args:
        model: an `fd.UNet` or any module model(x, t[, labels=]); trained in place, on the device it is on.
            Its initial weights belong to the run.
        objective: the loss.
        data: from `load_data`. If it has labels, the model is called with `labels` [B] int64, -1 where
            dropped; use dataclasses.replace(data, labels=None) for a model without classes.
        config: the numbers.
        out_dir: the run's folder; made if it is not there.
        resume: go on with the run in `out_dir` from its last checkpoint. False: `out_dir` must hold no run.
        sample_fn: sample_fn(averaged_model) -> images [n, C, H, W] in [-1, 1], for the sample grids; None: no
            grids.
        about: more to store with the model (a command, a licence); the data's attribution, seed, steps and
            seconds are there in any case.

    Raises:
        TypeError, ValueError: an argument breaks its contract; `out_dir` holds a run and `resume` is False,
            or holds none and it is True, or the run in it differs in a field, which the message names. Before
            any training.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: ImageData,
        config: TrainConfig,
        out_dir: str | Path,
        *,
        resume: bool = False,
        sample_fn: Callable[[nn.Module], Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, kind in (("model", model, nn.Module), ("objective", objective, Objective),
                                  ("data", data, ImageData), ("config", config, TrainConfig)):  # fmt: skip
            if not isinstance(value, kind):
                raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}")
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("`model` must have parameters to train, got none that require a gradient")
        _check_classes(model, data)
        self.model, self.objective, self.data, self.config = model, objective, data, config
        self._sample_fn, self._about = sample_fn, dict(about or {})
        self._device = self._parameters[0].device
        # One fused pass over all parameters, on the CPU as on a GPU.
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self._device.type in ("cpu", "cuda"),
        )
        self.ema = EMA(model, config.ema_decay)
        self.step, self.seconds = 0, 0.0
        self._averaged: nn.Module | None = None
        self._files = RunDir(out_dir)
        self._files.claim(model, objective, data, config, resume)
        self._start()

    def run(self, progress: bool = True) -> TrainResult:
        """Train up to `config.steps` steps and write everything that the run leaves.

        Args:
            progress: show a bar with the loss and the samples per second, on stderr.
        Raises:
            FloatingPointError: a loss or a gradient is not finite; the last checkpoint is from before it.
        """
        from tqdm import tqdm

        config, first, earlier, was_training = self.config, self.step, self.seconds, self.model.training
        log = StepLog(self._files.log, first)
        bar = tqdm(total=config.steps, initial=first, unit="step", disable=not progress, dynamic_ncols=True)
        try:
            # The model's own randomness (dropout) is seeded anew for every step; the caller's is put back.
            with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                self._loop(log, bar)
            self._draw_curve(log)
        finally:
            bar.close()
            log.close()
            self.model.train(was_training)
        savable = hasattr(self.model, "save_pretrained")
        if savable:
            self.save_pretrained(self._files.model)
        losses = [record["loss"] for record in log.records[-_LAST_LOSSES:]]
        samples = (self.step - first) * config.batch_size
        return TrainResult(
            steps=self.step,
            loss=math.fsum(losses) / len(losses) if losses else math.nan,
            seconds=self.seconds,
            samples_per_s=samples / (self.seconds - earlier) if samples else math.nan,
            model_path=self._files.model if savable else None,
        )

    def averaged_model(self) -> nn.Module:
        """A copy of the model with the averaged weights, in eval mode; every call refreshes the same one."""
        # Tensors born in a caller's inference mode could not be refreshed outside it.
        with torch.inference_mode(False):
            if self._averaged is None:
                self._averaged = copy.deepcopy(self.model).requires_grad_(False)
            self.ema.copy_to(self._averaged)
        return self._averaged.eval()

    def save_pretrained(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the averaged model with its diffusion settings and its origin, for `from_pretrained` to read.

        diffusion: schedule, prediction, variance, shape, clip, the arguments of a Sampler. about: data (the
        attribution), class_names, seed, steps, training_seconds, and what the trainer was given.

        Args:
            path: the model's folder.
            dtype: of the stored weights; None: the model's own.
        """
        objective = self.objective.to_config()
        diffusion = {
            **{key: objective[key] for key in ("schedule", "prediction", "variance")},
            "shape": list(self.data.shape),
            "clip": [-1.0, 1.0],
        }
        about = {
            "data": self.data.attribution,
            "class_names": list(self.data.class_names),
            "seed": self.config.seed,
            "steps": self.step,
            "training_seconds": round(self.seconds, 1),
            **self._about,
        }
        model: Any = self.averaged_model()
        model.save_pretrained(path, diffusion=diffusion, about=about, dtype=dtype)

    def _start(self) -> None:
        """Take up the last checkpoint, or write the one of step 0."""
        last = checkpoints(self._files.checkpoints)[-1:]
        if not last:
            # The initial weights come from outside: a run killed before its next checkpoint needs them again.
            self._save_checkpoint()
            return
        self.step, self.seconds = load_checkpoint(last[0], self.model, self.ema, self._optimizer)

    def _loop(self, log: StepLog, bar: Any) -> None:
        config, data = self.config, self.data
        if self._device.type != "cpu" and data.images.nbytes <= _RESIDENT_BYTES:
            data = data.to(self._device)
        batches = draws.Batches(len(data), config.batch_size, config.seed)
        if self.step and self._due(config.sample_every) and not self._files.sample(self.step).exists():
            self._sample()  # the kill came between the checkpoint and its grid
        pending: list[tuple[int, float, Tensor, Tensor]] = []
        clock = time.perf_counter()
        while self.step < config.steps:
            rate = config.lr_at(self.step)
            loss, norm = self._train_step(data, batches, rate)
            self.step += 1
            bar.update()
            pending.append((self.step, rate, loss, norm))
            checkpoint, sample = self._due(config.checkpoint_every), self._due(config.sample_every)
            if not (checkpoint or sample or self._due(config.log_every)):
                continue
            # The only place that waits for the device.
            values = torch.stack([torch.stack(item[2:]) for item in pending]).tolist()
            elapsed = time.perf_counter() - clock
            self.seconds += elapsed
            speed = round(len(pending) * config.batch_size / elapsed, 1)
            log.write([_record(item, value, speed) for item, value in zip(pending, values, strict=True)])
            bar.set_postfix(loss=f"{values[-1][0]:.4f}", samples_per_s=f"{speed:.0f}", refresh=False)
            pending.clear()
            if checkpoint:
                log.sync()
                self._save_checkpoint()
                self._draw_curve(log)
            if sample:
                self._sample()
            clock = time.perf_counter()

    def _train_step(self, data: ImageData, batches: draws.Batches, rate: float) -> tuple[Tensor, Tensor]:
        config, step, device = self.config, self.step, self._device
        ids = np.arange(config.batch_size)
        self._seed_model(step)
        x0, labels = data.batch(torch.from_numpy(batches.index(step)).to(data.images.device))
        t = torch.from_numpy(draws.times(config.seed, step, ids, len(self.objective.schedule))).to(device)
        cond = {}
        if labels is not None:
            drop = torch.from_numpy(draws.dropped(config.seed, step, ids, config.label_dropout))
            cond["labels"] = labels.masked_fill(drop.to(labels.device), -1).to(device)
        losses = self.objective(self.model.train(), x0.to(device), t, seed=config.seed, draw=step, cond=cond)
        loss = losses.total.mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if config.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, config.grad_clip, norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.ema.update(self.model)
        return loss.detach(), norm

    def _seed_model(self, step: int) -> None:
        word = int(draws.words(self.config.seed, draws.DOMAIN_MODEL, step, [0])[0])
        torch.default_generator.manual_seed(word)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(word)

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.steps or (every is not None and self.step % every == 0)

    def _save_checkpoint(self) -> None:
        path = checkpoint_path(self._files.checkpoints, self.step)
        save_checkpoint(path, self.model, self.ema, self._optimizer, self.step, self.seconds)
        prune(self._files.checkpoints, self.config.keep_checkpoints)

    def _sample(self) -> None:
        if self._sample_fn is not None:
            with torch.inference_mode():
                images = self._sample_fn(self.averaged_model())
            save_grid(images, self._files.sample(self.step))

    def _draw_curve(self, log: StepLog) -> None:
        if log.records:
            losses, steps = ([record[key] for record in log.records] for key in ("loss", "step"))
            save_curve(losses, self._files.curve, steps, title="training loss")


def _record(item: tuple[int, float, Tensor, Tensor], value: list[float], speed: float) -> dict[str, Any]:
    (step, rate, *_), (loss, norm) = item, value
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"the loss was {loss} and the gradient's norm {norm} at step {step}: training diverged; lower"
            " `lr` or `grad_clip`, lengthen `warmup`, or look for a broken image in the data"
        )
    return {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "samples_per_s": speed}


def _check_classes(model: nn.Module, data: ImageData) -> None:
    """An `fd.UNet` says how many classes it knows; other modules are called as the data has it."""
    known = getattr(model, "num_classes", data.num_classes) or None
    if known == data.num_classes or (known and data.num_classes and known > data.num_classes):
        return
    if data.num_classes is None:
        remedy = "build it with num_classes=0, or give labels"
    else:
        remedy = (
            f"build it with num_classes={data.num_classes}, or drop the labels with"
            " dataclasses.replace(data, labels=None, class_names=())"
        )
    raise ValueError(
        f"`model` knows {known or 'no'} classes and `data` has {data.num_classes or 'none'}; {remedy}"
    )
