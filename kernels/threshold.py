"""Dynamic thresholding: the factor that brings the quantile of a sample's |x0| back to 1, slot by slot.

    x0       = x0_from_x x + x0_from_out out                                          before any clip
    q        = v_k + w (v_{k+1} - v_k), v_k where w is 0,   k + w = quantile (N - 1),   v the sorted |x0|
    x0_scale = 1 / min(max(q, 1), largest)

`reverse_step` then takes x0 = clamp(x0_scale x0, -1, 1). The order statistics are exact: a radix select over
the bits of |x0|, whose order is that of the numbers, in four histograms of 8 bits and one minimum, each a
launch over all elements; they are counted with integer atomics, so no order of programs shows in the result.
A NaN lies above infinity. A sample has less than 2^31 elements.

Source: Saharia et al. 2022 (arXiv 2205.11487), sec. 2.3; the quantile is linear, as torch.quantile's.
"""

from __future__ import annotations

from ctypes import CDLL, c_int64
from typing import NamedTuple

import numpy as np
import torch

from . import cpu, layout
from ._blocks import cut, first_element, slot_row
from ._reverse_step_cpu import guided_out, predict_x0, runs
from ._triton import jit, tl
from .exact import add_term, first_term

BINS, PASSES = 256, 4


class Threshold(NamedTuple):
    """The operands of threshold, B slots of N elements; what `Step` has of the same name is the same.

    Attributes:
        x0_scale: [B] float32. Written for slots whose row thresholds, which all others leave alone.
        counts: [B, 5, 256] int32 scratch of the Triton kernels. Overwritten.
        x: [B, N] float32, dense. Read.
        out, coef, plan, row, cond_lane, uncond_lane, guidance_scale: as in `Step`.
    """

    x0_scale: torch.Tensor
    counts: torch.Tensor
    x: torch.Tensor
    out: torch.Tensor
    coef: torch.Tensor
    plan: torch.Tensor
    row: torch.Tensor
    cond_lane: torch.Tensor | None = None
    uncond_lane: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None

    @property
    def idle(self) -> int:
        """Index of the idle row."""
        return self.coef.shape[0] - 1


_BINS, _PASSES = tl.constexpr(BINS), tl.constexpr(PASSES)
_PLAN_WIDTH, _READS, _QUANTILE = (tl.constexpr(c) for c in (layout.PLAN_WIDTH, layout.READS, layout.QUANTILE))
_READS_THRESHOLD, _LARGEST = tl.constexpr(layout.READS_THRESHOLD), tl.constexpr(layout.LARGEST)
_X0_FROM_X, _X0_FROM_OUT = tl.constexpr(layout.X0_FROM_X), tl.constexpr(layout.X0_FROM_OUT)
_BITS, _UNIT = tl.constexpr(layout.QUANTILE_BITS), tl.constexpr(layout.QUANTILE_UNIT)
_FRACTION = tl.constexpr((1 << layout.QUANTILE_BITS) - 1)


@jit
def _bin_of(counts_ptr, rank):
    """Which bin holds the element of a rank, its rank there, and how many are in it."""
    counts = tl.load(counts_ptr + tl.arange(0, _BINS))
    below = tl.cumsum(counts, 0) <= rank
    place = tl.sum(below.to(tl.int32), 0)
    here = tl.sum(tl.where(tl.arange(0, _BINS) == place, counts, 0), 0)
    return place, rank - tl.sum(tl.where(below, counts, 0), 0), here


@jit
def _leading_bits(counts_ptr, position, PASSES: tl.constexpr):
    """The first 8 * PASSES bits of the order statistic, its rank among those alike, and their number."""
    rank = (position >> _BITS).to(tl.int32)
    bits = rank * 0
    here = rank * 0
    for i in tl.static_range(PASSES):
        place, rank, here = _bin_of(counts_ptr + i * _BINS, rank)
        bits = (bits << 8) | place
    return bits, rank, here


