"""How fast the error falls with the number of steps, on Gaussian data whose flow is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from oracles import SCHEDULES, assert_close, push_gaussian

from fastdiff.levels import NoiseLevels
from fastdiff.solvers import SOLVERS, compile_table
from fastdiff.solvers.steps import lagrange_integrals
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

STD = 0.4


def flow_error(table: SamplingTable) -> float:
    """Relative error of x - alpha mean at the last level above 0, against the flow of data N(mean, STD^2).

    The last step, from sigma_min to 0, is of first order in all solvers, and its error does not depend on n.
    """
    rows = int(np.flatnonzero(table.ends_step)[-2]) + 1
    state = np.eye(table.registers + 1)[0]
    for r in range(rows):
        alpha, sigma = table.alpha[r], table.sigma[r]
        matrix = table.from_state[r].copy()
        matrix[:, 0] += table.from_x0[r] * alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        state = matrix @ state
    exact = math.hypot(table.alpha[rows] * STD, table.sigma[rows]) / math.hypot(
        table.alpha[0] * STD, table.sigma[0]
    )
    return abs(state[0] / exact - 1.0)


ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("dpm_2", {}, 2),
    ("dpm_2_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver_type": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 2),  # see its docstring
    ("plms", {}, 2),  # its weights are those of equal steps in sigma_ve
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 3}, 3),
    ("lms", {"order": 4}, 4),
    ("deis", {"order": 2}, 2),
    ("deis", {"order": 3}, 3),
    ("deis", {"order": 4}, 4),
    ("unipc", {"order": 1}, 2),  # the corrector adds one order
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3}, 3),  # held back by the lower orders at the end
]


@pytest.mark.parametrize(("solver", "options", "order"), ORDERS)
def test_order_of_convergence(solver: str, options: dict, order: int) -> None:
    # From sigma_ve 3000 on, the first, lower-order steps of a multistep solver meet a constant x0_hat.
    # deis-3's leading error is odd in log sigma_ve about STD and cancels in a path that runs far beyond.
    end = STD if (solver, order) == ("deis", 3) else 0.05
    errors = []
    for n in (200, 400):
        levels = NoiseLevels.exponential(n, end, 3000.0)
        errors.append(flow_error(compile_table(solver, levels, **options)))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2, f"errors {errors}"


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "unipc", "deis", "lms"])
def test_higher_orders_pay_at_twenty_steps(solver: str) -> None:
    levels = NoiseLevels.exponential(20, 0.02, 50.0)
    assert flow_error(compile_table(solver, levels)) < 0.3 * flow_error(compile_table("ddim", levels))


WEAK_ORDERS = [
    ("ddpm", {}, 1),
    ("euler_ancestral", {}, 1),
    ("dpm_2_ancestral", {}, 2),
    ("dpmpp_2s_ancestral", {}, 2),
    ("dpmpp_2m_sde", {}, 2),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, 2),
    ("dpmpp_3m_sde", {}, 2),
    ("dpmpp_sde", {}, 2),
    ("dpmpp_sde", {"brownian": False}, 1),
]


@pytest.mark.parametrize(("solver", "options", "order"), WEAK_ORDERS)
def test_weak_order_of_convergence(solver: str, options: dict, order: int) -> None:
    """The standard deviation of the samples, without sampling error."""
    errors = []
    for n in (100, 200):
        levels = NoiseLevels.exponential(n, 0.002, 100.0)
        mean, std = push_gaussian(compile_table(solver, levels, **options), 1.5, STD)
        assert abs(mean - 1.5) < 1e-10
        errors.append(abs(std - STD))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25, f"errors {errors}"


GAUSSIAN_PATHS = {
    "linear": lambda n: NoiseLevels.from_schedule(SCHEDULES["linear"], space_timesteps(1000, n)),
    "cosine": lambda n: NoiseLevels.from_schedule(SCHEDULES["cosine"], space_timesteps(1000, n)),
    "ve": lambda n: NoiseLevels.karras(n, 0.002, 80.0),
    "flow": lambda n: NoiseLevels.flow(n),
}
FIRST_ORDER = {"ddpm", "ddim", "euler", "euler_ancestral"}


@pytest.mark.parametrize("path", GAUSSIAN_PATHS)
@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"lcm"}))
def test_gaussian_data_comes_out_of_every_solver_on_every_path(solver: str, path: str) -> None:
    errors = []
    for n in (25, 400):
        table = compile_table(solver, GAUSSIAN_PATHS[path](n), prediction="v")
        mean, std = push_gaussian(table, -0.7, STD)
        assert abs(mean + 0.7) < 1e-12  # x0_hat - mean vanishes at x = alpha mean
        errors.append(abs(std / STD - 1.0))
    assert errors[1] < (0.025 if solver in FIRST_ORDER else 0.0075), errors
    # 16 times as many steps; plms, whose weights are those of equal steps, has a change of sign in between
    assert errors[1] < (errors[0] if (solver, path) == ("plms", "linear") else errors[0] / 9.0), errors


@pytest.mark.parametrize("path", GAUSSIAN_PATHS)
def test_gaussian_data_comes_exactly_out_of_lcm_with_a_consistency_model(path: str) -> None:
    """At any number of steps; of E[x0 | x] it would keep the spread of neither the data nor the level."""
    for n in (1, 4, 25):
        table = compile_table("lcm", GAUSSIAN_PATHS[path](n), prediction="v")
        mean, std = push_gaussian(table, -0.7, STD, consistent=True)
        assert abs(mean + 0.7) < 1e-12
        assert abs(std - STD) < 1e-12


@pytest.mark.parametrize("order", range(1, 9))
def test_weights_of_a_multistep_are_the_polynomial_s_integrals(order: int) -> None:
    """Against the same polynomials in rational numbers, whose coefficients cancel in floating point."""
    nodes = [0.0, *(-np.cumsum(np.random.default_rng(order).uniform(0.1, 3.0, order - 1))).tolist()]
    exact = []
    for j, node in enumerate(map(Fraction, nodes)):
        polynomial = [Fraction(1)]  # coefficients, the constant first
        for other in map(Fraction, [*nodes[:j], *nodes[j + 1 :]]):
            shifted = [Fraction(0), *polynomial]
            scaled = [*(other * c for c in polynomial), Fraction(0)]
            polynomial = [(a - b) / (node - other) for a, b in zip(shifted, scaled, strict=True)]
        exact.append(float(sum(c / (k + 1) for k, c in enumerate(polynomial))))
    assert_close(lagrange_integrals(nodes, order // 2 + 1), exact, 1e-14)
