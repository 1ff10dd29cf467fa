"""The operators beside a chain's step: GroupNorm with SiLU, and the loss that draws its noise again."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastdiff as fd
from benchmarks.bench_memory import peak_bytes
from benchmarks.bench_step import compiled
from benchmarks.record import Comparison, Quantity, compare
from fastdiff.kernels import _torch_ops

IMAGES = {  # [B, C, H, W] and groups
    "1x64x8x8": ((1, 64, 8, 8), 16),
    "16x64x16x16": ((16, 64, 16, 16), 16),
    "16x128x32x32": ((16, 128, 32, 32), 32),
}
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
LEAST = {"1x64x8x8": 0.9, "16x64x16x16": 1.0}  # times torch's speed, on one thread of a busy machine
LOSS_SHAPE = (16, 3, 250, 250)  # 3 million elements
MOST_HELD = 2.3  # states: x_t, the gradient, and scratch memory
GUARD_NORM = "tests/test_benchmarks.py::test_group_norm_with_silu_is_not_slower_than_torch"
GUARD_LOSS = "tests/test_benchmarks.py::test_loss_that_redraws_its_noise_is_not_slower_than_a_stored_one"
GUARD_MEMORY = "tests/test_benchmarks.py::test_loss_that_redraws_its_noise_holds_no_noise"


def norm_variants(
    image: str,
    layout: str,
    train: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    peers: bool = False,
) -> dict[str, Callable[[], Any]]:
    """GroupNorm and SiLU with affine parameters, alone or with the gradients of all three.

    `peers` asks for torch.compile as well.

    Raises:
        AssertionError: the results differ by more than float32's rounding.
    """
    shape, groups = IMAGES[image]
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(s, generator=generator) for s in (shape, shape[1:2], shape[1:2], shape)
    )
    x, grad = (a.to(memory_format=FORMATS[layout]) for a in (x, grad))
    x, weight, bias, grad = (a.to(device, dtype) for a in (x, weight, bias, grad))
    for leaf in (x, weight, bias):
        leaf.requires_grad_(train)

    def eager() -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias))

    def ours() -> Tensor:
        return fd.ops.group_norm_silu(x, groups, weight, bias)

    forward = {"torch": eager, "fastdiff": ours} | ({"torch.compile": compiled(eager)} if peers else {})
    near = 1e-4 if dtype == torch.float32 else 0.1
    for run in forward.values():
        torch.testing.assert_close(run(), eager(), rtol=near, atol=near)
    if not train:
        return forward
    return {label: partial(_with_gradient, run, grad) for label, run in forward.items()}


def _with_gradient(run: Callable[[], Tensor], grad: Tensor) -> None:
    torch.autograd.backward(run(), grad)


def norm_speed(image: str, layout: str, train: bool = False, rounds: int = 15) -> Comparison:
    """`group_norm_silu` against torch's two operators."""
    _torch_ops.operators(wait=True)
    what = "forward and gradient" if train else "forward"
    guard = GUARD_NORM if image in LEAST and not train else ""
    return compare(
        "ops",
        f"GroupNorm and SiLU, {image} {layout}, {what}",
        norm_variants(image, layout, train),
        "torch",
        rounds=rounds,
        guard=guard,
        dtype="float32",
        groups=IMAGES[image][1],
    )


def loss_variants(
    shape: tuple[int, ...] = LOSS_SHAPE, device: str = "cpu", peers: bool = False
) -> dict[str, Callable[[], Any]]:
    """The loss of a network's output and its gradient, with the noise stored, and drawn again.

    `peers` asks for torch.compile as well.

    Raises:
        AssertionError: the two losses or gradients differ by more than float32's rounding.
    """
    _torch_ops.operators(wait=True)
    levels = torch.stack([torch.linspace(1, 0, 10), torch.linspace(0, 1, 10)], 1).to(device)
    t = torch.arange(shape[0], device=device) % 10
    key = (*fd.ops.noise_key(0, shape[0], None, device), torch.zeros_like(t))
    x0 = torch.zeros(shape, device=device)
    _, noise = fd.ops.q_sample(x0, levels, t, *key, target="eps")
    out = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()

    def stored(mse_loss: Callable[..., Tensor] = F.mse_loss) -> tuple[Tensor, Tensor]:
        loss = mse_loss(out, noise)
        return loss.detach(), torch.autograd.grad(loss, out)[0]

    def redrawn() -> tuple[Tensor, Tensor]:
        loss = fd.ops.denoising_loss(out, x0, levels, t, *key).mean()
        return loss.detach(), torch.autograd.grad(loss, out)[0]

    variants: dict[str, Callable[[], Any]] = {"mse_loss, noise stored": stored, "fastdiff": redrawn}
    if peers:
        variants["torch.compile, noise stored"] = partial(stored, compiled(F.mse_loss))
    for run in variants.values():
        for ours, theirs in zip(run(), stored(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7 / math.prod(shape[1:]))
    return variants


def loss_speed(rounds: int = 15) -> Comparison:
    """`denoising_loss` against `mse_loss` with the noise kept from the forward process."""
    return compare(
        "ops",
        f"loss and gradient, {math.prod(LOSS_SHAPE) / 1e6:g} million elements",
        loss_variants(),
        "mse_loss, noise stored",
        rounds=rounds,
        guard=GUARD_LOSS,
        shape=list(LOSS_SHAPE),
        dtype="float32",
        target="eps",
    )


def loss_held(redraw: bool, batch: int = 64) -> float:
    """Peak memory of one q_sample, loss and gradient, over x_t's: x_t, the gradient, and the noise if stored.

    Linux only, as `peak_bytes` is.
    """
    shape = (batch, *LOSS_SHAPE[1:])
    levels, t = torch.tensor([[0.8, 0.6]]), torch.zeros(batch, dtype=torch.int64)
    x0, out = torch.zeros(shape), torch.zeros(shape, requires_grad=True)

    def step() -> Any:
        target = None if redraw else "eps"
        x_t, noise = fd.ops.q_sample(x0, levels, t, 0, None, 0, target=target)
        if redraw:
            loss = fd.ops.denoising_loss(out, x0, levels, t, 0, None, 0).mean()
        else:
            loss = F.mse_loss(out, noise)
        return x_t, torch.autograd.grad(loss, out)

    return peak_bytes(step) / (4 * math.prod(shape))


@pytest.mark.parametrize("train", [False, True], ids=["forward", "train"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("image", IMAGES)
def bench_norm(image, layout, train, measured):
    measured(norm_speed(image, layout, train), norm_variants(image, layout, train)["fastdiff"])


def bench_loss(measured):
    measured(loss_speed(), loss_variants()["fastdiff"])


@pytest.mark.parametrize("redraw", [False, True], ids=["stored", "redrawn"])
def bench_loss_held(redraw, benchmark, keep):
    held = benchmark.pedantic(partial(loss_held, redraw), rounds=1)
    name = f"x_t, loss and gradient, noise {'redrawn' if redraw else 'stored'}: peak"
    guard = GUARD_MEMORY if redraw else ""
    keep(Quantity("ops", name, held, "states", MOST_HELD if redraw else None, {"batch": 64}, guard))
