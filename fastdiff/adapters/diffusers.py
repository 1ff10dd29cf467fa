"""Schedulers of Hugging Face diffusers, imported as sampling tables by running their own code."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdiff.adapters.basis import Basis, Refused, Tape
from fastdiff.adapters.brownian import BrownianPath
from fastdiff.adapters.conventions import (
    config_of,
    exempt_moments,
    first_row,
    is_inner_stage,
    levels_of,
    threshold_of,
    times_of,
    x0_columns,
)
from fastdiff.adapters.recording import (
    LEARNED_VALUES,
    Heads,
    Numbers,
    ProbeNetwork,
    compile_tapes,
    confirm,
    warn_of_misses,
)
from fastdiff.table import SamplingTable

__all__ = ["SchedulerReport", "import_scheduler", "survey"]


def import_scheduler(
    scheduler: Any,
    num_inference_steps: int | None = None,
    set_timesteps_kwargs: Mapping[str, Any] | None = None,
    **step_kwargs: Any,
) -> SamplingTable:
    """The sampling table of a diffusers scheduler, read off by running its own `step` on a basis.

    A copy runs; the scheduler itself stays as it was. The table has a row for each evaluation of the network
    and the fewest registers; a clamp of x0, or dynamic thresholding, becomes its clip, a learned range its
    log_var columns. Before it is returned the scheduler's own code has run once on random numbers and gone
    through the same states. Where a scheduler keeps no noise levels that are known, alpha is 1 and sigma 0
    throughout, and both are `exempt`. The increments of a Brownian tree keep the law that they have there,
    overlaps included.

    Args:
        scheduler: any diffusers scheduler, or an object with its `step`, `timesteps` and `config`.
        num_inference_steps: passed to `set_timesteps`; None, and no kwargs: the timesteps are set already.
        set_timesteps_kwargs: further arguments of `set_timesteps`, e.g. {"sigmas": [...]} or {"mu": 0.8}.
        **step_kwargs: further arguments of `step`, e.g. eta=1.0.
    Raises:
        ValueError: what cannot be a table, with the row and the operation: not linear, a learned variance
            that is no log variance, coefficients that are not finite.
        TypeError: `scheduler` has no `step`, or takes other arguments than (model_output, timestep, sample).
    Warns:
        UserWarning: the table misses the marginals of the scheduler's own levels by more than 1e-5.
    Source: the scheduler's own code.
    """
    name = type(scheduler).__name__
    _require_scheduler(scheduler, step_kwargs)
    ready = _prepared(scheduler, num_inference_steps, dict(set_timesteps_kwargs or {}))
    variance_type = config_of(ready, "variance_type")
    if variance_type == "learned" and hasattr(ready, "_get_variance"):
        raise Refused(
            f"{name} cannot be imported: it takes `variance_type='learned'` as a variance, where networks "
            "are trained to predict its logarithm; use 'learned_range', or compile_table('ddpm', "
            "variance='learned')"
        )
    learned = variance_type in ("learned", "learned_range")
    walks = [_on_basis(ready, name, v, step_kwargs) for v in (LEARNED_VALUES if learned else (None,))]
    table, weights = compile_tapes([walk.tape for walk in walks], _heads(ready, walks[0], step_kwargs))

    def run(network: ProbeNetwork, numbers: Numbers, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        theirs = copy.deepcopy(ready)

        def evaluate(x: torch.Tensor, t: torch.Tensor, row: int) -> torch.Tensor:
            numbers.evaluate()
            return network(_scaled(theirs, x, t), t)

        with numbers:
            return x, _walk(theirs, x.clone(), evaluate, step_kwargs)

    confirm(table, weights, run, rounds=walks[0].tape.rounds)
    warn_of_misses(table)
    return table


@dataclass
class _Recorded:
    """One run on a basis: c_in and what is known of x0 (NaN: nothing) for each row, and where steps end."""

    tape: Tape
    c_in: list[float]
    x0: list[tuple[float, float]]
    ends_step: list[bool]


def _on_basis(ready: Any, name: str, learned: float | None, step_kwargs: Mapping[str, Any]) -> _Recorded:
    """Run a copy of the scheduler on a basis."""
    scheduler = copy.deepcopy(ready)
    tape = Tape(name, learned)
    record = _Recorded(tape, [], [], [])
    if hasattr(scheduler, "_threshold_sample"):
        scheduler._threshold_sample = lambda x0: tape.clip(x0, threshold_of(scheduler))

    def evaluate(x: torch.Tensor, t: torch.Tensor, row: int) -> torch.Tensor:
        out = tape.evaluate(x)
        coords = tape.coordinates(_scaled(scheduler, x, t))
        if coords[1:].any():
            tape.refuse("`scale_model_input` makes the network's input of more than the sample")
        record.c_in.append(float(coords[0]))
        record.x0.append((np.nan, np.nan))
        if hasattr(scheduler, "precondition_outputs"):
            denoised = scheduler.precondition_outputs(x, out, scheduler.sigmas[first_row(scheduler) + row])
            _note_x0(record, denoised)
        return out

    def after(x0: Any) -> None:
        _note_x0(record, x0)
        record.ends_step.append(not is_inner_stage(scheduler))

    try:
        with tape:
            tape.close(_walk(scheduler, tape.unit("x"), evaluate, step_kwargs, after))
    except Refused:
        raise
    except Exception as error:  # whatever a stranger's code raises
        tape.refuse(f"`step` fails with {type(error).__name__}: {error}")
    return record


def _walk(
    scheduler: Any,
    x: torch.Tensor,
    evaluate: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    step_kwargs: Mapping[str, Any],
    after: Callable[[Any], None] = lambda x0: None,
) -> torch.Tensor:
    """The loop that a pipeline runs: evaluate(x, t, row) -> out, then the scheduler's step."""
    takes = inspect.signature(scheduler.step).parameters
    times = times_of(scheduler)
    shape, x0 = x.shape, None
    if hasattr(scheduler, "noise_sampler"):  # in place of a Brownian tree, which draws by itself
        scheduler.noise_sampler = BrownianPath(lambda: torch.randn(shape, dtype=torch.float64))
    for row, t in enumerate(times):
        out = evaluate(x, t, row)
        extra = dict(step_kwargs)
        if "old_pred_original_sample" in takes:  # CogVideoX's pipelines hand it on themselves
            extra |= {"old_pred_original_sample": x0, "timestep_back": times[row - 1] if row else None}
        if "prev_timestep" in takes and row + 1 < len(times):  # and unCLIP's the next time
            extra.setdefault("prev_timestep", times[row + 1])
        result = scheduler.step(model_output=out, timestep=t, sample=x, **extra)
        x, x0 = result if isinstance(result, tuple) else (result.prev_sample, _x0_of(result))
        after(x0)
    return x


