"""The kernels' specialisations in use, each as a call of its launcher on operands without memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import layout
from .advance import Advance, advance_triton
from .denoising_loss import Loss, denoising_loss_triton
from .group_norm import Norm, group_norm_silu_triton
from .group_norm_backward import NormGrad, group_norm_silu_backward_triton
from .philox import normal_triton
from .q_sample import TARGETS, Forward, q_sample_triton
from .reverse_step import Step, reverse_step_triton
from .threshold import BINS, PASSES, Threshold, threshold_triton
from .vlb import WIDTH as VLB_WIDTH
from .vlb import Terms, vlb_terms_triton

_BATCH, _N, _ROWS = 4, 3 * 32 * 32, 50


@dataclass(frozen=True)
class Specialisation:
    """A kernel as it is launched: its name, what is special, the launch, the least bytes per element.

    Attributes:
        index: which of the kernels that `launch` launches.
        exact: whether each of its operations rounds once, so that it may not fuse a multiply with an add.
    """

    kernel: str
    variant: str
    launch: Callable[[], Any]
    least: float
    index: int = 0
    exact: bool = True


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _int64(count: int, batch: int) -> list[torch.Tensor]:
    return [_empty(batch, dtype=torch.int64) for _ in range(count)]


def reverse_step(
    registers: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    guided: bool = False,
    learned: bool = False,
    known: bool = False,
    preview: bool = False,
    batch: int = _BATCH,
    n: int = _N,
) -> None:
    """Launch `reverse_step`; a batch of noise, guidance and so on as asked."""
    lanes, i32, i64 = 2 * batch if guided else batch, torch.int32, torch.int64
    lane = _empty(batch, dtype=i32) if guided else None
    reverse_step_triton(
        Step(
            x=_empty(batch, n),
            registers=_empty(registers, batch, n) if registers else None,
            out=_empty(lanes, 2 * n if learned else n, dtype=dtype),
            u=_empty(lanes, n, dtype=dtype),
            coef=_empty(_ROWS + 1, layout.width(registers)),
            plan=_empty(_ROWS + 1, layout.PLAN_WIDTH, dtype=i32),
            row=_empty(batch, dtype=i32),
            seed=_empty(batch, dtype=i64),
            sample_id=_empty(batch, dtype=i64),
            cond_lane=lane,
            uncond_lane=lane,
            guidance_scale=_empty(batch) if guided else None,
            known=_empty(batch, n) if known else None,
            mask=_empty(batch, n, dtype=torch.uint8) if known else None,
            preview=_empty(batch, n) if preview else None,
        )
    )


def threshold(batch: int = _BATCH, n: int = _N) -> None:
    """Launch `threshold`."""
    i32 = torch.int32
    counts = _empty(batch, PASSES + 1, BINS, dtype=i32)
    rows = (_empty(_ROWS + 1, layout.width(0)), _empty(_ROWS + 1, layout.PLAN_WIDTH, dtype=i32))
    elements = (_empty(batch, n), _empty(batch, n, dtype=torch.bfloat16))
    threshold_triton(Threshold(_empty(batch), counts, *elements, *rows, _empty(batch, dtype=i32)))


def q_sample(
    target: str = "none", dtype: torch.dtype = torch.bfloat16, batch: int = _BATCH, n: int = _N
) -> None:
    """Launch `q_sample`."""
    t, seed, sample_id, draw = _int64(4, batch)
    x_t, goal = _empty(batch, n, dtype=dtype), _empty(batch, n)
    kind = TARGETS.index(target)
    goal_or_none = goal if kind else None
    x0, levels = _empty(batch, n), _empty(_ROWS, 2)
    q_sample_triton(Forward(x_t, goal_or_none, x0, levels, t, seed, sample_id, draw, kind))


def denoising_loss(
    target: str = "eps",
    dtype: torch.dtype = torch.bfloat16,
    mask: tuple[torch.dtype, int, int] | None = None,
    batch: int = _BATCH,
    n: int = _N,
) -> None:
    """Launch `denoising_loss` with its gradient; a mask's dtype, the length of its rows, and `inner`."""
    t, seed, sample_id, draw = _int64(4, batch)
    out, x0, levels = _empty(batch, n, dtype=dtype), _empty(batch, n), _empty(_ROWS, 2)
    f = Loss(_empty(batch), out, out, x0, levels, t, seed, sample_id, draw, TARGETS.index(target))
    if mask is not None:
        rows = _empty(batch, mask[1], dtype=mask[0])
        f = f._replace(mask=rows, inner=mask[2], total=_empty(batch))
    denoising_loss_triton(f)


def vlb_terms(
    learned: bool = True, dtype: torch.dtype = torch.bfloat16, batch: int = _BATCH, n: int = _N
) -> None:
    """Launch `vlb_terms` as the hybrid loss does where a variance is learned, else as the bound does."""
    out, x0 = _empty(batch, 2 * n if learned else n, dtype=dtype), _empty(batch, n)
    grad = _empty(batch, n, dtype=dtype)
    coef, (t,) = _empty(_ROWS, VLB_WIDTH), _int64(1, batch)
    vlb_terms_triton(
        Terms(_empty(batch), None if learned else grad, grad if learned else None, x0, x0, out, coef, t)
    )


