"""group_norm_silu on CPU tensors: every way to the result, by size and surroundings, is the same formula."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits
from operators import Operators
from test_group_norm import BARE, FULL, SHAPES, assert_formula, exact_of, operands
from torch.utils.checkpoint import checkpoint

from fastdiff import _direct, ops
from fastdiff.kernels import _torch_ops

ROOT = Path(__file__).parents[1]
WAYS = ("operator", "direct", "torch")


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Send what follows one way; what is returned collects whether each call took it."""
    taken: list[bool] = []
    native = _torch_ops.operators(wait=True) or pytest.skip("needs a C++ compiler")

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            done = run(*operands)
            taken.append(done is not None)
            return done

        return call

    if way == "operator":
        monkeypatch.setattr(_direct, "group_norm_silu", counting(lambda operands: None))
    if way == "direct":
        direct = native._replace(group_norm_silu=counting(native.group_norm_silu))
        monkeypatch.setattr(_torch_ops, "operators", lambda: direct)
    if way == "torch":
        monkeypatch.setattr(_torch_ops, "operators", lambda: None)
        monkeypatch.setattr(_torch_ops.library, "is_coming", lambda: False)
        monkeypatch.setattr(_direct, "_by_torch", counting(_direct._by_torch))
    return taken


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


def test_a_compiler_sees_one_operator_whatever_the_size() -> None:
    taken = []

    def count(graph: torch.fx.GraphModule, _: list) -> object:
        taken.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    for n in (4, 2**16):
        x = torch.randn(1, 8, n)
        compiled = torch.compile(lambda a: ops.group_norm_silu(a, 4), fullgraph=True, backend=count)(x)
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


@pytest.mark.parametrize("wanted", ["residual", "weight", "bias", "scale", "shift"])
def test_only_the_gradients_that_are_asked_for_are_made(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("way", WAYS)
def test_transforms_see_the_formula(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go(way, monkeypatch)
    x = torch.randn(3, 2, 8, 5)
    many = torch.func.vmap(lambda a: ops.group_norm_silu(a, 4))(x)
    for one, other in zip(many, x, strict=True):
        assert torch.allclose(one, ops.group_norm_silu(other, 4), rtol=1e-5, atol=1e-6)


def test_what_the_gradient_needs_must_not_be_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True).clone()
    y = ops.group_norm_silu(x, 4)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_compiler_that_fails_on_torchs_headers_leaves_torchs_operators(tmp_path: Path) -> None:
    """With one line of the log that nobody is shown who did not ask for it, and the same numbers."""
    program = """
import logging, os
import torch
from fastdiff import ops
from fastdiff.kernels import _cache, _torch_ops, cpu
logging.getLogger("fastdiff").addHandler(handler := logging.Handler())
said = []
handler.emit = lambda record: said.append((record.levelname, record.getMessage()))
logging.getLogger("fastdiff").setLevel(logging.INFO)
x = torch.randn(2, 8, 5, requires_grad=True)
early = ops.group_norm_silu(x, 4)
assert cpu.library(wait=True) is not None
assert _torch_ops.operators(wait=True) is None
((level, line),) = said
assert level == "INFO" and "could not be built" in line, said
late = ops.group_norm_silu(x, 4)
assert torch.allclose(early, late, rtol=1e-5, atol=1e-6)
assert late.grad_fn.name() == "SiluBackward0", late.grad_fn
"""
    refusing = tmp_path / "g++"
    refusing.write_text('#!/bin/sh\ncase "$*" in *torch.cpp*) exit 1;; esac\nexec g++ "$@"\n')
    refusing.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=100,
        env=os.environ | {"CXX": str(refusing), "FASTDIFF_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_the_operator() -> None:
    code = """
import os
import torch
from fastdiff import ops
from fastdiff.kernels import _torch_ops
_torch_ops.operators(wait=True)
x = torch.randn(1, 8, 5)
y = ops.group_norm_silu(x, 4)
child = os.fork()
if child == 0:
    os._exit(not torch.equal(ops.group_norm_silu(x, 4), y))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_ordinary_gradient_goes_straight_to_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    go("direct", monkeypatch)
    x = torch.randn(2, 8, 5, requires_grad=True)
    y = ops.group_norm_silu(x, 4)
    with Operators() as operators:
        y.sum().backward()
    assert not any("fastdiff" in name for name in operators.counts)


def test_checkpointing_survives_the_end_of_the_background_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved for the gradient is the same before the compiled loop is there and after."""
    native, is_there = _torch_ops.operators(wait=True) or pytest.skip("needs a C++ compiler"), []
    monkeypatch.setattr(_torch_ops, "operators", lambda: native if is_there else None)
    monkeypatch.setattr(_torch_ops.library, "is_coming", lambda: not is_there)
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
from fastdiff import ops
from fastdiff.kernels import _torch_ops
_torch_ops.operators(wait=True)
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
