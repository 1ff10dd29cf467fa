"""One reverse step of every slot, each at its own row of its table: x_t -> x_s, whatever the solver.

    out  = uncond + w (cond - uncond)                                     where the slot has an `uncond_lane`
    x0   = clip(x0_scale (x0_from_x x + x0_from_out out))           x0_scale: of dynamic thresholding, else 1
    z    = normal(seed, sample_id, draw, element)
    z    = z exp((f log_var_max + (1 - f) log_var_min) / 2),  f = (v + 1) / 2      with a learned variance v
    s'_j = sum_k from_state[j,k] s_k + from_x0[j] x0 + from_out[j] out + from_noise[j] z,  s = (x, registers)
    x'   = known_alpha known + known_sigma y  where mask,  else free_ratio x' + free_std y
                     after rows that end a step, where a part of the image is known; y = normal(domain 3)
    u    = c_in_next x'                                    the next input, cast, into the slot's lanes

Sums accumulate from left to right; a coefficient 0 is a term that is not there, and what only such terms need
is not read (layout.py). Rows come from fastdiff/table.py.

Source: Ho et al. 2020, eq. 7 and 11, and the papers that fastdiff/solvers/ name; Lugmayr et al. 2022, eq. 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import cpu, layout
from ._blocks import cut, first_element, slot_row
from ._reverse_step_cpu import step_eager, step_native
from ._reverse_step_reference import reverse_step_reference
from ._triton import jit, tl
from .exact import add_term, exact_exp, first_term
from .philox import DOMAIN_KNOWN, DOMAIN_STEP, normal_block

__all__ = ["Step", "reverse_step_reference", "reverse_step_torch", "reverse_step_triton"]


class Step(NamedTuple):
    """The operands of one reverse step, B slots of N elements.

    Attributes:
        x: [B, N] float32, dense. Updated.
        registers: [K, B, N] float32, dense; None where K = 0. Updated.
        out: [lanes, N], or [lanes, 2N] with a learned variance's v behind; float32, bfloat16 or float16.
        u: [lanes, N] of the network's dtype, dense; None where nobody reads it. Written where a row follows.
        coef, plan: a packed table (layout.py).
        row: [B] int32; past the end: the idle row. Read, never written.
        seed, sample_id: [B] int64.
        cond_lane: [B] int32, the slot's lane of out and u; -1: the slot is idle. None: lane b.
        uncond_lane: [B] int32, the lane of its unconditional evaluation; -1: no guidance. None: nowhere.
        guidance_scale: [B] float32; needed with `uncond_lane`.
        noise: [B, N] float32 in place of the drawn z.
        x0_scale: [B] float32 of threshold.py; needed where rows threshold x0.
        known: [B, N] float32, read after rows whose plan says so, which all others leave alone.
        mask: [B, N] uint8, not 0 where `known` holds; needed with it.
        preview: [B, N] float32. Overwritten with each slot's x0; idle slots leave it alone.
    """

    x: torch.Tensor
    registers: torch.Tensor | None
    out: torch.Tensor
    u: torch.Tensor | None
    coef: torch.Tensor
    plan: torch.Tensor
    row: torch.Tensor
    seed: torch.Tensor
    sample_id: torch.Tensor
    cond_lane: torch.Tensor | None = None
    uncond_lane: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    x0_scale: torch.Tensor | None = None
    known: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    preview: torch.Tensor | None = None

    @property
    def idle(self) -> int:
        """Index of the idle row."""
        return self.coef.shape[0] - 1

    @property
    def learned(self) -> bool:
        """Whether the network gives a learned variance."""
        return self.out.shape[1] == 2 * self.x.shape[1]


_HEAD, _PLAN_WIDTH = tl.constexpr(layout.HEAD), tl.constexpr(layout.PLAN_WIDTH)
_DRAW, _READS, _WRITES = tl.constexpr(layout.DRAW), tl.constexpr(layout.READS), tl.constexpr(layout.WRITES)
_C_IN_NEXT = tl.constexpr(layout.C_IN_NEXT)
_X0_FROM_X, _X0_FROM_OUT = tl.constexpr(layout.X0_FROM_X), tl.constexpr(layout.X0_FROM_OUT)
_CLIP_LO, _CLIP_HI = tl.constexpr(layout.CLIP_LO), tl.constexpr(layout.CLIP_HI)
_LOG_VAR_MIN, _LOG_VAR_MAX = tl.constexpr(layout.LOG_VAR_MIN), tl.constexpr(layout.LOG_VAR_MAX)
_READS_OUT, _READS_NOISE = tl.constexpr(layout.READS_OUT), tl.constexpr(layout.READS_NOISE)
_WRITES_U, _WRITES_X0 = tl.constexpr(layout.WRITES_U), tl.constexpr(layout.WRITES_X0)
_READS_LEARNED, _READS_CLIP = tl.constexpr(layout.READS_LEARNED), tl.constexpr(layout.READS_CLIP)
_READS_THRESHOLD, _READS_KNOWN = tl.constexpr(layout.READS_THRESHOLD), tl.constexpr(layout.READS_KNOWN)
_READS_KNOWN_NOISE = tl.constexpr(layout.READS_KNOWN_NOISE)
_KNOWN_ALPHA, _KNOWN_SIGMA = tl.constexpr(layout.KNOWN_ALPHA), tl.constexpr(layout.KNOWN_SIGMA)
_FREE_RATIO, _FREE_STD = tl.constexpr(layout.FREE_RATIO), tl.constexpr(layout.FREE_STD)
_DOMAIN_STEP, _DOMAIN_KNOWN = tl.constexpr(DOMAIN_STEP), tl.constexpr(DOMAIN_KNOWN)
# within one warp an element may be stored by another thread than the one that loaded it, with nothing but a
# shuffle between; larger programs exchange through shared memory, behind a barrier
_ONE_WARP = tl.constexpr(256)


@jit
def _reverse_step_kernel(
    x_ptr, reg_ptr, out_ptr, u_ptr, noise_ptr, coef_ptr, plan_ptr, row_ptr, seed_ptr, sample_id_ptr,
    cond_ptr, uncond_ptr, scale_ptr, x0_scale_ptr, known_ptr, mask_ptr, preview_ptr, num_rows, batch, n,
    K: tl.constexpr, LANES: tl.constexpr, GUIDED: tl.constexpr, LEARNED: tl.constexpr,
    GIVEN_NOISE: tl.constexpr, WRITE_U: tl.constexpr, THRESHOLD: tl.constexpr, KNOWN: tl.constexpr,
    PREVIEW: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, lane = slot_row(slot, row_ptr, cond_ptr, num_rows, LANES)
    plan_ptr += row * _PLAN_WIDTH
    coef_ptr += row * (_HEAD + (K + 1) * (K + 4))
    reads = tl.load(plan_ptr + _READS)
    writes = tl.load(plan_ptr + _WRITES)
    if PREVIEW:  # x0 of every row, whether the step needs it or not
        reads = tl.where((writes & _WRITES_X0) != 0, reads | 1 | _READS_OUT, reads)
    # scalars before the elements, whose loads then wait for one latency and not for several
    draw = tl.load(plan_ptr + _DRAW).to(tl.uint32)
    sample_id = tl.load(sample_id_ptr + slot).to(tl.uint32)
    seed = tl.load(seed_ptr + slot).to(tl.uint64)
    x0_from_x, x0_from_out = tl.load(coef_ptr + _X0_FROM_X), tl.load(coef_ptr + _X0_FROM_OUT)
    clip_lo, clip_hi = tl.load(coef_ptr + _CLIP_LO), tl.load(coef_ptr + _CLIP_HI)
    c_in_next = tl.load(coef_ptr + _C_IN_NEXT)
    terms = ()
    for i in tl.static_range((K + 1) * (K + 4)):
        terms += (tl.load(coef_ptr + _HEAD + i),)  # type: ignore[assignment]
    if GUIDED:
        uncond_lane = tl.load(uncond_ptr + slot).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    start = first_element(BLOCK)
    inside = offset < n - start
    own = slot * n + start
    state = (tl.load(x_ptr + own + offset, mask=inside & ((reads & 1) != 0), other=0.0),)
    for k in tl.static_range(K):
        register = reg_ptr + (slot + k * batch) * n + start + offset
        state += (tl.load(register, mask=inside & ((reads & (2 << k)) != 0), other=0.0),)  # type: ignore[assignment]
    reads_out = inside & ((reads & _READS_OUT) != 0)
    lane_out = out_ptr + lane * n * (1 + LEARNED) + start
    out = tl.load(lane_out + offset, mask=reads_out, other=0.0).to(tl.float32)
    if GUIDED and uncond_lane >= 0:
        other_out = out_ptr + uncond_lane * n * (1 + LEARNED) + start
        uncond = tl.load(other_out + offset, mask=reads_out, other=0.0).to(tl.float32)
        out = uncond + tl.load(scale_ptr + slot) * (out - uncond)

    if BLOCK <= _ONE_WARP:
        tl.debug_barrier()

    x0 = add_term(first_term(x0_from_x, state[0]), x0_from_out, out)
    if THRESHOLD and (reads & _READS_THRESHOLD) != 0:
        x0 = x0 * tl.load(x0_scale_ptr + slot)
    if (reads & _READS_CLIP) != 0:
        x0 = tl.clamp(x0, clip_lo, clip_hi, propagate_nan=tl.PropagateNan.ALL)
    if PREVIEW:
        tl.store(preview_ptr + own + offset, x0, mask=inside & ((writes & _WRITES_X0) != 0))

    z = tl.zeros((BLOCK,), tl.float32)
    if (reads & _READS_NOISE) != 0:
        if GIVEN_NOISE:
            z = tl.load(noise_ptr + own + offset, mask=inside, other=0.0)
        else:
            z = normal_block(start, draw, sample_id, _DOMAIN_STEP, seed, BLOCK, WIDTH)
        if LEARNED and (reads & _READS_LEARNED) != 0:
            v = tl.load(lane_out + n + offset, mask=inside, other=0.0).to(tl.float32)
            f = (v + 1.0) * 0.5
            low, high = tl.load(coef_ptr + _LOG_VAR_MIN), tl.load(coef_ptr + _LOG_VAR_MAX)
            z = exact_exp((f * high + (1.0 - f) * low) * 0.5) * z

    for j in tl.static_range(K + 1):
        total = first_term(terms[j * (K + 4)], state[0])
        for k in tl.static_range(1, K + 1):
            total = add_term(total, terms[j * (K + 4) + k], state[k])
        total = add_term(total, terms[j * (K + 4) + K + 1], x0)
        total = add_term(total, terms[j * (K + 4) + K + 2], out)
        total = add_term(total, terms[j * (K + 4) + K + 3], z)
        written = inside & ((writes & (1 << j)) != 0)
        if j == 0:
            if KNOWN and (reads & _READS_KNOWN) != 0:
                kept = tl.load(known_ptr + own + offset, mask=inside, other=0.0)
                kept = first_term(tl.load(coef_ptr + _KNOWN_ALPHA), kept)
                total = first_term(tl.load(coef_ptr + _FREE_RATIO), total)
                if (reads & _READS_KNOWN_NOISE) != 0:
                    y = normal_block(start, draw, sample_id, _DOMAIN_KNOWN, seed, BLOCK, WIDTH)
                    kept = add_term(kept, tl.load(coef_ptr + _KNOWN_SIGMA), y)
                    total = add_term(total, tl.load(coef_ptr + _FREE_STD), y)
                chosen = tl.load(mask_ptr + own + offset, mask=inside, other=0) != 0
                total = tl.where(chosen, kept, total)
            tl.store(x_ptr + own + offset, total, mask=written)
            if WRITE_U:
                feeds_u = inside & ((writes & _WRITES_U) != 0)
                u = (c_in_next * total).to(u_ptr.dtype.element_ty)
                tl.store(u_ptr + lane * n + start + offset, u, mask=feeds_u)
                if GUIDED:
                    guided = feeds_u & (uncond_lane >= 0)
                    tl.store(u_ptr + uncond_lane * n + start + offset, u, mask=guided)
        else:
            tl.store(reg_ptr + (slot + (j - 1) * batch) * n + start + offset, total, mask=written)


def reverse_step_triton(s: Step) -> None:
    """`reverse_step_torch` on a GPU or in Triton's interpreter."""
    batch, n = s.x.shape
    if not s.x.numel():
        return
    out = s.out.contiguous()
    grid, options = cut(batch, n, out, s.u)
    given = (None if a is None else a.contiguous() for a in (s.known, s.mask))
    _reverse_step_kernel[grid](
        s.x, s.registers, out, s.u, None if s.noise is None else s.noise.contiguous(), s.coef, s.plan, s.row,
        s.seed, s.sample_id, s.cond_lane, s.uncond_lane, s.guidance_scale, s.x0_scale, *given, s.preview,
        s.idle, batch, n, K=0 if s.registers is None else s.registers.shape[0],
        LANES=s.cond_lane is not None, GUIDED=s.uncond_lane is not None, LEARNED=s.learned,
        GIVEN_NOISE=s.noise is not None, WRITE_U=s.u is not None, THRESHOLD=s.x0_scale is not None,
        KNOWN=s.known is not None, PREVIEW=s.preview is not None, **options,
    )  # fmt: skip


def reverse_step_torch(s: Step) -> None:
    """One step of every slot, in place: the CPU's implementation, and that of devices without Triton.

    Traffic: 12 bytes per element at K = 0 with a bfloat16 network, 16 with a float32 one; at most 8 more
        per register in use, 5 where a part of the image is known, 4 for a preview.
    """
    native = cpu.library() if s.x.device.type == "cpu" else None
    if native is None:
        step_eager(s)
    else:
        step_native(native, s)
