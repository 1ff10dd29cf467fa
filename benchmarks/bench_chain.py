"""Whole chains of small networks against diffusers' own loop over the same weights."""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from benchmarks import networks
from benchmarks.bench_memory import peak_bytes
from benchmarks.record import Comparison, Quantity, compare
from fastdiff.kernels import cpu
from fastdiff.nn import prediction_of

STEPS = 50
CHAINS = [
    ("mlp", 1), ("mlp", 256), ("policy", 1), ("action", 1), ("unet", 1), ("unet", 16),
    ("digits", 1), ("digits", 16), ("cifar10", 1),
]  # fmt: skip
OTHERS = ("action", "cifar10")  # networks of other people's, which `fd.optimize` may change
LARGE = {"cifar10": {"steps": 10, "rounds": 5}}  # whose evaluation takes a good part of a second
SOLVERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}
# A check that the two chains are the same, not of their last bits: the first step divides float32's rounding
# by alpha = 1/158, and nothing bounds what a network makes of a difference.
SAME = 1e-3
MOST_HOST = 60  # microseconds of a row beside its network
GUARD_HOST = "tests/test_benchmarks.py::test_a_row_costs_little_beside_its_network"
MOST_GROWTH = 1.05  # time of a row among 1 000 over that among 10
GUARD_GROWTH = "tests/test_benchmarks.py::test_a_row_costs_the_same_in_a_long_chain"
MOST_MEMORY = 0.1  # states that 1 000 rows take over 10: noise of the measurement, and the table
GUARD_MEMORY = "tests/test_benchmarks.py::test_a_long_chain_takes_the_memory_of_a_short_one"


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
        out = prediction_of(model(x, t.expand(shape[0])))
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
    return x


def chain_pair(network: str, solver: str, steps: int = STEPS) -> tuple[Any, fd.Sampler]:
    """diffusers' scheduler and our sampler for one chain: linear schedule, eps, clipped, leading times."""
    model, shape = getattr(networks, network)()
    common = {"beta_schedule": "linear", "clip_sample": True, "timestep_spacing": "leading"}
    scheduler = SOLVERS[solver](**common)
    scheduler.set_timesteps(steps)
    sampler = fd.Sampler(
        model,
        fd.NoiseSchedule.linear(1000),
        solver=solver,
        steps=steps,
        spacing="leading",
        shape=shape,
        compile=False,
    )
    return scheduler, sampler


def difference(network: str, batch: int, solver: str, steps: int = STEPS) -> float:
    """Largest difference of the two chains' samples on the same noise."""
    scheduler, sampler = chain_pair(network, solver, steps)
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
    """A chain, compared with diffusers', each with its network as it is and compiled.

    Raises:
        AssertionError: the chains do not give the same samples, or one that is to be compiled is not.
    """
    cpu.library(wait=True)
    assert (far := difference(network, batch, solver, steps)) <= SAME, f"the chains differ by {far}"
    scheduler, sampler = chain_pair(network, solver, steps)
    model, shape, generator = sampler.model, (batch, *sampler.shape), torch.Generator().manual_seed(0)
    by_torch = torch.compile(model, dynamic=False)
    plain = sampler.sample(batch, seed=0)

    def ours(model: Any, compile: bool) -> Callable[[], Tensor]:
        chain = fd.Sampler(model, table=sampler.table, shape=sampler.shape, compile=compile)
        with _nothing_said():
            far = float((chain.sample(batch, seed=0) - plain).abs().max())
        assert far <= SAME, f"the chains differ by {far}"
        return partial(chain.sample, batch, seed=0)

    optimised = {}
    if network in OTHERS:
        changed = copy.deepcopy(model)
        fd.optimize(changed, (torch.zeros(shape), torch.zeros(batch, dtype=torch.int64)))
        for name, compile in (("optimised", False), ("optimised and compiled", True)):
            optimised[f"fastdiff, {name}"] = ours(changed, compile)
    with torch.inference_mode():
        return compare(
            "chain",
            f"{network}, batch {batch}, {solver}",
            {
                "diffusers": partial(their_chain, scheduler, model, shape, generator),
                "diffusers + torch.compile": partial(their_chain, scheduler, by_torch, shape, generator),
                "fastdiff": partial(sampler.sample, batch, seed=0),
                "fastdiff, compiled": ours(model, compile=True),
                **optimised,
                "network alone": partial(_network_alone, model, shape, steps),
                "its products alone": partial(_products_alone, products(model, shape), steps),
            },
            "diffusers",
            rounds=rounds,
            steps=steps,
            parameters=sum(p.numel() for p in model.parameters()),
        )


