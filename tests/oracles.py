"""What the tests of tables compare with: exact results for Gaussian data, networks, schedules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastdiff.levels import NoiseLevels
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import SamplingTable

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear": NoiseSchedule.linear(1000),
    "scaled_linear": NoiseSchedule.scaled_linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
    "sigmoid": NoiseSchedule.sigmoid(1000),
    "zero_snr": NoiseSchedule.linear(1000).rescale_zero_terminal_snr(),
}


def assert_close(actual: object, expected: object, tol: float) -> None:
    """Every element within tol of the expected, relative to the largest expected magnitude (at least 1)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    error = float(np.abs(actual - expected).max(initial=0.0)) / scale
    assert error <= tol, f"relative error {error:.3g} exceeds {tol:.3g}"


def shortened(levels: NoiseLevels, first: int, stop: int) -> NoiseLevels:
    """The path that visits levels[first:stop] alone, then the clean end."""
    kept = [*range(first, stop), -1]
    t, alpha, sigma = (getattr(levels, name)[kept] for name in ("t", "alpha", "sigma"))
    return NoiseLevels(t, alpha, sigma, levels.path, levels.schedule, levels.time_scale)


def push_gaussian(
    table: SamplingTable, mean: float, std: float, *, consistent: bool = False
) -> tuple[float, float]:
    """Mean and standard deviation of a table's samples for data N(mean, std^2), without sampling.

    The exact network is x0_hat = E[x0 | x] = mean + g (x - alpha mean), with
    g = alpha std^2 / (alpha^2 std^2 + sigma^2); the exact consistency model, which follows the flow to its
    end, has g = std / sqrt(alpha^2 std^2 + sigma^2). The chain starts from the true marginal at level 0.
    """
    size = table.registers + 1
    m, p = np.zeros(size), np.zeros((size, size))
    m[0], p[0, 0] = table.alpha[0] * mean, (table.alpha[0] * std) ** 2 + table.sigma[0] ** 2
    for r in range(table.num_rows):
        alpha, sigma = table.alpha[r], table.sigma[r]
        spread = np.hypot(alpha * std, sigma)
        gain = std / spread if consistent else alpha * (std / spread) ** 2
        x0 = np.array([gain, mean * (1.0 - gain * alpha)])  # x0_hat = x0[0] x + x0[1]
        matrix = table.from_state[r].copy()
        matrix[:, 0] += table.from_x0[r] * x0[0]
        m = matrix @ m + table.from_x0[r] * x0[1]
        p = matrix @ p @ matrix.T + np.outer(table.from_noise[r], table.from_noise[r])
    assert not table.from_out.any()
    return float(m[0]), float(np.sqrt(p[0, 0]))


def flow_of_gaussian(levels: NoiseLevels, x: np.ndarray, mean: float, std: float) -> np.ndarray:
    """What the probability-flow ODE of data N(mean, std^2) makes of x at the first level."""
    alpha, sigma = levels.alpha[0], levels.sigma[0]
    return mean + (x - alpha * mean) * std / np.hypot(alpha * std, sigma)


def network_of(
    prediction: str,
    stages: dict[float, tuple[float, float]],
    x0_of: Callable[[np.ndarray, float, float], np.ndarray],
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A network that predicts `prediction` (not edm) and whose x0 is x0_of(x, *stages[t])."""

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        alpha, sigma = stages[float(t[0])]
        x0 = x0_of(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]

    return model


def wavy(x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
    """A smooth, non-linear x0 that depends on the level."""
    return np.tanh(x + alpha) - 0.3 * np.sin(2.0 * sigma * x)
