"""What the tests of denoising_loss share: operands, and the backends that must agree."""

from __future__ import annotations

import torch
from kernel_cases import run_on

from fastdiff.kernels.denoising_loss import Loss, denoising_loss_torch, denoising_loss_triton

LEVELS = 10


def operands(
    n: int, kind: int = 1, *, weighted: bool = False, given_noise: bool = False, batch: int = 4
) -> Loss:
    g = torch.Generator().manual_seed(n + kind)
    angle = torch.rand(LEVELS, generator=g)
    seed, sample_id, draw = torch.randint(0, 2**32, (3, batch), generator=g)
    return Loss(
        loss=torch.full((batch,), float("nan")),
        error=torch.full((batch, n), float("nan")),
        out=torch.randn(batch, n, generator=g),
        x0=torch.randn(batch, n, generator=g),
        alpha_sigma=torch.stack([angle.cos(), angle.sin()], 1),
        t=torch.randint(-2, LEVELS + 2, (batch,), generator=g),
        seed=seed * 2**31 - 2**62,
        sample_id=sample_id,
        draw=draw,
        kind=kind,
        weight=torch.rand(batch, generator=g) if weighted else None,
        noise=torch.randn(batch, n, generator=g) if given_noise else None,
    )


def run(backend: str, f: Loss) -> None:
    run_on(backend, denoising_loss_torch, denoising_loss_triton, f)
