"""Samplers of k-diffusion's shape, fn(model, x, sigmas, extra_args, callback, disable, ...), as tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastdiff.adapters.basis import Basis, Refused, Tape
from fastdiff.adapters.brownian import SAME, BrownianPath
from fastdiff.adapters.recording import Heads, Numbers, ProbeNetwork, compile_tapes, confirm, warn_of_misses
from fastdiff.table import SamplingTable

__all__ = ["import_sampler"]

_PASSED = ("extra_args", "callback", "disable", "noise_sampler")


def import_sampler(
    sample_fn: Callable[..., torch.Tensor],
    sigmas: torch.Tensor | np.ndarray | Sequence[float],
    **options: Any,
) -> SamplingTable:
    """The sampling table of a sampler of k-diffusion's shape, read off by running it on a basis.

    The function runs with a stand-in for the network; the table has a row for each time that it is called.
    The network is a denoiser, x0 = model(x, sigma): its time is sigma, its output x0, and x = x0 + sigma
    noise. Noise that is added before the first evaluation belongs to the initial level: it goes into
    `sigma[0]` and `init_scale`. A `noise_sampler` that the function takes is given the increments of one
    Brownian path, k-diffusion's own default; to have others, wrap the function so that it brings its own.

    Args:
        sample_fn: called as fn(model, x, sigmas, **options), and with those of extra_args, callback, disable
            and noise_sampler that it takes. Steps end at `sigmas`; where churn raises those, a
            callback behind a step's first evaluation, or what the sampler remembers, tells where.
        sigmas: [S+1] noise levels, falling; the last is usually 0.
        **options: the sampler's own, e.g. eta=0.5, s_churn=10.0.
    Raises:
        ValueError: what cannot be a table, with the evaluation and the operation: not linear, steps that
            depend on the data, two independent noises in a row.
        TypeError: a function of another shape, such as the samplers that choose their steps themselves.
    Warns:
        UserWarning: the table misses the marginals of the levels it calls the network at by more than 1e-5.
    Source: the sampler's own code.
    """
    name = getattr(sample_fn, "__name__", type(sample_fn).__name__)
    takes = _parameters(sample_fn, name, options)
    levels = sigmas if isinstance(sigmas, torch.Tensor) else torch.from_numpy(np.array(sigmas, np.float64))
    levels = levels.detach().cpu()
    if levels.dim() != 1 or len(levels) < 2 or not bool(torch.isfinite(levels).all()) or not levels[0] > 0:
        raise ValueError(
            f"`sigmas` must be [S+1] finite noise levels that start above 0, with S >= 1, got {sigmas!r}"
        )
    tape = Tape(name)
    told: list[float] = []
    starts: list[int] = []
    result = _run_on_basis(sample_fn, tape, levels, takes, options, told, starts)
    tape.close(result)
    table, weights = compile_tapes([tape], _heads(tape, told, starts, levels, options))

    def run(network: ProbeNetwork, numbers: Numbers, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def model(x: torch.Tensor, sigma: Any, **_: Any) -> torch.Tensor:
            numbers.evaluate()
            return network(x, sigma)

        with numbers:
            end = sample_fn(model, x, levels.clone(), **_call(takes, options, tuple(x.shape)))
        return network.states[0], end

    confirm(table, weights, run, rounds=tape.rounds)
    warn_of_misses(table)
    return table


def _run_on_basis(
    sample_fn: Callable[..., Any],
    tape: Tape,
    levels: torch.Tensor,
    takes: set[str],
    options: dict[str, Any],
    told: list[float],
    starts: list[int],
) -> Any:
    """Run the sampler; `told` gets each evaluation's sigma, `starts` the evaluations that begin a step."""

    def model(x: Any, sigma: Any, **_: Any) -> torch.Tensor:
        if isinstance(sigma, Basis):
            tape.refuse("the network is called at a sigma that depends on the state")
        with torch._C.DisableTorchFunction():
            values = torch.as_tensor(sigma, dtype=torch.float64).flatten()
            if not bool((values == values[0]).all()):
                tape.refuse("the network is called at a different sigma for each sample")
            told.append(float(values[0]))
        return tape.evaluate(x)

    def callback(*_: Any) -> None:
        if tape.epoch not in starts:
            starts.append(tape.epoch)

    x = tape.unit("x")
    try:
        with tape:
            return sample_fn(model, x, levels.clone(), **_call(takes, options, tuple(x.shape), callback))
    except Refused:
        raise
    except Exception as error:  # whatever a stranger's code raises
        tape.refuse(f"it fails with {type(error).__name__}: {error}")


