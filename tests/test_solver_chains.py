"""Solvers against their papers' loops, written out in sigma_ve, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from oracles import SCHEDULES, assert_close, shortened

from fastdiff.levels import NoiseLevels
from fastdiff.solvers import SOLVERS, compile_table
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

LINEAR = SCHEDULES["linear"]
VE = NoiseLevels.karras(9, 0.02, 40.0)
PATHS = {
    "ve": VE,
    "vp": NoiseLevels.from_schedule(LINEAR, space_timesteps(1000, 9)),
    "flow": shortened(NoiseLevels.flow(10, shift=2.0), 1, 10),
}
Denoiser = Callable[[np.ndarray, float], np.ndarray]


def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """x0 from x/alpha at sigma_ve; smooth and non-linear."""
    return np.tanh(x / math.hypot(1.0, sigma)) + 0.2 * np.sin(3.0 * x / (1.0 + sigma))


def run(table: SamplingTable, x: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The table's chain from x/alpha, with `denoise` for its network."""
    row = iter(range(table.num_rows))

    def model(u: np.ndarray, t: np.ndarray) -> np.ndarray:
        r = next(row)
        return denoise(u / table.alpha[r], table.sigma[r] / table.alpha[r])

    return table.evaluate(model, table.alpha[0] * x, noise)


def noisy_start(rows: int, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    return sigma * rng.normal(size=(1, 8)), rng.normal(size=(rows, 1, 8))


CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 30.0, "s_noise": 1.01}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["euler", "heun", "dpm_2"])
def test_churned_solvers_are_edm_s_algorithm(solver: str, path: str) -> None:
    """The loop of Karras et al. 2022, algorithm 2; its draw before step i is that of our row before it."""
    levels = PATHS[path]
    table = compile_table(solver, levels, prediction="x0", **CHURN)
    sigmas = levels.sigma_ve
    x, z = noisy_start(table.num_rows, sigmas[0])
    gamma = min(3.0 / len(levels), math.sqrt(2) - 1)
    ours, y, row = run(table, x, z), x, 0
    for i, (sigma, to) in enumerate(pairwise(sigmas)):
        if 0.05 <= sigma <= 30.0:
            raised = sigma * (1 + gamma)
            draw = z[row - 1] if i else 0.0
            y = y + draw * math.sqrt(raised**2 - sigma**2) * 1.01
            sigma = raised
        d = (y - denoise(y, sigma)) / sigma
        row += 1
        if to and solver == "heun":
            d_2 = (y + (to - sigma) * d - denoise(y + (to - sigma) * d, to)) / to
            y, row = y + (to - sigma) * 0.5 * (d + d_2), row + 1
        elif to and solver == "dpm_2":
            mid = math.exp(0.5 * (math.log(sigma) + math.log(to)))
            inner = y + (mid - sigma) * d
            y, row = y + (to - sigma) * (inner - denoise(inner, mid)) / mid, row + 1
        else:
            y = y + (to - sigma) * d
    assert row == table.num_rows
    assert_close(ours, y, 1e-11)


