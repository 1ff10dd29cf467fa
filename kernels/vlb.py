"""The terms of the variational bound, in bits per dimension, and their gradient in one pass.

    t > 0   KL(q(x_{t-1} | x_t, x_0), p(x_{t-1} | x_t)) = mean_i (exp(g) - 1 - g + exp(g) m^2) / (2 ln 2)
    t = 0   -log2 p(x_0 | x_1), mean over i, by the discretised Gaussian below
    x0_hat = clip(x0_from_x x_t + x0_from_out out),   m = w (x_0 - x0_hat),   w = c / s
    g = ln s^2 - (f log_var_max + (1 - f) log_var_min),   f = (v + 1) / 2

s^2 is the posterior's variance and c the coefficient of x_0 in its mean, so that x_t drops out of the
difference of the two means. At t = 0, where c = 1 and s is `posterior_log_variance_clipped`'s, with
k = w exp(g/2) and h = 1/255,

    P = F(k (x_0 - x0_hat + h)) - F(k (x_0 - x0_hat - h)),   F(z) = logistic(2 sqrt(2/pi) (z + 0.044715 z^3))

where the first is 1 if x_0 > 0.999, the second 0 if x_0 < -0.999, and P at least 1e-12. With p, q the
arguments of the two logistics, P = (1 - exp(q - p)) / ((1 + exp(-p)) (1 + exp(q))), which does not cancel.
These quotients are the one operation here that a GPU may round by 2 units in the last place.

Source: Ho et al. 2020, eq. 5, 7 and 13; Nichol and Dhariwal 2021, eq. 15; the tanh form is Page 1977's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from . import cpu
from ._blocks import cut, first_element
from ._triton import jit, tl
from ._vlb_cpu import (
    BITS,
    CLIP_HI,
    CLIP_LO,
    CUBIC,
    EDGE,
    GAP_AT_MAX,
    GAP_AT_MIN,
    HALF_BIN,
    HALF_BIN_SQUARED,
    LEAST,
    MEAN_WEIGHT,
    SIX_CUBIC,
    SLOPE,
    WIDTH,
    X0_FROM_OUT,
    X0_FROM_X,
    factors,
    terms_eager,
    terms_native,
)
from ._vlb_reference import vlb_terms_reference
from .exact import exact_exp, exact_exp_rest
from .philox import minus_two_log

__all__ = [
    "Terms",
    "factors",
    "pack",
    "vlb_terms_reference",
    "vlb_terms_torch",
    "vlb_terms_triton",
]

_HALF_BIN, _HALF_BIN_SQUARED, _EDGE, _LEAST, _SLOPE, _CUBIC, _SIX_CUBIC, _WIDTH = (
    tl.constexpr(c) for c in (HALF_BIN, HALF_BIN_SQUARED, EDGE, LEAST, SLOPE, CUBIC, SIX_CUBIC, WIDTH)
)


class Terms(NamedTuple):
    """The operands of vlb_terms, B samples of N elements.

    Attributes:
        vlb: [B] float32, bits per dimension. Overwritten.
        grad_mean: [B, N] of out's dtype, dense: d vlb_b / d out of the prediction over its `factors`; None
            where not wanted. Overwritten.
        grad_v: the same of the variance's half of out.
        x0: [B, N] float32, dense, images in [-1, 1] of 256 levels where t = 0.
        x_t: [B, N] float32, dense. Not read where x0_from_x is 0.
        out: [B, N] or [B, 2N] float32, bfloat16 or float16, dense: the prediction, then v.
        coef: [T, WIDTH] float32 (`pack`).
        t: [B] int64, a row of `coef`; clamped into it.
    """

    vlb: torch.Tensor
    grad_mean: torch.Tensor | None
    grad_v: torch.Tensor | None
    x0: torch.Tensor
    x_t: torch.Tensor
    out: torch.Tensor
    coef: torch.Tensor
    t: torch.Tensor


def pack(
    x0_from_x: np.ndarray, x0_from_out: np.ndarray, posterior_mean_coef1: np.ndarray,
    posterior_log_variance: np.ndarray, log_var_min: np.ndarray, log_var_max: np.ndarray,
    clip: tuple[float, float] | None = None, dtype: torch.dtype = torch.float32,
) -> torch.Tensor:  # fmt: skip
    """The rows of `coef` from float64 columns [T], each coefficient rounded to `dtype` once."""
    coef = np.zeros((len(x0_from_x), WIDTH))
    coef[:, X0_FROM_X], coef[:, X0_FROM_OUT] = x0_from_x, x0_from_out
    coef[:, CLIP_LO], coef[:, CLIP_HI] = clip or (-np.inf, np.inf)
    coef[:, MEAN_WEIGHT] = posterior_mean_coef1 * np.exp(-0.5 * posterior_log_variance)
    coef[:, GAP_AT_MIN] = posterior_log_variance - log_var_min
    coef[:, GAP_AT_MAX] = posterior_log_variance - log_var_max
    return torch.from_numpy(coef).to(dtype)


@jit
def _kl(error, gap, weight):
    """A term in nats, and its derivatives by gap and, over weight^2, by x0_hat."""
    power, less, rest = exact_exp_rest(gap)
    m = weight * error
    square = power * (m * m)
    return 0.5 * (rest + square), 0.5 * (less + square), -(power * error)


@jit
def _nll(x0, error, gap, weight):
    """The same at t = 0."""
    root = exact_exp(0.5 * gap)
    k = weight * root
    a, b = k * (error + _HALF_BIN), k * (error - _HALF_BIN)
    aa, bb = _CUBIC * (a * a), _CUBIC * (b * b)
    span = (2 * _HALF_BIN) * k
    bend = (_CUBIC * (k * k)) * (3.0 * (error * error) + _HALF_BIN_SQUARED)
    above, below = x0 > _EDGE, x0 < -_EDGE
    e_p = tl.where(above, 0.0, exact_exp(-(a * (_SLOPE + aa))))
    e_q = tl.where(below, 0.0, exact_exp(b * (_SLOPE + bb)))
    e_y, less, _ = exact_exp_rest(-(span * (_SLOPE + bend)))
    e_y = tl.where(above | below, 0.0, e_y)
    top = tl.where(above | below, 1.0, -less)
    from_p, from_q = 1.0 + e_p, 1.0 + e_q
    bottom = from_p * from_q
    p = top / bottom
    term = 0.5 * minus_two_log(tl.maximum(p, _LEAST))
    term = tl.where(p == p, term, p)
    s_p, s_q, s_y = e_p * from_q / bottom, e_q * from_p / bottom, e_y / top
    rise_p, rise_q = _SLOPE + 3.0 * aa, _SLOPE + 3.0 * bb
    by_log_k = s_p * (a * rise_p) - s_q * (b * rise_q) + s_y * (span * (_SLOPE + 3.0 * bend))
    by_error = (root * (1.0 / weight)) * (
        s_p * rise_p - s_q * rise_q + s_y * (span * (_SIX_CUBIC * (k * error)))
    )
    return term, tl.where(p < _LEAST, 0.0, -0.5 * by_log_k), tl.where(p < _LEAST, 0.0, by_error)


@jit
def _block_of(
    sum_ptr, grad_mean_ptr, grad_v_ptr, x0_ptr, x_t_ptr, out_ptr, row, b, n,
    FIRST: tl.constexpr, LEARNED: tl.constexpr, GRAD_MEAN: tl.constexpr, GRAD_V: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a program does at t = 0, or where t > 0."""
    from_x, from_out = tl.load(row), tl.load(row + 1)
    low, high = tl.load(row + 2), tl.load(row + 3)
    weight, gap_at_min, gap_at_max = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    offset = tl.arange(0, BLOCK)
    start = first_element(BLOCK)
    inside = offset < n - start
    own = b * n + start
    lane = own
    if LEARNED:
        lane = own + b * n
    x0 = tl.load(x0_ptr + own + offset, mask=inside, other=0.0)
    x_t = tl.zeros_like(x0)
    if from_x != 0.0:
        x_t = tl.load(x_t_ptr + own + offset, mask=inside, other=0.0)
    raw = from_x * x_t + from_out * tl.load(out_ptr + lane + offset, mask=inside, other=0.0).to(tl.float32)
    error = x0 - tl.clamp(raw, low, high, propagate_nan=tl.PropagateNan.ALL)
    gap = tl.zeros_like(x0) + gap_at_min
    if LEARNED:
        v = tl.load(out_ptr + lane + n + offset, mask=inside, other=0.0).to(tl.float32)
        f = (v + 1.0) * 0.5
        gap = f * gap_at_max + (1.0 - f) * gap_at_min
    if FIRST:
        term, by_gap, by_x0 = _nll(x0, error, gap, weight)
    else:
        term, by_gap, by_x0 = _kl(error, gap, weight)
    program = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    programs = tl.num_programs(1) * tl.num_programs(2)
    tl.store(sum_ptr + b * programs + program, tl.sum(tl.where(inside, term, 0.0), 0))
    if GRAD_MEAN:
        by_out = tl.where((raw >= low) & (raw <= high), by_x0, 0.0)
        tl.store(grad_mean_ptr + own + offset, by_out.to(grad_mean_ptr.dtype.element_ty), mask=inside)
    if GRAD_V:
        by_v = by_gap * (1.0 / tl.maximum(weight, 1.0))
        tl.store(grad_v_ptr + own + offset, by_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


@jit
def _vlb_terms_kernel(
    sum_ptr, grad_mean_ptr, grad_v_ptr, x0_ptr, x_t_ptr, out_ptr, coef_ptr, t_ptr, levels, n,
    LEARNED: tl.constexpr, GRAD_MEAN: tl.constexpr, GRAD_V: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    level = tl.load(t_ptr + b)
    level = tl.minimum(tl.maximum(level, 0), levels - 1)
    row = coef_ptr + level * _WIDTH  # in the order of X0_FROM_X, ..., GAP_AT_MAX
    # each path with its own loads and stores: what crosses a branch holds registers, at t > 0 as well
    if level == 0:
        _block_of(
            sum_ptr, grad_mean_ptr, grad_v_ptr, x0_ptr, x_t_ptr, out_ptr, row, b, n,
            True, LEARNED, GRAD_MEAN, GRAD_V, BLOCK,
        )  # fmt: skip
    else:
        _block_of(
            sum_ptr, grad_mean_ptr, grad_v_ptr, x0_ptr, x_t_ptr, out_ptr, row, b, n,
            False, LEARNED, GRAD_MEAN, GRAD_V, BLOCK,
        )  # fmt: skip


def vlb_terms_triton(f: Terms) -> None:
    """`vlb_terms_torch` on a GPU or in Triton's interpreter."""
    batch, n = f.x0.shape
    if not f.x0.numel():
        f.vlb.zero_()
        return
    grid, options = cut(batch, n, f.out)
    sums = torch.empty(batch, grid[1] * grid[2], dtype=torch.float32, device=f.x0.device)
    _vlb_terms_kernel[grid](
        sums, f.grad_mean, f.grad_v, f.x0, f.x_t, f.out, f.coef, f.t, f.coef.shape[0], n,
        LEARNED=f.out.shape[1] != n, GRAD_MEAN=f.grad_mean is not None, GRAD_V=f.grad_v is not None,
        **options,
    )  # fmt: skip
    f.vlb.copy_(sums.sum(1) * (BITS / n))


def vlb_terms_torch(f: Terms) -> None:
    """Fill vlb and the wanted gradients: the CPU's implementation, and that of devices without Triton.

    All numbers may be float64, and the arithmetic then is.

    Traffic: reads x0, x_t and out once, writes the gradients once.
    """
    if not f.x0.numel():
        f.vlb.zero_()
        return
    is_float32 = f.x0.device.type == "cpu" and f.x0.dtype == torch.float32
    native = cpu.library() if is_float32 else None
    if native is None:
        terms_eager(f)
    else:
        terms_native(native, f)
