"""How much memory a chain takes beside its network, as the operating system counts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff as fd
from benchmarks.record import Quantity

SHAPE, NUM = (4, 512, 512), 32  # a state of 128 MB: its buffers go back to the system when they are freed
MOST = 3  # state-sized buffers
SCRATCH = 0.3  # of a state: a sample at a time, a chunk of noise
CASES: dict[str, dict[str, Any]] = {
    "ddpm": {"solver": "ddpm"},
    "ddim": {"solver": "ddim"},
    "ddpm, guided": {"solver": "ddpm", "guidance_scale": 2.0},
    "ddpm, bfloat16 network": {"solver": "ddpm", "dtype": torch.bfloat16},
    "ddpm, learned variance": {"solver": "ddpm", "variance": "learned_range"},
}
GUARD = "tests/test_benchmarks.py::test_a_chain_holds_at_most_three_states"


def peak_bytes(run: Callable[[], Any]) -> int:
    """By how much the process's resident memory grows at most while `run` runs; Linux only.

    Everything counts (torch, NumPy, C++), once it has been written to.

    Raises:
        OSError: the system keeps no such record.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = _peak()
    run()
    return _peak() - before


def _peak() -> int:
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return 1024 * int(found[1])


class Ready:
    """A network whose output exists before the chain starts, and so is no part of the count."""

    def __init__(self, lanes: int, shape: tuple[int, ...], dtype: torch.dtype, learned: bool) -> None:
        channels, *rest = shape
        self.out = torch.ones(lanes, channels * (2 if learned else 1), *rest, dtype=dtype)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.out


def states_held(
    solver: str = "ddpm",
    guidance_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    variance: str = "fixed_small",
    steps: int = 3,
    **options: Any,
) -> float:
    """Peak memory of `Sampler.sample` over that of one float32 state, without the network's own.

    Args:
        solver, dtype, variance, steps: of the sampler.
        guidance_scale: of the call.
        **options: more arguments of the call.
    """
    guided = guidance_scale != 1
    model = Ready(NUM * (2 if guided else 1), SHAPE, dtype, variance.startswith("learned"))
    sampler = fd.Sampler(
        model,
        fd.NoiseSchedule.linear(1000),
        solver=solver,
        steps=steps,
        shape=SHAPE,
        dtype=dtype,
        variance=variance,
    )
    if guided:
        options |= {"cond": {"y": torch.zeros(NUM)}, "uncond": {"y": torch.zeros(NUM)}}
    state = 4 * NUM * SHAPE[0] * SHAPE[1] * SHAPE[2]
    return peak_bytes(lambda: sampler.sample(NUM, guidance_scale=guidance_scale, **options)) / state


@pytest.mark.parametrize("case", CASES)
def bench_states_held(case, benchmark, keep):
    states_held(steps=1)
    held = benchmark.pedantic(states_held, kwargs=CASES[case], rounds=1)
    about = {"shape": [NUM, *SHAPE]}
    keep(Quantity("memory", f"{case}: peak beside the network", held, "states", MOST + SCRATCH, about, GUARD))
