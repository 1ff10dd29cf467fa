"""How fast the error falls with the number of steps, on Gaussian data whose flow is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from oracles import SCHEDULES, push_gaussian

from fastdiff.levels import NoiseLevels
from fastdiff.solvers import compile_table
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
    ("deis", {"order": 4}, 4),
    ("unipc", {"order": 1}, 2),  # the corrector adds one order
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3}, 3),  # held back by the lower orders at the end
]


@pytest.mark.parametrize(("solver", "options", "order"), ORDERS)
def test_order_of_convergence(solver: str, options: dict, order: int) -> None:
    # From sigma_ve 3000 on, the first, lower-order steps of a multistep solver meet a constant x0_hat.
    errors = []
    for n in (200, 400):
        levels = NoiseLevels.exponential(n, 0.05, 3000.0)
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


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m_sde", "unipc", "plms"])
def test_gaussian_data_comes_out_of_the_schedule_s_own_steps(solver: str) -> None:
    table = compile_table(solver, NoiseLevels.from_schedule(SCHEDULES["cosine"], range(0, 1000, 10)))
    mean, std = push_gaussian(table, -0.7, STD)
    assert abs(mean + 0.7) < 1e-10
    assert abs(std / STD - 1.0) < 0.06
