"""Training: a step of the digits U-Net, and the objective alone, against two recipes over the same network.

The recipes are written out here from their projects' formulas; neither project's code is run but for
diffusers' scheduler and average, which its own training example uses:

- "denoising-diffusion-pytorch": stored noise, target and squares; Adam, clipping to 1, an average every tenth
  step (which a median of single steps does not see), the loss read at every step.
- "diffusers": DDPMScheduler.add_noise and get_velocity, mse_loss; AdamW, clipping to 1, EMAModel.
- "fastdiff": the step that `fastdiff train` takes: fd.Objective, AdamW, clipping to 1, an average.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff as fd
from benchmarks.bench_memory import peak_bytes
from benchmarks.record import Comparison, Quantity, compare
from fastdiff.kernels import _torch_ops, cpu
from fastdiff.train import TrainConfig, draws, load_data
from fastdiff.train.feed import Part
from fastdiff.train.ranks import Ranks
from fastdiff.train.step import Stepper
from fastdiff.train.times import uniform_times

T = 1000
BATCH = 32
SCHEDULE = fd.NoiseSchedule.linear(T)
LARGE = (32, 4, 512, 512)  # a batch of 128 MB for the objective alone
RECIPES = ("denoising-diffusion-pytorch", "diffusers", "fastdiff")
GUARD_MEMORY = "tests/test_bench_train.py::test_the_objective_never_stores_noise_or_target"
GUARD_SPEED = "tests/test_bench_train.py::test_the_objective_is_faster_than_either_recipe"
Loss = Callable[[Any, Tensor, Tensor, int, "Tensor | None"], Tensor]


def losses(prediction: str = "v") -> dict[str, Loss]:
    """Each recipe's loss(model, x0, t, step, noise) -> mean; noise None: drawn by the recipe itself."""
    scheduler = DDPMScheduler(num_train_timesteps=T, beta_schedule="linear")
    alpha, sigma = (torch.from_numpy(a.copy()).float() for a in (SCHEDULE.alpha, SCHEDULE.sigma))
    weight = torch.ones(T)
    objective = fd.Objective(SCHEDULE, prediction)

    def at(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return values.gather(-1, t).reshape(len(t), *[1] * (x.ndim - 1))

    def pytorch(model: Any, x0: Tensor, t: Tensor, step: int, noise: Tensor | None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        out = model(at(alpha, t, x0) * x0 + at(sigma, t, x0) * noise, t)
        goal = noise if prediction == "eps" else at(alpha, t, x0) * noise - at(sigma, t, x0) * x0
        each = F.mse_loss(out, goal, reduction="none").flatten(1).mean(1)
        return (each * at(weight, t, each)).mean()

    def diffusers(model: Any, x0: Tensor, t: Tensor, step: int, noise: Tensor | None) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        out = model(scheduler.add_noise(x0, noise, t), t)
        goal = noise if prediction == "eps" else scheduler.get_velocity(x0, noise, t)
        return F.mse_loss(out, goal)

    def ours(model: Any, x0: Tensor, t: Tensor, step: int, noise: Tensor | None) -> Tensor:
        return objective(model, x0, t, noise, draw=step).total.mean()

    return dict(zip(RECIPES, (pytorch, diffusers, ours), strict=True))


class Recipe:
    """Another project's training on its own copy of the network; a call is a step."""

    def __init__(self, recipe: str, model: nn.Module, loss: Loss, compiled: bool = False) -> None:
        self.recipe, self.loss, self.model, self.step = recipe, loss, copy.deepcopy(model).train(), 0
        self.run = torch.compile(self.model) if compiled else self.model
        self.parameters = list(self.model.parameters())
        self.average: Any
        if recipe == "diffusers":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                self.parameters, lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6
            )
            self.average = EMAModel(self.parameters, decay=0.9999, use_ema_warmup=True, power=0.75)
        else:
            self.optimizer = torch.optim.Adam(self.parameters, lr=1e-4, betas=(0.9, 0.99))
            self.average = [p.detach().clone() for p in self.parameters]
        self.x0, self.labels = load_data("digits").all()

    def __call__(self) -> None:
        x0, labels = (whole[batch_of(self.step, len(whole))] for whole in (self.x0, self.labels))
        t = torch.from_numpy(draws.times(0, self.step, range(BATCH), T))
        loss = self.loss(lambda x, s: self.run(x, s, labels), x0, t, self.step, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.recipe == "diffusers":
            self.average.step(self.parameters)
        else:
            loss.item()
            if self.step % 10 == 0:
                for mean, parameter in zip(self.average, self.parameters, strict=True):
                    mean.lerp_(parameter.detach(), 1 - 0.995)


class Ours:
    """`fastdiff train`'s own step on its own copy of the network; a call is a step."""

    def __init__(self, model: nn.Module, compiled: bool = False) -> None:
        config = TrainConfig(batch_size=BATCH, lr=1e-4, warmup=0, ema_decay=0.9999, compile=compiled)
        self.model, self.step = copy.deepcopy(model), 0
        self.stepper = Stepper(self.model, fd.Objective(SCHEDULE, "v"), config, Ranks(), uniform_times(T))
        self.x0, self.labels = load_data("digits").all()

    def __call__(self) -> None:
        where = batch_of(self.step, len(self.x0))
        self.stepper(self.step, [Part(np.arange(BATCH), self.x0[where], self.labels[where])])
        self.step += 1


def batch_of(step: int, samples: int) -> slice:
    """Where the batch of a step lies in the data."""
    first = step * BATCH % (samples - BATCH)
    return slice(first, first + BATCH)


def step_variants(compiled: bool) -> dict[str, Callable[[], Any]]:
    """A step of training by each recipe; with `compiled`, diffusers' and ours by torch.compile as well."""
    model, made = fd.UNet.from_pretrained("digits"), losses()
    variants: dict[str, Callable[[], Any]] = {
        **{name: Recipe(name, model, made[name]) for name in RECIPES[:2]},
        "fastdiff": Ours(model),
    }
    if compiled:
        variants["diffusers, torch.compile"] = Recipe("diffusers", model, made["diffusers"], compiled=True)
        variants["fastdiff, torch.compile"] = Ours(model, compiled=True)
    return variants


def step_speed(compiled: bool = True, rounds: int = 31) -> Comparison:
    """Whole steps of training, compared with diffusers'."""
    check()
    return compare(
        "train", f"a step of digits, batch {BATCH}", step_variants(compiled), "diffusers", rounds=rounds,
        batch=BATCH, prediction="v",
    )  # fmt: skip


class Ready:
    """A network whose output exists before the loss starts, and so is no part of the count."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.out = torch.zeros(shape, requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out


def objective_speed(shape: tuple[int, ...] = (16, 3, 250, 250), rounds: int = 15) -> Comparison:
    """The loss and its gradient with a network that costs nothing: x_t, noise, target, squares, gradient."""
    check()
    _torch_ops.operators(wait=True)
    x0, t, model = torch.zeros(shape), torch.arange(shape[0]), Ready(shape)

    def variant(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            model.out.grad = None
            loss(model, x0, t, 0, None).backward()

        return run

    variants = {name: variant(loss) for name, loss in losses("eps").items()}
    name = f"objective and gradient, {math.prod(shape) / 1e6:g} million elements"
    about = {"guard": GUARD_SPEED, "shape": list(shape)}
    return compare("train", name, variants, "diffusers", rounds=rounds, **about)


def batches_held(recipe: str, shape: tuple[int, ...] = LARGE) -> float:
    """Peak memory of a loss and its gradient, in batches; x0, the network's output and gradient are there."""
    cpu.library(wait=True)
    x0, t, model, loss = torch.ones(shape), torch.arange(shape[0]), Ready(shape), losses("eps")[recipe]
    model.out.grad = torch.ones(shape)
    return peak_bytes(lambda: loss(model, x0, t, 0, None).backward()) / (4 * math.prod(shape))


def check() -> None:
    """Hold the recipes against each other on the same noise: no figure for different things.

    Raises:
        AssertionError: they differ by more than float32's rounding of a mean and of diffusers' tables.
    """
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 8, 3, 8, 8, generator=g)
    t = torch.arange(8) * 140
    for prediction in ("eps", "v"):
        found = [float(loss(lambda x, s: 0.9 * x, x0, t, 0, noise)) for loss in losses(prediction).values()]
        for value in found[1:]:
            # alpha_bar is a product of up to 1000 float32 factors in diffusers
            assert abs(value / found[0] - 1) <= 1000 * 2**-24, found


def bench_step(measured):
    measured(step_speed(), step_variants(compiled=False)["fastdiff"])


def bench_objective(keep, benchmark):
    keep(benchmark.pedantic(objective_speed, rounds=1))


@pytest.mark.parametrize("recipe", RECIPES)
def bench_batches_held(recipe, benchmark, keep):
    batches_held(recipe, (2, 3, 8, 8))
    held = benchmark.pedantic(batches_held, args=(recipe,), rounds=1)
    name = f"{recipe}: peak of the objective and its gradient"
    guard = GUARD_MEMORY if recipe == "fastdiff" else ""
    keep(Quantity("train", name, held, "batches", None, {"shape": list(LARGE)}, guard))
