"""Whole chains of small networks against diffusers' own loop over the same weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import fastdiff as fd
from benchmarks import networks
from benchmarks.record import Comparison, compare
from fastdiff.kernels import cpu

STEPS = 50
CHAINS = [("mlp", 1), ("mlp", 256), ("policy", 1), ("digits", 1), ("digits", 16)]
SOLVERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
# A check that the two chains are the same, not of their last bits: the first step divides float32's rounding
# by alpha = 1/158, and nothing bounds what a network makes of a difference.
SAME = 1e-3


def their_chain(
    scheduler: Any,
    model: Callable[..., Tensor],
    shape: tuple[int, ...],
    generator: torch.Generator,
    **options: Any,
) -> Tensor:
    """diffusers' loop, as its pipelines write it."""
    x = torch.randn(shape, generator=generator)
    for t in scheduler.timesteps:
        out = model(x, t.expand(shape[0]))
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
    return x


def chain_pair(network: str, batch: int, solver: str, steps: int = STEPS) -> tuple[Any, fd.Sampler]:
    """diffusers' scheduler and our sampler for one chain: linear schedule, eps, clipped, leading times."""
    model, shape = getattr(networks, network)()
    common = {"beta_schedule": "linear", "clip_sample": True, "timestep_spacing": "leading"}
    scheduler = SOLVERS[solver](**common)
    scheduler.set_timesteps(steps)
    sampler = fd.Sampler(
        model, fd.NoiseSchedule.linear(1000), solver=solver, steps=steps, spacing="leading", shape=shape
    )
    return scheduler, sampler


def difference(network: str, batch: int, solver: str, steps: int = STEPS) -> float:
    """Largest difference of the two chains' samples on the same noise."""
    scheduler, sampler = chain_pair(network, batch, solver, steps)
    shape = (batch, *sampler.shape)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(shape, generator=generator)
    noise = torch.zeros(steps, *shape)
    for row in range(steps - 1 if solver == "ddpm" else 0):  # the last row adds none
        noise[row] = torch.randn(shape, generator=generator)
    ours = sampler.sample(batch, x_T=x_T, noise=noise)
    # diffusers' DDIM keeps the network's eps beside a clipped x0 unless it is told; ours never does
    options = {"use_clipped_model_output": True} if solver == "ddim" else {}
    with torch.inference_mode():
        theirs = their_chain(scheduler, sampler.model, shape, torch.Generator().manual_seed(0), **options)
    return float((ours - theirs).abs().max())


def chain_speed(network: str, batch: int, solver: str, rounds: int = 9, steps: int = STEPS) -> Comparison:
    """A chain, compared with diffusers'.

    Raises:
        AssertionError: the two chains do not give the same samples.
    """
    cpu.library(wait=True)
    assert (far := difference(network, batch, solver, steps)) <= SAME, f"the chains differ by {far}"
    scheduler, sampler = chain_pair(network, batch, solver, steps)
    shape, generator = (batch, *sampler.shape), torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return compare(
            "chain",
            f"{network}, batch {batch}, {solver}",
            {
                "diffusers": partial(their_chain, scheduler, sampler.model, shape, generator),
                "fastdiff": partial(sampler.sample, batch, seed=0),
                "network alone": partial(_network_alone, sampler.model, shape, steps),
            },
            "diffusers",
            rounds=rounds,
            steps=steps,
            parameters=sum(p.numel() for p in sampler.model.parameters()),
        )


def _network_alone(model: Callable[..., Tensor], shape: tuple[int, ...], steps: int) -> None:
    """The floor: the network's evaluations and nothing between them."""
    x, t = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    for _ in range(steps):
        model(x, t)


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize(("network", "batch"), CHAINS)
def bench_chain(network, batch, solver, measured):
    _, sampler = chain_pair(network, batch, solver)
    measured(chain_speed(network, batch, solver), partial(sampler.sample, batch, seed=0))
