"""Chains in float32 against float64: what is lost, and that the rows lose no more than they must."""

from __future__ import annotations

import numpy as np
import pytest
from oracles import SCHEDULES

from fastdiff.levels import NoiseLevels
from fastdiff.solvers import SOLVERS, compile_table
from fastdiff.solvers.prediction import prediction_columns
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

PATHS = {
    "linear": lambda n: NoiseLevels.from_schedule(SCHEDULES["linear"], space_timesteps(1000, n)),
    "cosine": lambda n: NoiseLevels.from_schedule(SCHEDULES["cosine"], space_timesteps(1000, n)),
    "karras": lambda n: NoiseLevels.karras(n, 0.002, 80.0),
    "karras_vp": lambda n: NoiseLevels.karras(n, schedule=SCHEDULES["linear"]),
    "flow": lambda n: NoiseLevels.flow(n, shift=3.0),
}
ROUNDED = ("x0_from_x", "x0_from_out", "from_state", "from_x0", "from_noise")


def x0_of(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """A smooth, non-linear x0 of samples of unit variance."""
    return np.tanh(1.2 * alpha / np.hypot(alpha, sigma) * x + 0.2)


class Chain:
    """A table with one noise and one lane for each prediction, [lanes, 1, 32].

    The rows of a solver do not depend on what its network predicts: only two columns do.
    """

    def __init__(self, table: SamplingTable, predictions: tuple[str, ...]) -> None:
        self.table, self.lanes = table, len(predictions)
        ends = (table.t, table.alpha[:-1], table.sigma[:-1])
        columns = [prediction_columns(prediction, *ends) for prediction in predictions]
        self.columns = {name: getattr(table, name) for name in ROUNDED}
        for name in ROUNDED[:2]:
            self.columns[name] = np.array([column[name] for column in columns]).T[:, :, None, None]
        rng = np.random.default_rng(7)
        self.x = (table.init_scale * rng.normal(size=(1, 32))).astype(np.float32)
        self.z = rng.normal(size=(table.num_rows, 1, 32)).astype(np.float32)
        # half an ulp of float32, up or down: of the output and of x0
        self.ulps = 2.0**-24 * rng.choice([-1.0, 1.0], size=(2, table.num_rows, self.lanes, 1, 32))

    def run(self, dtype: type, *, blurred: bool = False) -> np.ndarray:
        """The sample of each lane.

        Args:
            dtype: of all arithmetic, the state, the network's output and the table.
            blurred: whether the output and x0 are off by half an ulp of float32.
        """
        of_out, of_x0 = 1.0 + self.ulps if blurred else np.ones_like(self.ulps)
        c = {name: column.astype(dtype) for name, column in self.columns.items()}
        x = np.broadcast_to(self.x.astype(dtype), (self.lanes, 1, 32))
        state = [x] + [np.zeros_like(x)] * self.table.registers
        z = self.z.astype(dtype)
        for r in range(self.table.num_rows):
            wide = state[0].astype(np.float64)  # the network is exact
            exact = x0_of(wide, self.table.alpha[r], self.table.sigma[r])
            out = (exact - self.columns["x0_from_x"][r] * wide) / self.columns["x0_from_out"][r]
            out = (out * of_out[r]).astype(dtype)
            x0 = c["x0_from_x"][r] * state[0] + c["x0_from_out"][r] * out
            x0 = x0 * of_x0[r] if blurred else x0
            lines = np.concatenate([c["from_state"][r], c["from_x0"][r, :, None]], axis=1)
            state = [
                sum((a * term for a, term in zip(line, [*state, x0], strict=True) if a), start=std * z[r])
                for line, std in zip(lines, c["from_noise"][r], strict=True)
            ]
        assert state[0].dtype == dtype
        return state[0]


# What multiplies x0's own rounding, whatever the form: solver, rows, paths. Their docstrings say why.
AMPLIFY = {
    ("lms", 250): {"karras", "karras_vp"},
    ("heun", 5): {"cosine"},
    ("dpm_2_ancestral", 5): {"linear", "cosine", "karras", "karras_vp"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_is_within_1e_5_of_float64_where_the_network_s_output_is(solver: str, path: str) -> None:
    """State, table and noise in float32 cost 1e-5 of the sample at most.

    Or 8 times what half an ulp in the network's output and in x0 costs alone: a row rounds some 5 to 10
    further numbers, and no form of the rows makes a solver better conditioned. That is the bound with eps,
    which says nothing about x0 where alpha is small (1/alpha is 2e4 at the start of a cosine schedule), and
    of `AMPLIFY`.
    """
    for n in (5, 20, 50, 250):
        levels = PATHS[path](n)
        predictions = ("x0", "v", "eps") if levels.alpha[0] else ("x0", "v")
        chain = Chain(compile_table(solver, levels, prediction="v"), predictions)
        exact = chain.run(np.float64)
        scale = max(1.0, float(np.abs(exact).max()))
        lost, least = (
            np.abs(sample - exact).max(axis=(1, 2)) / scale
            for sample in (chain.run(np.float32), chain.run(np.float64, blurred=True))
        )
        for prediction, error, floor in zip(predictions, lost, least, strict=True):
            conditioned = prediction != "eps" and path not in AMPLIFY.get((solver, n), ())
            allowed = 1e-5 if conditioned else max(1e-5, 8.0 * floor)
            assert error <= allowed, f"{prediction}, {n} rows: {error:.2g}, of which {floor:.2g} at least"


def test_a_form_that_cancels_is_found() -> None:
    """The comparison sees rounding that rows cause: x and eps apart, as the papers write them."""
    from fastdiff.solvers.forms import Register, Row, X
    from fastdiff.solvers.steps import first_order, noise_in

    def apart(levels: NoiseLevels):
        for now, to in levels.steps():
            if not to.sigma:
                yield Row(now, first_order(now, to))
                continue
            middle, start = levels.at(np.sqrt(now.sigma_ve * to.sigma_ve)), Register()
            yield Row(now, first_order(now, middle), {start: (to.alpha / now.alpha) * X}, ends_step=False)
            yield Row(middle, start + to.alpha * (to.sigma_ve - now.sigma_ve) * noise_in(middle))

    levels = PATHS["cosine"](5)
    errors, samples = [], []
    for solver in (apart, "dpm_2"):
        chain = Chain(compile_table(solver, levels, prediction="v"), ("v",))
        samples.append(chain.run(np.float64))
        errors.append(np.abs(chain.run(np.float32) - samples[-1]).max())
    assert np.abs(samples[0] - samples[1]).max() < 1e-10
    assert errors[0] > 1e-4
    assert errors[1] < 1e-5
