"""The operator `group_norm_silu`: registered with torch, differentiable, its arguments checked."""

from __future__ import annotations

import math
import numbers
import os
from typing import Any

import torch

from fastdiff import _direct, _dispatch
from fastdiff._arguments import require
from fastdiff._gradients import only_once
from fastdiff.kernels import _torch_ops
from fastdiff.kernels._group_norm_cpu import affine_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Vector = torch.Tensor | None
Operands = tuple[torch.Tensor, Vector, Vector, Vector, Vector, Vector, int, float, bool]
_took_operator = [False]  # whether a gradient has gone the long way because the short one was being built

_PARAMETERS = (
    "Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, bool activation"
)
_dispatch._library.define(
    f"group_norm_silu(Tensor x, Tensor? residual, {_PARAMETERS}) -> (Tensor, Tensor, Tensor)"
)
_dispatch._library.define(
    "group_norm_silu_backward(Tensor grad, Tensor mean, Tensor rstd, Tensor x, Tensor? residual, "
    f"{_PARAMETERS}) -> (Tensor, Tensor)"
)


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: bool = True,
) -> torch.Tensor:
    """GroupNorm of x or x + residual, modulated, through SiLU.

        h = (GroupNorm(x + residual) weight + bias) scale + shift,   y = h sigmoid(h)

    Statistics and arithmetic are float32; results repeat bit for bit, on a CPU once its operator is built.
    Every operand has a gradient.

    Args:
        x: [B, C, ...] float32, bfloat16 or float16 with up to three further dimensions. Channels first or
            last in memory are read as they lie; anything else is copied.
        num_groups: divides C.
        weight, bias: [C], of any of these dtypes; None for 1 and 0.
        eps: positive, added to the variance.
        scale, shift: [B, C], or [1, C] for all samples alike; None for 1 and 0.
        residual: of x's shape and dtype.
        activation: False for y = h.

    Returns:
        x's shape, dtype and memory format.

    Raises:
        ValueError: shape, dtype or device mismatch, `num_groups` that does not divide C, eps that is not
            positive, before any launch.

    Traffic: reads x once where a group fits on chip, else twice; writes y once.
    Source: Wu and He 2018, eq. 1-4; Dhariwal and Nichol 2021, section 3.
    """
    operands = (x, residual, weight, bias, scale, shift, num_groups, eps, activation)
    if isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and x.is_cpu:
        try:
            if (done := _by_short_way(operands)) is not None:
                return done
        except (RuntimeError, TypeError):
            _check(*operands)  # in our words
            raise
    _check(*operands)
    y: torch.Tensor = torch.ops.fastdiff.group_norm_silu(*operands)[0]
    return y


def _by_short_way(operands: Operands) -> torch.Tensor | None:
    """The result of CPU tensors; None where these, valid or not, or the surroundings need the long way.

    Until the operator of torch's own kind is there, and where it cannot be built, torch's group_norm and SiLU
    take the call.

    Raises:
        RuntimeError, TypeError: torch's, for an operand that is none of its kind.
    """
    if _direct.is_watched(operands[:6]):
        return None
    library = _torch_ops.library
    is_coming = library.loaded is None and library.is_coming()  # asked before it may end
    if (native := _direct.operators()) is not None:
        found: torch.Tensor | None = native.group_norm_silu(*operands)
        return found
    return _by_torch(operands, is_coming)


def _by_torch(operands: Operands, is_coming: bool) -> torch.Tensor | None:
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
    # checkpointing runs this again, and must find the same tensors saved, however the build has ended by then
    _took_operator[0] |= wants_grad and is_coming
    if wants_grad and _took_operator[0]:
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


def _check(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, num_groups: int, eps: float, _: bool,
) -> None:  # fmt: skip
    """Refuse what `group_norm_silu` refuses."""
    require("x", x)
    if not 2 <= x.dim() <= 5 or x.dtype not in DTYPES:
        raise ValueError(
            f"`x` must be [B, C, ...] with 2 to 5 dimensions of {DTYPES}, got {x.dim()} of {x.dtype}"
        )
    batch, channels = x.shape[:2]
    if not isinstance(num_groups, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"`num_groups` must be an int, got {num_groups!r}")
    if not isinstance(eps, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"`eps` must be a number, got {eps!r}")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"`num_groups` must be positive and divide the {channels} channels, got {num_groups}"
        )
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"`eps` must be positive and finite, got {eps}")
    for name, vector in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if vector is None:
            continue
        require(name, vector, device=x.device)
        lead = () if name in ("weight", "bias") else (1 if vector.shape[:1] == (1,) else batch,)
        require(name, vector, shape=(*lead, channels))
        if vector.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be of {DTYPES}, got {vector.dtype}")
    if residual is not None:
        require("residual", residual, dtype=x.dtype, device=x.device, shape=tuple(x.shape))


