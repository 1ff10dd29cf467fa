"""The public operators: registered as torch asks, composable, and clear about what they refuse."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from kernel_cases import ENDINGS, assert_same_bits, int32, random_table
from kernel_cases import OP_SHAPE as SHAPE
from kernel_cases import OP_TABLE as TABLE
from kernel_cases import op_arguments as operands
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import fastdiff
from fastdiff import _dispatch, ops
from fastdiff.kernels import _triton, layout, philox
from fastdiff.kernels.layout import PackedTable
from fastdiff.schedule import NoiseSchedule
from fastdiff.train.bound import vlb_coefficients

# what nn.Module or a chain meets; the gradient of group_norm_silu is its own operator
EVERY = (
    "normal", "q_sample", "denoising_loss", "masked_denoising_loss", "vlb_terms", "group_norm_silu",
    "reverse_step_", "advance_",
)  # fmt: skip


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
        *[None] * 4,
        table.threshold,
        *[None] * 3,
    )


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
    given = operands()
    opcheck(torch.ops.fastdiff.reverse_step_, raw(given))
    given["table"] = random_table(1, 0, threshold=(0.9, 2.0), endings=ENDINGS)
    image = (torch.randn(2, *SHAPE), torch.ones(2, *SHAPE) > 0, torch.empty(2, *SHAPE))
    opcheck(torch.ops.fastdiff.reverse_step_, (*raw(given)[:-3], *image))
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


def test_reverse_step_thresholds_keeps_and_previews_as_its_table_says() -> None:
    table = random_table(0, 3, threshold=(0.9, 3.0), endings=ENDINGS)
    x, out, known = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask, preview, row = known > 0, torch.empty_like(x), table.start(2) + 2
    wide, size = x.clone(), SHAPE[0] * SHAPE[1] * SHAPE[2]
    ops.reverse_step(wide, 9 * out, table, row, seed=4, known=known, mask=mask, preview=preview)
    assert torch.equal(wide[mask], known[mask])  # row 2 ends on the clean image
    a = table.coef[2].double()
    x0 = a[layout.X0_FROM_X] * x.double() + a[layout.X0_FROM_OUT] * 9 * out.double()
    s = x0.abs().view(2, size).quantile(0.9, dim=1).clamp(1.0, 3.0).view(2, 1, 1, 1)
    assert (s > 1).all()
    assert (preview - (x0 / s).clamp(-1, 1)).abs().max() <= 1e-6
    plain = x.clone()
    ops.reverse_step(plain, 9 * out, table, row, seed=4)
    assert_same_bits(wide[~mask], plain[~mask])


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


def test_launch_happens_under_the_tensors_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[str] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(str(wanted))
        yield
        current.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(philox, "normal_triton", lambda *operands: current.append("launch"))
    _dispatch._run("normal", torch.device("cuda", 1), None)
    assert current == ["cuda:1", "launch", "left"]


def test_missing_triton_on_a_gpu_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_triton, "HAS_TRITON", False)
    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(torch.cuda, "device", lambda wanted: nullcontext())
    called = record_backends(monkeypatch)
    for _ in range(2):
        _dispatch._run("normal", torch.device("cuda"), None)
    assert called == ["torch", "torch"]
    assert len(caplog.records) == 1
    assert "pip install triton" in caplog.text


def test_two_threads_give_the_bits_of_one() -> None:
    def chain(seed: int) -> torch.Tensor:
        given = operands(8)
        row, t = given.pop("row").zero_(), torch.zeros(8)
        for _ in range(TABLE.num_rows):
            ops.reverse_step(row=row, **(given | dict(seed=seed)))
            ops.advance(row, TABLE, t)
        return given["x"]

    expected = [chain(seed) for seed in range(8)]
    with ThreadPoolExecutor(2) as pool:
        for actual, wanted in zip(pool.map(chain, range(8)), expected, strict=True):
            assert_same_bits(actual, wanted)


def test_model_with_every_operator_exports_compiles_and_runs_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x0: torch.Tensor, t: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, ...]:
            levels = torch.stack([torch.linspace(1, 0, 10), torch.linspace(0, 1, 10)], 1)
            x_t, goal = ops.q_sample(x0, levels, t, key, None, 3, target="v")
            out = self.layer(x_t)
            loss = ops.denoising_loss(out, x0, levels, t, key, None, 3, target="v")
            loss = loss + ops.denoising_loss(out, x0, levels, t, key, None, 3, mask=x0[:, :1] > 0)
            loss = loss + ops.vlb_terms(x0, x_t, out, coef, t)
            x_t = ops.group_norm_silu(x_t, 3, scale=loss[:, None].expand(2, 3))
            x, row = x_t + ops.normal(SHAPE, key, 2, 0), torch.zeros(2, dtype=torch.int32)
            ops.reverse_step(x, out, table, row, key)
            times = torch.zeros(2)
            ops.advance(row, table, times)
            return loss, goal, x, times

    table = random_table(0, 0)
    coef = vlb_coefficients(NoiseSchedule.linear(10), "v")
    model = Step().eval()
    given = (torch.randn(2, *SHAPE), torch.tensor([2, 9]), torch.tensor([5, -6]))
    with torch.no_grad():
        exported = torch.export.export(model, given)
        names = {str(node.target) for node in exported.graph.nodes if "fastdiff" in str(node.target)}
        assert names == {f"fastdiff.{name}.default" for name in EVERY}
        with torch.autocast("cpu", torch.bfloat16):
            loss, goal, x, _ = model(*given)
        monkeypatch.setattr("fastdiff._direct.is_watched", lambda operands: True)  # as by compilers
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for other in (exported.module(), compiled):
            for actual, expected in zip(other(*given), model(*given), strict=True):
                assert_same_bits(actual, expected)
    assert {loss.dtype, goal.dtype, x.dtype} == {torch.float32}
    assert all(a.isfinite().all() for a in (loss, goal, x))


def test_training_under_autocast_has_the_gradients_of_float32_up_to_bfloat16() -> None:
    torch.manual_seed(0)
    stem, head = torch.nn.Conv2d(SHAPE[0], 4, 3, padding=1), torch.nn.Conv2d(4, SHAPE[0], 3, padding=1)
    gain = torch.ones(4, requires_grad=True)
    parameters = [*stem.parameters(), gain, *head.parameters()]
    levels = torch.stack([torch.linspace(1, 0, 10), torch.linspace(0, 1, 10)], 1)
    coef = vlb_coefficients(NoiseSchedule.linear(10), "eps")
    x0, t = torch.rand(2, *SHAPE) * 2 - 1, torch.tensor([2, 9])

    def gradients(narrow: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            x_t, _ = ops.q_sample(x0, levels, t, 5, None, 3)
            out = head(ops.group_norm_silu(stem(x_t), 2, gain))
            assert out.dtype == (torch.bfloat16 if narrow else torch.float32)
            loss = ops.denoising_loss(out, x0, levels, t, 5, None, 3) + ops.vlb_terms(x0, x_t, out, coef, t)
        assert loss.dtype == torch.float32
        return list(torch.autograd.grad(loss.mean(), parameters))

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert actual.dtype == torch.float32
        # a dozen roundings to 8 bits on the way, of which the largest gradients see the mean
        assert (actual - expected).norm() <= 12 * 2**-8 * expected.norm()


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

    def sums() -> list[torch.Tensor]:
        """Taken in another order on each backend."""
        generator = torch.Generator().manual_seed(0)
        x0, out = (torch.randn(2, *SHAPE, generator=generator) for _ in range(2))
        out, steps = out.requires_grad_(), torch.tensor([0, 1])
        coef = vlb_coefficients(NoiseSchedule.linear(2), "eps")
        losses = [
            ops.denoising_loss(out, x0, torch.eye(2), steps, 3, None, 0),
            ops.denoising_loss(out, x0, torch.eye(2), steps, 3, None, 0, mask=x0[:, :1] > 0),
            ops.vlb_terms(x0.clamp(-1, 1), x0, out, coef, steps),
            ops.group_norm_silu(out, SHAPE[0]),
        ]
        return losses + [torch.autograd.grad(loss.square().sum(), out)[0] for loss in losses]

    expected, near = run(), sums()
    monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
    launched = set()
    original = _dispatch._kernel
    monkeypatch.setattr(_dispatch, "_kernel", lambda name, to: launched.add((name, to)) or original(name, to))
    for actual, wanted in zip(run(), expected, strict=True):
        assert_same_bits(actual, wanted)
    for actual, wanted in zip(sums(), near, strict=True):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
    every = {name.rstrip("_").removeprefix("masked_") for name in EVERY} | {"group_norm_silu_backward"}
    assert launched == {(name, "triton") for name in every}


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
