"""q_sample: the forward process and the network's target, the same bits on every backend; its gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import OTHERS, SIZES, assert_same_bits, run_on

from fastdiff import ops
from fastdiff.kernels.q_sample import Forward, q_sample_reference, q_sample_torch, q_sample_triton

LEVELS = 10


def forward(n: int, batch: int = 4, kind: int = 0, given_noise: bool = False, **changes: object) -> Forward:
    g = torch.Generator().manual_seed(n)
    angle = torch.rand(LEVELS, generator=g)
    seed, sample_id, draw = torch.randint(0, 2**32, (3, batch), generator=g)
    operands = Forward(
        x_t=torch.full((batch, n), float("nan")),
        target=torch.full((batch, n), float("nan")) if kind else None,
        x0=torch.randn(batch, n, generator=g),
        alpha_sigma=torch.stack([angle.cos(), angle.sin()], 1),
        t=torch.randint(-2, LEVELS + 2, (batch,), generator=g),
        seed=seed * 2**31 - 2**62,
        sample_id=sample_id,
        draw=draw,
        kind=kind,
        noise=torch.randn(batch, n, generator=g) if given_noise else None,
    )
    return operands._replace(**changes)


def own(f: Forward) -> Forward:
    return f._replace(x_t=f.x_t.clone(), target=None if f.target is None else f.target.clone())


def run(backend: str, f: Forward) -> None:
    run_on(backend, q_sample_torch, q_sample_triton, f)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("given_noise", [False, True])
def test_backends_agree_to_the_last_bit(backend: str, n: int, kind: int, given_noise: bool) -> None:
    f = forward(n, kind=kind, given_noise=given_noise)
    expected = own(f)
    run("torch", expected)
    run(backend, f)
    assert_same_bits(f.x_t, expected.x_t)
    if kind:
        assert_same_bits(f.target, expected.target)


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("given_noise", [False, True])
def test_float32_result_is_the_formula_up_to_rounding(kind: int, given_noise: bool) -> None:
    f = forward(1823, kind=kind, given_noise=given_noise)
    exact = f._replace(x_t=f.x_t.double(), target=None if f.target is None else f.target.double())
    q_sample_reference(exact)
    q_sample_torch(f)
    # two products and a sum of at most |x0| + |z| round 3 times, and z itself is within 1e-6 max(1, |z|)
    z = f.noise if given_noise else ops.normal((1823,), f.seed, f.sample_id, f.draw, domain=2)
    bound = 3 * 2**-24 * (f.x0.abs() + z.abs()) + 1e-6 * z.abs().clamp(min=1)
    assert ((f.x_t - exact.x_t).abs() <= bound).all()
    if kind:
        assert ((f.target - exact.target).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["torch", "native", *OTHERS[2:]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_one_cast_of_the_float32_result(backend: str, dtype: torch.dtype) -> None:
    wide = forward(63, kind=2)
    half = own(wide)._replace(x_t=wide.x_t.to(dtype))
    run("torch", wide)
    run(backend, half)
    assert_same_bits(half.x_t, wide.x_t.to(dtype))
    assert_same_bits(half.target, wide.target)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
def test_empty_batch_is_no_error(backend: str) -> None:
    run(backend, forward(5, batch=0, kind=1))


def test_times_outside_the_schedule_are_clamped() -> None:
    f = forward(9, batch=2, t=torch.tensor([-5, LEVELS + 5]))
    inside = own(f)._replace(t=torch.tensor([0, LEVELS - 1]))
    q_sample_torch(f)
    q_sample_torch(inside)
    assert_same_bits(f.x_t, inside.x_t)


def test_noise_is_that_of_the_training_domain() -> None:
    f = forward(9, kind=1)
    q_sample_torch(f)
    assert_same_bits(f.target, ops.normal((9,), f.seed, f.sample_id, f.draw, domain=2))


@pytest.mark.parametrize("target", [None, "eps", "v", "x0"])
def test_gradient_of_x0_is_that_of_the_formula(target: str | None) -> None:
    f = forward(12, batch=3, given_noise=True)
    x0, z = f.x0.view(3, 3, 4), f.noise.view(3, 3, 4)
    alpha, sigma = f.alpha_sigma[f.t.clamp(0, LEVELS - 1)].view(3, 2, 1, 1).unbind(1)
    weight = torch.randn(2, 3, 3, 4)
    plain = x0.clone().requires_grad_()
    goals = {"eps": z, "v": alpha * z - sigma * plain, "x0": plain, None: torch.zeros(())}
    (weight[0] * (alpha * plain + sigma * z) + weight[1] * goals[target]).sum().backward()
    fused = x0.clone().requires_grad_()
    x_t, goal = ops.q_sample(fused, f.alpha_sigma, f.t, 0, None, 0, noise=z, target=target)
    (weight[0] * x_t + weight[1] * (torch.zeros(()) if goal is None else goal)).sum().backward()
    assert torch.allclose(fused.grad, plain.grad, rtol=2**-22, atol=2**-22)


def test_target_has_shape_and_dtype_of_x0_whatever_the_networks_dtype() -> None:
    f = forward(12, batch=3)
    x0 = f.x0.view(3, 3, 2, 2)
    x_t, goal = ops.q_sample(x0, f.alpha_sigma, f.t, 1, None, 0, target="v", dtype=torch.bfloat16)
    assert (x_t.shape, x_t.dtype) == (x0.shape, torch.bfloat16)
    assert (goal.shape, goal.dtype) == (x0.shape, torch.float32)
    assert ops.q_sample(x0, f.alpha_sigma, f.t, 1, None, 0)[1] is None
