"""Registers the operators with torch and sends each call to the kernel of its device; ops.py is the face."""

from __future__ import annotations

import logging
import math
import os
from contextlib import nullcontext
from functools import cache
from importlib import import_module
from typing import Any

import torch

from fastdiff._gradients import halves, is_kept_by_others, only_once

TARGETS = ("eps", "v", "x0")  # of q_sample: kind 1, 2, 3
_BACKENDS = ("torch", "triton")
# where an operator is not in the module of its name
_MODULES = {
    "normal": "philox",
    "vlb_terms": "vlb",
    "group_norm_silu": "group_norm",
    "group_norm_silu_backward": "group_norm_backward",
}

_library = torch.library.Library("fastdiff", "DEF")
_library.define("normal(Tensor seed, Tensor sample_id, Tensor draw, int domain, int numel) -> Tensor")
_library.define(
    "q_sample(Tensor x0, Tensor alpha_sigma, Tensor t, Tensor seed, Tensor sample_id, Tensor draw, int kind, "
    "Tensor? noise, ScalarType dtype) -> (Tensor, Tensor)"
)
_library.define(
    "denoising_loss(Tensor out, Tensor x0, Tensor alpha_sigma, Tensor t, Tensor seed, Tensor sample_id, "
    "Tensor draw, int kind, Tensor? weight, Tensor? noise, bool with_grad) -> (Tensor, Tensor)"
)
_library.define(
    "masked_denoising_loss(Tensor out, Tensor x0, Tensor alpha_sigma, Tensor t, Tensor seed, "
    "Tensor sample_id, Tensor draw, int kind, Tensor? weight, Tensor? noise, bool with_grad, Tensor mask) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "vlb_terms(Tensor x0, Tensor x_t, Tensor out, Tensor coef, Tensor t, bool grad_mean, bool grad_v) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "reverse_step_(Tensor(a!) x, Tensor(b!)? registers, Tensor out, Tensor(c!)? u, Tensor coef, Tensor plan, "
    "Tensor row, Tensor seed, Tensor sample_id, Tensor? cond_lane, Tensor? uncond_lane, "
    "Tensor? guidance_scale, Tensor? noise, bool threshold, Tensor? known, Tensor? mask, "
    "Tensor(d!)? preview) -> ()"
)
_library.define(
    "advance_(Tensor(a!) row, Tensor coef, Tensor(b!) t, Tensor? last, Tensor? cond_lane, "
    "Tensor? uncond_lane, Tensor(c!)? lane_row) -> ()"
)
_said: set[str] = set()


def _run(name: str, device: torch.device, *operands: Any, backend: str | None = None) -> None:
    """Run the implementation of an operator on tensors of `device`, whichever device is current.

    `backend` is the one that float64 needs, whatever is chosen; None for float32.
    """
    chosen = os.environ.get("FASTDIFF_BACKEND")
    if chosen and chosen not in _BACKENDS:
        raise ValueError(f"FASTDIFF_BACKEND must be one of {_BACKENDS} or unset, got {chosen!r}")
    if not chosen:
        chosen = "triton" if device.type == "cuda" and _has_triton() else "torch"
    kernel = _kernel(name, backend or chosen)
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        if device.type != "cuda":
            kernel(*operands)
            return
        with torch.cuda.device(device):
            kernel(*operands)


def _wide(x0: torch.Tensor, backend: str) -> str | None:
    """The backend of an operator's float64, where x0 is that."""
    return backend if x0.dtype == torch.float64 else None


def _kernel(name: str, backend: str) -> Any:
    """The function that implements an operator."""
    return getattr(_module(_MODULES.get(name, name)), f"{name}_{backend}")


@cache
def _module(name: str) -> Any:
    """A kernel's module, imported, and Triton with it, when first asked for."""
    return import_module(f"fastdiff.kernels.{name}")


def _has_triton() -> bool:
    """Whether Triton is there; its absence on a machine with a GPU is said once."""
    found: bool = import_module("fastdiff.kernels._triton").HAS_TRITON
    if not found and "triton" not in _said:
        _said.add("triton")
        logging.getLogger("fastdiff").warning(
            "Triton is not installed: CUDA tensors use the torch implementations, with noise drawn on the "
            "CPU; `pip install triton` for the fused kernels"
        )
    return found


