"""group_norm_silu: the formula and its gradient, both memory formats, any groups, one pass or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import OTHERS, apply, assert_same_bits, library
from torch.library import opcheck

from fastdiff import ops
from fastdiff.kernels import _group_norm_cpu, _norm_tiles
from fastdiff.kernels import group_norm as module
from fastdiff.kernels.group_norm import Norm, group_norm_silu_reference, group_norm_silu_triton
from fastdiff.kernels.group_norm import group_norm_silu_torch as forward_torch
from fastdiff.kernels.group_norm_backward import (
    NormGrad,
    group_norm_silu_backward_reference,
    group_norm_silu_backward_triton,
)
from fastdiff.kernels.group_norm_backward import group_norm_silu_backward_torch as backward_torch

U = 2.0**-24
SUM = 96  # additions of float32 terms one behind the other, in lanes and trees, at most
HALF = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# B, C, N, groups: one element, primes, a group for each channel, one position; the last three take two passes
SHAPES = [
    (2, 8, 16, 2),
    (1, 1, 1, 1),
    (2, 7, 63, 7),
    (2, 7, 63, 1),
    (3, 64, 1, 4),
    (1, 1, 1823, 1),
    (1, 6, 1823, 1),
    (1, 6, 5000, 3),
    (1, 96, 300, 1),
]
FULL, BARE = {}, dict(residual=None, weight=None, bias=None, scale=None, shift=None, activation=False)


def operands(
    batch: int, channels: int, n: int, groups: int, last: bool = False, dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Norm:  # fmt: skip
    """Random operands away from 0, outputs poisoned; `last` moves the same numbers."""
    g = torch.Generator().manual_seed(channels * n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    x, residual = ((normal(batch, channels, n) + 1).to(dtype) for _ in range(2))
    if last:
        x, residual = x.mT.contiguous(), residual.mT.contiguous()
    moments = torch.full((2, batch, groups), float("nan"))
    vectors = (normal(channels), normal(channels), normal(batch, channels), normal(1, channels))
    f = Norm(torch.full_like(x, float("nan")), *moments, x, residual, *vectors, groups, 1e-5, True, last)
    return f._replace(**changes)


def gradient_of(f: Norm) -> NormGrad:
    """The operands of the gradient behind f, which has run."""
    batch, channels, _ = f.sizes
    grad = torch.randn(f.x.shape, generator=torch.Generator().manual_seed(3)).to(f.x.dtype)
    sums = torch.full((2, batch, channels), float("nan"))
    return NormGrad(torch.full_like(f.x, float("nan")), sums, grad, f.mean, f.rstd, *f[3:])


def run(backend: str, f: Norm | NormGrad, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch` means without the compiled loop."""
    forward = isinstance(f, Norm)
    if backend in ("native", "torch"):
        with monkeypatch.context() as m:
            if backend == "native":
                library()
            else:
                m.setattr(_group_norm_cpu.cpu, "library", lambda: None)
            (forward_torch if forward else backward_torch)(f)
    else:
        apply(backend, group_norm_silu_triton if forward else group_norm_silu_backward_triton, f)


def exact_of(f: Any) -> Any:
    """The same operands with float64 results, filled by the reference."""
    if isinstance(f, Norm):
        exact = f._replace(y=f.y.double(), mean=f.mean.double(), rstd=f.rstd.double())
        group_norm_silu_reference(exact)
    else:
        exact = f._replace(grad_x=f.grad_x.double(), sums=f.sums.double())
        group_norm_silu_backward_reference(exact)
    return exact