def _x0_of(result: Any) -> Any:
    return getattr(result, "pred_original_sample", None)


def _note_x0(record: _Recorded, x0: Any) -> None:
    """Keep the scheduler's own x0 of this row, if it is made of x and the output alone."""
    if isinstance(x0, Basis):
        coords = record.tape.coordinates(x0)
        if coords[1] and not coords[2:].any():
            record.x0[-1] = (float(coords[0]), float(coords[1]))


def _heads(scheduler: Any, record: _Recorded, step_kwargs: Mapping[str, Any]) -> Heads:
    """The columns beside the coefficients."""
    times = times_of(scheduler)
    levels = levels_of(scheduler, times)
    alpha, sigma = levels or (np.ones(len(times) + 1), np.zeros(len(times) + 1))
    px, po = np.array(record.x0, np.float64).T
    formula = x0_columns(scheduler, alpha[:-1], sigma[:-1]) if levels else (px, po)
    unknown = ~np.isfinite(px)
    init_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
    if levels and getattr(scheduler, "begin_index", None) and alpha[0] == 1.0:
        init_scale = float(sigma[0])  # where the scheduler's own is that of its noisiest level
    return Heads(
        t=np.array([float(t) for t in times]),
        c_in=np.array(record.c_in),
        x0_from_x=np.where(unknown, formula[0], px),
        x0_from_out=np.where(unknown, formula[1], po),
        alpha=alpha,
        sigma=sigma,
        ends_step=np.array([*record.ends_step[:-1], True]),
        init_scale=init_scale,
        exempt=exempt_moments(scheduler, step_kwargs) if levels else ("mean", "noise"),
    )


