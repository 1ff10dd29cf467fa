"""`reverse_step` as its formula stands, in float64: what every implementation is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import layout
from .philox import DOMAIN_KNOWN, DOMAIN_STEP, normal_reference

if TYPE_CHECKING:
    from .reverse_step import Step


def reverse_step_reference(s: Step) -> None:
    """The formula in float64, slot by slot, without the terms whose coefficient is 0.

    x, registers, u and preview may be float64.
    """
    batch, n = s.x.shape
    for b in range(batch):
        at = int(s.row[b])
        lane = b if s.cond_lane is None else int(s.cond_lane[b])
        if not 0 <= at < s.idle or lane < 0:
            continue
        a = s.coef[at].double()
        state = [s.x[b].double()] + ([] if s.registers is None else [r[b].double() for r in s.registers])
        k = len(state) - 1
        out = s.out[lane, :n].double()
        uncond_lane = -1 if s.uncond_lane is None else int(s.uncond_lane[b])
        if uncond_lane >= 0:
            uncond = s.out[uncond_lane, :n].double()
            out = uncond + s.guidance_scale[b].double() * (out - uncond)  # type: ignore[index]
        x0 = _dot(a[layout.X0_FROM_X : layout.X0_FROM_OUT + 1], [state[0], out])
        if s.x0_scale is not None and int(s.plan[at, layout.READS]) & layout.READS_THRESHOLD:
            x0 = x0 * s.x0_scale[b].double()
        x0 = x0.clamp(a[layout.CLIP_LO], a[layout.CLIP_HI])
        if s.preview is not None and int(s.plan[at, layout.WRITES]) & layout.WRITES_X0:
            s.preview[b] = x0
        key = (s.seed[b : b + 1], s.sample_id[b : b + 1], s.plan[at, layout.DRAW].reshape(1).long())
        if s.noise is not None:
            z = s.noise[b].double()
        else:
            z = normal_reference(s.x.new_empty(1, n, dtype=torch.float64), *key, DOMAIN_STEP)[0]
        lo, hi = a[layout.LOG_VAR_MIN], a[layout.LOG_VAR_MAX]
        if s.learned and (lo != 0 or hi != 0):
            f = (s.out[lane, n:].double() + 1) / 2
            z = z * torch.exp(0.5 * (f * hi + (1 - f) * lo))
        new = [_dot(a[layout.HEAD + j * (k + 4) :][: k + 4], [*state, x0, out, z]) for j in range(k + 1)]
        if s.known is not None and int(s.plan[at, layout.READS]) & layout.READS_KNOWN:
            y = normal_reference(s.x.new_empty(1, n, dtype=torch.float64), *key, DOMAIN_KNOWN)[0]
            kept = _dot(a[layout.KNOWN_ALPHA : layout.KNOWN_SIGMA + 1], [s.known[b].double(), y])
            free = _dot(a[layout.FREE_RATIO : layout.FREE_STD + 1], [new[0], y])
            new[0] = torch.where(s.mask[b] != 0, kept, free)  # type: ignore[index]
        s.x[b] = new[0]
        for j in range(k):
            s.registers[j, b] = new[j + 1]  # type: ignore[index]
        if s.u is not None and a[layout.C_IN_NEXT] != 0:
            for target in {lane, uncond_lane} - {-1}:
                s.u[target] = (a[layout.C_IN_NEXT] * new[0]).to(s.u.dtype)


def _dot(coefficients: torch.Tensor, values: list[torch.Tensor]) -> torch.Tensor:
    """sum of coefficient * value over the coefficients that are not 0."""
    terms = [a * value for a, value in zip(coefficients, values, strict=True) if a != 0]
    return sum(terms, torch.zeros_like(values[0]))
