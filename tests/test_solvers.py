"""Compiling solvers: valid tables of every schedule, spacing and solver, and the identities between them."""

from __future__ import annotations

import math
import time
from typing import Optional

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import SCHEDULES, assert_close, flow_of_gaussian, network_of, push_gaussian, shortened, wavy

from fastdiff.levels import NoiseLevels
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import (
    PREDICTIONS,
    SOLVERS,
    VARIANCES,
    Register,
    Row,
    X,
    Z,
    compile_table,
    solver_options,
)
from fastdiff.solvers.forms import X0, assemble
from fastdiff.spacing import SPACINGS, space_timesteps
from fastdiff.table import SamplingTable

LINEAR = SCHEDULES["linear"]
PATHS = {
    "vp": NoiseLevels.from_schedule(LINEAR, space_timesteps(1000, 12)),
    "zero_snr": NoiseLevels.from_schedule(SCHEDULES["zero_snr"], space_timesteps(1000, 12)),
    "karras": NoiseLevels.karras(12, schedule=LINEAR),
    "ve": NoiseLevels.karras(12, 0.002, 80.0),
    "flow": NoiseLevels.flow(12, shift=3.0, time_scale=1000.0),
}
ULP = 2.0**-53


def same_rows(a: SamplingTable, b: SamplingTable, tol: float) -> None:
    for name in ("t", "c_in", "x0_from_x", "x0_from_out", "from_state", "from_x0", "from_out", "from_noise"):
        assert_close(getattr(a, name), getattr(b, name), tol)


OPTIONS = {
    "eta": st.floats(0.0, 1.0),
    "order": st.integers(1, 3),
    "s_churn": st.floats(0.0, 100.0),
    "s_noise": st.floats(0.9, 1.1),
    "r": st.floats(0.1, 1.0),
    "brownian": st.booleans(),
    "solver_type": st.sampled_from(["midpoint", "heun"]),
    "sigma_data": st.none() | st.floats(0.1, 1.0),
}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_schedule_any_spacing_any_solver_makes_a_valid_table(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 80), "T")
    # alpha_bar ends above e^-18, which is that of a cosine schedule with 1000 steps
    beta = st.floats(1e-5, 1.0 - math.exp(-18.0 / total))
    betas = data.draw(st.lists(beta, min_size=total, max_size=total), "betas")
    steps = data.draw(st.integers(1, total), "S")
    spacing = data.draw(st.sampled_from(SPACINGS))
    solver = data.draw(st.sampled_from(sorted(SOLVERS)))
    variance = data.draw(st.sampled_from(VARIANCES))
    levels = NoiseLevels.from_schedule(
        NoiseSchedule.from_betas(betas), space_timesteps(total, steps, spacing)
    )
    options = {name: data.draw(OPTIONS[name], name) for name in solver_options(solver) if name in OPTIONS}
    table = compile_table(solver, levels, variance=variance, **options)  # checks itself
    assert table.num_rows >= steps
    assert table.ends_step.sum() == steps
    assert table.ends_step[-1]
    assert not table.from_noise[-1].any()
    assert (table.alpha[-1], table.sigma[-1]) == (1.0, 0.0)
    assert table.learned == (variance in ("learned", "learned_range"))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("path", PATHS)
def test_every_solver_walks_every_path(solver: str, path: str) -> None:
    for n in (1, 2, 3, 5, 12):
        compile_table(solver, shortened(PATHS[path], 0, n), prediction="v").check()


@pytest.mark.parametrize(
    ("solver", "options"),
    [*((solver, {}) for solver in SOLVERS), ("lms", {"order": 8}), ("deis", {"order": 4})],
)
def test_compiling_a_thousand_rows_takes_less_than_50_ms(solver: str, options: dict) -> None:
    levels = NoiseLevels.from_schedule(LINEAR)
    best = math.inf
    for _ in range(20):  # the fastest of some: other processes share the cores
        start = time.process_time()
        compile_table(solver, levels, **options)
        best = min(best, time.process_time() - start)
        if best < 0.05:
            return
    raise AssertionError(f"{solver} takes {best:.3f} s")