def _like(x: torch.Tensor) -> torch.Tensor:
    """Room of x's shape with its channels where x has them."""
    if not lies_last(x):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty(x.movedim(1, -1).shape, dtype=x.dtype, device=x.device).movedim(-1, 1)


def _flat(x: torch.Tensor | None, last: bool) -> torch.Tensor | None:
    """[B, C, N], or [B, N, C] where `last`, dense; a view where x already lies so."""
    if x is None:
        return None
    n = math.prod(x.shape[2:])
    if last:
        return x.movedim(1, -1).contiguous().view(x.shape[0], n, x.shape[1])
    return x.contiguous().view(x.shape[0], x.shape[1], n)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, groups: int, eps: float, activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from fastdiff.kernels.group_norm import Norm

    vectors = (weight, bias, scale, shift)
    y, mean, rstd = _forward_fake(x, residual, *vectors, groups, eps, activation)
    last = lies_last(x)
    small = map(_dispatch._dense, vectors)
    operands = Norm._make(
        (
            _flat(y, last),
            mean,
            rstd,
            _flat(x, last),
            _flat(residual, last),
            *small,
            groups,
            eps,
            activation,
            last,
        )
    )
    _dispatch._run("group_norm_silu", x.device, operands)
    return y, mean, rstd


def _forward_fake(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, groups: int, eps: float, activation: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    mean, rstd = (torch.empty(x.shape[0], groups, dtype=torch.float32, device=x.device) for _ in range(2))
    return _like(x), mean, rstd


def _backward(
    grad: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, x: torch.Tensor,
    residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, groups: int, eps: float, activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from fastdiff.kernels.group_norm_backward import NormGrad

    vectors = (weight, bias, scale, shift)
    grad_x, sums = _backward_fake(grad, mean, rstd, x, residual, *vectors, groups, eps, activation)
    last = lies_last(x)
    own = (_dispatch._dense(a) for a in (mean, rstd))
    elements = (_flat(x, last), _flat(residual, last))
    rest = (*map(_dispatch._dense, vectors), groups, eps, activation, last)
    operands = NormGrad._make((_flat(grad_x, last), sums, _flat(grad, last), *own, *elements, *rest))
    _dispatch._run("group_norm_silu_backward", x.device, operands)
    return grad_x, sums


def _backward_fake(
    grad: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, x: torch.Tensor,
    residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    scale: torch.Tensor | None, shift: torch.Tensor | None, groups: int, eps: float, activation: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _like(x), torch.empty(2, *x.shape[:2], dtype=torch.float32, device=x.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.groups, ctx.eps, ctx.activation = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(mean, rstd, *tensors)


def _gradients(
    ctx: Any, grad: torch.Tensor | None, _mean: None, _rstd: None
) -> tuple[torch.Tensor | None, ...]:
    """dv for x and residual, and what the sums over positions say of the parameters."""
    if grad is None:
        return (None,) * 9
    mean, rstd, *tensors = ctx.saved_tensors
    with torch.no_grad():
        grad_x, sums = torch.ops.fastdiff.group_norm_silu_backward(
            grad, mean, rstd, *tensors, ctx.groups, ctx.eps, ctx.activation
        )
        found = _parts(grad_x, sums, *tensors[1:])
    return *only_once("group_norm_silu", "torch's group_norm and silu", *found), None, None, None


def _parts(
    grad_x: torch.Tensor, sums: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None,
    bias: torch.Tensor | None, scale: torch.Tensor | None, shift: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:  # fmt: skip
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


_dispatch._register("group_norm_silu", _forward, _forward_fake)
_dispatch._register("group_norm_silu_backward", _backward, _backward_fake)
torch.library.register_autograd(
    "fastdiff::group_norm_silu", _gradients, setup_context=_setup, lib=_dispatch._library
)