def _require_scheduler(scheduler: Any, step_kwargs: Mapping[str, Any]) -> None:
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise TypeError(f"`scheduler` must be an instance, got the class {name}; give {name}()")
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"`scheduler` must have `step` and `timesteps`, as diffusers' have, got {name}")
    parameters = inspect.signature(scheduler.step).parameters
    known = {"model_output", "timestep", "sample"}
    handled = known | {"old_pred_original_sample", "timestep_back"} | set(step_kwargs)
    needed = {
        key
        for key, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    if not known <= set(parameters) or not needed <= handled:
        raise TypeError(
            f"{name} cannot be imported: its `step` takes ({', '.join(parameters)}), and a chain has only "
            "(model_output, timestep, sample) to give; pass what is fixed as keyword arguments"
        )
    if "generator" in step_kwargs:
        raise ValueError("`generator` cannot be imported: a table's noise is given by seed, sample and row")
    unknown = [key for key in step_kwargs if key not in parameters]
    if unknown:
        raise TypeError(f"`{unknown[0]}` is no argument of {name}.step, which takes {', '.join(parameters)}")


def _prepared(scheduler: Any, num_inference_steps: int | None, kwargs: dict[str, Any]) -> Any:
    """A copy on the CPU with its timesteps set."""
    name = type(scheduler).__name__
    ready = copy.deepcopy(scheduler)
    if num_inference_steps is not None or kwargs:
        if num_inference_steps is not None:
            kwargs["num_inference_steps"] = num_inference_steps
        try:
            ready.set_timesteps(**kwargs)
        except Exception as error:  # whatever a stranger's code raises
            raise Refused(
                f"{name} cannot be imported: its set_timesteps fails with {type(error).__name__}: {error}"
            ) from error
    elif getattr(ready, "_step_index", None) is not None or getattr(ready, "counter", None):
        raise ValueError(
            f"`scheduler` ({name}) is in the middle of a chain; say `num_inference_steps`, or call its "
            "set_timesteps first"
        )
    for key, value in vars(ready).items():
        if isinstance(value, torch.Tensor):
            setattr(ready, key, value.cpu())
    if hasattr(ready, "get_lms_coefficient"):  # by quadrature, most of an import's time
        ready.get_lms_coefficient = _once(ready.get_lms_coefficient)
    if not isinstance(getattr(ready, "timesteps", None), torch.Tensor) or not len(ready.timesteps):
        raise ValueError(f"`scheduler` ({name}) has no timesteps; say `num_inference_steps`")
    return ready


def _once(function: Callable[..., float]) -> Callable[..., float]:
    """A function of numbers, called once for each for all runs, and out of their sight."""

    @functools.cache
    def result(*args: Any) -> float:
        with torch._C.DisableTorchFunction():
            return function(*args)

    return result


def _scaled(scheduler: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


# what the survey passes to constructors and `set_timesteps` that need something
_SURVEYED: dict[str, tuple[dict[str, Any], int]] = {
    "AmusedScheduler": ({"mask_token_id": 0}, 10),
    "ConsistencyDecoderScheduler": ({}, 2),
    "HeliosDMDScheduler": ({"stages": 1}, 10),
    "HeliosScheduler": ({"stages": 1}, 10),
    "RFD4ProteinaScheduler": (
        {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
        10,
    ),
    "SCMScheduler": ({}, 2),
    "VQDiffusionScheduler": ({"num_vec_classes": 8}, 10),
}


@dataclass(frozen=True)
class SchedulerReport:
    """What became of one scheduler class.

    Attributes:
        name: the class.
        outcome: "imported" or "refused".
        rows, registers: of its table; None where it is refused.
        reason: why it is refused, or what its self-check says ("" where nothing).
    """

    name: str
    outcome: str
    rows: int | None
    registers: int | None
    reason: str


def survey() -> list[SchedulerReport]:
    """Import every scheduler class of the installed diffusers, as its defaults make it, with 10 steps.

    Returns:
        One report for each class, by name.
    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import schedulers

    return [_report(name, schedulers) for name in sorted(dir(schedulers)) if name.endswith("Scheduler")]


def _report(name: str, schedulers: Any) -> SchedulerReport:
    arguments, steps = _SURVEYED.get(name, ({}, 10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            table = import_scheduler(getattr(schedulers, name)(**arguments), steps)
        except Exception as error:  # whatever a stranger's code raises is its reason
            reason = " ".join(str(error).split())
            if "cannot be imported" not in reason:
                reason = f"{type(error).__name__}: {reason}"
            return SchedulerReport(name, "refused", None, None, reason)
    misses = [str(w.message) for w in caught if "imported as it is" in str(w.message)]
    return SchedulerReport(name, "imported", table.num_rows, table.registers, misses[0] if misses else "")
