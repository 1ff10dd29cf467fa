"""The denoising loss and its error in one pass over the network's output; its noise is drawn again.

    loss_b = w_b / N sum_i (out_i - target_i)^2,    d loss_b / d out_i = 2 w_b / N (out_i - target_i)
    target: eps = z,  v = alpha_t z - sigma_t x_0,  x0 = x_0;   z = normal(seed, sample_id, draw, i), domain 2

The target has the bits of q_sample's, so a loss over stored noise differs in the order of its sum alone. Each
program leaves the sum over its block; their sum over a sample is taken in a fixed order. The error stays
without its factor 2 w_b / N, which at the size of an image would take a float16 gradient below its range.

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


def factor(n: int, weight: torch.Tensor | None) -> torch.Tensor | float:
    """The loss's gradient over the error: one number, or [B]."""
    return 2.0 / max(n, 1) if weight is None else weight * (2.0 / max(n, 1))


@jit
def _denoising_loss_kernel(
    sum_ptr, error_ptr, out_ptr, x0_ptr, alpha_sigma_ptr, t_ptr, seed_ptr, sample_id_ptr, draw_ptr,
    noise_ptr, levels, n,
    KIND: tl.constexpr, LEARNED: tl.constexpr, ERROR: tl.constexpr, GIVEN_NOISE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
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
    error = tl.where(inside, out - target_of(alpha, sigma, x0, z, KIND), 0.0)
    program = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    programs = tl.num_programs(1) * tl.num_programs(2)
    tl.store(sum_ptr + b * programs + program, tl.sum(error * error, 0))
    if ERROR:
        tl.store(error_ptr + own + offset, error.to(error_ptr.dtype.element_ty), mask=inside)


def denoising_loss_triton(f: Loss) -> None:
    """`denoising_loss_torch` on a GPU or in Triton's interpreter."""
    batch, n = f.x0.shape
    if not f.out.numel():
        f.loss.zero_()
        return
    grid, options = cut(batch, n, f.out)
    sums = torch.empty(batch, grid[1] * grid[2], dtype=torch.float32, device=f.out.device)
    _denoising_loss_kernel[grid](
        sums, f.error, f.out, f.x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw, f.noise,
        f.alpha_sigma.shape[0], n, KIND=f.kind, LEARNED=f.out.shape[1] != n, ERROR=f.error is not None,
        GIVEN_NOISE=f.noise is not None, **options,
    )  # fmt: skip
    _finish(f, sums)


def denoising_loss_torch(f: Loss) -> None:
    """Fill loss, and error if wanted: the CPU's implementation, and that of devices without Triton.

    Traffic: reads out once, writes its error once; x0 is read for the targets v and x0.
    """
    batch, n = f.x0.shape
    if not f.out.numel():
        f.loss.zero_()
        return
    native = cpu.library() if f.out.device.type == "cpu" else None
    if native is None:
        off = f.out[:, :n].float() - _target(f, torch.empty_like(f.x0), q_sample_torch)
        _finish(f, off.square().sum(1, keepdim=True, dtype=torch.float64))
        if f.error is not None:
            f.error.copy_(off)
        return
    error = f.error if f.error is None or f.error.dtype == torch.float32 else torch.empty_like(f.x0)
    sums = torch.empty(batch, native.fd_blocks(c_int64(n)), dtype=torch.float64, device="cpu")
    out = f.out if f.out.dtype == torch.float32 else f.out[:, :n].float()
    tensors = (sums, error, out, f.x0, f.noise, f.alpha_sigma, f.t)
    native.fd_denoising_loss(
        *map(cpu.pointer, (*tensors, f.seed, f.sample_id, f.draw)), c_int64(batch), c_int64(n),
        c_int64(out.shape[1]), c_int64(f.alpha_sigma.shape[0]), f.kind, torch.get_num_threads(),
    )  # fmt: skip
    _finish(f, sums)
    if f.error is not None and error is not f.error:
        f.error.copy_(error)  # type: ignore[arg-type]


def denoising_loss_reference(f: Loss) -> None:
    """The formula in float64; loss and error may be float64."""
    batch, n = f.x0.shape
    error = f.out[:, :n].double() - _target(
        f, torch.empty_like(f.x0, dtype=torch.float64), q_sample_reference
    )
    weight = f.loss.new_ones(batch, 1) if f.weight is None else f.weight[:, None]
    f.loss.copy_((weight.double() * error.square()).sum(1) / max(n, 1))
    if f.error is not None:
        f.error.copy_(error)


def _finish(f: Loss, sums: torch.Tensor) -> None:
    """loss from the sums of a sample's blocks."""
    mean = sums.sum(1) / f.x0.shape[1]
    f.loss.copy_(mean if f.weight is None else mean * f.weight)


def _target(f: Loss, target: torch.Tensor, q_sample: object) -> torch.Tensor:
    """The target by q_sample, whose x_t nobody wants here."""
    x_t = torch.empty_like(target)
    key = (f.seed, f.sample_id, f.draw)
    q_sample(Forward(x_t, target, f.x0, f.alpha_sigma, f.t, *key, kind=f.kind, noise=f.noise))  # type: ignore[operator, misc]
    return target