class Bounds:
    """Running error bounds of float32 arithmetic, channels first: v, its moments, x_hat, h."""

    def __init__(self, f: Any) -> None:
        self.first = lambda a: (a.mT if f.last else a).double()
        batch, channels, _ = f.sizes
        v = self.first(f.x) + (0 if f.residual is None else self.first(f.residual))
        by_group = v.reshape(batch, f.groups, -1)
        self.own = by_group.shape[2]
        mean = by_group.mean(2, keepdim=True)
        var = (by_group - mean).square().mean(2, keepdim=True)
        self.mean_error = (SUM + 1) * U * by_group.abs().mean(2, keepdim=True)
        d = by_group - mean
        d_error = self.mean_error + U * (by_group.abs() + d.abs())
        var_error = (2 * d.abs() * d_error + d_error**2).mean(2, keepdim=True) + (SUM + 3) * U * var
        self.rstd_error = var_error / (var + f.eps) / 2 * 1.01 + 6 * U  # relative
        self.rstd = (var + f.eps).rsqrt()
        x_hat = d * self.rstd
        x_hat_error = self.rstd * d_error + x_hat.abs() * (self.rstd_error + 3 * U)
        self.x_hat, self.x_hat_error = x_hat.view(v.shape), x_hat_error.view(v.shape)
        one = torch.ones(1, channels, dtype=torch.float64)
        weight, scale = (one if a is None else a.double() for a in (f.weight, f.scale))
        bias, shift = (0 * one if a is None else a.double() for a in (f.bias, f.shift))
        self.gain = (weight * scale)[..., None]
        self.h = self.x_hat * self.gain + (bias * scale + shift)[..., None]
        size = (self.x_hat * self.gain).abs() + (bias * scale).abs()[..., None] + shift.abs()[..., None]
        self.h_error = self.gain.abs() * self.x_hat_error + 5 * U * size


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("changes", [FULL, BARE], ids=["full", "bare"])
def test_results_are_the_formula_up_to_rounding(
    backend: str, shape: tuple, last: bool, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(*shape, last, **changes)
    run(backend, f, monkeypatch)
    assert_formula(f)


def assert_formula(f: Norm) -> None:
    """y within 1.1 = max silu' of h's error, and an exponential's whose error grows with |h|."""
    exact, at = exact_of(f), Bounds(f)
    assert ((f.mean - exact.mean).abs() <= at.mean_error[..., 0]).all()
    assert ((f.rstd / exact.rstd - 1).abs() <= at.rstd_error[..., 0]).all()
    y = at.first(exact.y)
    bound = 1.1 * at.h_error + 8 * U * (at.h.abs() + 1) + HALF[f.y.dtype] * (y.abs() + U)
    assert ((at.first(f.y) - y).abs() <= bound).all()


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("changes", [FULL, BARE], ids=["full", "bare"])
def test_gradient_is_the_formula_up_to_rounding(
    backend: str, shape: tuple, last: bool, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(*shape, last, **changes)
    run(backend, f, monkeypatch)
    g = gradient_of(f)
    run(backend, g, monkeypatch)
    assert_gradient(g)


def assert_gradient(g: NormGrad) -> None:
    """The errors of gh (|silu''| <= 1/2), of its sums, and of dv, one after the other."""
    exact, at = exact_of(g), Bounds(g)
    grad, sigmoid = at.first(g.grad), at.h.sigmoid()
    slope, error = 1.0, torch.zeros_like(at.h)
    if g.activation:
        slope = sigmoid * (1 + at.h * (1 - sigmoid))
        error = grad.abs() * (at.h_error / 2 + 12 * U * (1 + at.h.abs()))
    gh = grad * slope
    plain = error.sum(2) + SUM * U * gh.abs().sum(2)
    along_terms = error * at.x_hat.abs() + gh.abs() * at.x_hat_error
    along = along_terms.sum(2) + (SUM + 2) * U * (gh * at.x_hat).abs().sum(2)
    assert ((g.sums[0] - exact.sums[0]).abs() <= plain).all()
    assert ((g.sums[1] - exact.sums[1]).abs() <= along).all()
    shape = (*at.rstd.shape[:2], -1)
    gain = at.gain.abs()

    def spread(means: torch.Tensor) -> torch.Tensor:
        return means.expand(*shape[:2], at.own).reshape(at.h.shape)

    def group_mean(channel: torch.Tensor) -> torch.Tensor:
        return spread((channel[..., None] * gain).reshape(shape).sum(2, keepdim=True) / at.own)

    terms = gh * at.gain
    m_along = spread((terms * at.x_hat).reshape(shape).mean(2, keepdim=True))
    m_plain_error = group_mean(plain + SUM * U * gh.abs().sum(2))
    m_along_error = group_mean(along + SUM * U * (gh * at.x_hat).abs().sum(2))
    size = terms.abs() + spread(terms.abs().reshape(shape).mean(2, keepdim=True)) + (at.x_hat * m_along).abs()
    inner = gain * error + m_plain_error + at.x_hat.abs() * m_along_error + at.x_hat_error * m_along.abs()
    bound = spread(at.rstd) * (inner + size * (spread(at.rstd_error) + 6 * U))
    wanted = at.first(exact.grad_x)
    bound = bound + HALF[g.grad_x.dtype] * (wanted.abs() + bound)
    assert ((at.first(g.grad_x) - wanted).abs() <= bound).all()


def test_checks_of_results_see_a_planted_error(monkeypatch: pytest.MonkeyPatch) -> None:
    f = operands(2, 8, 16, 2)
    run("torch", f, monkeypatch)
    g = gradient_of(f)
    run("torch", g, monkeypatch)
    for check, which, name in (
        (assert_formula, f, "y"),
        (assert_formula, f, "rstd"),
        (assert_gradient, g, "grad_x"),
    ):
        wrong = getattr(which, name) * (1 + 2.0**-14)
        with pytest.raises(AssertionError):
            check(which._replace(**{name: wrong}))


@pytest.mark.parametrize("backend", ["native", "torch", *OTHERS[2:]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("changes", [FULL, BARE, dict(residual=None)], ids=["full", "bare", "alone"])
def test_half_precision_costs_its_own_rounding_alone(
    backend: str, dtype: torch.dtype, last: bool, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(2, 12, 63, 3, last, dtype, **changes)
    run(backend, f, monkeypatch)
    assert_formula(f)
    g = gradient_of(f)
    run(backend, g, monkeypatch)
    assert_gradient(g)


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8, 4, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("activation", [True, False])
def test_bfloat16_is_read_where_it_lies_and_rounded_once(
    shape: tuple, last: bool, activation: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What float32 copies of the same numbers give, rounded, bit for bit; so the gradient of h is not."""
    f = operands(*shape, last, torch.bfloat16, residual=None, activation=activation)
    vectors = ("weight", "bias", "scale", "shift")
    f = f._replace(**{name: getattr(f, name).bfloat16() for name in vectors[1:]})
    exact = f._replace(**{name: getattr(f, name).float() for name in ("y", "x", *vectors)})
    moments = torch.full((2, *f.mean.shape), float("nan"))
    exact = exact._replace(mean=moments[0], rstd=moments[1])
    run("native", f, monkeypatch)
    run("native", exact, monkeypatch)
    for actual, wanted in ((f.y, exact.y.bfloat16()), (f.mean, exact.mean), (f.rstd, exact.rstd)):
        assert_same_bits(actual, wanted)
    g = gradient_of(f)
    exact = NormGrad(g.grad_x.float(), torch.empty_like(g.sums), g.grad.float(), *exact[1:3], *exact[3:])
    run("native", g, monkeypatch)
    run("native", exact, monkeypatch)
    assert_same_bits(g.grad_x, exact.grad_x.bfloat16())
    assert_same_bits(g.sums, exact.sums)


@pytest.mark.parametrize("changes", [FULL, BARE], ids=["full", "bare"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_reference_gradient_is_that_of_automatic_differentiation(changes: dict, last: bool) -> None:
    f = operands(2, 6, 35, 3, last, **changes)
    run_exact = exact_of(f)
    g = exact_of(gradient_of(f._replace(mean=run_exact.mean, rstd=run_exact.rstd)))
    names = ("x", "residual", "weight", "bias", "scale", "shift")
    leaves = {n: None if (a := getattr(f, n)) is None else a.double().requires_grad_() for n in names}
    v = leaves["x"] if leaves["residual"] is None else leaves["x"] + leaves["residual"]
    h = torch.group_norm(v.mT if last else v, f.groups, leaves["weight"], leaves["bias"], f.eps)
    h = h if leaves["scale"] is None else h * leaves["scale"][..., None] + leaves["shift"][..., None]
    y = torch.nn.functional.silu(h) if f.activation else h
    (y.mT if last else y).backward(g.grad.double())
    assert torch.allclose(leaves["x"].grad, g.grad_x, rtol=1e-10, atol=1e-12)
    if f.shift is not None:
        assert torch.allclose(leaves["shift"].grad, g.sums[0].sum(0, keepdim=True), rtol=1e-10, atol=1e-12)
        along = f.weight * g.sums[1] + f.bias * g.sums[0]
        assert torch.allclose(leaves["scale"].grad, along, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
@pytest.mark.parametrize("shape", [(0, 4, 5, 2), (2, 4, 0, 2)], ids=str)
def test_nothing_to_normalise_is_no_error(
    backend: str, shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(*shape)
    run(backend, f, monkeypatch)
    g = gradient_of(f)
    run(backend, g, monkeypatch)
    assert g.sums.count_nonzero() == 0


@pytest.mark.parametrize("backend", ["torch", *OTHERS])
def test_repeated_runs_give_the_same_bits(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    f, again = operands(1, 6, 5000, 3), operands(1, 6, 5000, 3)
    for each in (f, again):
        run(backend, each, monkeypatch)
    assert_same_bits(again.y, f.y)
    pair = gradient_of(f), gradient_of(f)
    for each in pair:
        run(backend, each, monkeypatch)
    assert_same_bits(pair[0].grad_x, pair[1].grad_x)


def test_a_group_is_read_once_where_it_fits_and_programs_are_enough() -> None:
    fits = [
        _norm_tiles.fits(b, 32, 4, n, module._ON_CHIP)
        for b, n in ((1, 1024), (1, 1025), (9, 4096), (9, 4097))
    ]
    assert fits == [True, False, True, False]


@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", ["first", "last", "strided"])
def test_operator_is_torch_and_its_gradients_in_the_same_memory_format(spatial: tuple, layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 24, *spatial)
    if layout == "last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        x = torch.randn(2, 24, *spatial, 2)[..., 0]
    given = [x, torch.randn(24), torch.randn(24), torch.randn(2, 24), torch.randn(1, 24), torch.randn_like(x)]
    results = []
    for fused in (True, False):
        leaves = [a.detach().clone().requires_grad_() for a in given]
        u, weight, bias, scale, shift, residual = leaves
        if fused:
            y = ops.group_norm_silu(u, 3, weight, bias, scale=scale, shift=shift, residual=residual)
        else:
            lead = (..., *[None] * len(spatial))
            h = torch.group_norm(u + residual, 3, weight, bias) * scale[lead] + shift[lead]
            y = torch.nn.functional.silu(h)
        y.square().sum().backward()
        results.append([y.detach(), *(a.grad for a in leaves)])
    for actual, wanted in zip(*results, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    fused = ops.group_norm_silu(x, 3)
    assert fused.stride() == (x if layout == "last" else x.contiguous()).stride()


def test_gradients_of_x_and_residual_share_no_memory() -> None:
    x, residual = (torch.randn(1, 4, 3).requires_grad_() for _ in range(2))
    ops.group_norm_silu(x, 2, residual=residual).sum().backward()
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_operator_passes_opcheck_and_compiles_as_one_graph(last: bool) -> None:
    x = torch.randn(2, 8, 5, 3).to(memory_format=torch.channels_last if last else torch.contiguous_format)
    vectors = [torch.randn(8), torch.randn(8), torch.randn(2, 8), torch.randn(1, 8)]
    given = [a.requires_grad_() for a in (x, torch.randn_like(x), *vectors)]
    opcheck(torch.ops.fastdiff.group_norm_silu, (*given, 4, 1e-5, True))

    scale = vectors[2].detach()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(
            lambda a: ops.group_norm_silu(a * 2, 4, scale=scale) + 1, fullgraph=True, backend="aot_eager"
        )(x)
        operator = torch.ops.fastdiff.group_norm_silu(x * 2, None, None, None, scale, None, 4, 1e-5, True)[0]
    assert_same_bits(compiled, operator + 1)


def norm(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.group_norm_silu(**(dict(x=torch.zeros(2, 6, 3), num_groups=3) | changes))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"`x` must be .* 2 to 5 dimensions .* got 1 of", norm(x=torch.zeros(6))),
        (r"`x` must be .* got 3 of torch.float64", norm(x=torch.zeros(2, 6, 3).double())),
        (r"`num_groups` must be positive and divide the 6 channels, got 4", norm(num_groups=4)),
        (r"`num_groups` must be .* got 0", norm(num_groups=0)),
        (r"`eps` must be positive and finite, got 0", norm(eps=0.0)),
        (r"`weight` must be \[6\]", norm(weight=torch.zeros(5))),
        (r"`bias` must be of .* got torch.int64", norm(bias=torch.zeros(6).long())),
        (r"`scale` must be \[2, 6\]", norm(scale=torch.zeros(3, 6))),
        (r"`shift` must be \[2, 6\]", norm(shift=torch.zeros(6))),
        (r"`residual` must be torch.float32 \[2, 6, 3\]", norm(residual=torch.zeros(2, 6, 3).half())),
    ],
)
def test_argument_that_breaks_the_contract_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()
