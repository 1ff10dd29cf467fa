"""What noise costs: normals against torch.randn, and the share of a chain that goes into drawing them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from benchmarks import networks
from benchmarks.record import Comparison, Quantity, compare, in_fresh_process
from fastdiff.kernels import cpu

BATCH, N = 16, 62_500  # a million normals
SLOWEST = 10  # times torch.randn's time, without a C++ compiler
SLOWEST_COMPILED = 1.25  # the same with one
LARGEST_SHARE = 0.05  # of a chain with a network in it, without a C++ compiler
STEPS = 200
GUARD_SPEED = "tests/test_benchmarks.py::test_normals_without_a_compiler_take_at_most_ten_times_torch_randn"
GUARD_SHARE = "tests/test_benchmarks.py::test_noise_is_a_small_share_of_a_chain_without_a_compiler"


def normal_speed(rounds: int = 15, batch: int = BATCH, n: int = N) -> Comparison:
    """fastdiff's normals against torch.randn, with the compiled kernel and without."""
    seed, ids = fd.ops.noise_key(0, batch, None, None)
    draw = torch.zeros_like(ids)
    into = torch.empty(batch, n)
    generator = torch.Generator().manual_seed(0)

    def draw_normals() -> None:
        torch.ops.fastdiff.normal(seed, ids, draw, 1, n)

    def draw_with_numpy() -> None:
        with mock.patch.object(cpu, "library", return_value=None):
            draw_normals()

    variants: dict[str, Callable[[], Any]] = {
        "torch.randn": partial(torch.randn, into.shape, generator=generator)
    }
    if cpu.library(wait=True) is not None:
        variants["fastdiff"] = draw_normals
    variants["fastdiff, no C++ compiler"] = draw_with_numpy
    return compare(
        "noise",
        "normals",
        variants,
        "torch.randn",
        rounds=rounds,
        guard=GUARD_SPEED,
        shape=[batch, n],
        dtype="float32",
    )


class Bare(nn.Module):
    """No network: what is left is the chain itself."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x


def noise_share(network: str, steps: int = STEPS) -> float:
    """Time spent drawing normals over the time of a whole DDPM chain of one sample, in this process.

    Args:
        network: a function of networks.py, or "bare".
        steps: of the chain.
    """
    model, shape = (Bare(), (1, 8, 8)) if network == "bare" else getattr(networks, network)()
    sampler = fd.Sampler(model, fd.NoiseSchedule.linear(1000), solver="ddpm", steps=steps, shape=shape)
    sampler.sample(1)
    normal = fd.ops.normal
    seconds, drawn = 0.0, 0

    def timed(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal seconds, drawn
        start = time.perf_counter()
        z = normal(*args, **kwargs)
        seconds += time.perf_counter() - start
        drawn += z.numel()
        return z

    with mock.patch.object(fd.ops, "normal", timed):
        start = time.perf_counter()
        sampler.sample(1, seed=1)
        total = time.perf_counter() - start
    assert drawn >= steps * math.prod(shape), (
        "x_T and every row but the last take noise; some was drawn unseen"
    )
    return seconds / total


def uncompiled_share(network: str, steps: int = STEPS) -> float:
    """`noise_share` in a new process that compiles nothing."""
    return in_fresh_process(f"bench_noise.noise_share({network!r}, {steps})", FASTDIFF_NATIVE="0")


def bench_normals(measured):
    measured(normal_speed(), partial(fd.ops.normal, (N,), 0, BATCH, 0))


@pytest.mark.parametrize("network", ["digits", "policy", "mlp", "bare"])
def bench_noise_share(network, benchmark, keep):
    share = benchmark.pedantic(uncompiled_share, (network,), rounds=1)
    limit, guard = (100 * LARGEST_SHARE, GUARD_SHARE) if network == "digits" else (None, "")
    name = f"share of a chain, {network}, batch 1, no C++ compiler"
    keep(Quantity("noise", name, 100 * share, "%", limit, {"steps": STEPS, "solver": "ddpm"}, guard))
