"""The public operators of a chain's step, of `fastdiff.ops`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastdiff import _dispatch
from fastdiff._arguments import noise_key, require

if TYPE_CHECKING:
    from fastdiff.kernels.layout import PackedTable


def reverse_step(
    x: torch.Tensor,
    out: torch.Tensor,
    table: PackedTable,
    row: torch.Tensor,
    seed: int | torch.Tensor = 0,
    sample_ids: Sequence[int] | torch.Tensor | None = None,
    *,
    registers: torch.Tensor | None = None,
    u: torch.Tensor | None = None,
    cond_lane: torch.Tensor | None = None,
    uncond_lane: torch.Tensor | None = None,
    guidance_scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    preview: torch.Tensor | None = None,
) -> torch.Tensor:
    """One reverse step of every slot, each at its own row of `table`: x_t -> x_s, in place.

        out = uncond + guidance_scale (cond - uncond)
        x0  = clip(r.x0_from_x x + r.x0_from_out out),   r = table[row[b]]
        x'  = r.from_state x + r.from_x0 x0 + r.from_out out + r.from_noise z(seed[b], sample_ids[b], r.draw)
        x'  = r.known_alpha known + r.known_sigma y  where mask, else  r.free_ratio x' + r.free_std y
        u   = r.c_in_next x'

    A table with dynamic thresholding takes x0 / s within [-1, 1] for clip(x0), s the quantile of |x0|; its
    factors are computed first, by launches of their own.

    Args:
        x: [B, ...] float32, dense. Updated in place.
        out: [lanes, ...] the network's output, or [lanes, 2C, ...] with a learned variance behind the
            prediction.
        table: a packed table on x's device (`SamplingTable.pack`).
        row: [B] int32 on x's device, 0 <= row <= num_rows; the last is the idle row. Read, never written.
        seed: 64 bits, for all slots or [B].
        sample_ids: [B] in [0, 2^32); None for 0..B-1.
        registers: [K, B, ...] float32, zero at the start of a chain; needed where the table has
            registers. Updated.
        u: [lanes, ...] of the network's dtype. Overwritten with the next row's input.
        cond_lane: [B] int32, the slot's lane of `out` and `u`; -1: the slot is idle. None: lane b.
        uncond_lane: [B] int32, the lane of its unconditional evaluation; -1: no guidance.
        guidance_scale: [B] float32, needed with `uncond_lane`.
        noise: [B, ...] float32 used in place of the drawn z.
        known: [B, ...] float32, a clean image of which a part is kept after the rows that the table was
            packed with as `endings`; y is noise of its own, of domain 3. None: endings are not looked at.
        mask: [B, ...] bool or uint8, where `known` is kept; needed with it.
        preview: [B, ...] float32. Overwritten with x0; idle slots leave theirs as it is.

    Returns:
        x.

    Raises:
        ValueError: shape, dtype or device mismatch, before any launch.

    Traffic: 12 bytes per element at K=0 with a bfloat16 network (16 with a float32 one), at most 8 more for
        each register in use, 5 more where a part is known, 4 for a preview.
    Source: Ho et al. 2020, eq. 7 and 11 (rows: fastdiff/solvers/ddpm.py).
    """
    require("x", x, dtype=torch.float32, dense=True)
    batch, sample = x.shape[0], tuple(x.shape[1:])
    for name, tensor in (("table.coef", table.coef), ("table.plan", table.plan)):
        require(name, tensor, device=x.device, remedy="use `table.to(x.device)`")
    require(
        "row",
        row,
        dtype=torch.int32,
        device=x.device,
        shape=(batch,),
        remedy="build it with `table.start(batch)`",
    )
    require("out", out, device=x.device)
    lanes = out.shape[0]
    wanted = (*((1 + table.learned) * c for c in sample[:1]), *sample[1:])
    if tuple(out.shape[1:]) != wanted or not out.is_floating_point():
        variance = "as this table's variance is learned" if table.learned else "as no variance is learned"
        raise ValueError(
            f"`out` must be [lanes, {', '.join(map(str, wanted))}] in floating point, {variance}, "
            f"got {list(out.shape)} {out.dtype}"
        )
    if table.registers and registers is None:
        raise ValueError(
            f"`registers` must be [{table.registers}, {batch}, ...] for this table; build zeros of that shape"
        )
    if registers is not None:
        require(
            "registers",
            registers,
            dtype=torch.float32,
            device=x.device,
            dense=True,
            shape=(table.registers, *x.shape),
        )
    if u is not None:
        require("u", u, device=x.device, dense=True, shape=(lanes, *sample))
    if cond_lane is None and uncond_lane is None and lanes != batch:
        raise ValueError(
            f"`out` has {lanes} lanes for {batch} slots; say with "
            f"`cond_lane` which lane belongs to which slot"
        )
    if uncond_lane is not None and (cond_lane is None or guidance_scale is None):
        raise ValueError("`uncond_lane` needs `cond_lane` and `guidance_scale`; give all three or none")
    for name, lane, dtype in (
        ("cond_lane", cond_lane, torch.int32),
        ("uncond_lane", uncond_lane, torch.int32),
        ("guidance_scale", guidance_scale, torch.float32),
    ):
        if lane is not None:
            require(name, lane, dtype=dtype, device=x.device, shape=(batch,))
    for name, given, dense in (("noise", noise, False), ("known", known, False), ("preview", preview, True)):
        if given is not None:
            require(name, given, dtype=torch.float32, device=x.device, shape=tuple(x.shape), dense=dense)
    if (known is None) != (mask is None):
        raise ValueError("`known` and `mask` belong together; give both or none")
    if mask is not None:
        require("mask", mask, device=x.device, shape=tuple(x.shape))
        if mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"`mask` must be bool or uint8, got {mask.dtype}; say `mask >= 0.5`")
    key, ids = noise_key(seed, batch if sample_ids is None else sample_ids, batch, x.device)
    if table.threshold and math.prod(sample) >= 2**31:
        raise ValueError(
            f"`x` must have less than 2^31 elements a sample where a table thresholds, got {list(x.shape)}"
        )
    torch.ops.fastdiff.reverse_step_(
        x, registers, out, u, table.coef, table.plan, row, key, ids, cond_lane, uncond_lane, guidance_scale,
        noise, table.threshold, known, mask, preview,
    )  # fmt: skip
    return x


def advance(
    row: torch.Tensor,
    table: PackedTable,
    t: torch.Tensor,
    *,
    last: torch.Tensor | None = None,
    cond_lane: torch.Tensor | None = None,
    uncond_lane: torch.Tensor | None = None,
    lane_row: torch.Tensor | None = None,
) -> None:
    """Every slot to its next row, and the network's times with it, on the device.

        row[b] = min(row[b] + 1, last[b]);   t[lane] = time of the new row

    Args:
        row: [B] int32. Updated in place.
        table: a packed table on the same device.
        t: [lanes] the network's times, of any dtype. The lanes of slots are overwritten.
        last: [B] int32, each slot's idle row; None: the table's.
        cond_lane, uncond_lane: [B] int32 lanes as in `reverse_step`.
        lane_row: [lanes] int32, each lane's row, for what is tabulated per row. Overwritten.

    Raises:
        ValueError: shape, dtype or device mismatch, before any launch.
    """
    require(
        "row", row, dtype=torch.int32, shape=(None,), dense=True, remedy="build it with `table.start(batch)`"
    )
    require("table.coef", table.coef, device=row.device, remedy="use `table.to(row.device)`")
    require("t", t, device=row.device, shape=(None,), dense=True)
    if cond_lane is None and t.shape[0] < row.shape[0]:
        raise ValueError(
            f"`t` must be [{row.shape[0]}] or longer, a time for each slot, got {list(t.shape)}; "
            "say with `cond_lane` which lane belongs to which slot"
        )
    for name, lanes in (("last", last), ("cond_lane", cond_lane), ("uncond_lane", uncond_lane)):
        if lanes is not None:
            require(name, lanes, dtype=torch.int32, device=row.device, shape=tuple(row.shape))
    if lane_row is not None:
        require("lane_row", lane_row, dtype=torch.int32, device=row.device, shape=tuple(t.shape), dense=True)
    torch.ops.fastdiff.advance_(row, table.coef, t, last, cond_lane, uncond_lane, lane_row)


def bound_reverse_step(*operands: Any) -> Callable[[torch.Tensor, torch.Tensor | None], bool] | None:
    """`reverse_step_` for rows that share all but `out` and `noise`; None where there is no quicker way."""
    from fastdiff.kernels import cpu
    from fastdiff.kernels._reverse_step_cpu import bound_native

    native = cpu.library() if os.environ.get("FASTDIFF_BACKEND", "torch") == "torch" else None
    *_, thresholds, _known, _mask, _preview = operands
    if native is None or thresholds:  # the factor of which is a row's own
        return None
    step = _dispatch._step_of(*operands)
    if step.x.device.type != "cpu" or step.out.dtype not in (torch.float32, torch.bfloat16):
        return None
    if step.u is not None and step.u.dtype != step.out.dtype:
        return None
    return bound_native(native, step)