@jit
def _count_kernel(
    x_ptr, out_ptr, coef_ptr, plan_ptr, row_ptr, cond_ptr, uncond_ptr, scale_ptr, counts_ptr, num_rows, n,
    width, lane_size,
    PASS: tl.constexpr, LANES: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, lane = slot_row(slot, row_ptr, cond_ptr, num_rows, LANES)
    plan_ptr += row * _PLAN_WIDTH
    coef_ptr += row * width
    if (tl.load(plan_ptr + _READS) & _READS_THRESHOLD) != 0:
        position = tl.load(plan_ptr + _QUANTILE).to(tl.int64) * (n - 1)
        counts_ptr += slot * ((_PASSES + 1) * _BINS)
        start = first_element(BLOCK)
        offset = tl.arange(0, BLOCK)
        inside = offset < n - start
        x = tl.load(x_ptr + slot * n + start + offset, mask=inside, other=0.0)
        out = tl.load(out_ptr + lane * lane_size + start + offset, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            uncond_lane = tl.load(uncond_ptr + slot).to(tl.int64)
            if uncond_lane >= 0:
                other = out_ptr + uncond_lane * lane_size + start + offset
                uncond = tl.load(other, mask=inside, other=0.0).to(tl.float32)
                out = uncond + tl.load(scale_ptr + slot) * (out - uncond)
        x0 = first_term(tl.load(coef_ptr + _X0_FROM_X), x)
        x0 = add_term(x0, tl.load(coef_ptr + _X0_FROM_OUT), out)
        bits = x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        found, _, _ = _leading_bits(counts_ptr, position, PASS)
        if PASS == _PASSES:  # the next larger element
            above = tl.where(inside & (bits > found), bits, 0x7FFFFFFF)
            tl.atomic_min(counts_ptr + PASS * _BINS, tl.min(above, 0), sem="relaxed")
        else:
            alike = inside
            if PASS:
                alike = inside & ((bits >> (8 * (_PASSES - PASS))) == found)
            places = (bits >> (8 * (_PASSES - 1 - PASS))) & (_BINS - 1)
            added = tl.histogram(places, _BINS, mask=alike)
            bins = counts_ptr + PASS * _BINS + tl.arange(0, _BINS)
            tl.atomic_add(bins, added, mask=added > 0, sem="relaxed")


@jit
def _scale_kernel(
    x0_scale_ptr, coef_ptr, plan_ptr, row_ptr, cond_ptr, counts_ptr, num_rows, n, width, LANES: tl.constexpr
):
    slot = tl.program_id(0).to(tl.int64)
    row, _ = slot_row(slot, row_ptr, cond_ptr, num_rows, LANES)
    plan_ptr += row * _PLAN_WIDTH
    if (tl.load(plan_ptr + _READS) & _READS_THRESHOLD) != 0:
        position = tl.load(plan_ptr + _QUANTILE).to(tl.int64) * (n - 1)
        weight = (position & _FRACTION).to(tl.int32).to(tl.float32) * _UNIT
        counts_ptr += slot * ((_PASSES + 1) * _BINS)
        bits, rank, here = _leading_bits(counts_ptr, position, _PASSES)
        low = bits.to(tl.float32, bitcast=True)
        above = tl.load(counts_ptr + _PASSES * _BINS)
        last = (position >> _BITS) == n - 1
        high = tl.where((rank + 1 < here) | last, bits, above).to(tl.float32, bitcast=True)
        q = tl.where((weight == 0.0) | (high == low), low, low + weight * (high - low))
        q = tl.where(q < 1.0, 1.0, q)
        largest = tl.load(coef_ptr + row * width + _LARGEST)
        q = tl.where(q > largest, largest, q)
        tl.store(x0_scale_ptr + slot, tl.div_rn(1.0, q))


def threshold_triton(s: Threshold) -> None:
    """`threshold_torch` on a GPU or in Triton's interpreter."""
    batch, n = s.x.shape
    if not s.x.numel():
        return
    out, counts = s.out.contiguous(), s.counts
    counts.zero_()
    counts[:, PASSES].fill_(2**31 - 1)
    grid, options = cut(batch, n, out)
    del options["WIDTH"]
    rows = (s.coef, s.plan, s.row, s.cond_lane)
    sizes = (s.idle, n, s.coef.shape[1])
    lanes = s.cond_lane is not None
    for i in range(PASSES + 1):
        _count_kernel[grid](
            s.x, out, *rows, s.uncond_lane, s.guidance_scale, counts, *sizes, out.shape[1], PASS=i,
            LANES=lanes, GUIDED=s.uncond_lane is not None, **options,
        )  # fmt: skip
    _scale_kernel[(batch,)](
        s.x0_scale, *rows, counts, *sizes, LANES=lanes, num_warps=1, enable_fp_fusion=False
    )


def threshold_torch(s: Threshold) -> None:
    """The factor of every slot: the CPU's implementation, and that of devices without Triton."""
    native = cpu.library() if s.x.device.type == "cpu" else None
    if native is None:
        threshold_eager(s)
    else:
        threshold_native(native, s)


def threshold_native(native: CDLL, s: Threshold) -> None:
    """The compiled loop of reverse_step.cpp."""
    batch, n = s.x.shape
    halves = s.out.dtype == torch.bfloat16
    out = (s.out if halves else s.out.float()).contiguous()
    sizes = (batch, n, out.shape[1], s.idle, s.coef.shape[1])
    native.fd_threshold(
        *map(cpu.pointer, (s.x0_scale, s.x, out, *s[4:])), *map(c_int64, sizes), int(halves),
        torch.get_num_threads(),
    )  # fmt: skip


def threshold_eager(s: Threshold) -> None:
    """The same in torch and NumPy, sample by sample."""
    n = s.x.shape[1]
    for slots, row, lanes, uncond_lanes in runs(s):
        coef, plan = s.coef[row].tolist(), s.plan[row].tolist()
        if not n or not plan[layout.READS] & layout.READS_THRESHOLD:
            continue
        k, rest = divmod(plan[layout.QUANTILE] * (n - 1), 1 << layout.QUANTILE_BITS)
        weight = np.float32(rest) * np.float32(layout.QUANTILE_UNIT)
        largest = np.float32(coef[layout.LARGEST])
        for b, lane, uncond_lane in zip(range(slots.start, slots.stop), lanes, uncond_lanes, strict=True):
            some = slice(b, b + 1)
            out = guided_out(s, some, [lane], [uncond_lane], slice(0, n))
            bits = predict_x0(coef, s.x[some], out)[0].cpu().numpy().view(np.int32) & np.int32(0x7FFFFFFF)
            ranks = [k, min(k + 1, n - 1)]  # of the bits, whose order is that of the numbers
            low, high = np.partition(bits, ranks)[ranks].view(np.float32)
            q = low if weight == 0.0 or high == low else low + weight * (high - low)
            q = np.float32(1.0) if q < 1.0 else q
            s.x0_scale[b] = float(np.float32(1.0) / (largest if q > largest else q))


def threshold_reference(s: Threshold) -> None:
    """The formula in float64, by torch.quantile; x0_scale may be float64."""
    n = s.x.shape[1]
    for slots, row, lanes, uncond_lanes in runs(s):
        if not int(s.plan[row, layout.READS]) & layout.READS_THRESHOLD:
            continue
        a = s.coef[row].double()
        for b in range(slots.start, slots.stop):
            at = b - slots.start
            out = s.out[lanes[at], :n].double()
            if uncond_lanes[at] >= 0:
                uncond = s.out[uncond_lanes[at], :n].double()
                out = uncond + s.guidance_scale[b].double() * (out - uncond)  # type: ignore[index]
            x0 = a[layout.X0_FROM_X] * s.x[b].double() + a[layout.X0_FROM_OUT] * out
            quantile = float(s.plan[row, layout.QUANTILE]) * layout.QUANTILE_UNIT
            q = torch.quantile(x0.abs(), quantile).clamp(min=1.0).clamp(max=a[layout.LARGEST])
            s.x0_scale[b] = 1.0 / q
