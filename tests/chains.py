"""What the tests of whole chains share: a small smooth network, a sampler with it, the noise it draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from oracles import SCHEDULES

import fastdiff as fd

SHAPE = (2, 4, 4)
SCHEDULE = SCHEDULES["linear"]
# solvers that remember earlier steps
HISTORY = {"lms", "plms", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis"}


def one_thread() -> Iterator[None]:
    """A fixture: threads cost more than they bring where a whole batch is some hundred numbers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def smooth(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """A non-linear network, elementwise, that depends on time and class."""
    shift = torch.cos(t.to(x.dtype) / 300)
    if labels is not None:
        shift = shift + labels.to(x.dtype) / 5
    return torch.tanh(0.5 * x + shift.view(-1, *[1] * (x.dim() - 1)))


def sampler(solver: str = "ddpm", steps: int = 6, **options) -> fd.Sampler:
    return fd.Sampler(smooth, SCHEDULE, solver=solver, steps=steps, shape=SHAPE, **options)


def normals(num: int, row: int, domain: int, seed: int = 0) -> torch.Tensor:
    return fd.ops.normal(SHAPE, seed, num, row, domain=domain)
