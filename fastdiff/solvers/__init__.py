"""Solvers by name, and the compiler that makes a table of one.

A solver is a function NoiseLevels -> rows in a file of its own, named after it; its keyword arguments are the
solver's options.
"""

from __future__ import annotations

import difflib
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from fastdiff._arguments import as_kind
from fastdiff.clip import Clip
from fastdiff.levels import NoiseLevels
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import ddpm
from fastdiff.solvers.deis import deis
from fastdiff.solvers.dpm_2 import dpm_2
from fastdiff.solvers.dpm_2_ancestral import dpm_2_ancestral
from fastdiff.solvers.dpmpp_2m import dpmpp_2m
from fastdiff.solvers.dpmpp_2m_sde import dpmpp_2m_sde
from fastdiff.solvers.dpmpp_2s_ancestral import dpmpp_2s_ancestral
from fastdiff.solvers.dpmpp_3m_sde import dpmpp_3m_sde
from fastdiff.solvers.dpmpp_sde import dpmpp_sde
from fastdiff.solvers.euler import euler
from fastdiff.solvers.euler_ancestral import euler_ancestral
from fastdiff.solvers.forms import OUT, X0, Form, Register, Row, X, Z, assemble
from fastdiff.solvers.heun import heun
from fastdiff.solvers.lcm import lcm
from fastdiff.solvers.lms import lms
from fastdiff.solvers.plms import plms
from fastdiff.solvers.prediction import PREDICTIONS, Prediction, prediction_columns
from fastdiff.solvers.unipc import unipc
from fastdiff.table import SamplingTable

__all__ = [
    "OUT",
    "PREDICTIONS",
    "SOLVERS",
    "VARIANCES",
    "X0",
    "Form",
    "Prediction",
    "Register",
    "Row",
    "Solver",
    "Variance",
    "X",
    "Z",
    "compile_table",
    "solver_options",
]

Solver = Callable[..., Iterable[Row]]
Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[str, ...] = get_args(Variance)
SOLVERS: dict[str, Solver] = {
    function.__name__: function
    for function in (
        ddpm,
        ddim,
        euler,
        euler_ancestral,
        heun,
        dpm_2,
        dpm_2_ancestral,
        lms,
        plms,
        dpmpp_2m,
        dpmpp_2s_ancestral,
        dpmpp_sde,
        dpmpp_2m_sde,
        dpmpp_3m_sde,
        unipc,
        deis,
        lcm,
    )
}


def compile_table(
    solver: str | Solver,
    levels: NoiseLevels,
    *,
    prediction: str = "eps",
    variance: str = "fixed_small",
    clip: Clip = None,
    sigma_data: float | None = None,
    **options: Any,
) -> SamplingTable:
    """The table of a solver over a path of noise levels; it has passed its self-check.

    Args:
        solver: a name of `SOLVERS`, or a function `(levels, **options) -> rows` like those.
        prediction: what the network predicts: "eps", "x0", "v", "flow" or "edm".
        variance: "fixed_small", "fixed_large", or "learned", "learned_range", where the network's output has
            2C channels; every solver but "ddpm" ignores the second half.
        clip: range (lo, hi) of the predicted x0, a `DynamicThreshold`, or None.
        sigma_data: the data's standard deviation: EDM's with prediction "edm" (default 0.5), else the option
            of solver "lcm".
        **options: the solver's own; `solver_options` lists them.
    Raises:
        ValueError: an unknown solver, prediction or variance, or values out of range.
        TypeError: an option that the solver does not have, or that is not what the solver annotates it as.
    """
    function, name = _find(solver)
    if variance not in VARIANCES:
        raise ValueError(f"`variance` must be one of {', '.join(VARIANCES)}, got {variance!r}")
    if not isinstance(levels, NoiseLevels):
        raise TypeError(
            f"`levels` must be NoiseLevels, got {type(levels).__name__}; see NoiseLevels.from_schedule"
        )
    if sigma_data is not None:
        sigma_data = as_kind("sigma_data", sigma_data, "float", None)
        if prediction != "edm":
            options["sigma_data"] = sigma_data
    options = _checked(function, name, options)
    if "variance" in inspect.signature(function).parameters:
        options["variance"] = variance
    made = function(levels, **options)
    rows = list(made) if isinstance(made, Iterable) else []
    others = (f"{type(row).__name__} as row {i}" for i, row in enumerate(rows) if not isinstance(row, Row))
    if wrong := next(others, None if rows else "none"):
        raise ValueError(f"`solver` must yield a Row for each evaluation, got {wrong} from {name!r}")
    t, alpha, sigma = np.array([row.level for row in rows], np.float64).T
    init_scale = rows[0].init_scale
    if init_scale is None:
        init_scale = 1.0 if levels.path == "vp" else rows[0].level.sigma
    log_var = np.array([row.log_var for row in rows], np.float64)
    table = SamplingTable(
        **prediction_columns(prediction, t, alpha, sigma, 0.5 if sigma_data is None else sigma_data),
        **assemble(rows),
        log_var_min=log_var[:, 0],
        log_var_max=log_var[:, 1],
        alpha=np.append(alpha, 1.0),
        sigma=np.append(sigma, 0.0),
        ends_step=np.array([row.ends_step for row in rows]),
        init_scale=init_scale,
        clip=clip,
        name=name,
        learned=variance in ("learned", "learned_range"),
        exempt=tuple(sorted({moment for row in rows for moment in row.exempt})),
    )
    table.check()
    return table


def solver_options(solver: str | Solver) -> dict[str, Any]:
    """The options of a solver and their defaults, `variance` aside."""
    parameters = inspect.signature(_find(solver)[0]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "variance"}


def _checked(function: Solver, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as the solver's signature annotates them; those without an annotation as they are."""
    known, hints, checked = solver_options(function), _hints(function), {}
    for option, value in options.items():
        if option not in known:
            raise TypeError(
                f"`{option}` is no option of solver {name!r}, which takes {', '.join(known) or 'none'}"
            )
        hint = hints.get(option)
        members = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
        kinds = [kind for kind in (bool, int, float, str) if members - {type(None)} == {kind}]
        if kinds and not (value is None and type(None) in members):
            default = None if known[option] is inspect.Parameter.empty else known[option]
            value = as_kind(option, value, kinds[0].__name__, default)
        checked[option] = value
    return checked


def _hints(function: Solver) -> dict[str, Any]:
    """What a solver's parameters are annotated as; none where that cannot be evaluated."""
    try:
        return get_type_hints(function if inspect.isroutine(function) else type(function).__call__)
    except (NameError, TypeError, AttributeError):  # names that only a type checker knows
        return {}


def _find(solver: str | Solver) -> tuple[Solver, str]:
    if callable(solver):
        return solver, getattr(solver, "__name__", type(solver).__name__)
    if not isinstance(solver, str) or solver not in SOLVERS:
        near = difflib.get_close_matches(str(solver), SOLVERS, n=1, cutoff=0.0)
        raise ValueError(
            f"`solver` must be a function or one of {', '.join(SOLVERS)}, got {solver!r}; "
            f"the nearest name is {near[0]!r}"
        )
    return SOLVERS[solver], solver
