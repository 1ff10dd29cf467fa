"""The denoising loss and its error in one pass over the network's output; its noise is drawn again.

    loss_b = w_b / N sum_i (out_i - target_i)^2,    d loss_b / d out_i = 2 w_b / N (out_i - target_i)
    target: eps = z,  v = alpha_t z - sigma_t x_0,  x0 = x_0;   z = normal(seed, sample_id, draw, i), domain 2
    under a mask m:  loss_b = w_b / S sum_i m_i (out_i - target_i)^2,   S = sum_i m_i;   0 where S = 0

The target has the bits of q_sample's, so a loss over stored noise differs in the order of its sum alone. Each
program leaves the sum over its block; their sum over a sample is taken in a fixed order. The error stays
without its factor 2 w_b / N, which at the size of an image would take a float16 gradient below its range, and
under a mask is m_i (out_i - target_i), 0 where m_i is 0, whatever stands there.

Source: Ho et al. 2020, eq. 14; Salimans and Ho 2022 (v and its weights).
"""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch

from . import cpu
from ._blocks import cut, first_element
from ._triton import jit, tl
from .philox import DOMAIN_TRAIN, normal_block
from .q_sample import Forward, q_sample_reference, q_sample_torch, target_of

_DOMAIN_TRAIN, _X0 = tl.constexpr(DOMAIN_TRAIN), tl.constexpr(3)
_REPEATED = tl.constexpr(2)  # a mask of fewer numbers than a sample has; 1: of as many, 0: none
_TINY = torch.finfo(torch.float32).tiny


class Loss(NamedTuple):
    """The operands of denoising_loss, B samples of N elements.

    Attributes:
        loss: [B] float32. Overwritten.
        error: [B, N] of out's dtype, dense: out - target, the gradient but for its `factor`; None where
            nobody wants it. Overwritten.
        out: [B, N] or [B, 2N] float32, bfloat16 or float16, dense: the network's prediction, which may be
            followed by a variance, which is not read.
        x0: [B, N] float32, dense. Not read where the target is eps.
        alpha_sigma: [levels, 2] float32, alpha and sigma of each level.
        t: [B] int64, a row of `alpha_sigma`; clamped into it.
        seed, sample_id, draw: [B] int64, the noise's key.
        kind: the target, an index into q_sample's `TARGETS`, not 0.
        weight: [B] float32, or None for 1.
        noise: [B, N] float32, dense, in place of the drawn z.
        mask: [B, M] float32, or uint8 of 0 and 1, its rows dense; element i has the weight
            mask[b, i // inner % M]. inner M divides N, which is below 2^31 where inner M < N.
        inner: how many neighbouring elements share a number of the mask.
        total: [B] float32, with a mask: S. Overwritten.
    """

    loss: torch.Tensor
    error: torch.Tensor | None
    out: torch.Tensor
    x0: torch.Tensor
    alpha_sigma: torch.Tensor
    t: torch.Tensor
    seed: torch.Tensor
    sample_id: torch.Tensor
    draw: torch.Tensor
    kind: int
    weight: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    inner: int = 1
    total: torch.Tensor | None = None

    @property
    def rows(self) -> tuple[int, int]:
        """How far apart the mask's rows lie, and their length M."""
        return (0, 0) if self.mask is None else (self.mask.stride(0), self.mask.shape[1])


def factor(n: int, weight: torch.Tensor | None, total: torch.Tensor | None = None) -> torch.Tensor | float:
    """The loss's gradient over the error: one number, or [B]."""
    each = 2.0 / max(n, 1) if total is None else 2.0 * _inverse(total)
    return each if weight is None else weight * each


def _inverse(total: torch.Tensor) -> torch.Tensor:
    """1 / S, and 0 where a mask leaves nothing."""
    return total.clamp(min=_TINY).reciprocal() * (total > 0)


