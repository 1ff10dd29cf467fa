"""What the operators' gradients share: they are made in the forward pass, once, and multiplied behind it."""

from __future__ import annotations

from typing import Any

import torch

Half = tuple[torch.Tensor, torch.Tensor]


def only_once(name: str, remedy: str, *found: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Gradients that raise where they are differentiated again, in place of being taken for constants."""
    if not torch.is_grad_enabled():
        return found
    given = [a if a is None else a.detach().requires_grad_() for a in found]
    message = f"{name} has no second derivative; use {remedy} for it"
    native: Any = getattr(torch._C._functions, "DelayedError", None)  # not of torch's interface
    again = (
        _Refusal.apply(message, *given) if native is None else native(message.encode(), len(given))(*given)
    )
    return again if isinstance(again, tuple) else (again,)


class _Refusal(torch.autograd.Function):
    """Its operands, with a message in place of a derivative."""

    @staticmethod
    def forward(ctx: Any, message: str, *found: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.message = message
        return tuple(a if a is None else a.view_as(a) for a in found)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def is_kept_by_others() -> bool:
    """Whether hooks on saved tensors are at work, which may keep what they are given."""
    # not of torch's interface
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def halves(
    prediction: Half | None, variance: Half | None, *, is_learned: bool, is_shared: bool
) -> torch.Tensor:
    """The gradient of a network's output from its prediction's and its variance's; None for 0.

    Each is what the forward pass has saved, and [B] numbers that it is to be multiplied by. `is_shared` is
    what `is_kept_by_others` said in the forward pass.
    """
    if not is_learned:
        assert prediction is not None
        return _times_each(*prediction, is_shared)
    like, by = prediction or variance  # type: ignore[misc]
    if is_elsewhere(by):
        zeros, both = torch.zeros_like(like), (prediction, variance)
        return torch.cat([zeros if h is None else (h[0] * _each(*h)).to(like.dtype) for h in both], 1)
    shape = (like.shape[0], 2 * like.shape[1], *like.shape[2:])
    grad = torch.zeros(shape, dtype=like.dtype, device=like.device)
    for part, half in zip(grad.chunk(2, 1), (prediction, variance), strict=True):
        if half is not None:
            torch.mul(half[0], _each(*half), out=part)
    return grad


def is_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory of its own to write in or read by address: a transform's, a tracer's."""
    if type(tensor) is not torch.Tensor:
        return True
    try:
        tensor.data_ptr()
    except RuntimeError:  # such as vmap's, of autograd's is_grads_batched
        return True
    return False


def _each(saved: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """One number for each sample, as it meets the samples."""
    return each.view(-1, *[1] * (saved.dim() - 1))


def _times_each(saved: torch.Tensor, each: torch.Tensor, is_shared: bool) -> torch.Tensor:
    """A gradient that the forward pass has saved, times one number for each sample.

    In its own memory where the graph is not kept for another pass, so that training holds it once; a tracer
    plans memory itself.
    """
    is_kept: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    is_needed_again = is_shared or torch.is_grad_enabled() or is_kept()
    if is_needed_again or is_elsewhere(saved) or is_elsewhere(each):
        return (saved * _each(saved, each)).to(saved.dtype)
    return saved.mul_(_each(saved, each))
