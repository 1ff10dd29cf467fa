"""One reverse step of a large state, noise drawn: the operator against diffusers, torch and torch.compile."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

import fastdiff as fd
from benchmarks.record import Comparison, compare
from fastdiff.kernels import cpu

SHAPE = (16, 3, 250, 250)  # 3 million elements
ROW, T = 500, 1000
NEEDED = 1.5  # times diffusers' speed, with a C++ compiler
GUARD = "tests/test_benchmarks.py::test_a_large_ddpm_step_is_faster_than_diffusers"


def schedulers() -> dict[str, Any]:
    """diffusers' own, set to the chain that `table` compiles."""
    common = {"num_train_timesteps": T, "beta_schedule": "linear", "clip_sample": True}
    made = {"ddpm": DDPMScheduler(**common, variance_type="fixed_small"), "ddim": DDIMScheduler(**common)}
    for scheduler in made.values():
        scheduler.set_timesteps(T)
    return made


@cache
def table(solver: str) -> fd.SamplingTable:
    """All steps of the linear chain, x0 clipped to [-1, 1]."""
    levels = fd.NoiseLevels.from_schedule(fd.NoiseSchedule.linear(T), range(T))
    return fd.compile_table(solver, levels, clip=(-1.0, 1.0))


def plain_step(solver: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The row's formula as a user would write it in torch, with torch's own noise."""
    row = table(solver)
    a, b = float(row.x0_from_x[ROW]), float(row.x0_from_out[ROW])
    from_x, from_x0, from_out, from_noise = (
        float(column.reshape(T, -1)[ROW, 0])
        for column in (row.from_state, row.from_x0, row.from_out, row.from_noise)
    )

    def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x0 = (a * x + b * out).clamp(-1, 1)
        after = from_x * x + from_x0 * x0
        if from_out:
            after = after + from_out * out
        return after + from_noise * torch.randn_like(x) if from_noise else after

    return step


def compiled(run: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A baseline by torch.compile, for its own task alone.

    One code object called with shape after shape is compiled for all shapes at once, and slower: what was
    compiled for another task is forgotten, and each size is a constant.
    """
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, dynamic=False, **options)


def step_variants(
    solver: str, shape: tuple[int, ...] = SHAPE, peers: bool = True, device: str = "cpu"
) -> dict[str, Callable[[], Any]]:
    """The same step in several ways; each has drawn its noise and clipped x0 when it returns.

    Args:
        solver: "ddpm" or "ddim".
        shape: [B, ...] of the state.
        peers: plain torch, torch.compile and, on a CPU, fastdiff without a compiler as well.
        device: where the state lies.
    """
    cpu.library(wait=True)
    generator = torch.Generator(device).manual_seed(0)
    x, out = (torch.randn(shape, generator=generator, device=device) for _ in range(2))
    scheduler = schedulers()[solver]
    packed = table(solver).pack().to(device)
    row = torch.full((shape[0],), ROW, dtype=torch.int32, device=device)
    key = fd.ops.noise_key(0, shape[0], None, device)
    state = x.clone()
    variants = {
        "diffusers": partial(scheduler.step, out, T - 1 - ROW, x, generator=generator),
        "fastdiff": partial(fd.ops.reverse_step, state, out, packed, row, *key),
    }
    if not peers:
        return variants

    def uncompiled() -> None:
        with mock.patch.object(cpu, "library", return_value=None):
            fd.ops.reverse_step(state, out, packed, row, seed=0)

    plain = plain_step(solver)
    variants |= {"torch": partial(plain, x, out), "torch.compile": partial(compiled(plain), x, out)}
    return variants | ({"fastdiff, no C++ compiler": uncompiled} if device == "cpu" else {})


def step_speed(
    solver: str, shape: tuple[int, ...] = SHAPE, peers: bool = True, rounds: int = 15
) -> Comparison:
    """The step of a solver, compared with diffusers'."""
    check_step(solver)
    with torch.inference_mode():
        return compare(
            "step",
            f"{solver}, {math.prod(shape) / 1e6:g} million elements",
            step_variants(solver, shape, peers),
            "diffusers",
            rounds=rounds,
            guard=GUARD if solver == "ddpm" else "",
            shape=list(shape),
            dtype="float32",
            clip=True,
        )


def check_step(solver: str, device: str = "cpu") -> None:
    """Hold our step against diffusers' on the same noise: no figure for two different things.

    Raises:
        AssertionError: they differ by more than float32's rounding of diffusers' tables and sums.
    """
    shape = (2, 3, 8, 8)
    x, out = torch.randn(shape, device=device), torch.randn(shape, device=device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    options = {"use_clipped_model_output": True} if solver == "ddim" else {}
    theirs = schedulers()[solver].step(
        out, T - 1 - ROW, x, generator=torch.Generator().manual_seed(1), **options
    )
    ours = x.clone()
    row = torch.full((2,), ROW, dtype=torch.int32, device=device)
    fd.ops.reverse_step(ours, out, table(solver).pack().to(device), row, noise=noise)
    # alpha_bar is a product of 500 float32 factors there: 500 ulp at most, of values up to 4
    torch.testing.assert_close(ours, theirs.prev_sample, rtol=0, atol=500 * 4 * 2**-24)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def bench_step(solver, measured):
    measured(step_speed(solver), step_variants(solver, peers=False)["fastdiff"])
