"""`group_norm_silu` on CPU tensors without the way through an operator, which is longer than a small image.

The dispatcher and a Python operator behind it cost about 40 µs; torch's own group_norm and SiLU take 10 µs
for 64x8x8. So small images go to these two, and larger ones straight to the compiled loop, where nobody looks
on (a compiler, a tracer, a transform, a mode). A compiler or an exporter always sees the one operator.
"""

from __future__ import annotations

import os
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch.autograd import forward_ad

from fastdiff._gradients import only_once
from fastdiff.kernels import cpu
from fastdiff.kernels._group_norm_cpu import affine_of, float32_of, norm_native, v_of

# elements up to which torch's two operators are faster, where a gradient is wanted, and in channels_last (one
# core of an AVX-512 Xeon; a factor of 0.5 to 0.8 without the first two, at 4 096 elements)
_FEW, _FEW_GRAD, _FEW_LAST = 2**15, 2**16, 2**10
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = "torch's group_norm and silu"
Vector = torch.Tensor | None
Operands = tuple[torch.Tensor, Vector, Vector, Vector, Vector, Vector, int, float, bool]


def _keys(*names: str) -> int | None:
    """A set of dispatch keys as a number; None where this torch does not say."""
    try:
        key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
        return int(reduce(or_, (keys(getattr(key, name)) for name in names)).raw_repr())
    except AttributeError:
        return None