def ancestral(sigma: float, to: float, eta: float) -> tuple[float, float]:
    up = min(to, eta * math.sqrt(to**2 * (sigma**2 - to**2) / sigma**2))
    return math.sqrt(to**2 - up**2), up


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("solver", ["dpmpp_2s_ancestral", "dpmpp_sde", "dpm_2_ancestral"])
def test_two_stage_ancestral_solvers_are_k_diffusion_s_loops(solver: str, eta: float, path: str) -> None:
    levels = PATHS[path]
    options = {"brownian": False} if solver == "dpmpp_sde" else {}
    table = compile_table(solver, levels, prediction="x0", eta=eta, s_noise=1.02, **options)
    x, z = noisy_start(table.num_rows, levels.sigma_ve[0])
    ours, y, row = run(table, x, z), x, 0
    for sigma, to in pairwise(levels.sigma_ve):
        x0 = denoise(y, sigma)
        row += 1
        down, up = ancestral(sigma, to, eta)
        if to == 0:
            y = x0
            continue
        if solver == "dpmpp_sde":
            mid = math.exp(0.5 * (math.log(sigma) + math.log(to)))
            mid_down, mid_up = ancestral(sigma, mid, eta)
            inner = mid_down / sigma * y + (1 - mid_down / sigma) * x0 + 1.02 * mid_up * z[row - 1]
            y = down / sigma * y + (1 - down / sigma) * denoise(inner, mid)
        elif solver == "dpmpp_2s_ancestral":
            mid = math.exp(0.5 * (math.log(sigma) + math.log(down)))
            inner = mid / sigma * y + (1 - mid / sigma) * x0
            y = down / sigma * y + (1 - down / sigma) * denoise(inner, mid)
        else:
            mid = math.exp(0.5 * (math.log(sigma) + math.log(down)))
            inner = y + (mid - sigma) * (y - x0) / sigma
            y = y + (down - sigma) * (inner - denoise(inner, mid)) / mid
        y = y + 1.02 * up * z[row]
        row += 1
    assert row == table.num_rows
    assert_close(ours, y, 1e-11)


def test_dpmpp_3m_sde_is_k_diffusion_s_loop() -> None:
    table = compile_table("dpmpp_3m_sde", VE, prediction="x0", eta=0.8)
    x, z = noisy_start(table.num_rows, 40.0)
    ours, y, past = run(table, x, z), x, []
    for i, (sigma, to) in enumerate(pairwise(VE.sigma)):
        x0 = denoise(y, sigma)
        if to == 0:
            y = x0
            break
        h = math.log(sigma / to)
        k = 1.8 * h
        y = math.exp(-k) * y + (1 - math.exp(-k)) * x0
        phi_2 = math.expm1(-k) / k + 1
        if len(past) > 1:
            (h_1, x0_1), (h_2, x0_2) = past[-1], past[-2]
            r0, r1 = h_1 / h, h_2 / h
            slope_0, slope_1 = (x0 - x0_1) / r0, (x0_1 - x0_2) / r1
            y = y + phi_2 * (slope_0 + (slope_0 - slope_1) * r0 / (r0 + r1))
            y = y - (phi_2 / k - 0.5) * (slope_0 - slope_1) / (r0 + r1)
        elif past:
            y = y + phi_2 * (x0 - past[-1][1]) / (past[-1][0] / h)
        y = y + z[i] * to * math.sqrt(-math.expm1(-2 * 0.8 * h))
        past.append((h, x0))
    assert_close(ours, y, 1e-11)


def test_brownian_noise_of_dpmpp_sde_has_the_overlap_s_covariance() -> None:
    table = compile_table("dpmpp_sde", VE, prediction="x0")
    for step in range(len(VE) - 1):
        first, second = 2 * step, 2 * step + 1
        mid_up, shared = table.from_noise[first]
        fresh = table.from_noise[second, 0]
        sigma, to = VE.sigma[step], VE.sigma[step + 1]
        mid = math.sqrt(sigma * to)
        up = ancestral(sigma, to, 1.0)[1]
        assert_close(shared**2 + fresh**2, up**2, 1e-13)
        assert_close(mid_up, ancestral(sigma, mid, 1.0)[1], 1e-13)
        assert_close(shared / up, math.sqrt((sigma - mid) / (sigma - to)), 1e-13)


def same_sampler(a: SamplingTable, b: SamplingTable, tol: float = 1e-12) -> None:
    """Both chains make the same of a non-linear network, whatever their registers hold."""
    assert a.num_rows == b.num_rows
    assert_close(a.t, b.t, 1e-12)
    x, z = noisy_start(a.num_rows, a.sigma[0] / a.alpha[0])
    assert_close(run(a, x, z), run(b, x, z), tol)


