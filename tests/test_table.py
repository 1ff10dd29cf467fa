"""The sampling table: what it checks of itself, how it runs, and that it survives a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import SCHEDULES, assert_close

from fastdiff.levels import NoiseLevels
from fastdiff.solvers import compile_table
from fastdiff.solvers.forms import X0, Register, Row, X, Z
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

LEVELS = NoiseLevels.from_schedule(SCHEDULES["linear"], space_timesteps(1000, 6))


def two_registers(levels: NoiseLevels):
    """Every kind of coefficient: two registers, noise in both, and rows that end no step."""
    first, second = Register(), Register()
    yield Row(levels.levels[0], 0.5 * X + 0.25 * X0 + 2.0 * Z, {first: X - Z, second: 3.0 * X0}, False)
    yield Row(levels.levels[1], X0 + 0.1 * first - 0.2 * second, exempt=("mean", "noise"))


def custom(levels: NoiseLevels = LEVELS, **options: object) -> SamplingTable:
    table = compile_table(two_registers, levels, **options)
    # An importer may add what no solver of ours has: the raw output.
    from_out = np.array([[0.0, 0.5, 0.0], [0.7, 0.0, 0.0]])
    return dataclasses.replace(table, from_out=from_out)


def replaced(table: SamplingTable, name: str, index: tuple[int, ...] | int, value: float) -> SamplingTable:
    array = getattr(table, name).copy()
    array[index] = value
    return dataclasses.replace(table, **{name: array})


def by_hand(
    table: SamplingTable, model: Callable, x: np.ndarray, z: np.ndarray, clip: tuple[float, float]
) -> np.ndarray:
    """`two_registers` spelled out."""
    first = second = None
    for r in range(2):
        out = model(table.c_in[r] * x, np.full(len(x), table.t[r]))
        x0 = np.clip(table.x0_from_x[r] * x + table.x0_from_out[r] * out, *clip)
        if r == 0:
            x, first, second = 0.5 * x + 0.25 * x0 + 2.0 * z[0], 1.0 * x + 0.5 * out - 1.0 * z[0], 3.0 * x0
        else:
            x = 0.1 * first - 0.2 * second + 1.0 * x0 + 0.7 * out
    return x


def test_evaluate_is_the_documented_formula_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 3, 5)), rng.normal(size=(2, 2, 3, 5))

    def model(u: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.sin(u) * t[:, None, None]

    table = custom(clip=(-0.5, 0.5))
    assert table.registers == 2
    result = table.evaluate(model, x, z)
    np.testing.assert_array_equal(result, by_hand(table, model, x, z, (-0.5, 0.5)))
    np.testing.assert_array_equal(
        table.evaluate(model, x, z, clip=(-9, 9)), by_hand(table, model, x, z, (-9.0, 9.0))
    )


def test_evaluate_of_tensors_is_that_of_arrays() -> None:
    rng = np.random.default_rng(1)
    x, z = rng.normal(size=(2, 4)), rng.normal(size=(2, 2, 4))
    table = custom(clip=(-1, 1))
    arrays = table.evaluate(lambda u, t: 0.1 * u + t[:, None], x, z)
    tensors = table.evaluate(lambda u, t: 0.1 * u + t[:, None], torch.tensor(x), torch.tensor(z))
    assert isinstance(arrays, np.ndarray)
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_array_equal(arrays, tensors.numpy())
    single = table.evaluate(lambda u, t: u, torch.tensor(x).float(), torch.tensor(z).float())
    assert single.dtype == torch.float64


def test_a_coefficient_zero_is_not_read() -> None:
    x = np.full((1, 2), 3.0)
    nan = np.full_like(x, np.nan)
    table = compile_table("ddpm", LEVELS, prediction="x0")
    # With prediction x0 the last row takes the output alone: neither x nor the last z may be touched.
    noise = [nan] * LEVELS.sigma.size
    assert table.evaluate(lambda u, t: np.full_like(u, 2.0), nan, noise).tolist() == [[2.0, 2.0]]
    deterministic = compile_table("ddim", LEVELS)
    assert np.isfinite(deterministic.evaluate(lambda u, t: u, x, noise)).all()


def test_learned_range_interpolates_log_variances() -> None:
    table = compile_table("ddpm", LEVELS, variance="learned_range")
    assert table.learned
    x, z = np.full((2, 3), 0.5), np.random.default_rng(2).normal(size=(6, 2, 3))

    def run(v: float) -> np.ndarray:
        return table.evaluate(lambda u, t: np.concatenate([0.1 * u, np.full_like(u, v)], 1), x, z)

    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = compile_table("ddpm", LEVELS, variance=variance)
        assert_close(run(v), fixed.evaluate(lambda u, t: 0.1 * u, x, z), 1e-14)
    middle = compile_table("ddpm", LEVELS)
    small, large = table.log_var_min, table.log_var_max
    stds = np.where(middle.from_noise[:, 0] == 0, 0, np.exp(0.25 * (small + large)))
    middle = dataclasses.replace(middle, from_noise=stds[:, None])
    assert_close(run(0.0), middle.evaluate(lambda u, t: 0.1 * u, x, z), 1e-14)


def test_learned_is_a_log_variance() -> None:
    table = compile_table("ddpm", LEVELS, variance="learned")
    assert table.log_var_min.tolist() == [-1.0] * 5 + [0.0]
    assert table.log_var_max.tolist() == [1.0] * 5 + [0.0]
    assert table.from_noise[:, 0].tolist() == [1.0] * 5 + [0.0]
    v, z = np.log(0.09), np.ones((6, 1, 1))
    result = table.evaluate(lambda u, t: np.array([[0.0, v]]), np.zeros((1, 1)), z)
    scaled = dataclasses.replace(table, from_noise=0.3 * table.from_noise, learned=False)
    assert_close(result, scaled.evaluate(lambda u, t: 0.0 * u, np.zeros((1, 1)), z), 1e-14)


def test_a_deterministic_solver_ignores_the_variance_channels() -> None:
    table = compile_table("ddim", LEVELS, variance="learned_range")
    plain = compile_table("ddim", LEVELS)
    x = np.random.default_rng(3).normal(size=(1, 2, 4))
    with_v = table.evaluate(lambda u, t: np.concatenate([np.cos(u), np.full_like(u, np.nan)], 1), x)
    np.testing.assert_array_equal(with_v, plain.evaluate(lambda u, t: np.cos(u), x))


@pytest.mark.parametrize(
    ("name", "index", "error"),
    [
        ("from_state", (2, 0, 0), 1e-9),
        ("from_x0", (2, 0), 1e-9),
        ("from_noise", (2, 0), 1e-9),
        ("alpha", 3, 1e-9),
    ],
)
def test_check_catches_a_planted_error(name: str, index: tuple[int, ...], error: float) -> None:
    table = compile_table("ddpm", LEVELS)
    planted = replaced(table, name, index, getattr(table, name)[index] + error)
    with pytest.raises(ValueError, match=r"'ddpm' misses the .* in row 2"):
        planted.check()
    planted.check(tol=1e-5)


def test_check_leaves_out_what_is_exempt() -> None:
    table = compile_table("ddpm", LEVELS)
    noisy = replaced(table, "from_noise", (2, 0), 9.0)
    with pytest.raises(ValueError, match="misses the noise"):
        noisy.check()
    dataclasses.replace(noisy, exempt=("noise",)).check()


def test_check_follows_the_raw_output() -> None:
    # eps as the output: x' = alpha' x0 + sigma' out is DDIM, whatever the clip does to x0.
    table = compile_table("ddim", LEVELS)
    alpha, sigma = LEVELS.alpha[1:], LEVELS.sigma[1:]
    raw = dataclasses.replace(
        table, from_state=np.zeros_like(table.from_state), from_x0=alpha[:, None], from_out=sigma[:, None]
    )
    raw.check()
    with pytest.raises(ValueError, match="in row 1"):
        replaced(raw, "from_out", (1, 0), 0.99 * sigma[1]).check()
    with pytest.raises(ValueError, match="row 1 reads `out`"):
        replaced(raw, "x0_from_out", 1, 0.0).check()


def test_moments_of_registers_are_propagated() -> None:
    mean, variance = custom().moments()
    a, s = LEVELS.alpha[0], LEVELS.sigma[0]
    # row 0: x1 = x/2 + 1/4 + 2 z, first = x - z + out/2; row 1: 1 + 0.7 out + first/10 - 3/5; out = eps
    assert_close(mean[:2], [a, 0.5 * a + 0.25], 1e-15)
    assert_close(variance[:2], [s**2, 0.25 * s**2 + 4.0], 1e-15)
    x1_eps = (mean[1] - LEVELS.alpha[1]) / LEVELS.sigma[1]
    assert_close(mean[2], 1.0 + 0.7 * x1_eps + 0.1 * a - 0.6, 1e-14)
    k = 0.7 / LEVELS.sigma[1]
    eps_share = 0.5 * s * k + 0.1 * (s + 0.5)  # x = a + s eps, out = eps
    assert_close(variance[2], eps_share**2 + (2.0 * k - 0.1) ** 2, 1e-13)


@pytest.mark.parametrize(
    "make", [lambda: custom(clip=(-1, 1)), lambda: compile_table("ddpm", LEVELS, variance="learned")]
)
def test_a_saved_table_is_the_same_table(tmp_path, make: Callable[[], SamplingTable]) -> None:
    table = make()
    path = tmp_path / "table.fastdiff"
    table.save(path)
    again = SamplingTable.load(path)
    assert again == table
    assert hash(again) == hash(table)
    assert (again.clip, again.exempt, again.learned) == (table.clip, table.exempt, table.learned)


def test_tables_differ_when_anything_does() -> None:
    table = compile_table("ddpm", LEVELS)
    assert table != table.with_clip((-1, 1))
    assert table != replaced(table, "t", 0, 5.0)
    assert table != "ddpm"
    assert table.with_clip((-1, 1)).clip == (-1.0, 1.0)


def test_loading_something_else_is_a_clear_error(tmp_path) -> None:
    table = compile_table("ddpm", LEVELS)
    path = tmp_path / "table"
    table.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="truncated"):
        SamplingTable.load(path)
    from fastdiff.files import save_tensors

    save_tensors(path, {"t": torch.zeros(3)})
    with pytest.raises(ValueError, match="must hold a sampling table"):
        SamplingTable.load(path)


def test_tables_are_immutable_and_hold_no_array_of_the_caller() -> None:
    table = custom()
    with pytest.raises(ValueError, match="read-only"):
        table.from_x0[0, 0] = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        table.name = "other"
    noise = np.zeros((2, 3))
    taken = dataclasses.replace(table, from_noise=noise)
    noise[0] = 1.0
    assert not taken.from_noise.any()


def test_packing_keeps_rows_and_registers() -> None:
    packed = custom(clip=(-1, 1)).pack()
    assert packed.num_rows == 2
    assert packed.registers == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: replaced(custom(), "from_x0", (1, 0), np.nan), "`from_x0` must be finite"),
        (lambda: dataclasses.replace(custom(), t=np.zeros(3)), r"`t` must be \[2\], got shape \[3\]"),
        (lambda: dataclasses.replace(custom(), from_state=np.zeros((2, 3))), r"\[rows, K\+1, K\+1\]"),
        (lambda: dataclasses.replace(custom(), alpha=np.zeros(2)), r"`alpha` must be \[3\]"),
        (lambda: dataclasses.replace(custom(), init_scale=0.0), "`init_scale` must be positive"),
        (lambda: dataclasses.replace(custom(), exempt=("variance",)), "`exempt` may hold"),
        (lambda: custom().with_clip((1, -1)), r"`clip` must be \(lo, hi\) with lo < hi"),
        (lambda: custom().with_clip(1.0), "`clip` must be None, "),
        (lambda: custom().with_clip((float("nan"), 1)), "lo < hi"),
        (
            lambda: custom().evaluate(lambda u, t: u, np.zeros((1, 2))),
            "`noise` must hold z for every row, got None",
        ),
        (
            lambda: custom().evaluate(lambda u, t: u, np.zeros((1, 2)), np.zeros((2, 1, 3))),
            r"`noise\[0\]` must have x's shape \[1, 2\], got \[1, 3\]",
        ),
        (
            lambda: compile_table("ddim", LEVELS).evaluate(lambda u, t: u[:, :1], np.zeros((1, 2))),
            r"the input's shape: \[1, 2\], got \[1, 1\]",
        ),
        (
            lambda: compile_table("ddim", LEVELS, variance="learned").evaluate(
                lambda u, t: u, np.zeros((1, 2))
            ),
            r"2C channels, as its variance is learned: \[1, 4\]",
        ),
    ],
)
def test_bad_arguments_make_clear_errors(make: Callable[[], object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