# What torch dispatches on. An ordinary CPU tensor's keys (one made in inference mode has no Autograd), and
# those of a thread in which nothing intercepts: a subclass, a wrapped tensor, a mode, a tracer would add one.
_ORDINARY = (_keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"), _keys("CPU", "AutocastCPU"))
_UNWATCHED = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
# These are torch's own, not its interface: where one is missing, every call takes the operator.
_keys_of: Any = getattr(torch._C, "_dispatch_keys", None)
_intercepting: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_has_looks = None not in (
    *_ORDINARY,
    *_UNWATCHED,
    _keys_of,
    _intercepting,
    getattr(forward_ad, "_current_level", None),
)


def attempt(operands: Operands) -> torch.Tensor | None:
    """The operator's result; None where the operands, valid or not, or the surroundings need the long way."""
    x, eps = operands[0], operands[7]
    if torch.compiler.is_compiling() or not x.is_cpu or os.environ.get("FASTDIFF_BACKEND"):
        return None
    if not (2 <= x.dim() <= 5 and 0 < eps < float("inf")) or x.dtype not in DTYPES:
        return None
    numel, is_first, wants_grad = x.numel(), x.is_contiguous(), False
    if numel == 0 or not all(a is None or isinstance(a, torch.Tensor) for a in operands[1:6]):
        return None
    if torch.is_grad_enabled():
        wants_grad = any(a is not None and a.requires_grad for a in operands[:6])
    few = _FEW_LAST if not is_first else _FEW_GRAD if wants_grad else _FEW
    # without the loop, a gradient takes the operator, which saves the tensors that the loop's way saves:
    # checkpointing runs this again, and the background build may have ended by then
    if x.dtype == torch.float32 and (numel <= few or (not wants_grad and cpu.library() is None)):
        try:
            return _by_torch(operands, is_first, wants_grad)
        except RuntimeError:  # torch refuses them; the checks of the long way say why
            return None
    if not _is_direct(operands, is_first):
        return None
    batch, channels = x.shape[:2]
    layout = ((batch, channels, numel // (batch * channels)), not is_first)
    if wants_grad:
        y: torch.Tensor = _Differentiable.apply(layout, *operands)
        return y
    return _forward(layout, operands, None, None)


def _by_torch(operands: Operands, is_first: bool, wants_grad: bool) -> torch.Tensor | None:
    """By torch's own operators on [B, C, ...] memory: in channels_last its variance cancels."""
    x, residual, weight, bias, scale, shift, groups, eps, activation = operands
    for a in (scale, shift):
        if a is not None and (a.shape not in (x.shape[:2], (1, x.shape[1])) or a.dtype not in DTYPES):
            return None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return None
    v = x if residual is None else x + residual
    is_last = not is_first and lies_last(x)
    v = v if is_first else v.contiguous()
    if scale is None and shift is None:
        h = torch.group_norm(v, groups, weight, bias, eps)
    else:  # the batch laid out as channels makes the samples' parameters those of one call
        batch, channels = x.shape[:2]
        vectors = affine_of(weight, bias, scale, shift)
        gain, offset = (None if a is None else a.expand(batch, channels).reshape(-1) for a in vectors)
        flat = v.reshape(1, batch * channels, -1)
        h = torch.group_norm(flat, batch * groups, gain, offset, eps).view(v.shape)
    if activation:
        h = torch.nn.functional.silu(h, inplace=not wants_grad)
    return _to_last(h) if is_last else h


def _to_last(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with its channels last in memory."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_direct(operands: Operands, is_first: bool) -> bool:
    """Whether the compiled loop can read these operands as they lie, and nothing intercepts the call."""
    x, residual, weight, bias, scale, shift, groups, _, _ = operands
    if not _has_looks:
        return False
    shape = x.shape
    channels = shape[1]
    for a in (x, weight, bias, scale, shift, residual):
        if a is None:
            continue
        if _keys_of(a).raw_repr() not in _ORDINARY:
            return False
        if a is x:
            continue
        if a is residual:
            if a.shape != shape or a.stride() != x.stride() or a.dtype != x.dtype:
                return False
        elif a.dtype not in DTYPES or a.stride()[-1:] != (1,):
            return False
        elif a is weight or a is bias:
            if a.shape != (channels,):
                return False
        elif a.shape != shape[:2] and a.shape != (1, channels):
            return False
    return (
        groups > 0
        and channels % groups == 0
        and (is_first or lies_last(x))
        and _intercepting().raw_repr() in _UNWATCHED
        and forward_ad._current_level < 0
        and cpu.library() is not None
    )


def lies_last(x: torch.Tensor) -> bool:
    """Whether x lies in memory with its channels last, and not with its channels first as well."""
    if x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _forward(layout: Any, operands: Operands, mean: Vector, rstd: Vector) -> torch.Tensor:
    x, residual, *vectors, groups, eps, activation = operands
    v = v_of(x, residual)
    y = torch.empty_like(v)
    sizes, is_last = layout
    tensors = (y, mean, rstd, v, *float32_of(*vectors))
    norm_native(cpu.library(), tensors, sizes, groups, eps, activation, is_last)
    return y if y.dtype == x.dtype else y.to(x.dtype)


class _Differentiable(torch.autograd.Function):
    """The same with its gradient."""

    @staticmethod
    def forward(ctx: Any, layout: Any, *operands: Any) -> torch.Tensor:
        *tensors, ctx.groups, ctx.eps, ctx.activation = operands
        ctx.layout = layout
        mean, rstd = (_room(layout[0][0], ctx.groups) for _ in range(2))
        y = _forward(layout, operands, mean, rstd)
        ctx.save_for_backward(mean, rstd, *tensors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        with torch.no_grad():
            found = _Differentiable._first(ctx, grad)
        return None, *only_once("group_norm_silu", REMEDY, *found), None, None, None

    @staticmethod
    def _first(ctx: Any, grad: torch.Tensor) -> tuple[Vector, ...]:
        mean, rstd, x, residual, *vectors = ctx.saved_tensors
        if _keys_of(grad).raw_repr() not in _ORDINARY:  # vmap's, of is_grads_batched: its memory is elsewhere
            operands = (grad, *ctx.saved_tensors, ctx.groups, ctx.eps, ctx.activation)
            grad_x, sums = torch.ops.fastdiff.group_norm_silu_backward(*operands)
            return gradients(grad_x, sums, residual, *vectors)
        v, grad = v_of(x, residual), grad.float()
        if grad.stride() != v.stride():
            grad = torch.empty_like(v).copy_(grad)
        grad_x, sums = torch.empty_like(v), _room(2, *x.shape[:2])
        sizes, is_last = ctx.layout
        options = (ctx.groups, ctx.eps, ctx.activation, is_last)
        tensors = (None, mean, rstd, v, *float32_of(*vectors))
        norm_native(cpu.library(), tensors, sizes, *options, backward=(grad, grad_x, sums))
        grad_x = grad_x if grad_x.dtype == x.dtype else grad_x.to(x.dtype)
        return gradients(grad_x, sums, residual, *vectors)


def gradients(
    grad_x: torch.Tensor, sums: torch.Tensor, residual: Vector, weight: Vector, bias: Vector, scale: Vector,
    shift: Vector,
) -> tuple[Vector, ...]:  # fmt: skip
    """The gradients of x, residual, weight, bias, scale and shift from what the kernel leaves."""
    of_weight, of_bias, of_scale, of_shift = weight, bias, scale, shift
    if weight is not None or bias is not None:
        plain, along = (sums if scale is None else scale * sums).sum(1).unbind()
        of_weight = None if weight is None else along.to(weight.dtype)
        of_bias = None if bias is None else plain.to(bias.dtype)
    if scale is not None:
        by_scale = sums[1] if weight is None else weight * sums[1]
        by_scale = by_scale if bias is None else by_scale + bias * sums[0]
        of_scale = by_scale.sum_to_size(scale.shape).to(scale.dtype)
    if shift is not None:
        of_shift = sums[0].sum_to_size(shift.shape).to(shift.dtype)
    return grad_x, None if residual is None else grad_x.clone(), of_weight, of_bias, of_scale, of_shift


def _room(*shape: int) -> torch.Tensor:
    """What the compiled loop writes by its address, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")