@contextmanager
def _nothing_said() -> Iterator[None]:
    """See to it that a sampler does what it was asked to: it says so in one line where it cannot.

    Raises:
        AssertionError: with that line.
    """
    said: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger("fastdiff")
    handler.emit = said.append  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
    assert not said, said[0].getMessage()


def _network_alone(model: Callable[..., Tensor], shape: tuple[int, ...], steps: int) -> None:
    """The evaluations of the network as diffusers' loop calls it, and nothing between them."""
    x, t = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    for _ in range(steps):
        model(x, t)


class _Products(TorchDispatchMode):
    """Notes a network's convolutions, matrix products and attention, with their operands."""

    KINDS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.KINDS:
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def products(model: Callable[..., Tensor], shape: tuple[int, ...]) -> list[Callable[[], Any]]:
    """A network's convolutions, matrix products and attention, each as a call on its own operands."""
    # not in inference mode, where layers are seen whole
    with torch.inference_mode(False), torch.no_grad(), _Products() as noted:
        model(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64))
    return noted.calls


def _products_alone(calls: list[Callable[[], Any]], steps: int) -> None:
    """The network's own products, nothing between them: those of its embedding included."""
    for _ in range(steps):
        for call in calls:
            call()


def host_microseconds(rounds: int = 15) -> float:
    """What a row costs beside its network: a chain of 1 000 rows of 16 numbers whose network does nothing."""
    cpu.library(wait=True)
    sampler = fd.Sampler(
        lambda x, t: x, fd.NoiseSchedule.linear(1000), solver="ddpm", steps=None, shape=(16,), compile=False
    )
    seconds = []
    for _ in range(rounds):
        start = time.thread_time()  # the host's own work, whatever else the machine does
        sampler.sample(1)
        seconds.append(time.thread_time() - start)
    return 1e3 * statistics.median(seconds)


def row_growth(network: str = "policy", rounds: int = 5) -> float:
    """The time of a row in a chain of 1 000 over that in a chain of 10: median over interleaved rounds."""
    cpu.library(wait=True)
    model, shape = getattr(networks, network)()
    schedule = fd.NoiseSchedule.linear(1000)
    short, long = (
        partial(fd.Sampler(model, schedule, solver="ddpm", steps=steps, shape=shape, compile=False).sample, 1)
        for steps in (10, 1000)
    )
    short()
    ratios = []
    for _ in range(rounds):
        before = [_seconds(short) for _ in range(10)]
        per_row = _seconds(long) / 1000
        ratios.append(per_row / (statistics.median(before + [_seconds(short) for _ in range(10)]) / 10))
    return statistics.median(ratios)


def memory_growth() -> float:
    """Bytes that a chain of 1 000 rows takes at its peak over one of 10, in states of 16 MB."""
    schedule, state = fd.NoiseSchedule.linear(1000), (4, 1024, 1024)
    out = torch.ones(1, *state)
    peaks = []
    for steps in (10, 10, 1000):  # the first makes room
        sampler = fd.Sampler(
            lambda x, t: out, schedule, solver="ddpm", steps=steps, shape=state, compile=False
        )
        peaks.append(peak_bytes(partial(sampler.sample, 1)))
    return (peaks[2] - peaks[1]) / out.nbytes


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize(("network", "batch"), CHAINS)
def bench_chain(network, batch, solver, measured):
    options = LARGE.get(network, {})
    _, sampler = chain_pair(network, solver, options.get("steps", STEPS))
    measured(chain_speed(network, batch, solver, **options), partial(sampler.sample, batch, seed=0))


def bench_row(keep, benchmark):
    """What a row costs beside its network."""
    value = benchmark.pedantic(host_microseconds, rounds=1)
    keep(Quantity("chain", "host work per row", value, "us", MOST_HOST, {"rows": 1000}, GUARD_HOST))


def bench_growth(keep, benchmark):
    """Time per row and memory from 10 rows to 1 000."""
    value = benchmark.pedantic(row_growth, rounds=1)
    keep(
        Quantity(
            "chain", "time per row, 1 000 rows over 10, policy", value, "x", MOST_GROWTH, {}, GUARD_GROWTH
        )
    )
    value = memory_growth()
    keep(Quantity("chain", "memory, 1 000 rows over 10", value, "states", MOST_MEMORY, {}, GUARD_MEMORY))
