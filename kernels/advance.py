"""The row counter: every slot goes to its next row, and the network's time with it. The only writer of rows.

    row[b] = min(row[b] + 1, last[b])
    t[lane] = T of the new row,   lane_row[lane] = the new row         for the slot's lanes

One program, so that a captured step needs no synchronisation between reading and writing rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import layout
from ._triton import jit, tl

_T = tl.constexpr(layout.T)
_BLOCK = 1024


class Advance(NamedTuple):
    """The operands of advance, B slots.

    Attributes:
        row: [B] int32. Updated.
        coef: [rows + 1, width] of a packed table.
        t: [lanes] of the network's time dtype. The lanes of slots are overwritten.
        last: [B] int32, each slot's idle row; None: the table's last row.
        cond_lane, uncond_lane: [B] int32 lanes, -1 for none; None: lane b, and no unconditional lane.
        lane_row: [lanes] int32 rows for gathering what is tabulated per row; None: nobody wants them.
    """

    row: torch.Tensor
    coef: torch.Tensor
    t: torch.Tensor
    last: torch.Tensor | None = None
    cond_lane: torch.Tensor | None = None
    uncond_lane: torch.Tensor | None = None
    lane_row: torch.Tensor | None = None


@jit
def _advance_kernel(
    row_ptr, coef_ptr, t_ptr, last_ptr, cond_ptr, uncond_ptr, lane_row_ptr, batch, num_rows, width,
    LAST: tl.constexpr, LANES: tl.constexpr, GUIDED: tl.constexpr, LANE_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    for first in range(0, batch, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < batch
        last = tl.zeros((BLOCK,), tl.int32) + num_rows
        if LAST:
            last = tl.load(last_ptr + slot, mask=inside, other=0)
        row = tl.load(row_ptr + slot, mask=inside, other=0)
        row = tl.where((row < 0) | (row >= last), last, row + 1)
        tl.store(row_ptr + slot, row, mask=inside)
        t = tl.load(coef_ptr + row.to(tl.int64) * width + _T, mask=inside, other=0.0).to(
            t_ptr.dtype.element_ty
        )
        lane = slot
        if LANES:
            lane = tl.load(cond_ptr + slot, mask=inside, other=-1)
        tl.store(t_ptr + lane, t, mask=inside & (lane >= 0))
        if LANE_ROW:
            tl.store(lane_row_ptr + lane, row, mask=inside & (lane >= 0))
        if GUIDED:
            lane = tl.load(uncond_ptr + slot, mask=inside, other=-1)
            tl.store(t_ptr + lane, t, mask=inside & (lane >= 0))
            if LANE_ROW:
                tl.store(lane_row_ptr + lane, row, mask=inside & (lane >= 0))


def advance_triton(a: Advance) -> None:
    """`advance_torch` on a GPU or in Triton's interpreter."""
    _advance_kernel[(1,)](
        a.row, a.coef, a.t, a.last, a.cond_lane, a.uncond_lane, a.lane_row, a.row.shape[0],
        a.coef.shape[0] - 1, a.coef.shape[1], LAST=a.last is not None, LANES=a.cond_lane is not None,
        GUIDED=a.uncond_lane is not None, LANE_ROW=a.lane_row is not None, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def advance_torch(a: Advance) -> None:
    """Every slot to its next row, and t with it: on the CPU, and on devices without Triton."""
    idle = a.coef.shape[0] - 1
    last = torch.full_like(a.row, idle) if a.last is None else a.last
    a.row.copy_(torch.where((a.row < 0) | (a.row >= last), last, a.row + 1))
    t = a.coef[a.row.long(), layout.T].to(a.t.dtype)
    if a.cond_lane is None:
        batch = a.row.shape[0]
        a.t[:batch] = t
        if a.lane_row is not None:
            a.lane_row[:batch] = a.row
    for lanes in (a.cond_lane, a.uncond_lane):
        if lanes is not None:
            held = lanes >= 0
            a.t[lanes[held].long()] = t[held]
            if a.lane_row is not None:
                a.lane_row[lanes[held].long()] = a.row[held]


def advance_reference(a: Advance) -> None:
    """The formula, slot by slot."""
    for b in range(a.row.shape[0]):
        last = a.coef.shape[0] - 1 if a.last is None else int(a.last[b])
        row = int(a.row[b])
        row = last if row < 0 or row >= last else row + 1
        a.row[b] = row
        for lanes, default in ((a.cond_lane, b), (a.uncond_lane, -1)):
            lane = default if lanes is None else int(lanes[b])
            if lane >= 0:
                a.t[lane] = a.coef[row, layout.T].to(a.t.dtype)
                if a.lane_row is not None:
                    a.lane_row[lane] = row