@jit
def _denoising_loss_kernel(
    sum_ptr, error_ptr, out_ptr, x0_ptr, alpha_sigma_ptr, t_ptr, seed_ptr, sample_id_ptr, draw_ptr,
    noise_ptr, mask_ptr, total_ptr, levels, n, stride_mask, period, inner,
    KIND: tl.constexpr, LEARNED: tl.constexpr, ERROR: tl.constexpr, GIVEN_NOISE: tl.constexpr,
    MASK: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    level = tl.load(t_ptr + b)
    level = tl.minimum(tl.maximum(level, 0), levels - 1)
    alpha = tl.load(alpha_sigma_ptr + 2 * level)
    sigma = tl.load(alpha_sigma_ptr + 2 * level + 1)
    offset = tl.arange(0, BLOCK)
    start = first_element(BLOCK)
    inside = offset < n - start
    own = b * n + start
    lane = own
    if LEARNED:
        lane = own + b * n
    out = tl.load(out_ptr + lane + offset, mask=inside, other=0.0).to(tl.float32)
    z = out
    if KIND != _X0:
        if GIVEN_NOISE:
            z = tl.load(noise_ptr + own + offset, mask=inside, other=0.0)
        else:
            z = normal_block(
                start,
                tl.load(draw_ptr + b).to(tl.uint32),
                tl.load(sample_id_ptr + b).to(tl.uint32),
                _DOMAIN_TRAIN,
                tl.load(seed_ptr + b).to(tl.uint64),
                BLOCK,
                WIDTH,
            )
    x0 = out
    if KIND > 1:
        x0 = tl.load(x0_ptr + own + offset, mask=inside, other=0.0)
    if MASK:
        at = start + offset
        if MASK == _REPEATED:
            at = (start.to(tl.int32) + offset) // inner % period
        m = tl.load(mask_ptr + b * stride_mask + at, mask=inside, other=0).to(tl.float32)
        inside = m != 0.0
    error = tl.where(inside, out - target_of(alpha, sigma, x0, z, KIND), 0.0)
    weighted = error
    if MASK:
        weighted = m * error
    program = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    programs = tl.num_programs(1) * tl.num_programs(2)
    tl.store(sum_ptr + b * programs + program, tl.sum(weighted * error, 0))
    if MASK:
        tl.store(total_ptr + b * programs + program, tl.sum(m, 0))
    if ERROR:
        tl.store(error_ptr + own + offset, weighted.to(error_ptr.dtype.element_ty), mask=offset < n - start)


def denoising_loss_triton(f: Loss) -> None:
    """`denoising_loss_torch` on a GPU or in Triton's interpreter."""
    batch, n = f.x0.shape
    if _is_nothing(f):
        return
    grid, options = cut(batch, n, f.out)
    sums = torch.empty(batch, grid[1] * grid[2], dtype=torch.float32, device=f.out.device)
    totals = None if f.mask is None else torch.empty_like(sums)
    _denoising_loss_kernel[grid](
        sums, f.error, f.out, f.x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw, f.noise, f.mask, totals,
        f.alpha_sigma.shape[0], n, *f.rows, f.inner, KIND=f.kind, LEARNED=f.out.shape[1] != n,
        ERROR=f.error is not None, GIVEN_NOISE=f.noise is not None,
        MASK=0 if f.mask is None else 1 if f.mask.shape[1] == n else 2, **options,
    )  # fmt: skip
    _finish(f, sums, totals)


def denoising_loss_torch(f: Loss) -> None:
    """Fill loss, and error if wanted: the CPU's implementation, and that of devices without Triton."""
    batch, n = f.x0.shape
    if _is_nothing(f):
        return
    native = cpu.library() if f.out.device.type == "cpu" else None
    if native is None:
        off = f.out[:, :n].float() - _target(f, torch.empty_like(f.x0), q_sample_torch)
        weighted, off = _masked(f, off)
        sums = (weighted * off).sum(1, keepdim=True, dtype=torch.float64)
        _finish(f, sums, None if f.mask is None else _sum_of(f.mask, n))
        if f.error is not None:
            f.error.copy_(weighted)
        return
    error = f.error if f.error is None or f.error.dtype == torch.float32 else torch.empty_like(f.x0)
    sums = torch.empty(batch, native.fd_blocks(c_int64(n)), dtype=torch.float64, device="cpu")
    totals = None if f.mask is None else torch.empty_like(sums)
    out = f.out if f.out.dtype == torch.float32 else f.out[:, :n].float()
    tensors = (sums, error, out, f.x0, f.noise, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw)
    sizes = (batch, n, out.shape[1], f.alpha_sigma.shape[0], *f.rows, f.inner)
    is_wide = f.mask is not None and f.mask.dtype == torch.float32
    native.fd_denoising_loss(
        *map(cpu.pointer, (*tensors, f.mask, totals)), *map(c_int64, sizes), int(is_wide), f.kind,
        torch.get_num_threads(),
    )  # fmt: skip
    _finish(f, sums, totals)
    if f.error is not None and error is not f.error:
        f.error.copy_(error)  # type: ignore[arg-type]


def denoising_loss_reference(f: Loss) -> None:
    """The formula in float64; loss, error and total may be float64."""
    batch, n = f.x0.shape
    if _is_nothing(f):
        return
    error = f.out[:, :n].double() - _target(
        f, torch.empty_like(f.x0, dtype=torch.float64), q_sample_reference
    )
    weighted, error = _masked(f, error)
    weight = f.loss.new_ones(batch) if f.weight is None else f.weight
    if f.mask is None:
        f.loss.copy_((weight.double()[:, None] * error.square()).sum(1) / max(n, 1))
    else:
        f.total.copy_(total := _sum_of(f.mask, n).squeeze(1))  # type: ignore[union-attr]
        f.loss.copy_(weight * (weighted * error).sum(1) * _inverse(total))
    if f.error is not None:
        f.error.copy_(weighted)


def _masked(f: Loss, error: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """m times an error, and the error where m is not 0."""
    if f.mask is None:
        return error, error
    m = f.mask[:, None, :, None].to(error.dtype)
    kept = error.view(len(error), -1, f.mask.shape[1], f.inner).where(m != 0, 0)
    return (m * kept).view_as(error), kept.view_as(error)


def _sum_of(mask: torch.Tensor, n: int) -> torch.Tensor:
    """[B, 1] float64: S, the sum of a mask over all n elements."""
    return mask.sum(1, keepdim=True, dtype=torch.float64) * (n // max(1, mask.shape[1]))


def _is_nothing(f: Loss) -> bool:
    """Whether there are no elements, whose loss is 0."""
    if f.x0.numel():
        return False
    for result in (f.loss, f.total):
        if result is not None:
            result.zero_()
    return True


def _finish(f: Loss, sums: torch.Tensor, totals: torch.Tensor | None) -> None:
    """loss, and total under a mask, from the sums of a sample's blocks."""
    if totals is None:
        mean = sums.sum(1) / f.x0.shape[1]
    else:
        f.total.copy_(totals.sum(1))  # type: ignore[union-attr]
        mean = sums.sum(1) * _inverse(f.total)  # type: ignore[arg-type]
    f.loss.copy_(mean if f.weight is None else mean * f.weight)


def _target(f: Loss, target: torch.Tensor, q_sample: object) -> torch.Tensor:
    """The target by q_sample, whose x_t nobody wants here."""
    x_t = torch.empty_like(target)
    key = (f.seed, f.sample_id, f.draw)
    q_sample(Forward(x_t, target, f.x0, f.alpha_sigma, f.t, *key, kind=f.kind, noise=f.noise))  # type: ignore[operator, misc]
    return target
