"""denoising_loss: the mean squared error against q_sample's target and its gradient; noise drawn again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import OTHERS, SIZES, assert_compiles_as_one_graph, assert_same_bits
from loss_cases import operands, run
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fastdiff import _direct, ops
from fastdiff.kernels import _torch_ops
from fastdiff.kernels import denoising_loss as module
from fastdiff.kernels.denoising_loss import denoising_loss_reference, denoising_loss_torch


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"given_noise": True}], ids=str)
def test_loss_and_error_are_the_formula_up_to_rounding(
    backend: str, n: int, kind: int, options: dict
) -> None:
    f = operands(n, kind, **options)
    exact = f._replace(loss=f.loss.double(), error=f.error.double())
    denoising_loss_reference(exact)
    run(backend, f)
    # a target rounds 3 times at a size of at most |x0| + |z|, and a drawn z is within 1e-6 max(1, |z|)
    weight = torch.ones(4) if f.weight is None else f.weight
    z = f.noise if f.noise is not None else ops.normal((n,), f.seed, f.sample_id, f.draw, domain=2)
    target = 4 * 2**-24 * (f.out.abs() + f.x0.abs() + z.abs()) + 1e-6 * z.abs().clamp(min=1)
    error = exact.error
    assert ((f.error - error).abs() <= target + 4 * 2**-24 * error.abs()).all()
    # sums of 1024 positive terms in float32, in 16 lanes or as a tree, round at most 64 times
    bound = (weight[:, None] * (2 * error.abs() * target + target**2)).mean(1) + 64 * 2**-24 * exact.loss
    assert ((f.loss - exact.loss).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["native", *OTHERS[2:]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_only_the_casts(backend: str, dtype: torch.dtype) -> None:
    half = operands(63, 2)
    half = half._replace(out=half.out.to(dtype), error=half.error.to(dtype))
    wide = half._replace(out=half.out.float(), error=half.error.float(), loss=half.loss.clone())
    run(backend, half)
    run(backend, wide)
    assert_same_bits(half.error, wide.error.to(dtype))
    assert_same_bits(half.loss, wide.loss)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
def test_loss_without_a_gradient_is_the_same(backend: str) -> None:
    f = operands(1823, weighted=True)
    bare = f._replace(error=None, loss=f.loss.clone())
    run(backend, f)
    run(backend, bare)
    assert_same_bits(bare.loss, f.loss)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
def test_repeated_runs_give_the_same_bits(backend: str) -> None:
    f = operands(20_000, batch=2)
    again = f._replace(loss=f.loss.clone(), error=f.error.clone())
    run(backend, f)
    run(backend, again)
    assert_same_bits(again.loss, f.loss)
    assert_same_bits(again.error, f.error)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
def test_empty_operands_have_no_loss(backend: str, batch: int, n: int) -> None:
    f = operands(n, batch=batch)
    run(backend, f)
    assert f.loss.tolist() == [0.0] * batch


def test_epsilon_does_not_read_x0() -> None:
    f = operands(63)
    f.x0.fill_(float("nan"))
    denoising_loss_torch(f)
    assert f.loss.isfinite().all()


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_operator_is_mse_against_the_target_of_q_sample(target: str) -> None:
    f = operands(12, batch=3, weighted=True)
    x0, level = f.x0.view(3, 3, 2, 2), (f.alpha_sigma, f.t, 7, [5, 6, 9], 11)
    model = torch.nn.Conv2d(3, 3, 1)
    grads, losses = [], []
    for fused in (True, False):
        model.zero_grad()
        x_t, goal = ops.q_sample(x0, *level, target=target)
        out = model(x_t)
        if fused:
            loss = ops.denoising_loss(out, x0, *level, target=target, weight=f.weight)
        else:
            loss = f.weight * (out - goal).square().flatten(1).mean(1)
        (loss * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
        losses.append(loss.detach())
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*losses, rtol=1e-6)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_operator_passes_opcheck_and_compiles_as_one_graph() -> None:
    f = operands(12, batch=3)
    key = (f.seed, f.sample_id, f.draw)
    for grad in (False, True):
        out = f.out.clone().requires_grad_(grad)
        # the gradient is made in the error's memory, which opcheck reads afterwards: 2 w / N = 1 leaves it
        weight = torch.full((3,), 12 / 2)
        args = (out, f.x0, f.alpha_sigma, f.t, *key, 2, weight, None, grad)
        opcheck(torch.ops.fastdiff.denoising_loss, args)

    def step(out: torch.Tensor) -> torch.Tensor:
        return ops.denoising_loss(out * 2, f.x0, f.alpha_sigma, f.t, *key, target="v").mean()

    assert_compiles_as_one_graph(step, f.out)


def test_gradient_is_not_made_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastdiff._direct.operators", lambda: None)
    f, wanted = operands(12, batch=3), []
    original = module.denoising_loss_torch
    monkeypatch.setattr(
        module, "denoising_loss_torch", lambda s: (wanted.append(s.error is not None), original(s))
    )
    call = lambda out: ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, 0, None, 0)  # noqa: E731
    call(f.out)
    with torch.no_grad():
        call(f.out.clone().requires_grad_())
    call(f.out.clone().requires_grad_())
    assert wanted == [False, False, True]


def test_gradient_is_the_same_again_where_the_graph_is_kept() -> None:
    """Without `retain_graph` the saved gradient becomes the result, in its own memory."""
    f = operands(12, batch=3)
    out = f.out.clone().requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.5])
    loss = ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw)
    found = []
    for kept in (True, True, False):
        found += torch.autograd.grad((loss * weights).sum(), out, retain_graph=kept)
    assert_same_bits(found[1], found[0])
    assert_same_bits(found[2], found[0])
    assert len({grad.data_ptr() for grad in found}) == 3


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_what_a_hook_on_saved_tensors_keeps_is_not_overwritten(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by(way, monkeypatch)
    f, kept = operands(12, batch=3), []
    out = f.out.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda saved: (kept.append((saved, saved.clone())), saved)[1], lambda saved: saved
    ):
        loss = ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw)
    loss.sum().backward()
    assert kept
    for now, then in kept:
        assert_same_bits(now, then)


def test_loss_that_nobody_differentiates_leaves_no_gradient() -> None:
    f = operands(12, batch=3)
    out = f.out.clone().requires_grad_()
    loss = ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, 0, None, 0)
    (grad,) = torch.autograd.grad(out.sum() + 0 * loss.detach().sum(), out)
    assert torch.equal(grad, torch.ones_like(out))


def loss(**changes: Any) -> Callable[[], Any]:
    f = operands(6, batch=2)
    given = dict(out=f.out, x0=f.x0, alpha_sigma=f.alpha_sigma, t=f.t, seed=0, sample_ids=None, draw=0)
    return lambda: ops.denoising_loss(**(given | changes))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"`target` must be one of .* got None", loss(target=None)),
        (r"`out` must be .*bfloat16.* got torch.float64", loss(out=torch.zeros(2, 6).double())),
        (r"`out` must be \[2, 5\], or \[2, 10\] .* got torch.float32 \[2, 6\]", loss(x0=torch.zeros(2, 5))),
        (r"`x0` must be torch.float32", loss(x0=torch.zeros(2, 6).half())),
        (r"`alpha_sigma` must be torch.float32 \[any, 2\]", loss(alpha_sigma=torch.zeros(3, 1))),
        (r"`t` must be torch.int64 \[2\]", loss(t=torch.zeros(2).int())),
        (r"`weight` must be torch.float32 \[2\]", loss(weight=torch.zeros(3))),
        (r"`noise` must be torch.float32 \[2, 6\]", loss(noise=torch.zeros(6))),
        (r"`seed` must fit 64 bits", loss(seed=2**64)),
    ],
)
def test_argument_that_breaks_the_contract_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_variance_behind_the_prediction_is_not_read(backend: str, dtype: torch.dtype) -> None:
    f = operands(63, 2)
    f = f._replace(out=f.out.to(dtype), error=f.error.to(dtype))
    nan = torch.full_like(f.out, float("nan"))
    doubled = f._replace(out=torch.cat([f.out, nan], 1), loss=f.loss.clone(), error=f.error.clone())
    for each in (f, doubled):
        run(backend, each)
    assert_same_bits(doubled.loss, f.loss)
    assert_same_bits(doubled.error, f.error)
    exact = f._replace(loss=f.loss.double(), error=None)
    denoising_loss_reference(exact)
    again = doubled._replace(loss=f.loss.double(), error=None)
    denoising_loss_reference(again)
    assert_same_bits(exact.loss, again.loss)


def test_the_operators_gradient_of_the_variance_is_0() -> None:
    f, level = operands(12, batch=3), ((7, [5, 6, 9], 11))
    out = torch.cat([f.out, f.out], 1).view(3, 6, 2, 2).requires_grad_()
    alone = f.out.view(3, 3, 2, 2).clone().requires_grad_()
    for each in (out, alone):
        loss = ops.denoising_loss(each, f.x0.view(3, 3, 2, 2), f.alpha_sigma, f.t, *level, target="v")
        (loss * torch.tensor([1.0, 2.0, 0.5])).sum().backward()
    assert_same_bits(out.grad[:, :3].contiguous(), alone.grad)
    assert (out.grad[:, 3:] == 0).all()


@pytest.mark.parametrize("size", [64, 1024])
@pytest.mark.parametrize("learned", [False, True])
def test_gradient_of_a_float16_network_does_not_underflow_however_large_the_image(
    size: int, learned: bool
) -> None:
    """Under a loss scale of 65 536, as training in float16 has it: errors of 0.1 over 3 million elements."""
    g = torch.Generator().manual_seed(size)
    noise = torch.randn(1, 3, size, size, generator=g)
    out = (noise + 0.1 * torch.randn(noise.shape, generator=g)).half()
    out = (torch.cat([out, out], 1) if learned else out).requires_grad_()
    levels, weight = torch.full((2, 2), 0.5**0.5), torch.tensor([0.5])
    loss = ops.denoising_loss(
        out, noise, levels, torch.tensor([1]), 1, None, 2, target="eps", noise=noise, weight=weight
    )
    (grad,) = torch.autograd.grad(65536 * loss.sum(), out)
    exact = 65536 * 0.5 * 2 / noise.numel() * (out.detach()[:, :3].double() - noise)
    # the error and the product round once each, and below 2^-14 to multiples of 2^-24
    assert ((grad[:, :3] - exact).abs() <= 2.0**-10 * exact.abs() + 2.0**-24).all()
    relative = float((grad[:, :3] - exact).norm() / exact.norm())
    assert relative < 1e-3


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send what follows by the operator in Python, or by the one of torch's own kind and no other."""
    native = _torch_ops.operators(wait=True) or pytest.skip("needs a C++ compiler")
    if way == "operator":
        monkeypatch.setattr(_direct, "operators", lambda: None)
        return

    def direct(*operands: Any) -> torch.Tensor:
        loss = native.denoising_loss(*operands)
        assert loss is not None
        return loss

    monkeypatch.setattr(_direct, "operators", lambda: native._replace(denoising_loss=direct))


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"given_noise": True}], ids=str)
def test_both_ways_to_the_loop_give_the_same_bits(
    target: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(1823, **options)
    given = dict(weight=f.weight, noise=f.noise, target=target)
    found = []
    for way in ("operator", "direct"):
        with monkeypatch.context() as patch:
            by(way, patch)
            out = f.out.view(4, 1, 1823).clone().requires_grad_()
            x0 = f.x0.view(4, 1, 1823)
            given["noise"] = f.noise if f.noise is None else f.noise.view(4, 1, 1823)
            loss = ops.denoising_loss(out, x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw, **given)
            kept = torch.autograd.grad(loss.square().sum(), out, retain_graph=True)[0]
            found.append((loss.detach(), kept, torch.autograd.grad(loss.square().sum(), out)[0]))
            with torch.no_grad():
                plain = ops.denoising_loss(out, x0, f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw, **given)
            assert_same_bits(plain, loss.detach())
            assert_same_bits(kept, found[-1][2])
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


def test_checkpointing_survives_the_end_of_the_background_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the gradient is the same before torch's own kind of operator is there and after."""
    f = operands(12, weighted=True)
    key = (f.seed, f.sample_id, f.draw)
    out = f.out.clone().requires_grad_()

    def loss(out: torch.Tensor) -> torch.Tensor:
        return ops.denoising_loss(out.sin(), f.x0, f.alpha_sigma, f.t, *key, weight=f.weight)

    with monkeypatch.context() as patch:
        by("operator", patch)
        expected = torch.autograd.grad(loss(out).sum(), out)[0]
        kept = checkpoint(loss, out, use_reentrant=False)
    by("direct", monkeypatch)
    assert_same_bits(torch.autograd.grad(kept.sum(), out)[0], expected)


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_second_derivative_is_refused_not_taken_for_zero(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    by(way, monkeypatch)
    f = operands(12, batch=3)
    out = f.out.clone().requires_grad_()
    loss = ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, 0, None, 0)
    (grad,) = torch.autograd.grad(loss.sum(), out, create_graph=True)
    with pytest.raises(RuntimeError, match="denoising_loss has no second derivative; use q_sample"):
        (loss.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize(("way", "learned"), [("operator", False), ("operator", True), ("direct", False)])
def test_gradients_of_many_sums_at_once_are_those_of_each(
    way: str, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`is_grads_batched`, as torch.autograd.functional.jacobian(vectorize=True) has it."""
    by(way, monkeypatch)
    f = operands(12, batch=3)
    out = (torch.cat([f.out, f.out], 1) if learned else f.out.clone()).requires_grad_()
    loss = ops.denoising_loss(out, f.x0, f.alpha_sigma, f.t, 0, None, 0)
    each = torch.eye(3)
    (batched,) = torch.autograd.grad(loss, out, each, is_grads_batched=True, retain_graph=True)
    for one, row in zip(batched, each, strict=True):
        assert_same_bits(one, *torch.autograd.grad(loss, out, row, retain_graph=True))
    (alone,) = torch.autograd.grad(loss, out, each, is_grads_batched=True)
    assert_same_bits(alone, batched)