def _dense(tensor: Any) -> Any:
    """A tensor as a kernel may read it, by address alone; None stays None."""
    return None if tensor is None else tensor.contiguous()


def _flat(tensor: Any, lead: int = 1) -> Any:
    """[..., N]: the sample's dimensions after the first `lead` as one; a view of a dense tensor."""
    if tensor is None:
        return None
    return tensor.flatten(lead) if tensor.dim() > lead else tensor.unsqueeze(-1)


def _normal(
    seed: torch.Tensor, sample_id: torch.Tensor, draw: torch.Tensor, domain: int, numel: int
) -> torch.Tensor:
    z = _normal_fake(seed, sample_id, draw, domain, numel)
    _run("normal", seed.device, z, _dense(seed), _dense(sample_id), _dense(draw), domain)
    return z


def _normal_fake(
    seed: torch.Tensor, sample_id: torch.Tensor, draw: torch.Tensor, domain: int, numel: int
) -> torch.Tensor:
    return torch.empty(seed.shape[0], numel, dtype=torch.float32, device=seed.device)


def _q_sample(
    x0: torch.Tensor, alpha_sigma: torch.Tensor, t: torch.Tensor, seed: torch.Tensor, sample_id: torch.Tensor,
    draw: torch.Tensor, kind: int, noise: torch.Tensor | None, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from fastdiff.kernels.q_sample import Forward

    x_t, target = _q_sample_fake(x0, alpha_sigma, t, seed, sample_id, draw, kind, noise, dtype)
    small = (_dense(a) for a in (alpha_sigma, t, seed, sample_id, draw))
    written = (_flat(x_t), _flat(target) if kind else None)
    operands = Forward._make((*written, _flat(_dense(x0)), *small, kind, _flat(_dense(noise))))
    _run("q_sample", x0.device, operands, backend=_wide(x0, "reference"))
    return x_t, target


def _q_sample_fake(
    x0: torch.Tensor, alpha_sigma: torch.Tensor, t: torch.Tensor, seed: torch.Tensor, sample_id: torch.Tensor,
    draw: torch.Tensor, kind: int, noise: torch.Tensor | None, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    x_t = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    return x_t, torch.empty(x0.shape if kind else (0,), dtype=x0.dtype, device=x0.device)


def _q_sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, alpha_sigma, t, _, _, _, ctx.kind, _, _ = inputs
    ctx.save_for_backward(alpha_sigma, t)


def _q_sample_backward(
    ctx: Any, grad_x_t: torch.Tensor, grad_target: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """dx_0 = alpha dx_t, and -sigma dv or dx0 of the target; the noise has no gradient."""
    alpha_sigma, t = ctx.saved_tensors
    shape = (-1, *[1] * (grad_x_t.dim() - 1))
    alpha, sigma = alpha_sigma[t.clamp(0, alpha_sigma.shape[0] - 1)].unbind(1)
    grad = alpha.view(shape) * grad_x_t.to(alpha.dtype)
    target = ctx.kind and TARGETS[ctx.kind - 1]
    if target == "v":
        grad = grad - sigma.view(shape) * grad_target
    if target == "x0":
        grad = grad + grad_target
    return grad, *[None] * 8


def _denoising_loss(
    out: torch.Tensor, x0: torch.Tensor, alpha_sigma: torch.Tensor, t: torch.Tensor, seed: torch.Tensor,
    sample_id: torch.Tensor, draw: torch.Tensor, kind: int, weight: torch.Tensor | None,
    noise: torch.Tensor | None, with_grad: bool, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    from fastdiff.kernels.denoising_loss import Loss

    small = (alpha_sigma, t, seed, sample_id, draw)
    results = _denoising_loss_fake(out, x0, *small, kind, weight, noise, with_grad, mask)
    elements = (_flat(results[1]) if with_grad else None, _flat(_dense(out)), _flat(_dense(x0)))
    masked = (None, 1, None) if mask is None else (*_rows_of_mask(mask, x0.shape), results[2])
    given = (_dense(weight), _flat(_dense(noise)), *masked)
    operands = Loss._make((results[0], *elements, *map(_dense, small), kind, *given))
    _run("denoising_loss", x0.device, operands, backend=_wide(x0, "reference"))
    return results


def _rows_of_mask(mask: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int]:
    """[B, M] and `inner`, as `kernels.denoising_loss.Loss` has them, of a mask that broadcasts to `shape`.

    A copy where it is not dense between its first and its last dimension of more than one number.
    """
    mask = mask[(None,) * (len(shape) - mask.dim())]
    kept = [d for d in range(1, len(shape)) if mask.shape[d] != 1]
    if math.prod(shape[1:]) >= 2**31:  # more than the kernel divides
        kept = list(range(1, len(shape)))
    first, end = (kept[0], kept[-1] + 1) if kept else (1, 1)
    rows = mask.expand(mask.shape[0], *mask.shape[1:first], *shape[first:end], *mask.shape[end:])
    rows = rows.reshape(mask.shape[0], math.prod(rows.shape[1:])).contiguous()
    rows = rows.view(torch.uint8) if mask.dtype == torch.bool else rows
    return rows.expand(shape[0], -1), math.prod(shape[end:])


def _denoising_loss_fake(
    out: torch.Tensor, x0: torch.Tensor, alpha_sigma: torch.Tensor, t: torch.Tensor, seed: torch.Tensor,
    sample_id: torch.Tensor, draw: torch.Tensor, kind: int, weight: torch.Tensor | None,
    noise: torch.Tensor | None, with_grad: bool, mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    loss = torch.empty(x0.shape[0], dtype=x0.dtype, device=x0.device)
    error = torch.empty(x0.shape if with_grad else (0,), dtype=out.dtype, device=x0.device)
    return (loss, error) if mask is None else (loss, error, torch.empty_like(loss))


def _denoising_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    if not inputs[10]:
        raise RuntimeError("denoising_loss was run with with_grad=False, so it has no gradient")
    ctx.is_learned = inputs[0].shape != inputs[1].shape
    ctx.numel, ctx.inputs = math.prod(inputs[1].shape[1:]), len(inputs)
    ctx.is_shared = is_kept_by_others()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or the engine fills a tensor of out's size with zeros
    ctx.save_for_backward(inputs[8], *output[1:])


def _denoising_loss_backward(
    ctx: Any, grad_loss: torch.Tensor | None, *_: None
) -> tuple[torch.Tensor | None, ...]:
    """The error that the loss's own pass has left, times each sample's factor, which float32 holds."""
    from fastdiff.kernels.denoising_loss import factor

    if grad_loss is None:
        return (None,) * ctx.inputs
    weight, error, *total = ctx.saved_tensors
    prediction = (error, factor(ctx.numel, weight, *total) * grad_loss)
    found = halves(prediction, None, is_learned=ctx.is_learned, is_shared=ctx.is_shared)
    again = only_once("denoising_loss", "q_sample's target and torch's operators", found)
    return *again, *[None] * (ctx.inputs - 1)


def _vlb_terms(
    x0: torch.Tensor, x_t: torch.Tensor, out: torch.Tensor, coef: torch.Tensor, t: torch.Tensor,
    grad_mean: bool, grad_v: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from fastdiff.kernels.vlb import Terms

    vlb, *grads = _vlb_terms_fake(x0, x_t, out, coef, t, grad_mean, grad_v)
    wanted = (_flat(g) if w else None for g, w in zip(grads, (grad_mean, grad_v), strict=True))
    read = (_flat(_dense(a)) for a in (x0, x_t, out))
    operands = Terms._make((vlb, *wanted, *read, _dense(coef), _dense(t)))
    _run("vlb_terms", x0.device, operands, backend=_wide(x0, "torch"))
    return vlb, grads[0], grads[1]


def _vlb_terms_fake(
    x0: torch.Tensor, x_t: torch.Tensor, out: torch.Tensor, coef: torch.Tensor, t: torch.Tensor,
    grad_mean: bool, grad_v: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    vlb = torch.empty(x0.shape[0], dtype=x0.dtype, device=x0.device)
    shapes = (x0.shape if wanted else (0,) for wanted in (grad_mean, grad_v))
    mean, v = (torch.empty(shape, dtype=out.dtype, device=x0.device) for shape in shapes)
    return vlb, mean, v


def _vlb_terms_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x0, _, out, coef, t, ctx.grad_mean, ctx.grad_v = inputs
    if not (ctx.grad_mean or ctx.grad_v):
        raise RuntimeError("vlb_terms was run without gradients, so it has none")
    ctx.is_learned, ctx.numel = x0.shape != out.shape, math.prod(x0.shape[1:])
    ctx.is_shared = is_kept_by_others()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], coef, t)


def _vlb_terms_backward(
    ctx: Any, grad_vlb: torch.Tensor | None, _mean: None, _v: None
) -> tuple[torch.Tensor | None, ...]:
    """What the forward pass has left, times each sample's factors; 0 for a half that is detached."""
    from fastdiff.kernels.vlb import factors

    if grad_vlb is None:
        return (None,) * 7
    *saved, coef, t = ctx.saved_tensors
    each = (factor * grad_vlb for factor in factors(coef, t, ctx.numel))
    parts = zip(saved, each, (ctx.grad_mean, ctx.grad_v), strict=True)
    mean, v = ((half, by) if wanted else None for half, by, wanted in parts)
    found = halves(mean, v, is_learned=ctx.is_learned, is_shared=ctx.is_shared)
    return None, None, *only_once("vlb_terms", "torch's operators", found), *[None] * 4


def _reverse_step(*operands: Any) -> None:
    step = _step_of(*operands)
    _run("reverse_step", step.x.device, step)


def _step_of(
    x: torch.Tensor, registers: torch.Tensor | None, out: torch.Tensor, u: torch.Tensor | None, *rest: Any
) -> Any:
    """The kernels' operands of `reverse_step_`."""
    from fastdiff.kernels.reverse_step import Step

    *small, noise, threshold, known, mask, preview = rest
    state, small = (_flat(x), _flat(registers, 2), _flat(_dense(out)), _flat(u)), [*map(_dense, small)]
    bits = mask if mask is None or mask.dtype == torch.uint8 else mask.view(torch.uint8)
    image = (_flat(_dense(a)) for a in (known, bits))
    x0_scale = _x0_scale(state[0], state[2], small) if threshold else None
    operands = (*state, *small, _flat(_dense(noise)), x0_scale, *image, _flat(preview))
    return Step._make(operands)


def _x0_scale(x: torch.Tensor, out: torch.Tensor, small: list[Any]) -> torch.Tensor:
    """The factors of dynamic thresholding, 1 where a slot has none."""
    from fastdiff.kernels.threshold import BINS, PASSES, Threshold

    coef, plan, row, _, _, *lanes = small
    scale = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
    counts = torch.empty(x.shape[0], PASSES + 1, BINS, dtype=torch.int32, device=x.device)
    _run("threshold", x.device, Threshold(scale, counts, x, out, coef, plan, row, *lanes))
    return scale


def _advance(
    row: torch.Tensor, coef: torch.Tensor, t: torch.Tensor, last: torch.Tensor | None,
    cond_lane: torch.Tensor | None, uncond_lane: torch.Tensor | None, lane_row: torch.Tensor | None,
) -> None:  # fmt: skip
    from fastdiff.kernels.advance import Advance

    operands = Advance(row, _dense(coef), t, _dense(last), _dense(cond_lane), _dense(uncond_lane), lane_row)
    _run("advance", row.device, operands)


def _register(name: str, implementation: Any, fake: Any) -> None:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=_library)


_register("normal", _normal, _normal_fake)
_register("q_sample", _q_sample, _q_sample_fake)
_register("denoising_loss", _denoising_loss, _denoising_loss_fake)
_register("masked_denoising_loss", _denoising_loss, _denoising_loss_fake)
_register("vlb_terms", _vlb_terms, _vlb_terms_fake)
_register("reverse_step_", _reverse_step, lambda *operands: None)
_register("advance_", _advance, lambda *operands: None)
for _name, _backward, _setup in (
    ("q_sample", _q_sample_backward, _q_sample_setup),
    ("denoising_loss", _denoising_loss_backward, _denoising_loss_setup),
    ("masked_denoising_loss", _denoising_loss_backward, _denoising_loss_setup),
    ("vlb_terms", _vlb_terms_backward, _vlb_terms_setup),
):
    torch.library.register_autograd(f"fastdiff::{_name}", _backward, setup_context=_setup, lib=_library)