def group_norm_silu(
    n: int = 1024,
    dtype: torch.dtype = torch.bfloat16,
    last: bool = False,
    backward: bool = False,
    batch: int = _BATCH,
) -> None:
    """Launch `group_norm_silu` on 128 channels in 32 groups, or its gradient."""
    channels, groups = 128, 32
    x = _empty(*((batch, n, channels) if last else (batch, channels, n)), dtype=dtype)
    mean, weight, scale = _empty(batch, groups), _empty(channels), _empty(batch, channels)
    rest = (x, None, weight, weight, scale, scale, groups, 1e-5, True, last)
    if backward:
        group_norm_silu_backward_triton(NormGrad(x, _empty(2, batch, channels), x, mean, mean, *rest))
    else:
        group_norm_silu_triton(Norm(x, mean, mean, *rest))


def _norms() -> tuple[Specialisation, ...]:
    """`group_norm_silu` and its gradient, once over x (32x32) and twice (128x128)."""
    once, twice, bf16, fp16, fp32 = 32 * 32, 128 * 128, torch.bfloat16, torch.float16, torch.float32
    rows: tuple[tuple[str, float, int, tuple[Any, ...]], ...] = (
        ("once bf16", 4, 0, (once, bf16)),
        ("once fp16", 4, 0, (once, fp16)),
        ("once fp32", 8, 0, (once, fp32)),
        ("once fp32 last", 8, 0, (once, fp32, True)),
        ("moments bf16", 2, 0, (twice, bf16)),
        ("moments bf16 last", 2, 0, (twice, bf16, True)),
        ("y bf16", 4, 2, (twice, bf16)),
        ("y bf16 last", 4, 2, (twice, bf16, True)),
        ("gradient once bf16", 6, 0, (once, bf16, False, True)),
        ("gradient once fp16", 6, 0, (once, fp16, False, True)),
        ("gradient sums bf16", 4, 0, (twice, bf16, False, True)),
        ("gradient bf16", 6, 1, (twice, bf16, False, True)),
        ("gradient bf16 last", 6, 1, (twice, bf16, True, True)),
    )
    return tuple(
        Specialisation("group_norm_silu", name, partial(group_norm_silu, *a), least, index, exact=False)
        for name, least, index, a in rows
    )


def normal(batch: int = _BATCH, n: int = _N) -> None:
    """Launch `normal`."""
    seed, sample_id, draw = _int64(3, batch)
    normal_triton(_empty(batch, n), seed, sample_id, draw, domain=0)


def advance(batch: int = _BATCH) -> None:
    """Launch `advance`."""
    i32 = torch.int32
    advance_triton(Advance(_empty(batch, dtype=i32), _empty(_ROWS + 1, layout.width(0)), _empty(batch)))


IN_USE = (
    Specialisation("reverse_step", "K=0 bf16", reverse_step, 12),
    Specialisation("reverse_step", "K=0 fp32", lambda: reverse_step(dtype=torch.float32), 16),
    Specialisation("reverse_step", "K=0 fp16", lambda: reverse_step(dtype=torch.float16), 12),
    Specialisation("reverse_step", "K=0 bf16 guided", lambda: reverse_step(guided=True), 16),
    Specialisation("reverse_step", "K=0 bf16 learned", lambda: reverse_step(learned=True), 14),
    Specialisation("reverse_step", "K=1 bf16", lambda: reverse_step(1), 20),
    Specialisation("reverse_step", "K=3 bf16", lambda: reverse_step(3), 36),
    Specialisation("reverse_step", "K=0 bf16 known", lambda: reverse_step(known=True), 17),
    Specialisation("reverse_step", "K=0 bf16 preview", lambda: reverse_step(preview=True), 16),
    Specialisation("threshold", "first count bf16", threshold, 6),
    Specialisation("threshold", "last count bf16", threshold, 6, PASSES - 1),
    Specialisation("threshold", "next above bf16", threshold, 6, PASSES),
    Specialisation("q_sample", "bf16", q_sample, 6),
    Specialisation("q_sample", "fp16", lambda: q_sample(dtype=torch.float16), 6),
    Specialisation("q_sample", "bf16 eps", lambda: q_sample("eps"), 10),
    Specialisation("q_sample", "fp32 v", lambda: q_sample("v", torch.float32), 12),
    Specialisation("denoising_loss", "bf16 eps", denoising_loss, 4),
    Specialisation("denoising_loss", "fp16 eps", lambda: denoising_loss(dtype=torch.float16), 4),
    Specialisation("denoising_loss", "fp32 v", lambda: denoising_loss("v", torch.float32), 12),
    Specialisation(
        "denoising_loss", "bf16 eps mask uint8", lambda: denoising_loss(mask=(torch.uint8, _N, 1)), 5
    ),
    Specialisation(
        "denoising_loss", "bf16 eps mask fp32", lambda: denoising_loss(mask=(torch.float32, _N, 1)), 8
    ),
    Specialisation(
        "denoising_loss", "bf16 eps mask of pixels", lambda: denoising_loss(mask=(torch.uint8, _N // 3, 1)), 5
    ),
    Specialisation(
        "denoising_loss", "bf16 eps mask of steps", lambda: denoising_loss(mask=(torch.uint8, 16, 192)), 5
    ),
    Specialisation("vlb_terms", "bf16 learned, both paths", vlb_terms, 14),
    Specialisation("vlb_terms", "fp16 learned, both paths", lambda: vlb_terms(dtype=torch.float16), 14),
    Specialisation("vlb_terms", "fp32 fixed, both paths", lambda: vlb_terms(False, torch.float32), 16),
    Specialisation("normal", "fp32", normal, 4),
    Specialisation("advance", "int32", advance, 16),  # for each slot: its row, read and written, and a time
    *_norms(),
)
