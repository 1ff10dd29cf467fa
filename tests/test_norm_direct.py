"""group_norm_silu on CPU tensors: every way to the result, by size and surroundings, is the same formula."""

from __future__ import annotations

import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import assert_same_bits, library
from operators import Operators
from test_group_norm import BARE, FULL, SHAPES, assert_formula, exact_of, operands
from torch.utils.checkpoint import checkpoint

from fastdiff import _norm_direct, ops

ROOT = Path(__file__).parents[1]
WAYS = ("operator", "direct", "torch")


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send what follows one way, whatever its size."""
    for name in ("_FEW", "_FEW_GRAD", "_FEW_LAST"):
        monkeypatch.setattr(_norm_direct, name, 2**40 if way == "torch" else 0)
    if way == "operator":
        monkeypatch.setattr("fastdiff._norm.attempt", lambda operands: None)
    else:
        library()
        taken = []
        for name in ("_by_torch", "_forward"):
            original = getattr(_norm_direct, name)
            monkeypatch.setattr(
                _norm_direct, name, lambda *a, f=original, name=name: (taken.append(name), f(*a))[1]
            )
        monkeypatch.setattr(_norm_direct, "taken", taken, raising=False)


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
    go(way, monkeypatch)
    f = operands(*shape, last, **changes)
    x, residual = (first(a, last) for a in (f.x, f.residual))
    options = dict(scale=f.scale, shift=f.shift, residual=residual, activation=f.activation)
    y = ops.group_norm_silu(x, f.groups, f.weight, f.bias, **options)
    exact = exact_of(f)
    assert_formula(f._replace(y=first(y, last), mean=exact.mean.float(), rstd=exact.rstd.float()))
    assert y.stride() == x.stride()
    if way != "operator":
        assert _norm_direct.taken == ["_by_torch" if way == "torch" else "_forward"]


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
def test_half_precision_goes_straight_to_the_loop(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own two operators would round between them."""
    go("torch", monkeypatch)
    f = operands(2, 12, 63, 3, dtype=dtype, residual=None)
    y = ops.group_norm_silu(f.x, 3, f.weight, f.bias, scale=f.scale, shift=f.shift)
    exact = exact_of(f)
    assert_formula(f._replace(y=y, mean=exact.mean.float(), rstd=exact.rstd.float()))
    assert _norm_direct.taken == ["_forward"]


def test_who_looks_on_sees_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5)
    with Operators() as operators:
        y = ops.group_norm_silu(x, 4)
    assert "fastdiff.group_norm_silu.default" in operators.counts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, yet must not record a constant
        traced = torch.jit.trace(lambda a: ops.group_norm_silu(a, 4), x)
    assert_same_bits(traced(3 * x), ops.group_norm_silu(3 * x, 4))
    assert_same_bits(y, ops.group_norm_silu(x, 4))


