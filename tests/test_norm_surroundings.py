"""group_norm_silu on CPU tensors: who looks on sees one operator, whoever builds, forks or hooks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import assert_same_bits
from norm_ways import WAYS, go
from operators import Operators
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastdiff import _norm, ops
from fastdiff.kernels import _cache, _torch_ops, cpu

ROOT = Path(__file__).parents[1]


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


@pytest.mark.parametrize("way", WAYS)
def test_transforms_see_the_formula(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = go(way, monkeypatch)
    x = torch.randn(3, 2, 8, 5)
    many = torch.func.vmap(lambda a: ops.group_norm_silu(a, 4))(x)
    assert True not in taken
    for one, other in zip(many, x, strict=True):
        assert torch.allclose(one, ops.group_norm_silu(other, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unpacked", ["transposed", "strided"])
def test_what_hooks_on_saved_tensors_give_back_may_lie_otherwise(
    unpacked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go("direct", monkeypatch)
    x, weight = torch.randn(2, 8, 5, requires_grad=True), torch.randn(8, requires_grad=True)

    def unpack(saved: torch.Tensor) -> torch.Tensor:
        if unpacked == "transposed":
            return saved.mT.contiguous().mT if saved.dim() > 1 else saved
        return torch.stack([saved, saved], -1)[..., 0]

    def gradients() -> tuple[torch.Tensor, ...]:
        y = ops.group_norm_silu(x, 4, weight)
        return torch.autograd.grad(y.square().sum(), (x, weight))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, unpack):
        found = gradients()
    for grad, wanted in zip(found, expected, strict=True):
        assert torch.allclose(grad, wanted, rtol=1e-5, atol=1e-5)


class _Subclass(torch.Tensor):
    """One that torch lets through its functions."""


def test_subclasses_and_function_modes_see_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, x, seen = go("direct", monkeypatch), torch.randn(2, 8, 5), []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    assert type(ops.group_norm_silu(x.as_subclass(_Subclass), 4)) is _Subclass
    with Watching():
        ops.group_norm_silu(x, 4)
    assert "fastdiff.group_norm_silu" in seen
    with torch.inference_mode(), FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.zeros(2, 8, 5))
    with torch.inference_mode():
        assert ops.group_norm_silu(fake, 4).shape == x.shape
    assert True not in taken


@pytest.mark.parametrize("is_built", [False, True])
def test_what_is_traced_is_the_one_operator_at_any_time(
    is_built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    go("direct" if is_built else "torch", monkeypatch)
    with Operators() as operators:
        ops.group_norm_silu(torch.randn(2, 8, 5), 4)
    assert [name for name in operators.counts if "norm" in name] == ["fastdiff.group_norm_silu.default"]


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
with torch.no_grad():
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


def test_no_compiler_is_started_that_takes_the_memory_which_others_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = _torch_ops.library
    cpu.library(wait=True)
    monkeypatch.setattr(library, "loaded", None)
    monkeypatch.setattr(library, "_thread", None)
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(_cache, "free_memory", lambda: 1.9e9)
    with caplog.at_level("INFO"):
        assert _torch_ops.operators(wait=True) is None
    assert "its compiler takes 1.0 GB of memory, and twice that is not free" in caplog.text
    assert not list(tmp_path.iterdir())


def test_free_memory_is_a_number_of_bytes() -> None:
    assert _cache.free_memory() > 2**20


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
    native = _torch_ops.operators()
    os._exit(native is None or not torch.equal(native.group_norm_silu(x, *[None] * 5, 4, 1e-5, True), y))
raise SystemExit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("end", ["built", "failed"])
def test_checkpointing_survives_the_end_of_the_background_build(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved for the gradient is the same before the build ends and after, however it does."""
    native = _torch_ops.operators(wait=True) or pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(_norm, "_took_operator", [False])
    monkeypatch.setattr(_torch_ops.library, "loaded", None)
    monkeypatch.setattr(_torch_ops, "operators", lambda: None)
    monkeypatch.setattr(_torch_ops.library, "is_coming", lambda: True)
    x, weight, scale = (torch.randn(*s, requires_grad=True) for s in ((2, 8, 5), (8,), (2, 8)))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ops.group_norm_silu(x, 4, weight, scale=scale)

    y = checkpoint(layer, x, use_reentrant=False)
    monkeypatch.setattr(_torch_ops.library, "is_coming", lambda: False)
    monkeypatch.setattr(_torch_ops.library, "loaded", native if end == "built" else None)
    grads = torch.autograd.grad(y.square().sum(), (x, weight, scale))
    expected = torch.autograd.grad(layer(x).square().sum(), (x, weight, scale))
    for grad, wanted in zip(grads, expected, strict=True):
        assert torch.allclose(grad, wanted, rtol=1e-4, atol=1e-4)


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
