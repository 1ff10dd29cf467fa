"""`vlb_terms` as its formula stands, in float64: what every implementation is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._vlb_cpu import (
    BITS,
    CLIP_HI,
    CLIP_LO,
    CUBIC,
    EDGE,
    GAP_AT_MAX,
    GAP_AT_MIN,
    HALF_BIN,
    LEAST,
    MEAN_WEIGHT,
    SLOPE,
    X0_FROM_OUT,
    X0_FROM_X,
    factors,
    rows,
)

if TYPE_CHECKING:
    from .vlb import Terms


def vlb_terms_reference(f: Terms) -> None:
    """The formula in float64, its gradient by autograd; vlb and the gradients may be float64."""
    if not f.x0.numel():
        f.vlb.zero_()
        return
    n, x0 = f.x0.shape[1], f.x0.double()
    row, first = rows(f, torch.float64)
    out = f.out.detach().double().requires_grad_()
    with torch.enable_grad():
        raw = row[X0_FROM_X] * f.x_t.double().where(row[X0_FROM_X] != 0, 0) + row[X0_FROM_OUT] * out[:, :n]
        error = x0 - raw.clamp(row[CLIP_LO], row[CLIP_HI])
        share = (out[:, n:] + 1) / 2 if out.shape[1] != n else x0.new_zeros(1, 1)
        gap = share * row[GAP_AT_MAX] + (1 - share) * row[GAP_AT_MIN]
        k = row[MEAN_WEIGHT] * torch.exp(gap / 2)
        kl = 0.5 * (torch.expm1(gap) - gap + (k * error) ** 2)
        p, q = (k * (error + h) for h in (HALF_BIN, -HALF_BIN))
        p, q = (z * (SLOPE + CUBIC * z**2) for z in (p, q))
        # sigmoid(p) - sigmoid(q), from the side where both are small
        sign = torch.where(error > 0, -1.0, 1.0)
        inner = (torch.sigmoid(sign * p) - torch.sigmoid(sign * q)).abs()
        probability = torch.where(x0 < -EDGE, p.sigmoid(), torch.where(x0 > EDGE, (-q).sigmoid(), inner))
        terms = torch.where(first, -probability.clamp(min=LEAST).log(), kl)
        vlb = terms.mean(1) * BITS
        (grad,) = torch.autograd.grad(vlb.sum(), out)
    f.vlb.copy_(vlb.detach())
    parts = zip(
        (f.grad_mean, f.grad_v), (grad[:, :n], grad[:, n:]), factors(f.coef.double(), f.t, n), strict=True
    )
    for written, part, factor in parts:
        if written is not None:
            written.copy_(part / factor[:, None])
