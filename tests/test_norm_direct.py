"""group_norm_silu on CPU tensors: every way to the result, by size and surroundings, is the same formula."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import assert_same_bits
from norm_ways import WAYS, go
from operators import Operators
from test_group_norm import BARE, FULL, SHAPES, assert_formula, exact_of, operands

from fastdiff import ops

ROOT = Path(__file__).parents[1]


def first(tensor: torch.Tensor | None, last: bool) -> torch.Tensor | None:
    """[B, C, N] as the operator takes it, channels last in memory where they were."""
    return None if tensor is None else tensor.mT if last else tensor


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [*SHAPES[:5], SHAPES[7]], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("changes", [FULL, BARE], ids=["full", "bare"])
def test_every_way_is_the_formula_in_the_same_memory_format(
    way: str, shape: tuple, last: bool, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = go(way, monkeypatch)
    f = operands(*shape, last, **changes)
    x, residual = (first(a, last) for a in (f.x, f.residual))
    options = dict(scale=f.scale, shift=f.shift, residual=residual, activation=f.activation)
    y = ops.group_norm_silu(x, f.groups, f.weight, f.bias, **options)
    exact = exact_of(f)
    assert_formula(f._replace(y=first(y, last), mean=exact.mean.float(), rstd=exact.rstd.float()))
    assert y.stride() == x.stride()
    assert taken == [way != "operator"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spatial", [(), (7,), (3, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_every_way_has_the_gradients_of_torch(
    way: str, spatial: tuple, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    torch.manual_seed(0)
    x = torch.randn(2, 24, *spatial)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    vectors = [torch.randn(24), torch.randn(24), torch.randn(2, 48)[:, ::2][:, :24], torch.randn(1, 24)]
    given = [x, torch.randn_like(x), *vectors]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [a.detach().to(dtype).requires_grad_() for a in given]
        u, residual, weight, bias, scale, shift = leaves
        if dtype == torch.float32:
            y = ops.group_norm_silu(u, 3, weight, bias, scale=scale, shift=shift, residual=residual)
        else:
            lead = (..., *[None] * len(spatial))
            h = torch.group_norm(u + residual, 3, weight, bias) * scale[lead] + shift[lead]
            y = torch.nn.functional.silu(h)
        y.square().sum().backward()
        results.append([y.detach(), *(a.grad for a in leaves)])
    for actual, wanted in zip(*results, strict=True):
        assert torch.allclose(actual.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_half_precision_is_rounded_once(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own two operators would round between them."""
    taken = go(way, monkeypatch)
    f = operands(2, 12, 63, 3, dtype=dtype, residual=None)
    y = ops.group_norm_silu(f.x, 3, f.weight, f.bias, scale=f.scale, shift=f.shift)
    exact = exact_of(f)
    assert_formula(f._replace(y=y, mean=exact.mean.float(), rstd=exact.rstd.float()))
    assert taken == [way == "direct"]