@pytest.mark.parametrize("path", ["vp", "karras", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_predictions_of_one_network_make_one_sample(solver: str, path: str) -> None:
    """eps = x0 = v = flow: the sample does not depend on how the network puts it."""
    levels = PATHS[path]
    if levels.alpha[0] == 0:  # eps says nothing about x0 there
        levels = shortened(levels, 1, 12)
    rng = np.random.default_rng(4)
    x, results = rng.normal(size=(2, 9)), {}
    for prediction in PREDICTIONS[:4]:
        table = compile_table(solver, levels, prediction=prediction)
        stages = {t: (a, s) for t, a, s in zip(table.t, table.alpha, table.sigma, strict=False)}
        noise = np.random.default_rng(5).normal(size=(table.num_rows, 2, 9))
        results[prediction] = table.evaluate(network_of(prediction, stages, wavy), x, noise)
    for result in results.values():
        # a row's error is of the order ulp / alpha (x0 from eps at alpha 0.006), the network's slope about 2
        assert_close(result, results["x0"], 1e-10)


def test_edm_columns_are_karras_preconditioning() -> None:
    levels = NoiseLevels.karras(7, 0.01, 50.0)
    table = compile_table("ddim", levels, prediction="edm", sigma_data=0.7)
    s = levels.sigma[:-1]
    assert_close(table.t, np.log(s) / 4, 1e-15)
    assert_close(table.c_in, 1 / np.sqrt(s**2 + 0.49), 1e-15)
    assert_close(table.x0_from_x, 0.49 / (s**2 + 0.49), 1e-15)
    assert_close(table.x0_from_out, s * 0.7 / np.sqrt(s**2 + 0.49), 1e-15)
    assert compile_table("ddim", levels, prediction="edm") == compile_table(
        "ddim", levels, prediction="edm", sigma_data=0.5
    )


def test_edm_on_a_scaled_path_sees_the_unscaled_sample() -> None:
    ve = compile_table("ddim", PATHS["ve"], prediction="edm")
    flow = NoiseLevels(
        PATHS["ve"].t, 1 / (1 + PATHS["ve"].sigma), PATHS["ve"].sigma / (1 + PATHS["ve"].sigma), "flow"
    )
    scaled = compile_table("ddim", flow, prediction="edm")
    assert_close(scaled.c_in * flow.alpha[:-1], ve.c_in, 1e-14)
    assert_close(scaled.x0_from_x * flow.alpha[:-1], ve.x0_from_x, 1e-14)
    assert_close(scaled.t, ve.t, 1e-14)


@pytest.mark.parametrize("path", ["vp", "karras", "ve", "flow", "zero_snr"])
def test_ddim_eta_one_is_ddpm(path: str) -> None:
    ddim = compile_table("ddim", PATHS[path], prediction="x0", eta=1.0)
    ddpm = compile_table("ddpm", PATHS[path], prediction="x0")
    same_rows(ddim, ddpm, 1e-12)


@pytest.mark.parametrize("path", ["vp", "karras", "ve", "flow", "zero_snr"])
def test_ddim_eta_zero_is_euler_in_sigma_ve(path: str) -> None:
    table = compile_table("ddim", PATHS[path], prediction="v")
    assert table.registers == 0
    assert not table.from_noise.any()
    rng = np.random.default_rng(6)
    x, x0 = rng.normal(size=7), rng.normal(size=7)
    for row, (now, to) in enumerate(PATHS[path].steps()):
        if now.alpha == 0:  # the limit: x is noise alone and is scaled down
            expected = to.alpha * x0 + to.sigma * x
        else:
            slope = (x / now.alpha - x0) / now.sigma_ve
            expected = to.alpha * (x / now.alpha + (to.sigma_ve - now.sigma_ve) * slope)
        # x / alpha and sigma_ve are up to 1/alpha times larger than what is left of them
        assert_close(
            table.from_state[row, 0, 0] * x + table.from_x0[row, 0] * x0,
            expected,
            1e-13 / max(now.alpha, 1e-2),
        )


def test_ddpm_rows_are_the_schedule_s_posterior() -> None:
    kept = space_timesteps(1000, 40)
    schedule = LINEAR.respace(kept)
    table = compile_table("ddpm", NoiseLevels.from_schedule(LINEAR, kept))
    assert table.t.tolist() == kept[::-1]
    assert_close(table.from_x0[:, 0], schedule.posterior_mean_coef1[::-1], 1e-12)
    assert_close(table.from_state[:, 0, 0], schedule.posterior_mean_coef2[::-1], 1e-12)
    assert_close(table.from_noise[:-1, 0] ** 2, schedule.posterior_variance[:0:-1], 1e-12)
    large = compile_table("ddpm", NoiseLevels.from_schedule(LINEAR, kept), variance="fixed_large")
    assert_close(large.from_noise[:-1, 0] ** 2, schedule.betas[:0:-1], 1e-12)
    learned = compile_table("ddpm", NoiseLevels.from_schedule(LINEAR, kept), variance="learned_range")
    assert_close(learned.log_var_min[:-1], schedule.posterior_log_variance_clipped[:0:-1], 1e-11)
    assert_close(learned.log_var_max[:-1], np.log(schedule.betas[:0:-1]), 1e-11)
    assert (learned.log_var_min[-1], learned.log_var_max[-1]) == (0.0, 0.0)


def test_a_pure_noise_start_draws_ddpm_s_next_sample_afresh() -> None:
    table = compile_table("ddpm", PATHS["zero_snr"], prediction="v")
    assert table.from_state[0, 0, 0] == 0.0
    assert table.from_x0[0, 0] == PATHS["zero_snr"].alpha[1]
    assert_close(table.from_noise[0, 0], PATHS["zero_snr"].sigma[1], 1e-15)


def test_chains_start_at_unit_variance_or_at_their_sigma() -> None:
    scales = {
        path: compile_table("ddim", levels, prediction="v").init_scale for path, levels in PATHS.items()
    }
    assert scales == {"vp": 1.0, "zero_snr": 1.0, "karras": 1.0, "ve": 80.0, "flow": 1.0}


@pytest.mark.parametrize(("eta", "mean", "std"), [(0.0, 2.0, 0.5), (0.5, -1.0, 1.5), (1.0, 2.0, 0.5)])
def test_ddim_of_gaussian_data_is_gaussian_data_to_first_order(eta: float, mean: float, std: float) -> None:
    errors = []
    for n in (50, 100, 200):
        levels = NoiseLevels.exponential(n, schedule=LINEAR)
        got_mean, got_std = push_gaussian(compile_table("ddim", levels, eta=eta), mean, std)
        # x0_hat - mean vanishes at x = alpha mean, so the mean is kept by every row
        assert_close(got_mean, mean, 1e-12)
        errors.append(abs(got_std - std))
    order = math.log2(errors[1] / errors[2])
    assert 0.85 < order < 1.15, f"errors {errors}"
    assert errors[2] < 0.03 * std


def test_ddim_s_deterministic_map_tends_to_the_flow() -> None:
    errors = []
    for n in (100, 200):
        levels = NoiseLevels.exponential(n, schedule=LINEAR)
        table = compile_table("ddim", levels, prediction="x0")

        def model(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
            return 1.0 + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha)

        x = np.array([[-2.0, 0.0, 1.5]])
        stages = {t: (a, s) for t, a, s in zip(table.t, table.alpha, table.sigma, strict=False)}
        got = table.evaluate(network_of("x0", stages, model), x)
        errors.append(np.abs(got - flow_of_gaussian(levels, x, 1.0, 0.5)).max())
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_dead_registers_cost_nothing_and_living_ones_share_places() -> None:
    def solver(levels: NoiseLevels):
        last = None
        for now, to in levels.steps():
            kept, unread = Register(), Register()
            x = X + (0.25 * last if last is not None else 0.0 * Z)
            yield Row(now, x, {kept: X0, unread: X}, exempt=("mean", "noise"))
            last = kept if to.sigma else None

    table = compile_table(solver, PATHS["ve"], prediction="x0")
    assert table.registers == 1
    # the last row reads its predecessor's memory and leaves it as it is
    assert table.from_state[-1].tolist() == [[1.0, 0.25], [0.0, 1.0]]
    assert table.from_x0[:-1, 1].tolist() == [1.0] * 11
    assert table.from_x0[-1, 1] == 0.0


def test_two_memories_alive_at_once_take_two_places_and_stay_there() -> None:
    rows, level = [], PATHS["ve"].levels[0]
    a, b, c = Register(), Register(), Register()
    rows.append(Row(level, X, {a: X0}))
    rows.append(Row(level, X + a, {b: 2.0 * X0}))
    rows.append(Row(level, X + a + b, {c: b + X0}))  # a and b end here, c takes the place of one
    rows.append(Row(level, X + c))
    columns = assemble(rows)
    assert columns["from_state"].shape == (4, 3, 3)
    assert columns["from_state"][1, 1].tolist() == [0.0, 1.0, 0.0]  # a stays, unmoved
    assert columns["from_state"][2, 0].tolist() == [1.0, 1.0, 1.0]
    assert columns["from_state"][2, 1].tolist() == [0.0, 0.0, 1.0]
    assert columns["from_state"][3, 0].tolist() == [1.0, 1.0, 0.0]


def never_saved(levels: NoiseLevels):
    for now, _ in levels.steps():
        yield Row(now, X + Register())


def saved_twice(levels: NoiseLevels):
    kept = Register()
    for now, _ in levels.steps():
        yield Row(now, X + kept if now is not levels.levels[0] else X, {kept: X0})


@pytest.mark.parametrize(
    ("solver", "options", "error", "match"),
    [
        ("dpm", {}, ValueError, "`solver` must be .* got 'dpm'; the nearest name is 'dd"),
        ("ddim", {"prediction": "epsilon"}, ValueError, "`prediction` must be one of eps"),
        ("ddim", {"variance": "small"}, ValueError, "`variance` must be one of fixed_small"),
        ("ddim", {"eta": 1.5}, ValueError, r"`eta` must be in \[0, 1\]"),
        ("ddim", {"s_churn": 1.0}, TypeError, "`s_churn` is no option of solver 'ddim', which takes eta"),
        ("ddpm", {"eta": 1.0}, TypeError, "`eta` is no option of solver 'ddpm', which takes none"),
        ("ddim", {"sigma_data": 1.0}, TypeError, "`sigma_data` is no option"),
        ("ddim", {"clip": 1.0}, ValueError, "`clip`"),
        ("ddim", {"prediction": "edm", "sigma_data": -1.0}, ValueError, "`sigma_data`"),
        (3, {}, ValueError, "must be a function or one of ddpm"),
        (lambda levels: [], {}, ValueError, "must yield a Row for each evaluation"),
        (lambda levels: None, {}, ValueError, "must yield a Row .* got none"),
        (lambda levels: [1], {}, ValueError, "must yield a Row .* got int as row 0"),
        (lambda levels: [*SOLVERS["euler"](levels), None], {}, ValueError, "got NoneType as row 12"),
        (never_saved, {}, ValueError, "no earlier row saves"),
        (saved_twice, {}, ValueError, "saves one register in two rows"),
    ],
)
def test_bad_arguments_make_clear_errors(solver, options: dict, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compile_table(solver, PATHS["vp"], **options)


def test_levels_of_another_type_are_refused() -> None:
    with pytest.raises(TypeError, match="`levels` must be NoiseLevels, got NoiseSchedule"):
        compile_table("ddim", LINEAR)


@pytest.mark.parametrize("prediction", ["eps", "edm"])
def test_no_signal_and_a_noise_prediction_is_an_error_that_names_the_others(prediction: str) -> None:
    for path in ("flow", "zero_snr"):
        with pytest.raises(ValueError, match="'v' or 'x0'"):
            compile_table("ddim", PATHS[path], prediction=prediction)


WRONG = {
    "float": ["a", None, True, math.nan, [0.5]],
    "int": [2.5, "2", None, True],
    "bool": [2, "yes", None],
    "str": [1, None],
}


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_option_of_the_wrong_kind_is_named(solver: str) -> None:
    for option, default in solver_options(solver).items():
        wrong = WRONG["float" if default is None else type(default).__name__]
        for value in [value for value in wrong if not (default is value is None)]:
            with pytest.raises((TypeError, ValueError), match=f"^`{option}` must be .*, got "):
                compile_table(solver, PATHS["vp"], **{option: value})
        if isinstance(default, float) or default is None:
            for value in (math.inf, -math.inf):
                if value != default:
                    with pytest.raises(ValueError, match=f"^`{option}` must be a finite number"):
                        compile_table(solver, PATHS["vp"], **{option: value})


@pytest.mark.parametrize("solver", SOLVERS)
def test_numbers_of_numpy_are_taken_at_their_full_width(solver: str) -> None:
    """np.float32(0.5) is 0.5: not a number that rounds all that is multiplied by it to float32."""
    narrow = {bool: np.bool_, int: np.int64, float: np.float32}
    for option, default in solver_options(solver).items():
        value = 0.5 if default is None or isinstance(default, float) else default
        cast = narrow.get(type(value), str)(value)
        assert compile_table(solver, PATHS["vp"], **{option: cast}) == compile_table(
            solver, PATHS["vp"], **{option: value}
        )


def test_a_solver_of_the_user_s_own_gets_its_options_as_it_annotates_them() -> None:
    seen = {}

    def mine(levels: NoiseLevels, *, free=1, weight: float = 0.5, until: float | None = None, of=()):
        seen.update(free=free, weight=weight, until=until, of=of)
        return (Row(now, to.alpha * X0 + to.sigma * Z) for now, to in levels.steps())

    compile_table(mine, PATHS["ve"], prediction="x0", free=0.25, weight=np.float32(0.25), until=None, of="x")
    assert seen == {"free": 0.25, "weight": 0.25, "until": None, "of": "x"}
    assert type(seen["weight"]) is float
    compile_table(mine, PATHS["ve"], prediction="x0", free="any", until=3)
    assert seen == {"free": "any", "weight": 0.5, "until": 3.0, "of": ()}
    with pytest.raises(TypeError, match="`until` must be a number, got 'x'"):
        compile_table(mine, PATHS["ve"], prediction="x0", until="x")


def test_annotations_of_other_forms_are_read_or_left_alone() -> None:
    seen = {}

    def mine(levels, *, until: Optional[float] = None, of: list[int] = (), order: int):  # noqa: UP045
        seen.update(until=until, of=of, order=order)
        return (Row(now, to.alpha * X0 + to.sigma * Z) for now, to in levels.steps())

    compile_table(mine, PATHS["ve"], prediction="x0", until=np.float32(0.5), of="x", order=np.int64(3))
    assert seen == {"until": 0.5, "of": "x", "order": 3}
    assert [type(seen[name]) for name in ("until", "order")] == [float, int]
    with pytest.raises(TypeError, match=r"`order` must be a whole number, got 2.5 \(float\)"):
        compile_table(mine, PATHS["ve"], prediction="x0", order=2.5)
    with pytest.raises(TypeError, match="'order'"):
        compile_table(mine, PATHS["ve"], prediction="x0")


def test_options_of_a_solver_can_be_listed() -> None:
    assert solver_options("ddim") == {"eta": 0.0}
    assert solver_options("ddpm") == {}
