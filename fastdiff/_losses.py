"""The operators of training: a noisy sample, the denoising loss and the bound's terms, arguments checked.

Their numbers are float32. On the CPU they take float64 as well, everything in it then, and compute the plain
formula with a gradient: what gradcheck needs, and what their float32 is measured by.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdiff import _direct, _dispatch
from fastdiff._arguments import integers, noise_key, require

_TARGETS = (None, *_dispatch.TARGETS)
_NETWORK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def q_sample(
    x0: torch.Tensor,
    alpha_sigma: torch.Tensor,
    t: torch.Tensor,
    seed: int | torch.Tensor,
    sample_ids: Sequence[int] | torch.Tensor | None,
    draw: int | torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    target: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A sample of q(x_t | x_0) with its noise drawn in the kernel, and what the network should predict.

        x_t = alpha_t x_0 + sigma_t z;   target: eps = z,  v = alpha_t z - sigma_t x_0,  x0 = x_0

    Args:
        x0: [B, ...] float32.
        alpha_sigma: [T, 2] float32 on x0's device: sqrt(alpha_bar), sqrt(1 - alpha_bar).
        t: [B] int64 rows of `alpha_sigma`; clamped into it on the device.
        seed: 64 bits, for all samples or [B].
        sample_ids: [B] in [0, 2^32); None for 0..B-1.
        draw: the optimisation step, an int or a tensor.
        noise: [B, ...] float32 used in place of the drawn z.
        target: None, "eps", "v" or "x0".
        dtype: dtype of x_t, by default x0's.

    Returns:
        x_t in `dtype`, and the target in float32 or None.

    Raises:
        ValueError: shape, dtype or device mismatch, before any launch.

    Source: Ho et al. 2020, eq. 4; Salimans and Ho 2022.
    """
    if target not in _TARGETS:
        raise ValueError(f"`target` must be one of {_TARGETS}, got {target!r}")
    _check(x0, t, None, ("alpha_sigma", alpha_sigma, 2), "noise", noise)
    batch = x0.shape[0]
    key, ids = noise_key(seed, batch if sample_ids is None else sample_ids, batch, x0.device)
    draws = integers("draw", draw, batch, x0.device)
    x_t, goal = torch.ops.fastdiff.q_sample(
        x0, alpha_sigma, t, key, ids, draws, _TARGETS.index(target), noise, dtype or x0.dtype
    )
    return x_t, None if target is None else goal