def test_tensors_that_are_not_what_their_memory_says_take_the_long_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A negated view, a zero without memory: their address alone would be read wrongly."""
    go("direct", monkeypatch)
    negated = torch.view_as_complex(torch.randn(1, 1, 1, 2)).conj().imag
    assert negated.is_neg()
    assert negated.is_contiguous()
    weight = torch.ones(1)
    shift = torch.full((1, 1), 0.5)
    expected = ops.group_norm_silu(negated.resolve_neg(), 1, weight, shift=shift)
    assert_same_bits(ops.group_norm_silu(negated, 1, weight, shift=shift), expected)
    zero = torch._efficientzerotensor((2, 8, 5))
    assert_same_bits(ops.group_norm_silu(zero, 4), ops.group_norm_silu(torch.zeros(2, 8, 5), 4))


def test_size_decides_and_a_compiler_sees_one_operator() -> None:
    taken = []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        taken.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    for n in (4, 2**16):
        x = torch.randn(1, 8, n)
        compiled = torch.compile(lambda a: ops.group_norm_silu(a, 4), fullgraph=True, backend=count)(x)
        # the operator always runs the compiled loop, which a small image goes past
        assert torch.allclose(compiled, ops.group_norm_silu(x, 4), rtol=2**-20, atol=2**-20)
    assert [name for name in taken if "getitem" not in name] == ["fastdiff.group_norm_silu"] * 2


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_second_derivative_is_refused_not_taken_for_zero(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True)
    y = ops.group_norm_silu(x, 4)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="group_norm_silu has no second derivative"):
        (y.sum() + grad.square().sum()).backward()


def test_threads_do_not_meet_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    images = [torch.randn(1, 8, 40, 40, generator=torch.Generator().manual_seed(i)) for i in range(16)]
    expected = [ops.group_norm_silu(x, 4) for x in images]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: ops.group_norm_silu(x, 4), images))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_choosing_a_backend_is_heeded_at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_BACKEND", "numba")
    with pytest.raises(ValueError, match="FASTDIFF_BACKEND must be one of"):
        ops.group_norm_silu(torch.randn(1, 8, 4), 4)


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


def test_an_ordinary_gradient_goes_straight_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True)
    y = ops.group_norm_silu(x, 4)
    with Operators() as operators:
        y.sum().backward()
    assert not any("fastdiff" in name for name in operators.counts)


def test_checkpointing_survives_the_end_of_the_background_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the gradient is the same before the compiled loop is there and after."""
    loaded, is_there = library(), []
    monkeypatch.setattr(_norm_direct.cpu, "library", lambda *a, **k: loaded if is_there else None)
    for name in ("_FEW", "_FEW_GRAD", "_FEW_LAST"):
        monkeypatch.setattr(_norm_direct, name, 0)
    x, weight, scale = (torch.randn(*s, requires_grad=True) for s in ((2, 8, 5), (8,), (2, 8)))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.group_norm_silu(x, 4, weight, scale=scale)

    y = checkpoint(layer, x, use_reentrant=False)
    is_there.append(True)
    grads = torch.autograd.grad(y.square().sum(), (x, weight, scale))
    expected = torch.autograd.grad(layer(x).square().sum(), (x, weight, scale))
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["direct", "torch"])
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "residual"])
def test_what_is_no_tensor_is_named(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    with pytest.raises(TypeError, match=f"`{name}` must be a tensor, got float"):
        ops.group_norm_silu(torch.zeros(2, 6, 3), 3, **{name: 1.0})


def test_a_torch_without_its_inner_functions_takes_the_operator_and_still_refuses() -> None:
    """None of them is promised: in a process whose torch has lost them."""
    program = """
import torch
from torch.autograd import forward_ad
%s
import fastdiff
from fastdiff import _dispatch, _norm_direct, ops
from fastdiff.kernels import cpu
cpu.library(wait=True)
_norm_direct._FEW = _norm_direct._FEW_GRAD = 0
x = torch.randn(2, 8, 5, requires_grad=True)
y = ops.group_norm_silu(x, 4)
h = torch.nn.functional.silu(torch.group_norm(x, 4))
assert torch.allclose(y, h, rtol=1e-5, atol=1e-6)
given, wanted = (torch.autograd.grad(a.square().sum(), x, retain_graph=True)[0] for a in (y, h))
assert torch.allclose(given, wanted, rtol=1e-4, atol=1e-5)
loss = ops.denoising_loss(x, x.detach(), torch.rand(3, 2), torch.zeros(2).long(), 0, None, 0)
for result in (y.sum(), loss.sum()):
    (grad,) = torch.autograd.grad(result, x, create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        assert "has no second derivative" in str(error), error
    else:
        raise AssertionError("was taken for a constant")
"""
    missing = "; ".join(
        [
            "del torch._C._dispatch_tls_local_include_set, torch._C._functions.DelayedError",
            "del torch._C._autograd._get_current_graph_task_keep_graph",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program % missing], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr[-2000:]