def _heads(
    tape: Tape, told: list[float], starts: list[int], levels: torch.Tensor, options: dict[str, Any]
) -> Heads:
    """The columns beside the coefficients: alpha is 1, x0 the output."""
    rows = len(tape.epochs)
    if not rows:
        raise Refused(f"{tape.name} cannot be imported: it never calls the network")
    assert tape.start.x is not None
    scale, noise = tape.start.x[0], np.delete(tape.start.x, 0)
    sigma = np.array([*told, float(levels[-1])])
    ends = _ends_by_level(sigma, levels.double().numpy())
    # called behind a step's first evaluation, as k-diffusion does; behind each it tells nothing
    if ends is None and starts[:1] == [0] and len(starts) < rows:
        ends = np.array([row + 1 in starts for row in range(rows - 1)] + [True])
    return Heads(
        t=np.array(told),
        c_in=np.ones(rows),
        x0_from_x=np.zeros(rows),
        x0_from_out=np.ones(rows),
        alpha=np.ones(rows + 1),
        sigma=sigma,
        ends_step=ends,
        init_scale=float(np.hypot(scale * float(levels[0]), np.linalg.norm(noise))),
        exempt=("noise",) if options.get("s_noise", 1.0) != 1.0 else (),
    )


def _ends_by_level(sigma: np.ndarray, levels: np.ndarray) -> np.ndarray | None:
    """[rows] whether a row ends a step, by the levels at which the network is called and the last one.

    A step starts with as many evaluations at its level as the first one; more there correct the step before.
    None where the levels do not tell: the calls miss some, or go back up, as with churn.
    """
    visited = np.isclose(levels[:, None], sigma, rtol=SAME, atol=0.0).any(axis=1).all()
    if not visited or (np.diff(sigma) > SAME * sigma[:-1]).any():
        return None
    changes = ~np.isclose(sigma[1:], sigma[:-1], rtol=SAME, atol=0.0)
    arrivals = [0, *(np.flatnonzero(changes) + 1).tolist()]  # the first evaluation at each level
    at_start = (arrivals[1:] or [len(sigma)])[0]
    ends = np.zeros(len(sigma) - 1, bool)
    for first, then in zip(arrivals, [*arrivals[1:], len(sigma)], strict=True):
        if first and np.isclose(levels, sigma[first], rtol=SAME, atol=0.0).any():
            ends[max(first, then - at_start) - 1] = True
    ends[-1] = True
    return ends


def _parameters(sample_fn: Any, name: str, options: dict[str, Any]) -> set[str]:
    """Names of `_PASSED` that the function takes."""
    if not callable(sample_fn):
        raise TypeError(f"`sample_fn` must be a function (model, x, sigmas, ...), got {name}")
    parameters = inspect.signature(sample_fn).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    first = list(parameters)[:3]
    if "sigma_min" in first:
        raise TypeError(
            f"{name} cannot be imported: it takes sigma_min and sigma_max and chooses its steps, and a "
            "table's rows are fixed beforehand; where its steps do not depend on the data, wrap it as "
            "fn(model, x, sigmas)"
        )
    if len(first) < 3:
        raise TypeError(f"{name} must take (model, x, sigmas, ...), got ({', '.join(parameters)})")
    ours = ("extra_args", "callback", "disable")
    if given := [option for option in options if option in ours]:
        raise TypeError(f"`{given[0]}` must be left out: the import gives {name} its own")
    if unknown := [option for option in options if option not in parameters and not anything]:
        own = [parameter for parameter in list(parameters)[3:] if parameter not in ours]
        raise TypeError(f"`{unknown[0]}` is no option of {name}, which takes {', '.join(own) or 'none'}")
    return {key for key in _PASSED if key in parameters or (anything and key != "noise_sampler")}


def _call(
    takes: set[str],
    options: dict[str, Any],
    shape: tuple[int, ...],
    callback: Callable[..., None] = lambda *_: None,
) -> dict[str, Any]:
    """The keyword arguments of one call."""

    path = BrownianPath(lambda: torch.randn(shape, dtype=torch.float64))
    passed = {"extra_args": {}, "callback": callback, "disable": True, "noise_sampler": path}
    return {**{key: value for key, value in passed.items() if key in takes}, **options}