IDENTITIES = [
    ("euler", {}, "ddim", {}),
    ("euler_ancestral", {}, "ddpm", {}),
    ("euler_ancestral", {"eta": 0.0}, "ddim", {}),
    ("lms", {"order": 1}, "ddim", {}),
    ("deis", {"order": 1}, "ddim", {}),
    ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m", {}),
    ("dpmpp_sde", {"eta": 0.0}, "dpmpp_2s_ancestral", {"eta": 0.0}),
    ("dpm_2_ancestral", {"eta": 0.0}, "dpm_2", {}),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("left", "left_options", "right", "right_options"), IDENTITIES)
def test_identities_between_solvers(
    left: str, left_options: dict, right: str, right_options: dict, path: str
) -> None:
    a = compile_table(left, PATHS[path], prediction="x0", **left_options)
    b = compile_table(right, PATHS[path], prediction="x0", **right_options)
    same_sampler(a, b)


def test_2m_without_its_register_is_ddim() -> None:
    table = compile_table("dpmpp_2m", VE, prediction="x0")
    ddim = compile_table("ddim", VE, prediction="x0")
    # what the register gives is taken from x0
    assert table.registers == 1
    assert_close(table.from_state[:, 0, 0], ddim.from_state[:, 0, 0], 1e-15)
    assert_close(table.from_x0[:, 0] + table.from_state[:, 0, 1], ddim.from_x0[:, 0], 1e-14)


def test_all_noise_of_lcm_is_fresh() -> None:
    table = compile_table("lcm", PATHS["vp"], prediction="x0")
    assert not table.from_state.any()
    assert table.from_x0[:, 0].tolist() == PATHS["vp"].alpha[1:].tolist()
    assert table.from_noise[:, 0].tolist() == PATHS["vp"].sigma[1:].tolist()


REGISTERS = {
    "ddpm": 0, "ddim": 0, "euler": 0, "euler_ancestral": 0, "lcm": 0,
    "heun": 1, "dpm_2": 1, "dpm_2_ancestral": 1, "dpmpp_2s_ancestral": 1, "dpmpp_sde": 1,
    "dpmpp_2m": 1, "dpmpp_2m_sde": 1, "dpmpp_3m_sde": 2, "deis": 2, "lms": 3, "plms": 3, "unipc": 3,
}  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS)
def test_registers_are_the_fewest_that_the_method_needs(solver: str) -> None:
    assert compile_table(solver, VE).registers == REGISTERS[solver]


@pytest.mark.parametrize(
    ("solver", "order", "registers"),
    [
        ("lms", 1, 0),
        ("lms", 2, 1),
        ("lms", 6, 5),
        ("deis", 1, 0),
        ("deis", 2, 1),
        ("deis", 4, 3),
        ("unipc", 1, 1),
        ("unipc", 2, 2),
    ],
)
def test_registers_follow_the_order(solver: str, order: int, registers: int) -> None:
    assert compile_table(solver, VE, order=order).registers == registers


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_row_writes_only_what_is_new(solver: str) -> None:
    """History is not shifted: a memory stays in its place until its last reader, so a row writes one.

    Two where a row starts two memories: UniPC's x0 and half-corrected x, PLMS's eps and half-made first step.
    """
    table = compile_table(solver, VE)
    kept = np.eye(table.registers + 1)
    for row in range(table.num_rows):
        idle = (
            (table.from_state[row] == kept).all(1) & (table.from_x0[row] == 0) & (table.from_noise[row] == 0)
        )
        allowed = 2 if solver == "unipc" or (solver == "plms" and row == 0) else 1
        assert (~idle[1:]).sum() <= allowed


@pytest.mark.parametrize("solver", SOLVERS)
def test_rows_are_the_method_s_evaluations(solver: str) -> None:
    steps = len(VE)
    two_stage = {"heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"}
    rows = 2 * steps - 1 if solver in two_stage else steps + (solver == "plms")
    table = compile_table(solver, VE)
    assert table.num_rows == rows
    assert table.ends_step.sum() == steps


