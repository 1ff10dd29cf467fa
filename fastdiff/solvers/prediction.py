"""What a network predicts: the columns t, c_in, x0_from_x and x0_from_out of a table, and no others."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Prediction = Literal["eps", "x0", "v", "flow", "edm"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def prediction_columns(
    prediction: str, t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, sigma_data: float = 0.5
) -> dict[str, np.ndarray]:
    """How x0 follows from x = alpha x0 + sigma eps and the network's output, and what the network is given.

        x0 = x0_from_x * x + x0_from_out * out,   network input c_in * x at time t
        eps    out = eps                    x0 = (x - sigma out) / alpha
        x0     out = x0
        v      out = alpha eps - sigma x0   x0 = (alpha x - sigma out) / (alpha^2 + sigma^2)
        flow   out = eps - x0               x0 = (x - sigma out) / (alpha + sigma)
        edm    x0 = c_skip x/alpha + c_out out;   with s = sigma/alpha, d = sigma_data, n = sqrt(s^2 + d^2):
               c_skip = d^2/n^2, c_out = s d/n, c_in = 1/(alpha n), t = ln(s)/4

    Args:
        t, alpha, sigma: [rows] float64, sigma > 0.
        sigma_data: EDM's standard deviation of the data.
    Raises:
        ValueError: an unknown prediction, or eps or edm where alpha is 0 and says nothing about x0.
    Source: Ho et al. 2020, eq. 11; Salimans & Ho 2022 (arXiv 2202.00512), sec. 4; Lipman et al. 2023
        (arXiv 2210.02747); Karras et al. 2022 (arXiv 2206.00364), eq. 7 and table 1.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"`prediction` must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if prediction in ("eps", "edm") and (alpha == 0).any():
        raise ValueError(
            f"`prediction` {prediction!r} cannot give x0 at a level with alpha 0 (flow, zero terminal SNR): "
            "x holds no signal there; use a network that predicts 'v' or 'x0', or start below that level"
        )
    one, zero = np.ones_like(alpha), np.zeros_like(alpha)
    c_in = one
    if prediction == "eps":
        from_x, from_out = 1.0 / alpha, -sigma / alpha
    elif prediction == "x0":
        from_x, from_out = zero, one
    elif prediction == "v":
        norm = alpha**2 + sigma**2
        from_x, from_out = alpha / norm, -sigma / norm
    elif prediction == "flow":
        from_x, from_out = 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    else:
        if not 0 < sigma_data < np.inf:
            raise ValueError(f"`sigma_data` must be positive and finite, got {sigma_data}")
        s = sigma / alpha
        norm = np.hypot(s, sigma_data)
        from_x, from_out = (sigma_data / norm) ** 2 / alpha, s * sigma_data / norm
        c_in, t = 1.0 / (alpha * norm), np.log(s) / 4.0
    return {"t": t, "c_in": c_in, "x0_from_x": from_x, "x0_from_out": from_out}
