"""The training loop: steps, a log, pictures, averaged weights, and checkpoints that a kill cannot spoil."""

from __future__ import annotations

import copy
import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.nn import EMA
from fastdiff.pictures import save_curve, save_grid
from fastdiff.train.augment import shape_after
from fastdiff.train.checkpoint import checkpoint_path, last_whole, prune, restore, save_checkpoint
from fastdiff.train.config import TrainConfig
from fastdiff.train.data import ImageData
from fastdiff.train.feed import Feed, cut
from fastdiff.train.log import QUARTILES, StepLog, records
from fastdiff.train.objective import Objective
from fastdiff.train.ranks import Ranks
from fastdiff.train.rundir import RunDir
from fastdiff.train.step import Measured, Stepper, Times, gathered
from fastdiff.train.stop import STATUS, Stop, Stopped
from fastdiff.train.times import uniform_times

_LAST_LOSSES = 100  # `TrainResult.loss` is their mean


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        steps: steps done, resumed ones included.
        loss: mean of the last 100 steps' losses.
        seconds: time spent in steps, resumed ones included; samples, pictures and checkpoints not counted.
        samples_per_s: training samples per second of this call; nan if it had nothing left to do.
        waited: the seconds of this call in which a step waited for its data.
        model_path: the folder of the averaged model, or None for a model without `save_pretrained`.
    """

    steps: int
    loss: float
    seconds: float
    samples_per_s: float
    waited: float
    model_path: Path | None


class Trainer:
    """Trains `model` on `data` by `objective`, and writes all that a run leaves into one folder:

        run.json                          what the run is: configuration, objective, data, network
        log.jsonl                         a line for each step: step, loss, loss_q1 .. loss_q4 (of the
                                          quarters of the chain), lr, grad_norm, samples_per_s, and mse
                                          and vlb where they are not the loss itself
        loss.png                          its curves
        samples/step-00001000.png         grids of `sample_fn`
        checkpoints/step-00001000.safetensors
        model/                            the averaged model with its diffusion settings, at the end
        model-ema-0.9999/                 the same for each further decay

    The same arguments give the same weights bit for bit on the same device with the same number of threads
    (on a GPU, as far as torch's operations are deterministic there), and so does a run that was killed at any
    moment and resumed.

    Under `torchrun`, or wherever torch.distributed is initialised, the processes train together: each
    computes its part of every batch of `config.batch_size` samples, and rank 0 alone writes. Noise and times
    belong to the sample, so losses are those of one process but for the order of sums, and a run may be
    resumed by another number of processes. `out_dir` must be a folder that all of them see.

    Args:
        model: an `fd.UNet` or any module model(x, t[, labels=]); trained in place, on the device it is on.
            Its initial weights belong to the run (rank 0's, where there are several processes).
        objective: the loss.
        data: from `load_data`, which takes folders, files, arrays, torch Datasets and iterables. If it has
            labels, the model is called with `labels` [B] int64, -1 where dropped; use
            dataclasses.replace(data, labels=None) for a model without classes.
        config: the numbers.
        out_dir: the run's folder; made if it is not there.
        resume: go on with the run in `out_dir` from its last checkpoint. False: `out_dir` must hold no run.
        sample_fn: sample_fn(averaged_model) -> images [n, C, H, W] in [-1, 1], for the sample grids; None: no
            grids.
        about: more to store with the model (a command, a licence); the data's attribution, seed, steps and
            seconds are there in any case.
        times: what chooses the times; None: uniform.

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
        times: Times | None = None,
    ) -> None:
        for name, value, kind in (("model", model, nn.Module), ("objective", objective, Objective),
                                  ("data", data, ImageData), ("config", config, TrainConfig)):  # fmt: skip
            if not isinstance(value, kind):
                raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}")
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("`model` must have parameters to train, got none that require a gradient")
        _check_classes(model, data)
        self.model, self.objective, self.data, self.config = model, objective, data, config
        self._shape = shape_after(data.shape, config)
        self._sample_fn, self._about = sample_fn, dict(about or {})
        self._device = parameters[0].device
        self._ranks = Ranks.join(self._device)
        self._cuts = cut(config.batch_size, config.accumulate, self._ranks.rank, self._ranks.size)
        if not all(len(ids) for ids in cut(config.batch_size, config.accumulate * self._ranks.size)):
            raise ValueError(
                f"`batch_size` must give every part of every process a sample, got {config.batch_size} for"
                f" {self._ranks.size} processes of {config.accumulate} parts"
            )
        self._times = uniform_times(len(objective.schedule)) if times is None else times
        self._ranks.share(model)
        self._stepper = Stepper(model, objective, config, self._ranks, self._times)
        self.step, self.seconds = 0, 0.0
        self._averaged: nn.Module | None = None
        self._files = RunDir(out_dir)
        self._claim(resume)
        self._start()

    def run(self, progress: bool = True, dtype: torch.dtype | None = None) -> TrainResult:
        """Train up to `config.steps` steps and write everything that the run leaves.

        Args:
            progress: show a bar with the loss and the samples per second, on stderr.
            dtype: of the weights in `model/`; None: the model's own.
        Raises:
            FloatingPointError: a loss or a gradient is not finite; the last checkpoint is from before it.
            OSError: a checkpoint could not be written; those before it are whole.
            ConnectionError: another process of this run ended.
            Stopped: (a SystemExit, status 143) SIGTERM came; the step was finished, or with several processes
                those up to the next look at the loss, and there is a checkpoint of it. After the last look
                SIGTERM ends the process as ever, once that checkpoint is written.
        """
        from tqdm import tqdm

        config, first, earlier, was_training = self.config, self.step, self.seconds, self.model.training
        log = StepLog(self._files.log, first, self._ranks.first)
        show = progress and self._ranks.first
        bar = tqdm(total=config.steps, initial=first, unit="step", disable=not show, dynamic_ncols=True)
        feed = Feed(self.data, config, self._cuts, self._device, first)
        with Stop() as stop:
            try:
                # The model's own randomness (dropout) is seeded anew for every step; the caller's comes back.
                devices = [self._device] if self._device.type == "cuda" else []
                with torch.random.fork_rng(devices):
                    self._loop(log, bar, feed, stop)
                self._draw_curve(log)
            finally:
                feed.close()
                bar.close()
                log.close()
                self.model.train(was_training)
        savable = hasattr(self.model, "save_pretrained")
        if savable and self._ranks.first:
            for decay in config.ema_decays:
                self.save_pretrained(self._files.model_of(decay, config), dtype, decay)
        losses = [record["loss"] for record in log.records[-_LAST_LOSSES:]]
        samples = (self.step - first) * config.batch_size
        return TrainResult(
            steps=self.step,
            loss=math.fsum(losses) / len(losses) if losses else math.nan,
            seconds=self.seconds,
            samples_per_s=samples / (self.seconds - earlier) if samples else math.nan,
            waited=feed.waited,
            model_path=self._files.model if savable else None,
        )

    @property
    def ema(self) -> EMA:
        """The averaged weights that sample: those of the first decay."""
        return self._stepper.emas[0]

    def averaged_model(self, decay: float | None = None) -> nn.Module:
        """A copy of the model with averaged weights, in eval mode; every call refreshes the same one.

        Args:
            decay: which average, one of the configuration's; None: the first.
        """
        # Tensors born in a caller's inference mode could not be refreshed outside it.
        with torch.inference_mode(False):
            if self._averaged is None:
                self._averaged = copy.deepcopy(self.model).requires_grad_(False)
            self._ema_of(decay).copy_to(self._averaged)
        return self._averaged.eval()

    def save_pretrained(
        self, path: str | Path, dtype: torch.dtype | None = None, decay: float | None = None
    ) -> None:
        """Write the averaged model with its diffusion settings and its origin, for `from_pretrained` to read.

        diffusion: schedule, prediction, variance, shape, clip, the arguments of a Sampler. about: data (the
        attribution), class_names, seed, steps, training_seconds, and what the trainer was given.

        Args:
            path: the model's folder.
            dtype: of the stored weights; None: the model's own.
            decay: which average; None: the first.
        """
        objective = self.objective.to_config()
        diffusion = {
            **{key: objective[key] for key in ("schedule", "prediction", "variance")},
            "shape": list(self._shape),
            "clip": [-1.0, 1.0],
        }
        about = {
            "data": self.data.attribution,
            "class_names": list(self.data.class_names),
            "seed": self.config.seed,
            "steps": self.step,
            "training_seconds": round(self.seconds, 1),
            "ema_decay": self._ema_of(decay).decay,
            **self._about,
        }
        model: Any = self.averaged_model(decay)
        model.save_pretrained(path, diffusion=diffusion, about=about, dtype=dtype)

    def _ema_of(self, decay: float | None) -> EMA:
        for ema in self._stepper.emas:
            if decay in (None, ema.decay):
                return ema
        raise ValueError(f"`decay` must be one of {self.config.ema_decays}, got {decay!r}")

    def _claim(self, resume: bool) -> None:
        """Make the folder this run's, by rank 0; the others must be about the same run."""
        described = self._files.describe(
            self.model, self.objective, self.data, self.config, self._times.to_config()
        )

        def claimed() -> Any:
            self._files.claim(described, self.config, resume)
            return described

        self._files.check_same(self._ranks.by_first(claimed), described)

    def _start(self) -> None:
        """Take up the last whole checkpoint, or write the one of step 0."""
        path = self._ranks.by_first(lambda: last_whole(self._files.checkpoints))
        if path is None:
            # The initial weights come from outside: a run killed before its next checkpoint needs them again.
            self._save_checkpoint()
            return
        stepper = self._stepper
        self.step, self.seconds = restore(path, self.model, stepper.emas, stepper.optimizer, self._times)

    def _loop(self, log: StepLog, bar: Any, feed: Feed, stop: Stop) -> None:
        config = self.config
        if self.step and self._due(config.sample_every) and not self._files.sample(self.step).exists():
            self._sample()  # the kill came between the checkpoint and its grid
        pending: list[Measured] = []
        clock = time.perf_counter()
        while self.step < config.steps:
            pending.append(self._stepper(self.step, feed.next_parts()))
            self.step += 1
            bar.update()
            checkpoint, sample = self._due(config.checkpoint_every), self._due(config.sample_every)
            look = checkpoint or sample or self._due(config.log_every)
            if not (look or (stop.asked and self._ranks.size == 1)):
                continue
            # The only place that waits for the device.
            t, losses, norms = gathered(pending, int(self._cuts[0][0]), config.batch_size, self._ranks)
            elapsed = time.perf_counter() - clock
            self.seconds += elapsed
            speed = round(len(pending) * config.batch_size / elapsed, 1)
            log.write(records(pending, t, losses, norms, len(self.objective.schedule), speed))
            loss = f"{log.records[-1]['loss']:.4f}"
            bar.set_postfix(loss=loss, samples_per_s=f"{speed:.0f}", refresh=False)
            pending.clear()
            # Several processes end after the same step: those in the next would wait for the others.
            stops = self._ranks.any(stop.asked)
            if checkpoint or stops:
                log.sync()
                self._save_checkpoint()
                self._draw_curve(log)
            if stops:
                self._say_stopped()
                # torchrun kills all as soon as one has ended: none may before rank 0 has written.
                self._ranks.meet()
                raise Stopped(STATUS)
            if sample:
                self._sample()
            clock = time.perf_counter()

    def _say_stopped(self) -> None:
        if self._ranks.first:
            where, steps = shlex.quote(str(self._files.root)), self.config.steps
            print(
                f"\nstopped by SIGTERM after step {self.step} of {steps}; the same run goes on from"
                f" its checkpoint in {where} with --resume, in Python with resume=True",
                file=sys.stderr,
            )

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.steps or (every is not None and self.step % every == 0)

    def _save_checkpoint(self) -> None:
        if self._ranks.first:
            path, stepper = checkpoint_path(self._files.checkpoints, self.step), self._stepper
            save_checkpoint(
                path, self.model, stepper.emas, stepper.optimizer, self._times, self.step, self.seconds
            )
            prune(self._files.checkpoints, self.config.keep_checkpoints)

    def _sample(self) -> None:
        if self._sample_fn is not None and self._ranks.first:
            with torch.inference_mode():
                images = self._sample_fn(self.averaged_model())
            save_grid(images, self._files.sample(self.step))

    def _draw_curve(self, log: StepLog) -> None:
        if log.records and self._ranks.first:
            steps, losses = ([record[key] for record in log.records] for key in ("step", "loss"))
            quarters = {key: [record.get(key) for record in log.records] for key in QUARTILES}
            save_curve(losses, self._files.curve, steps, title="training loss", parts=quarters)


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
