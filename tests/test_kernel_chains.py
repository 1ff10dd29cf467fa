"""Every solver as a real chain through the fused step, alone and mixed in one batch, against `evaluate`.

The bound is that of float32 itself: of every row's own rounding (K + 4 products and sums for each output, and
the coefficients'), carried to the end by the chain's derivatives.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from chains import SCHEDULE, one_thread
from kernel_cases import Rounded, assert_same_bits, library
from oracles import shortened

import fastdiff as fd
from fastdiff.kernels import cpu, layout
from fastdiff.table import SamplingTable

SHAPE = (2, 3)
SEED = 21
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("ddpm", {}),
    ("ddpm", {"variance": "fixed_large"}),
    ("ddim", {}),
    ("ddim", {"eta": 0.5}),
    ("euler", {}),
    ("euler", {"s_churn": 4.0, "s_noise": 1.01}),
    ("euler_ancestral", {}),
    ("heun", {}),
    ("heun", {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 30.0}),
    ("dpm_2", {}),
    ("dpm_2", {"s_churn": 4.0}),
    ("dpm_2_ancestral", {"eta": 0.7}),
    *(("lms", {"order": order}) for order in (1, 2, 3, 4, 6)),
    ("plms", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_2s_ancestral", {}),
    ("dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpmpp_sde", {}),
    ("dpmpp_sde", {"brownian": False, "r": 0.4}),
    ("dpmpp_2m_sde", {"solver_type": "midpoint"}),
    ("dpmpp_2m_sde", {"solver_type": "heun", "eta": 0.5}),
    ("dpmpp_3m_sde", {}),
    *(("unipc", {"order": order}) for order in (1, 2, 3)),
    *(("deis", {"order": order}) for order in (1, 2, 3, 4)),
    ("lcm", {}),
    ("lcm", {"sigma_data": 0.5}),
]
LEVELS = {
    "vp": fd.NoiseLevels.from_schedule(SCHEDULE, fd.space_timesteps(1000, 9)),
    "ve": fd.NoiseLevels.karras(9, 0.02, 20.0),
    "flow": fd.NoiseLevels.flow(9, shift=2.0, time_scale=1000.0),
}
CASES = [
    *(("vp", prediction) for prediction in ("eps", "x0", "v", "flow", "edm")),
    *(("ve", prediction) for prediction in ("eps", "x0", "v", "edm")),
    *(("flow", prediction) for prediction in ("eps", "x0", "v", "flow", "edm")),
]
_one_thread = pytest.fixture(autouse=True)(one_thread)


@cache
def tables(path: str, prediction: str, learned: bool = False) -> list[SamplingTable]:
    """The table of every variant."""
    levels = LEVELS[path]
    if path == "flow" and prediction in ("eps", "edm"):  # which say nothing about x0 where alpha is 0
        levels = shortened(levels, 1, len(levels))
    more = {"variance": "learned_range"} if learned else {}
    clips = [None, (-1.0, 1.0)]
    return [
        fd.compile_table(solver, levels, prediction=prediction, clip=clips[i % 2], **{**options, **more})
        for i, (solver, options) in enumerate(VARIANTS)
        if not (learned and "variance" in options)
    ]


def network(u: torch.Tensor, t: torch.Tensor, learned: bool = False) -> torch.Tensor:
    """y/(1 + |y|) of 0.5 u + a shift by time: correctly rounded operations, Lipschitz constant 1/2."""
    y = 0.5 * u.double() + (0.3 - t.double() * 2.0**-10).view(-1, 1, 1)
    out = y / (1.0 + y.abs())
    return torch.cat([out, -0.5 * out], dim=1) if learned else out


def guidance(slot: int) -> float:
    """The guidance scale of a slot, exact in float32; every third has none."""
    return 1.0 if slot % 3 == 0 else 0.5 + slot / 64


def run(batch: list[tuple[int, SamplingTable]], learned: bool = False) -> torch.Tensor:
    """The chains of (slot, table), each with its own solver and guidance, in one batch."""
    slots, own = zip(*batch, strict=True)
    registers = max(table.registers for table in own)
    packs = [table.pack(registers=registers) for table in own]
    arena = replace(layout.join(packs), learned=learned)
    first = [0, *accumulate(len(pack.coef) for pack in packs)][:-1]
    last = torch.tensor([f + table.num_rows for f, table in zip(first, own, strict=True)], dtype=torch.int32)
    num = len(batch)
    guided = [b for b, slot in enumerate(slots) if guidance(slot) != 1.0]
    cond_lane = torch.arange(num, dtype=torch.int32)
    uncond_lane = torch.full((num,), -1, dtype=torch.int32)
    uncond_lane[guided] = torch.arange(num, num + len(guided), dtype=torch.int32)
    order = torch.tensor([*range(num), *guided])
    x = start(list(slots), own)
    c_in = torch.tensor([float(table.c_in[0]) for table in own], dtype=torch.float32).view(-1, 1, 1)
    u = (c_in * x)[order]
    row = torch.tensor(first, dtype=torch.int32)
    t = arena.coef[row.long(), layout.T][order]
    state = torch.zeros(registers, *x.shape) if registers else None
    for _ in range(max(table.num_rows for table in own)):
        out = network(u, t, learned).float()
        out[num:] = -out[num:]  # the unconditional evaluation
        fd.ops.reverse_step(
            x, out, arena, row, SEED, list(slots), registers=state, u=u, cond_lane=cond_lane,
            uncond_lane=uncond_lane, guidance_scale=torch.tensor([guidance(slot) for slot in slots]),
        )  # fmt: skip
        fd.ops.advance(row, arena, t, last=last, cond_lane=cond_lane, uncond_lane=uncond_lane)
    assert torch.equal(row, last)
    return x


def start(slots: list[int], own: tuple[SamplingTable, ...]) -> torch.Tensor:
    z = fd.ops.normal(SHAPE, SEED, slots, 0, domain=0)
    return z * torch.tensor([table.init_scale for table in own], dtype=torch.float32).view(-1, 1, 1)


def noise_of(slot: int, table: SamplingTable) -> torch.Tensor:
    return torch.stack([fd.ops.normal(SHAPE, SEED, [slot], row) for row in range(table.num_rows)])


def guided_network(slot: int, learned: bool = False) -> Any:
    """The network as `evaluate` takes it, with a slot's guidance."""

    def model(u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out = network(u, t.float(), learned)
        mixed = -out + guidance(slot) * (out - -out)
        return torch.cat([mixed[:, :2], out[:, 2:]], dim=1) if learned else mixed

    return model


def bounded(slot: int, table: SamplingTable, learned: bool = False) -> Rounded:
    """The chain in float64, and how far its float32 run may be from it.

    A row's own rounding, by running error analysis, times the derivative of the result by that row's state:
    what the chain makes of an error is neither lost nor counted twice. Second orders are below 1 %.
    """
    size = table.registers + 1
    state = [start([slot], (table,)).double(), *[torch.zeros(1, *SHAPE).double()] * table.registers]
    noise = noise_of(slot, table)
    own, jacobians = [], []
    for row in range(table.num_rows):
        new, jacobian = one_row(slot, table, row, state, noise[row], learned)
        own.append(torch.stack([value.error for value in new], dim=-1))
        jacobians.append(jacobian)
        state = [value.value for value in new]
    gradient = torch.eye(size, dtype=torch.float64)[0].expand(1, *SHAPE, size)
    error = torch.zeros(1, *SHAPE, dtype=torch.float64)
    for rounding, jacobian in zip(reversed(own), reversed(jacobians), strict=True):
        error = error + (gradient.abs() * rounding).sum(dim=-1)
        gradient = (gradient[..., None, :] @ jacobian)[..., 0, :]
    return Rounded(state[0], 1.01 * error)


def one_row(
    slot: int, table: SamplingTable, row: int, state: list[torch.Tensor], z: torch.Tensor, learned: bool
) -> tuple[list[Rounded], torch.Tensor]:
    """A row on an exact state: its outputs with the bounds of their rounding, and d s'_j / d s_k."""
    terms = [Rounded.exact(value) for value in state]
    w, t = guidance(slot), torch.tensor([table.t[row]], dtype=torch.float32)
    u = coef(table.c_in[row]) * terms[0] if table.c_in[row] != 1 else terms[0]
    value = network(u.value, t, learned)
    value, v = value[:, :2], value[:, 2:]
    slope = 0.5 * (1.0 - value.abs()) ** 2  # the derivative of y/(1 + |y|), as 1/(1 + |y|) = 1 - |out|
    rounding = slope * u.error + 2.0**-24 * value.abs()
    out, slope = Rounded(value, rounding), slope * float(table.c_in[row])
    if w != 1.0:
        out = Rounded(-value, rounding) + Rounded.exact(torch.tensor(w)) * (out - Rounded(-value, rounding))
    by_out = (2.0 * w - 1.0) * slope if w != 1.0 else slope
    x0 = dot([table.x0_from_x[row], table.x0_from_out[row]], [terms[0], out])
    by_x0 = table.x0_from_x[row] + table.x0_from_out[row] * by_out
    if table.clip is not None:
        inside = (x0.value > table.clip[0]) & (x0.value < table.clip[1])
        by_x0 = by_x0 * inside
        x0 = Rounded(x0.value.clamp(*table.clip), x0.error)
    noise, by_noise = Rounded.exact(z), torch.zeros_like(slope)
    low, high = float(table.log_var_min[row]), float(table.log_var_max[row])
    if learned and (low, high) != (0.0, 0.0):
        half, one = Rounded.exact(torch.tensor(0.5)), Rounded.exact(torch.tensor(1.0))
        f = (Rounded(v, 0.5 * rounding) + one) * half
        y = (f * coef(high) + (one - f) * coef(low)) * half
        factor = y.value.exp()
        noise = Rounded(factor, factor * (torch.expm1(y.error) + 2e-7)) * noise  # exact_exp's own error
        by_noise = noise.value * (0.25 * (high - low)) * (-0.5 * slope)
    terms += [x0, out, noise]
    columns = (table.from_x0[row], table.from_out[row], table.from_noise[row])
    new = [
        dot([*line, *(column[j] for column in columns)], terms)
        for j, line in enumerate(table.from_state[row])
    ]
    jacobian = torch.tensor(table.from_state[row]).expand(*state[0].shape, -1, -1).clone()
    for column, by in zip(columns, (by_x0, by_out, by_noise), strict=True):
        jacobian[..., 0] += by[..., None] * torch.tensor(column)
    return new, jacobian


def coef(value: float) -> Rounded:
    """A coefficient, which packing rounds once."""
    exact = torch.tensor(float(value), dtype=torch.float64)
    return Rounded(exact, (exact - exact.float().double()).abs())


def dot(coefficients: list[float], values: list[Rounded]) -> Rounded:
    total: Rounded | None = None
    for c, value in zip(coefficients, values, strict=True):
        if c != 0:
            product = value if c == 1 else coef(c) * value
            total = product if total is None else total + product
    return total or Rounded.exact(torch.zeros_like(values[0].value))


@cache
def expected(path: str, prediction: str, learned: bool = False) -> list[Rounded]:
    return [bounded(slot, table, learned) for slot, table in enumerate(tables(path, prediction, learned))]


def use(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native":
        library()
    elif backend == "numpy":
        monkeypatch.setattr(cpu, "library", lambda wait=False: None)
    else:
        monkeypatch.setenv("FASTDIFF_BACKEND", "triton")


def assert_within_float32(x: torch.Tensor, path: str, prediction: str, learned: bool = False) -> None:
    for slot, bound in enumerate(expected(path, prediction, learned)):
        error = (x[slot : slot + 1].double() - bound.value).abs()
        name = tables(path, prediction, learned)[slot]
        assert (error <= bound.error).all(), f"{name}: {float((error / bound.error).max()):.3g} of the bound"


@pytest.mark.parametrize(
    ("path", "prediction", "backend"),
    [
        *((*case, "native") for case in CASES),
        ("vp", "eps", "numpy"),
        ("ve", "edm", "numpy"),
        ("flow", "v", "numpy"),
    ],
)
def test_all_solvers_in_one_batch_are_their_float64_chains(
    path: str, prediction: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    assert_within_float32(run(list(enumerate(tables(path, prediction)))), path, prediction)


@pytest.mark.parametrize(("path", "backend"), [("vp", "native"), ("flow", "native"), ("ve", "numpy")])
def test_a_learned_variance_mixes_with_solvers_that_ignore_it(
    path: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(backend, monkeypatch)
    x = run(list(enumerate(tables(path, "v", True))), learned=True)
    assert_within_float32(x, path, "v", learned=True)


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_chain_alone_has_the_bits_it_has_in_a_mixed_batch(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, a table has its own K; in the batch it is padded to the largest."""
    use(backend, monkeypatch)
    mixed = list(enumerate(tables("vp", "edm")))
    together = run(mixed)
    assert {table.registers for _, table in mixed} == {0, 1, 2, 3, 5}
    for slot, table in mixed:
        assert_same_bits(run([(slot, table)])[0], together[slot])
    assert_same_bits(run(mixed[::-1]), together.flip(0))


@pytest.mark.parametrize(("path", "prediction"), CASES)
def test_the_bound_is_around_evaluate_and_narrow(path: str, prediction: str) -> None:
    bounds = expected(path, prediction)
    for slot, (table, bound) in enumerate(zip(tables(path, prediction), bounds, strict=True)):
        x = start([slot], (table,)).double()
        result = table.evaluate(guided_network(slot), x, noise_of(slot, table))
        assert (result - bound.value).abs().max() <= 1e-12 * table.init_scale
    # eps at t = 999 multiplies float32's rounding by sigma/alpha, 158 on this path
    widest = sorted(float(bound.error.max()) for bound in bounds)
    assert widest[len(widest) // 2] <= (158 if prediction == "eps" else 1) * 3e-6


def test_the_comparison_sees_a_planted_error() -> None:
    x = run(list(enumerate(tables("vp", "x0"))))
    for slot in range(len(VARIANTS)):
        wrong = x.clone()
        wrong[slot, 0, 0] += 1e-4
        with pytest.raises(AssertionError, match="of the bound"):
            assert_within_float32(wrong, "vp", "x0")


@pytest.mark.interpret
def test_the_interpreter_runs_them_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = list(enumerate(tables("vp", "edm")))
    expected_bits = run(chosen)
    use("triton", monkeypatch)
    assert_same_bits(run(chosen), expected_bits)