@pytest.mark.parametrize("kinds", ["bbbbb", "bfbfb", "fbhbf", "hhbfh"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("residual", [False, True])
def test_both_ways_have_the_same_bits_whatever_the_dtypes(
    kinds: str, last: bool, residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of x and its residual, weight, bias, scale, shift: float32, bfloat16 or half."""
    dtypes = [dict(f=torch.float32, b=torch.bfloat16, h=torch.float16)[kind] for kind in kinds]
    f = operands(2, 12, 35, 3, last)
    x, other = (first(a, last).to(dtypes[0]) for a in (f.x, f.residual))
    given = [a.to(dtype) for a, dtype in zip(f[5:9], dtypes[1:], strict=False)]
    leaves = [a.requires_grad_() for a in (x, *given, *[other] * residual)]
    found = []
    for way in ("operator", "direct"):
        with monkeypatch.context() as patch:
            taken = go(way, patch)
            weight, bias, scale, shift = given
            options = dict(scale=scale, shift=shift, residual=other if residual else None)
            y = ops.group_norm_silu(x, 3, weight, bias, **options)
            found.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach().float()).to(y.dtype))])
            assert taken == [way == "direct"]
    for one, another in zip(*found, strict=True):
        assert_same_bits(one, another)
        assert one.stride() == another.stride()


def test_a_gradient_finer_than_x_is_not_rounded() -> None:
    x = torch.randn(2, 8, 35).bfloat16()
    grad = torch.randn(2, 8, 35)
    rest = (None, None, None, None, None, 4, 1e-5, True)
    _, mean, rstd = torch.ops.fastdiff.group_norm_silu(x, *rest)
    found = torch.ops.fastdiff.group_norm_silu_backward(grad, mean, rstd, x, *rest)
    exact = torch.ops.fastdiff.group_norm_silu_backward(grad, mean, rstd, x.float(), *rest)
    assert_same_bits(found[0], exact[0].bfloat16())
    assert_same_bits(found[1], exact[1])


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_second_derivative_is_refused_not_taken_for_zero(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True)
    y = ops.group_norm_silu(x, 4)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        (y.sum() + grad.square().sum()).backward()


@pytest.mark.parametrize("way", ["direct", "torch"])
@pytest.mark.parametrize(
    "wrong",
    [
        dict(weight=torch.zeros(5)),
        dict(weight=torch.zeros(1)),
        dict(weight=torch.tensor(1.0)),
        dict(shift=torch.tensor(1.0)),
        dict(residual=torch.tensor(1.0)),
        dict(bias=torch.zeros(6).long()),
        dict(scale=torch.zeros(6)),
        dict(scale=torch.zeros(2, 1)),
        dict(shift=torch.zeros(2, 6).long()),
        dict(residual=torch.zeros(1, 6, 3)),
        dict(residual=torch.zeros(2, 6, 3).half()),
        dict(weight=torch.zeros(6, device="meta")),
        dict(num_groups=4),
        dict(num_groups=0),
        dict(eps=0.0),
        dict(eps=float("nan")),
    ],
    ids=str,
)
def test_what_the_long_way_refuses_no_short_one_accepts(
    way: str, wrong: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be"):
        ops.group_norm_silu(**(dict(x=torch.zeros(2, 6, 3), num_groups=3) | wrong))


@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_many_sums_at_once_are_those_of_each(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`is_grads_batched`: the gradient is then one of vmap's tensors, without an address."""
    go(way, monkeypatch)
    torch.manual_seed(0)
    x, residual, weight, scale = (torch.randn(*s) for s in ((2, 8, 5), (2, 8, 5), (8,), (2, 8)))
    leaves = [a.requires_grad_() for a in (x, residual, weight, scale)]
    y = ops.group_norm_silu(x, 4, weight, scale=scale, residual=residual)
    each = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, leaves, each, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(each):
        alone = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for many, one in zip(batched, alone, strict=True):
            assert torch.allclose(many[i], one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["residual", "weight", "bias", "scale", "shift"])
def test_a_gradient_that_is_asked_for_alone_is_the_operators(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = operands(2, 12, 7, 3, **FULL)
    given = dict(weight=f.weight, bias=f.bias, scale=f.scale, shift=f.shift, residual=f.residual)
    leaf = given[wanted].requires_grad_()
    grads = []
    for way in ("operator", "direct"):
        with monkeypatch.context() as patch:
            go(way, patch)
            y = ops.group_norm_silu(f.x, 3, **given)
            grads += torch.autograd.grad(y.square().sum(), leaf)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-5 * float(grads[0].abs().max()))


def test_no_two_gradients_of_one_sample_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who accumulates gradients adds to each in place."""
    go("direct", monkeypatch)
    names = ("residual", "weight", "bias", "scale", "shift")
    shapes = ((1, 8, 5), (8,), (8,), (1, 8), (1, 8))
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(5), k) for k in range(6)):
        leaves = {names[i]: torch.randn(shapes[i], requires_grad=True) for i in chosen}
        x, given = torch.randn(1, 8, 5, requires_grad=True), tuple(leaves.values())
        y = ops.group_norm_silu(x, 4, leaves.pop("weight", None), leaves.pop("bias", None), **leaves)
        given = [
            x,
            *(node.variable for node, _ in y.grad_fn.next_functions if node and node.variable is not x),
        ]
        grads = torch.autograd.grad(y.square().sum(), given)
        ranges = sorted((g.data_ptr(), g.data_ptr() + g.nbytes) for g in grads)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))


@pytest.mark.parametrize("way", WAYS)
def test_options_may_be_numpys(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    x = torch.randn(2, 8, 5)
    expected = ops.group_norm_silu(x, 4, eps=0.5)
    assert_same_bits(ops.group_norm_silu(x, np.int64(4), eps=np.float32(0.5)), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_groups=4.0), "`num_groups` must be an int, got 4.0"),
        (dict(num_groups=None), "`num_groups` must be an int, got None"),
        (dict(eps="1e-5"), "`eps` must be a number, got '1e-5'"),
    ],
    ids=str,
)
def test_options_of_other_types_are_named(
    way: str, wrong: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(way, monkeypatch)
    with pytest.raises(TypeError, match=re.escape(message)):
        ops.group_norm_silu(**(dict(x=torch.randn(2, 8, 5), num_groups=4) | wrong))


def test_what_the_gradient_needs_must_not_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True).clone()
    y = ops.group_norm_silu(x, 4)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_ordinary_gradient_goes_straight_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True)
    y = ops.group_norm_silu(x, 4)
    with Operators() as operators:
        y.sum().backward()
    assert not any("fastdiff" in name for name in operators.counts)


@pytest.mark.parametrize("way", ["direct", "torch"])
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "residual"])
def test_what_is_no_tensor_is_named(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got float"):
        ops.group_norm_silu(torch.zeros(2, 6, 3), 3, **{name: 1.0})
