"""`reverse_step` without Triton: the compiled loop of cpu.cpp, and the same operations in torch and NumPy.

The formula stands in reverse_step.py. Both give its bits: separate multiplications and additions, in the same
order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import CDLL, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch

from . import cpu, layout
from .exact import exact_exp_numpy
from .philox import DOMAIN_KNOWN, DOMAIN_STEP, normal_numpy

if TYPE_CHECKING:
    from .reverse_step import Step

_PART = 32768  # elements, a multiple of 4: the temporaries stay in cache


def step_native(native: CDLL, s: Step) -> None:
    """The compiled loop; it knows networks of float32 and bfloat16, others it meets in float32."""
    batch, n = s.x.shape
    halves = s.out.dtype == torch.bfloat16 and (s.u is None or s.u.dtype == torch.bfloat16)
    out = (s.out if halves else s.out.float()).contiguous()
    u = s.u if s.u is None or halves or s.u.dtype == torch.float32 else s.u.float()
    noise, known, mask = (None if a is None else a.contiguous() for a in (s.noise, s.known, s.mask))
    tensors = (s.x, s.registers, out, u, noise, *s[4:12], s.x0_scale, known, mask, s.preview)
    native.fd_reverse_step(
        *map(cpu.pointer, tensors), c_int64(batch), c_int64(n), c_int64(out.shape[1]), c_int64(s.idle),
        0 if s.registers is None else s.registers.shape[0], int(halves), torch.get_num_threads(),
    )  # fmt: skip
    if s.u is not None and u is not s.u:
        s.u.copy_(u)  # type: ignore[arg-type]


def bound_native(native: CDLL, s: Step) -> Callable[[torch.Tensor, torch.Tensor | None], bool]:
    """`step_native` for rows that share their buffers, whose addresses are looked up once.

    A call takes a quarter of the operator's time, which is most of a small network's step on a CPU.

    Args:
        s: the operands, dense; `out` and `noise` stand for those of any row.

    Returns:
        A function of a row's own output and noise. It does nothing and returns False where they do not lie
        in memory as the kernel reads them.
    """
    own_out, own_noise = c_void_p(), c_void_p()
    x, registers, u, *rest = map(cpu.pointer, (s.x, s.registers, s.u, *s[4:12], *s[13:]))
    sizes = (c_int64(s.x.shape[0]), c_int64(s.x.shape[1]), c_int64(s.out.shape[1]), c_int64(s.idle))
    flags = (0 if s.registers is None else s.registers.shape[0], int(s.out.dtype == torch.bfloat16))
    arguments = (x, registers, own_out, u, own_noise, *rest, *sizes, *flags, torch.get_num_threads())
    run = native.fd_reverse_step
    kept = s._replace(out=s.out.new_empty(0))  # what the addresses are of

    def step(out: torch.Tensor, noise: torch.Tensor | None) -> bool:
        if out.dtype is not kept.out.dtype or not out.is_contiguous():
            return False
        if noise is not None and not noise.is_contiguous():
            return False
        own_out.value = out.data_ptr()
        own_noise.value = None if noise is None else noise.data_ptr()
        run(*arguments)
        return True

    return step


def step_eager(s: Step) -> None:
    """The same in torch for runs of slots at one row, in parts that stay in cache; reads rows on the host."""
    n = s.x.shape[1]
    for slots, row, lanes, uncond_lanes in runs(s):
        coef, plan = s.coef[row].tolist(), s.plan[row].tolist()
        step = max(1, _PART // max(n, 1))
        for b in range(slots.start, slots.stop, step):
            some = slice(b, min(b + step, slots.stop))
            here = slice(some.start - slots.start, some.stop - slots.start)
            for i in range(0, n, _PART):
                _step_part(s, coef, plan, some, lanes[here], uncond_lanes[here], slice(i, min(i + _PART, n)))


def runs(s: Any) -> Iterator[tuple[slice, int, list[int], list[int]]]:
    """Runs of neighbouring slots at one row, all guided or none: (slots, row, lanes, unconditional lanes)."""
    batch = s.x.shape[0]
    rows = [row if 0 <= row <= s.idle else s.idle for row in s.row.tolist()]
    cond = list(range(batch)) if s.cond_lane is None else s.cond_lane.tolist()
    uncond = [-1] * batch if s.uncond_lane is None else s.uncond_lane.tolist()
    kinds = [(row, lane < 0, other < 0) for row, lane, other in zip(rows, cond, uncond, strict=True)]
    first = 0
    for b in range(1, batch + 1):
        if b == batch or kinds[b] != kinds[first]:
            if rows[first] != s.idle and cond[first] >= 0:
                yield slice(first, b), rows[first], cond[first:b], uncond[first:b]
            first = b


def _step_part(
    s: Step,
    coef: list[float],
    plan: list[int],
    slots: slice,
    lanes: list[int],
    uncond_lanes: list[int],
    part: slice,
) -> None:
    """The formula for a run of slots at one row and a stretch of their elements."""
    reads, writes = plan[layout.READS], plan[layout.WRITES]
    preview = s.preview if writes & layout.WRITES_X0 else None
    if preview is not None:
        reads |= 1 | layout.READS_OUT | layout.READS_X0
    views = [s.x[slots, part]] + ([] if s.registers is None else [r[slots, part] for r in s.registers])
    k = len(views) - 1
    out = guided_out(s, slots, lanes, uncond_lanes, part) if reads & layout.READS_OUT else None
    x0 = None
    if reads & layout.READS_X0:
        x0 = predict_x0(coef, views[0], out)
        if s.x0_scale is not None and reads & layout.READS_THRESHOLD:
            x0 = x0 * s.x0_scale[slots, None]
        if reads & layout.READS_CLIP:
            x0 = x0.clamp(coef[layout.CLIP_LO], coef[layout.CLIP_HI])
        if preview is not None:
            preview[slots, part] = x0
    z = _noise(s, coef, plan, slots, lanes, part) if reads & layout.READS_NOISE else None
    feeds_u = s.u is not None and writes & layout.WRITES_U != 0
    new: list[Any] = []
    for j in range(k + 1):
        terms = coef[layout.HEAD + j * (k + 4) :][: k + 4]
        wanted = writes >> j & 1 or (j == 0 and feeds_u)
        new.append(_sum(terms, [*views, x0, out, z], views[j]) if wanted else None)
    if s.known is not None and reads & layout.READS_KNOWN:
        new[0] = _keep_known(s, coef, plan, slots, part, new[0])
    for j, value in enumerate(new):
        if value is not None and writes >> j & 1:
            views[j].copy_(value)
    if s.u is not None and feeds_u:
        first = (coef[layout.C_IN_NEXT] * new[0]).to(s.u.dtype)
        for b, targets in enumerate(zip(lanes, uncond_lanes, strict=True)):
            for lane in targets:
                if lane >= 0:
                    s.u[lane, part] = first[b]


def guided_out(s: Any, slots: slice, lanes: list[int], uncond_lanes: list[int], part: slice) -> torch.Tensor:
    """The network's output of a run of slots, with guidance where they have it."""
    out = _gather(s.out, lanes, part)
    if uncond_lanes[0] < 0:
        return out
    uncond = _gather(s.out, uncond_lanes, part)
    guided: torch.Tensor = uncond + s.guidance_scale[slots, None] * (out - uncond)
    return guided


