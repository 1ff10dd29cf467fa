"""The CPU's operators without the way through Python, which costs 40 µs and 100 more with a gradient.

Where nobody looks on (a compiler, a tracer, a transform, a mode), an operator of torch's own kind takes the
call, once it is built (kernels/_torch_ops.py). Who looks on always sees the one operator.
"""

from __future__ import annotations

import os
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch.autograd import forward_ad

from fastdiff.kernels import _torch_ops
from fastdiff.kernels._group_norm_cpu import affine_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Vector = torch.Tensor | None
Operands = tuple[torch.Tensor, Vector, Vector, Vector, Vector, Vector, int, float, bool]


def _keys(*names: str) -> int | None:
    """A set of dispatch keys as a number; None where this torch does not say."""
    try:
        key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
        return int(reduce(or_, (keys(getattr(key, name)) for name in names)).raw_repr())
    except AttributeError:
        return None


# What torch dispatches on where nothing intercepts: a mode, a tracer, a transform would add a key.
_UNWATCHED = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
# These are torch's own, not its interface: where one is missing, every call takes the operator.
_intercepting: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_has_looks = None not in (*_UNWATCHED, _intercepting, getattr(forward_ad, "_current_level", None))


def operators() -> _torch_ops.Operators | None:
    """Those of torch's own kind, where nothing looks on; built in the background from the first call on."""
    if torch.compiler.is_compiling() or not _has_looks:
        return None
    if _intercepting().raw_repr() not in _UNWATCHED or forward_ad._current_level >= 0:
        return None
    return _torch_ops.operators()


def group_norm_silu(operands: Operands) -> torch.Tensor | None:
    """The operator's result; None where the operands, valid or not, or the surroundings need the long way.

    Until the operator is there, and where it cannot be built, torch's group_norm and SiLU take the call.

    Raises:
        RuntimeError: torch's, for an operand that is none of its kind.
    """
    if torch.compiler.is_compiling() or not operands[0].is_cpu:
        return None
    if (native := operators()) is not None:
        found: torch.Tensor | None = native.group_norm_silu(*operands)
        return found
    return None if _torch_ops.operators() else _by_torch(operands)


def _by_torch(operands: Operands) -> torch.Tensor | None:
    """By torch's own operators on [B, C, ...] memory: in channels_last its variance cancels."""
    x, residual, weight, bias, scale, shift, groups, eps, activation = operands
    if os.environ.get("FASTDIFF_BACKEND"):
        return None
    # half precision would be rounded between the two
    if not (2 <= x.dim() <= 5 and 0 < eps < float("inf")) or x.dtype != torch.float32 or x.numel() == 0:
        return None
    if not all(a is None or isinstance(a, torch.Tensor) for a in operands[1:6]):
        return None
    wants_grad = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in operands[:6])
    # checkpointing runs this again, and must find the same tensors saved when the build has ended by then
    if wants_grad and _torch_ops.library.is_coming():
        return None
    for a in (scale, shift):
        if a is not None and (a.shape not in (x.shape[:2], (1, x.shape[1])) or a.dtype not in DTYPES):
            return None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return None
    v = x if residual is None else x + residual
    v = v.contiguous()
    try:
        if scale is None and shift is None:
            h = torch.group_norm(v, groups, weight, bias, eps)
        else:  # the batch laid out as channels makes the samples' parameters those of one call
            batch, channels = x.shape[:2]
            vectors = affine_of(weight, bias, scale, shift)
            gain, offset = (None if a is None else a.expand(batch, channels).reshape(-1) for a in vectors)
            flat = v.reshape(1, batch * channels, -1)
            h = torch.group_norm(flat, batch * groups, gain, offset, eps).view(v.shape)
    except RuntimeError:  # torch mixes no dtypes; what else it refuses, the checks of the long way name
        return None
    if activation:
        h = torch.nn.functional.silu(h, inplace=not wants_grad)
    return _to_last(h) if lies_last(x) else h


def _to_last(x: torch.Tensor) -> torch.Tensor:
    """A copy of x with its channels last in memory."""
    if x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def lies_last(x: torch.Tensor) -> bool:
    """Whether x lies in memory with its channels last, and not with its channels first as well."""
    if x.is_contiguous():
        return False
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()
