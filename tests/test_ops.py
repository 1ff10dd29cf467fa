"""The public operators: registered as torch asks, composable, and clear about what they refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, random_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastdiff
from fastdiff import ops
from fastdiff.kernels import advance as advance_module
from fastdiff.kernels import philox
from fastdiff.kernels.layout import PackedTable

SHAPE = (3, 4, 5)
TABLE = random_table(1, 0)


def operands(batch: int = 2, lanes: int | None = None, learned: bool = False) -> dict[str, Any]:
    """Arguments of a valid `ops.reverse_step`."""
    g = torch.Generator().manual_seed(1)
    channels = SHAPE[0] * (2 if learned else 1)
    lanes = batch if lanes is None else lanes
    return dict(
        x=torch.randn(batch, *SHAPE, generator=g),
        out=torch.randn(lanes, channels, *SHAPE[1:], generator=g),
        table=TABLE,
        row=TABLE.start(batch) + 2,
        seed=7,
        registers=torch.randn(1, batch, *SHAPE, generator=g),
        u=torch.zeros(lanes, *SHAPE),
    )


def raw(given: dict[str, Any]) -> tuple[Any, ...]:
    """The same as arguments of `torch.ops.fastdiff.reverse_step_`."""
    key = ops.noise_key(given["seed"], len(given["x"]), None, None)
    table = given["table"]
    return (
        given["x"],
        given["registers"],
        given["out"],
        given["u"],
        table.coef,
        table.plan,
        given["row"],
        *key,
    ) + (None,) * 4


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# registration


def test_operators_pass_opcheck() -> None:
    seed, ids = ops.noise_key(1, 5, 5, None)
    draws = torch.zeros_like(ids)
    opcheck(torch.ops.fastdiff.normal, (seed, ids, draws, 1, 7))
    t = torch.randint(0, 10, (5,))
    for kind in range(4):
        for grad in (False, True):
            x0 = torch.randn(5, *SHAPE, requires_grad=grad)
            args = (x0, torch.rand(10, 2), t, seed, ids, draws, kind, None, torch.float32)
            opcheck(torch.ops.fastdiff.q_sample, args)
    opcheck(torch.ops.fastdiff.reverse_step_, raw(operands()))
    row = TABLE.start(5)
    opcheck(
        torch.ops.fastdiff.advance_,
        (row, TABLE.coef, torch.zeros(5), None, None, None, torch.zeros_like(row)),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_chain_compiles_as_one_graph_and_gives_the_same_bits(backend: str) -> None:
    def chain(x0: torch.Tensor, key: torch.Tensor, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        z = ops.normal(SHAPE, key, 2, 0)
        x_t, goal = ops.q_sample(x0, alpha_sigma, times, key, None, 3, target="v")
        x = given["x"] + z
        row = given["row"] + 0
        u = torch.zeros_like(x)
        rest = {k: given[k] for k in ("out", "table", "registers")}
        ops.reverse_step(x, row=row, seed=key, u=u, **rest)
        t = torch.zeros(2)
        ops.advance(row, given["table"], t)
        return x * 2, u + 1, x_t, goal, row, t

    alpha_sigma, times = torch.rand(10, 2), torch.tensor([2, 9])
    x0, key = torch.randn(2, *SHAPE), torch.tensor([5, -6])
    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, backend=backend)(x0, key, operands())
    for actual, expected in zip(compiled, chain(x0, key, operands()), strict=True):
        assert_same_bits(actual, expected)


def test_operators_run_on_fake_tensors_without_their_kernels() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        seed, ids = ops.noise_key(1, 2, 2, "cuda")
        assert ops.normal(SHAPE, seed, ids, 0).shape == (2, *SHAPE)
        x0 = torch.empty(2, *SHAPE, device="cuda")
        t = torch.zeros(2, dtype=torch.int64, device="cuda")
        x_t, goal = ops.q_sample(x0, torch.empty(10, 2, device="cuda"), t, seed, ids, 0, target="eps")
        assert (x_t.shape, goal.shape, goal.device.type) == (x0.shape, x0.shape, "cuda")
        row = torch.zeros(2, dtype=torch.int32, device="cuda")
        coef, plan = (torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in (TABLE.coef, TABLE.plan))
        table = PackedTable(coef, plan, 1)
        registers = torch.empty(1, *x0.shape, device="cuda")
        assert ops.reverse_step(x0, torch.empty_like(x0), table, row, seed, ids, registers=registers) is x0
        ops.advance(row, table, torch.zeros(2, device="cuda"))


# behaviour


def test_normal_depends_on_nothing_but_its_coordinates() -> None:
    z = ops.normal(SHAPE, 9, 5, draw=3)
    assert (z.shape, z.dtype) == ((5, *SHAPE), torch.float32)
    assert_same_bits(ops.normal(SHAPE, 9, [3], draw=3)[0], z[3])
    assert_same_bits(ops.normal(SHAPE, torch.tensor([9, 9]), [4, 0], draw=torch.tensor([3, 3])), z[[4, 0]])
    assert_same_bits(ops.normal((2, 1), 9, [1], draw=3)[0].flatten(), z[1].flatten()[:2])
    assert ops.normal((0, 3), 9, 5, draw=3).shape == (5, 0, 3)


def test_seed_of_64_bits_is_the_same_signed_and_unsigned() -> None:
    assert_same_bits(ops.normal((8,), 2**64 - 1, 1, 0), ops.normal((8,), -1, 1, 0))
    assert not torch.equal(ops.normal((8,), 2**63, 1, 0), ops.normal((8,), 0, 1, 0))


def test_reverse_step_updates_x_in_place_and_returns_it() -> None:
    given = operands()
    x = given.pop("x")
    before = x.clone()
    assert ops.reverse_step(x, **given) is x
    assert not torch.equal(x, before)


def test_operands_that_are_not_dense_give_the_same_bits() -> None:
    def spread(a: torch.Tensor) -> torch.Tensor:
        return torch.stack([a, torch.full_like(a, 99)], -1)[..., 0]

    given = operands(4, lanes=8, learned=True)
    given |= dict(
        cond_lane=int32(0, 6, 3, 1),
        uncond_lane=int32(2, -1, 4, 5),
        guidance_scale=torch.tensor([2.0, 1, 3, 0.5]),
    )
    given |= dict(sample_ids=torch.tensor([5, 3, 1, 2]), seed=torch.tensor([1, 2, 3, 4]))
    strided = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    names = ("out", "row", "cond_lane", "uncond_lane", "guidance_scale", "sample_ids", "seed")
    strided |= {k: spread(given[k]) for k in names}
    assert not strided["out"].is_contiguous()
    channels_last = given | {k: given[k].clone() for k in ("x", "u", "registers")}
    channels_last["out"] = given["out"].contiguous(memory_format=torch.channels_last)
    expected = ops.reverse_step(**given)
    for other in (strided, channels_last):
        assert_same_bits(ops.reverse_step(**other), expected)
        assert_same_bits(other["u"], given["u"])


def test_table_without_registers_ignores_the_state_of_gradients() -> None:
    x = torch.randn(2, *SHAPE)
    out = torch.randn(2, *SHAPE, requires_grad=True)
    ops.reverse_step(x, out, random_table(0, 0), TABLE.start(2) + 2)
    assert not x.requires_grad


# the choice of backend


def test_cuda_tensors_go_to_triton_and_others_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called = record_backends(monkeypatch)
    ops.normal((4,), 0, 1, 0)
    monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
    ops.normal((4,), 0, 1, 0)
    monkeypatch.setenv("FASTDIFF_BACKEND", "torch")
    ops.normal((4,), 0, 1, 0)
    monkeypatch.setenv("FASTDIFF_BACKEND", "")
    ops.normal((4,), 0, 1, 0)
    assert called == ["torch", "triton", "torch", "torch"]


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_BACKEND", "numba")
    with pytest.raises(ValueError, match=r"FASTDIFF_BACKEND must be one of .*torch.*triton.*numba"):
        ops.normal((4,), 0, 1, 0)


def record_backends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []
    for name in ("torch", "triton"):
        monkeypatch.setattr(philox, f"normal_{name}", lambda *operands, name=name: called.append(name))
    return called


@pytest.mark.interpret
def test_backend_triton_runs_every_operator_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[torch.Tensor]:
        given = operands()
        row, t = given["row"].clone(), torch.zeros(2)
        ops.advance(row, TABLE, t)
        x_t, goal = ops.q_sample(
            given["x"].clone(), torch.eye(2), torch.tensor([0, 1]), 3, None, 0, target="v"
        )
        return [ops.reverse_step(**given), given["u"], x_t, goal, row, t, ops.normal(SHAPE, 1, 2, 3)]

    expected = run()
    monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
    launched = []
    original = advance_module.advance_triton
    monkeypatch.setattr(advance_module, "advance_triton", lambda a: (launched.append(1), original(a)))
    for actual, wanted in zip(run(), expected, strict=True):
        assert_same_bits(actual, wanted)
    assert launched


def test_package_imports_and_runs_without_triton_and_a_launch_says_what_to_do() -> None:
    script = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Blocked())
import torch, fastdiff.ops as ops
from fastdiff.kernels import _triton, advance, philox, q_sample, reverse_step
assert not _triton.HAS_TRITON
assert ops.normal((5,), 0, 2, 0).shape == (2, 5)
import os
os.environ["FASTDIFF_BACKEND"] = "triton"
for launch in (lambda: ops.normal((5,), 0, 2, 0), lambda: ops.q_sample(
    torch.zeros(1, 5), torch.ones(1, 2), torch.zeros(1, dtype=torch.int64), 0, None, 0)):
    try:
        launch()
    except RuntimeError as error:
        assert "needs Triton" in str(error) and "pip install triton" in str(error), error
    else:
        raise SystemExit("a launch without Triton passed")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_import_of_the_operators_brings_no_triton_and_no_compiler() -> None:
    script = "import sys, fastdiff.ops; assert not {'triton', 'torch._dynamo', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_rng_version_is_public() -> None:
    assert fastdiff.RNG_VERSION == 1


# what is refused


def change(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.reverse_step(**(operands() | changes))


def sampled(**changes: Any) -> Callable[[], Any]:
    given = dict(x0=torch.zeros(2, 3), alpha_sigma=torch.ones(4, 2), t=torch.zeros(2, dtype=torch.int64))
    return lambda: ops.q_sample(**(given | dict(seed=0, sample_ids=None, draw=0) | changes))


def advanced(**changes: Any) -> Callable[[], Any]:
    given = dict(row=TABLE.start(2), table=TABLE, t=torch.zeros(2))
    return lambda: ops.advance(**(given | changes))


META = torch.device("meta")
REFUSED: list[tuple[str, Callable[[], Any]]] = [
    (r"`x` must be torch.float32 dense on cpu, got torch.float64", change(x=torch.zeros(2, *SHAPE).double())),
    (r"`x` must be .*dense.* got .* not dense", change(x=torch.zeros(2, 4, 5, 3).movedim(-1, 1))),
    (r"`table.coef` must be on cpu, got .* on meta; use `table.to", change(table=TABLE.to(META))),
    (
        r"`row` must be torch.int32 \[2\] on cpu, got torch.int64.*`table.start",
        change(row=torch.zeros(2).long()),
    ),
    (r"`row` must be torch.int32 \[2\]", change(row=TABLE.start(3))),
    (
        r"`out` must be \[lanes, 3, 4, 5\], or .*2C.* got \[2, 3, 4, 4\]",
        change(out=torch.zeros(2, 3, 4, 4)),
    ),
    (r"`out` must be .* got \[2, 5, 4, 3\]", change(out=torch.zeros(2, 5, 4, 3))),
    (r"`out` must be .* torch.int64", change(out=torch.zeros(2, *SHAPE).long())),
    (r"`out` must be on cpu, got .* on meta", change(out=torch.zeros(2, *SHAPE, device=META))),
    (r"`registers` must be \[1, 2, \.\.\.\]", change(registers=None)),
    (r"`registers` must be torch.float32 \[1, 2, 3, 4, 5\]", change(registers=torch.zeros(2, 2, *SHAPE))),
    (r"`u` must be \[2, 3, 4, 5\] dense", change(u=torch.zeros(2, 3, 4, 4))),
    (r"`out` has 4 lanes for 2 slots; say with `cond_lane`", change(out=torch.zeros(4, *SHAPE), u=None)),
    (r"`uncond_lane` needs `cond_lane` and `guidance_scale`", change(uncond_lane=int32(0, 1))),
    (r"`cond_lane` must be torch.int32 \[2\]", change(cond_lane=int32(0))),
    (r"`guidance_scale` must be torch.float32 \[2\]", change(guidance_scale=torch.ones(2).double())),
    (r"`noise` must be torch.float32 \[2, 3, 4, 5\]", change(noise=torch.zeros(2, 60))),
    (r"`seed` must fit 64 bits, got 18446744073709551616", change(seed=2**64)),
    (r"`seed` must be an int or \[2\] int64", change(seed=torch.zeros(3).long())),
    (r"`sample_ids` must be \[2\], got shape \(3,\)", change(sample_ids=[0, 1, 2])),
    (r"`sample_ids` must be in \[0, 2\^32\), got 4294967296", change(sample_ids=[0, 2**32])),
    (r"`target` must be one of .* got 'noise'", sampled(target="noise")),
    (r"`x0` must be torch.float32", sampled(x0=torch.zeros(2, 3).half())),
    (r"`alpha_sigma` must be torch.float32 \[any, 2\]", sampled(alpha_sigma=torch.ones(4, 3))),
    (r"`t` must be torch.int64 \[2\]", sampled(t=torch.zeros(3).long())),
    (r"`noise` must be torch.float32 \[2, 3\]", sampled(noise=torch.zeros(2))),
    (r"`draw` must be in \[0, 2\^32\), got -1", sampled(draw=-1)),
    (r"`row` must be torch.int32 \[any\] dense.*`table.start", advanced(row=torch.zeros(2))),
    (r"`table.coef` must be on cpu.*on meta", advanced(table=TABLE.to(META))),
    (r"`t` must be \[2\] or longer.*`cond_lane`", advanced(t=torch.zeros(1))),
    (r"`last` must be torch.int32 \[2\]", advanced(last=int32(1))),
    (r"`lane_row` must be torch.int32 \[2\]", advanced(lane_row=int32(1))),
    (r"`domain` must be in \[0, 2\^32\), got -1", lambda: ops.normal((2,), 0, 1, 0, domain=-1)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_argument_that_breaks_the_contract_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("seed", lambda: ops.normal((2,), 1.5, 1, 0)),
        ("sample_ids", lambda: ops.normal((2,), 1, [0.5], 0)),
        ("sample_ids", lambda: ops.normal((2,), 1, torch.tensor([0.5]), 0)),
        ("x", change(x=[1.0, 2.0])),
    ],
)
def test_argument_of_another_type_is_named(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        call()


def test_refused_call_changes_nothing() -> None:
    given = operands()
    x, u, registers = (given[k].clone() for k in ("x", "u", "registers"))
    with pytest.raises(ValueError, match="`noise`"):
        ops.reverse_step(**given, noise=torch.zeros(1))
    for before, name in ((x, "x"), (u, "u"), (registers, "registers")):
        assert_same_bits(given[name], before)