def predict_x0(coef: list[float], x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """x0 before any clip."""
    return _sum(coef[layout.X0_FROM_X : layout.X0_FROM_OUT + 1], [x, out], x)


def _keep_known(
    s: Step, coef: list[float], plan: list[int], slots: slice, part: slice, x: torch.Tensor
) -> torch.Tensor:
    """The state after a row that ends a step, with its known part."""
    assert s.known is not None
    assert s.mask is not None
    y = None
    if plan[layout.READS] & layout.READS_KNOWN_NOISE:
        y = _drawn(s, plan, slots, part, DOMAIN_KNOWN)
    kept = _sum(coef[layout.KNOWN_ALPHA : layout.KNOWN_SIGMA + 1], [s.known[slots, part], y], x)
    free = _sum(coef[layout.FREE_RATIO : layout.FREE_STD + 1], [x, y], x)
    return torch.where(s.mask[slots, part] != 0, kept, free)


def _gather(a: torch.Tensor, lanes: list[int], part: slice) -> torch.Tensor:
    """Lanes of `a` as float32: a view where they are neighbours."""
    if lanes == list(range(lanes[0], lanes[0] + len(lanes))):
        return a[lanes[0] : lanes[0] + len(lanes), part].float()
    return a[lanes, part].float()


def _sum(coefficients: list[float], values: list[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """sum of coefficient * value from left to right over coefficients that are not 0; -0.0 without any."""
    total: Any = None
    for a, value in zip(coefficients, values, strict=True):
        if a != 0.0:
            product = a * value  # type: ignore[operator]
            total = product if total is None else total.add_(product)
    return torch.full_like(like, -0.0) if total is None else total


def _noise(
    s: Step, coef: list[float], plan: list[int], slots: slice, lanes: list[int], part: slice
) -> torch.Tensor:
    """z of a run of slots, drawn on the CPU or given, times the learned standard deviation if any."""
    z = _drawn(s, plan, slots, part, DOMAIN_STEP) if s.noise is None else s.noise[slots, part]
    if plan[layout.READS] & layout.READS_LEARNED and s.learned:
        n = s.x.shape[1]
        f = (_gather(s.out, lanes, slice(n + part.start, n + part.stop)) + 1.0) * 0.5
        y = (f * coef[layout.LOG_VAR_MAX] + (1.0 - f) * coef[layout.LOG_VAR_MIN]) * 0.5
        z = torch.from_numpy(exact_exp_numpy(y.cpu().numpy())).to(y.device) * z
    return z


def _drawn(s: Step, plan: list[int], slots: slice, part: slice, domain: int) -> torch.Tensor:
    """Normals of a row and a run of slots, drawn on the CPU."""
    ids = s.sample_id[slots].cpu()
    shape = (slots.stop - slots.start, part.stop - part.start)
    z = torch.empty(shape, dtype=torch.float32, device="cpu")
    normal_numpy(z, s.seed[slots].cpu(), ids, torch.full_like(ids, plan[layout.DRAW]), domain, part.start)
    return z.to(s.x.device)
