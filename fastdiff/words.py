"""What the command line's words stand for: schedules, levels and a solver's options by name."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Sequence
from typing import Any

from fastdiff.levels import NoiseLevels
from fastdiff.schedule import NoiseSchedule
from fastdiff.spacing import space_timesteps

SCHEDULES = ("linear", "cosine", "scaled_linear", "sigmoid")
_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
FORMULAS = ("karras", "exponential", "polyexponential", "vp", "flow")


def schedule(name: str, timesteps: int, zero_snr: bool = False) -> NoiseSchedule:
    """The schedule of a name with its usual numbers, rescaled to end without signal if wanted.

    The betas of "linear" and "scaled_linear" were chosen for 1000 steps; they are multiplied by
    1000 / timesteps (up to 0.999), so that a chain of any length ends in as much noise.

    Raises:
        ValueError: an unknown name.
    Source: Nichol & Dhariwal 2021's code (the factor).
    """
    if name not in SCHEDULES:
        raise ValueError(f"`--schedule` must be one of {', '.join(SCHEDULES)}, got {name!r}")
    betas = {}
    if name in _BETAS and timesteps != 1000:
        start, end = (min(beta * 1000 / timesteps, 0.999) for beta in _BETAS[name])
        betas = {"beta_start": start, "beta_end": end}
    made: NoiseSchedule = getattr(NoiseSchedule, name)(timesteps, **betas)
    return made.rescale_zero_terminal_snr() if zero_snr else made


def levels(kind: str, schedule: NoiseSchedule, steps: str, spacing: str) -> NoiseLevels:
    """The levels of a chain: "schedule", at the schedule's own steps, or by a formula over its range.

    Args:
        steps: a number, or for "schedule" what `space_timesteps` takes.
        spacing: of "schedule".
    Raises:
        ValueError: an unknown kind, or steps that it does not take.
    """
    if kind == "schedule":
        wanted = int(steps) if steps.isdecimal() else steps
        return NoiseLevels.from_schedule(schedule, space_timesteps(len(schedule), wanted, spacing=spacing))
    if kind not in FORMULAS:
        raise ValueError(f"`--levels` must be one of schedule, {', '.join(FORMULAS)}, got {kind!r}")
    if not steps.isdecimal():
        raise ValueError(f"`--steps` must be a number with `--levels {kind}`, got {steps!r}")
    if kind == "flow":
        return NoiseLevels.flow(int(steps))
    made: NoiseLevels = getattr(NoiseLevels, kind)(int(steps), schedule=schedule)
    return made


def options(given: Sequence[str]) -> dict[str, Any]:
    """`order=2`, `solver_type=heun` -> keyword arguments; values are JSON, numbers or Python, else text.

    Raises:
        ValueError: no name, no equals sign or no value.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"`--option` must be name=value, such as order=2, got {text!r}")
        found[name] = _read(value)
    return found


def _read(value: str) -> Any:
    readers: tuple[Callable[[str], Any], ...] = (json.loads, float, ast.literal_eval)  # false, inf, False
    for reader in readers:
        try:
            return reader(value)
        except (ValueError, SyntaxError, TypeError):  # TypeError: {[]: 1}
            continue
    return value