def test_churn_of_the_first_level_is_part_of_the_start() -> None:
    gamma = math.sqrt(2) - 1
    table = compile_table("euler", VE, s_churn=100.0)
    assert_close([table.sigma[0], table.init_scale], [40.0 * math.sqrt(2)] * 2, 1e-14)
    assert_close(table.from_noise[0, 0], VE.sigma[1] * math.sqrt((1 + gamma) ** 2 - 1), 1e-14)
    assert table.from_noise[-1, 0] == 0.0
    assert table.exempt == ()
    vp = compile_table("heun", PATHS["vp"], s_churn=100.0)
    assert_close(vp.init_scale, 1.0, 1e-14)  # unit variance stays unit variance
    assert_close(vp.alpha[0] ** 2 + vp.sigma[0] ** 2, 1.0, 1e-14)
    louder = compile_table("euler", VE, s_churn=100.0, s_noise=2.0)
    assert_close(louder.init_scale, 40.0 * math.sqrt(1 + 4 * 1), 1e-14)
    assert louder.exempt == ("noise",)
    silent = compile_table("euler", VE, s_churn=100.0, s_noise=0.0)
    assert_close([silent.sigma[0], silent.init_scale], [40.0 * math.sqrt(2), 40.0], 1e-14)
    assert silent.exempt == ("noise",)


@pytest.mark.parametrize("start", ["flow", "zero_snr"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_without_signal_is_one_first_order_row(solver: str, start: str) -> None:
    full = NoiseLevels.flow(10, shift=2.0)
    if start == "zero_snr":
        full = NoiseLevels.from_schedule(SCHEDULES["zero_snr"], space_timesteps(1000, 10))
    table = compile_table(solver, full, prediction="v")
    assert table.alpha[0] == 0.0
    assert table.ends_step[0]
    alpha, sigma = full.alpha[1], full.sigma[1]
    # what is x' made of: alpha' x0, and noise of sigma' from x or fresh
    assert_close(table.from_x0[0, 0], alpha, 1e-15)
    assert_close(math.hypot(table.from_state[0, 0, 0], table.from_noise[0, 0]), sigma, 1e-15)
    fresh = solver in ("ddpm", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "lcm")
    assert (table.from_noise[0, 0] != 0) == fresh
    if table.registers:  # history starts after it
        assert not table.from_state[1, 0, 1:].any()
        later = compile_table(solver, shortened(full, 1, 10), prediction="v")
        assert_close(table.from_state[1:, 0].sum(axis=1), later.from_state[:, 0].sum(axis=1), 1e-12)


@pytest.mark.parametrize(
    ("solver", "options", "match"),
    [
        ("euler", {"s_churn": -1.0}, "`s_churn` must be >= 0"),
        ("heun", {"s_noise": -1.0}, "`s_noise` must be >= 0"),
        ("euler_ancestral", {"eta": -0.1}, "`eta` must be >= 0"),
        ("euler_ancestral", {"s_noise": -1.0}, "`s_noise` must be >= 0"),
        ("dpmpp_sde", {"s_noise": -1.0}, "`s_noise` must be >= 0"),
        ("dpmpp_2m_sde", {"eta": -1.0}, "`eta` must be >= 0"),
        ("dpmpp_3m_sde", {"eta": -1.0}, "`eta` must be >= 0"),
        ("dpmpp_2m_sde", {"solver_type": "euler"}, "`solver_type` must be 'midpoint' or 'heun'"),
        ("dpmpp_sde", {"r": 0.0}, r"`r` must be in \(0, 1\]"),
        ("lms", {"order": 9}, r"`order` must be in 1\.\.8"),
        ("deis", {"order": 0}, r"`order` must be in 1\.\.4"),
        ("unipc", {"order": 4}, "`order` must be 1, 2 or 3"),
        ("lcm", {"sigma_data": 0.0}, "`sigma_data` must be positive"),
    ],
)
def test_options_out_of_range_are_clear_errors(solver: str, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compile_table(solver, VE, **options)