def denoising_loss(
    out: torch.Tensor,
    x0: torch.Tensor,
    alpha_sigma: torch.Tensor,
    t: torch.Tensor,
    seed: int | torch.Tensor,
    sample_ids: Sequence[int] | torch.Tensor | None,
    draw: int | torch.Tensor,
    *,
    target: str = "eps",
    weight: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sample's weighted mean squared error against what `q_sample` with the same key says to predict.

        loss_b = weight_b mean_i (out_i - target_i)^2;   eps = z,  v = alpha_t z - sigma_t x_0,  x0 = x_0
        under a mask  weight_b sum_i m_i (out_i - target_i)^2 / sum_i m_i,  0 where no m_i is above 0

    The noise is drawn again and never stored; the gradient of `out` comes from the same pass.

    Args:
        out: [B, C, ...] the network's prediction, float32, bfloat16 or float16, or [B, 2C, ...] with a
            variance behind it, which is not read. Its gradient is defined, 0 for the variance.
        x0: [B, C, ...] float32. Read where the target is v or x0; has no gradient.
        alpha_sigma: [T, 2] float32 on out's device: sqrt(alpha_bar), sqrt(1 - alpha_bar).
        t: [B] int64 rows of `alpha_sigma`; clamped into it on the device.
        seed, sample_ids, draw: the noise's key, as `q_sample` had it.
        target: "eps", "v" or "x0".
        weight: [B] float32; None for 1. Has no gradient.
        noise: [B, ...] float32 used in place of the drawn z.
        mask: where the loss looks, bool or float32 weights in [0, 1], of any shape that broadcasts to x0's:
            like x0, [B, 1, H, W], [H, W], [B, T, 1]. Each sample's mean is over its own mask: for one mean
            over all of a batch's, weigh samples by their masks' sums. What stands where it is 0, in `out` or
            elsewhere, does not matter, NaN included. Has no gradient.

    Returns:
        [B] of x0's dtype.

    Raises:
        ValueError: shape, dtype or device mismatch, before any launch.

    Traffic: reads `out`, writes its gradient, nothing else where the target is eps; a mask is read as it is,
        not expanded, unless a dimension of 1 lies between others, as in [B, C, 1, W], it is not dense, or a
        sample has 2^31 elements.
    Source: Ho et al. 2020, eq. 14; Salimans and Ho 2022.
    """
    if target not in _dispatch.TARGETS:
        raise ValueError(f"`target` must be one of {_dispatch.TARGETS}, got {target!r}")
    _check(x0, t, out, ("alpha_sigma", alpha_sigma, 2), "noise", noise)
    batch, device = x0.shape[0], x0.device
    if weight is not None:
        require("weight", weight, dtype=x0.dtype, device=device, shape=(batch,))
    if mask is not None:
        check_mask(mask, x0)
    key, ids = noise_key(seed, batch if sample_ids is None else sample_ids, batch, device)
    draws = integers("draw", draw, batch, device)
    kind = 1 + _dispatch.TARGETS.index(target)
    given = (None if a is None else a.detach() for a in (weight, noise))
    operands = (out, x0.detach(), alpha_sigma.detach(), t, key, ids, draws, kind, *given)
    if mask is None and device.type == "cpu" and not _direct.is_watched(operands):
        native = _direct.operators()
        found: torch.Tensor | None = None if native is None else native.denoising_loss(*operands)
        if found is not None:
            return found
    loss: torch.Tensor
    if mask is None:
        loss = torch.ops.fastdiff.denoising_loss(*operands, _wants_grad(out))[0]
    else:
        loss = torch.ops.fastdiff.masked_denoising_loss(*operands, _wants_grad(out), mask.detach())[0]
    return loss


def vlb_terms(
    x0: torch.Tensor,
    x_t: torch.Tensor,
    out: torch.Tensor,
    coef: torch.Tensor,
    t: torch.Tensor,
    *,
    detach_mean: bool = False,
) -> torch.Tensor:
    """Each sample's term of the variational bound at its time, in bits per dimension.

        t > 0: KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t));   t = 0: -log2 p(x_0 | x_1), in bins of 2/255

    Args:
        x0: [B, C, ...] float32, images in [-1, 1]. Has no gradient.
        x_t: [B, C, ...] float32, the noisy sample that the network saw. Has no gradient.
        out: [B, C, ...] the network's output, float32, bfloat16 or float16, or [B, 2C, ...] with a learned
            variance behind the prediction. Its gradient is defined and comes from the same pass.
        coef: [T, 8] float32 on x0's device (`fastdiff.train.bound.vlb_coefficients`).
        t: [B] int64 rows of `coef`; clamped into it on the device.
        detach_mean: give the prediction no gradient, the variance alone, as the hybrid loss does.

    Returns:
        [B] of x0's dtype.

    Raises:
        ValueError: shape, dtype or device mismatch, before any launch.

    Traffic: reads x0, x_t and `out`, writes the gradients that are wanted.
    Source: Ho et al. 2020, eq. 5, 7 and 13; Nichol and Dhariwal 2021, eq. 4, 15 and 16.
    """
    _check(x0, t, out, ("coef", coef, 8), "x_t", x_t)
    wants_grad = _wants_grad(out)
    wants = (wants_grad and not detach_mean, wants_grad and out.shape != x0.shape)
    operands = (x0.detach(), x_t.detach(), out if any(wants) else out.detach(), coef.detach(), t, *wants)
    vlb: torch.Tensor = torch.ops.fastdiff.vlb_terms(*operands)[0]
    return vlb


def _check(
    x0: torch.Tensor,
    t: torch.Tensor,
    out: torch.Tensor | None,
    rows: tuple[str, torch.Tensor, int],
    name: str,
    alike: torch.Tensor | None,
) -> None:
    """Refuse operands that do not belong together; x0's dtype is that of all numbers but the network's.

    Args:
        out: the network's output, where there is one.
        rows: the name of the table that t points into, it, and its columns.
        alike: a tensor of x0's shape, or None; `name` is its own.
    """
    if not (isinstance(x0, torch.Tensor) and x0.dtype == torch.float64 and x0.device.type == "cpu"):
        require("x0", x0, dtype=torch.float32, remedy="float64 is for the CPU")
    real, device = x0.dtype, x0.device
    if alike is not None:
        require(name, alike, dtype=real, device=device, shape=tuple(x0.shape))
    if out is not None:
        _check_out(out, x0)
    require(rows[0], rows[1], dtype=real, device=device, shape=(None, rows[2]))
    require("t", t, dtype=torch.int64, device=device, shape=(x0.shape[0],))


def _check_out(out: torch.Tensor, x0: torch.Tensor) -> None:
    """Refuse a network's output that does not belong to x0."""
    require("out", out, device=x0.device)
    shape = tuple(x0.shape)
    doubled = (*shape[:1], *(2 * c for c in shape[1:2]), *shape[2:])
    dtypes = (torch.float64,) if x0.dtype == torch.float64 else _NETWORK_DTYPES
    if tuple(out.shape) not in (shape, doubled) or out.dtype not in dtypes:
        raise ValueError(
            f"`out` must be {list(shape)}, or {list(doubled)} with a learned variance, of {dtypes}, "
            f"got {out.dtype} {list(out.shape)}; it is what the network returned for this x0"
        )


def check_mask(mask: torch.Tensor, x0: torch.Tensor) -> None:
    """Refuse a mask that does not belong to x0."""
    require("mask", mask, device=x0.device)
    shape = (1,) * (x0.dim() - mask.dim()) + tuple(mask.shape)
    fits = len(shape) == x0.dim() and all(a in (1, b) for a, b in zip(shape, x0.shape, strict=True))
    if not fits or mask.dtype not in (torch.bool, x0.dtype):
        raise ValueError(
            f"`mask` must be bool or {x0.dtype} and broadcast to {list(x0.shape)}, "
            f"got {mask.dtype} {list(mask.shape)}; `mask.bool()` or `mask[..., None]`, say"
        )


def _wants_grad(out: torch.Tensor) -> bool:
    return out.requires_grad and torch.is_grad_enabled()
