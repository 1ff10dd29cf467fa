"""Which of a schedule's T times a chain visits."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fastdiff.schedule import check_count

SPACINGS = ("ddpm", "leading", "trailing", "linspace")


def space_timesteps(
    num_timesteps: int, steps: int | str, spacing: str = "ddpm", offset: int = 0
) -> list[int]:
    """A subsequence of a schedule's T times, ascending.

        ddpm      round(i (T-1)/(n-1)), i = 0..n-1: both ends included; n = 1: T-1    (Nichol & Dhariwal 2021)
        leading   i (T // n) + offset                       (Song 2020; Stable Diffusion has offset 1)
        trailing  round(T (n-i)/n) - 1: the last time is always there            (Lin et al. 2023)
        linspace  round(i (T-1)/(n-1)), by diffusers' own arithmetic

    Args:
        num_timesteps: T.
        steps: n; or "10,15,20": T cut into equal sections with so many "ddpm" steps each; or "ddim50": the
            smallest integer stride from 0 that makes 50 steps.
        spacing: how n steps are placed; strings are placed by "ddpm".
        offset: added to "leading" times; >= 0.
    Raises:
        ValueError: n < 1 or n > T, an unknown spacing, a stride that does not exist, a time out of range.
        TypeError: a count that is no integer.
    Source: Nichol & Dhariwal 2021, sec. 4; Song et al. 2020 (arXiv 2010.02502), app. D.2; Lin et al. 2023
        (arXiv 2305.08891), table 2.
    """
    total = check_count("num_timesteps", num_timesteps)
    if spacing not in SPACINGS:
        raise ValueError(f"`spacing` must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if isinstance(offset, bool) or not isinstance(offset, int | np.integer) or offset < 0:
        raise ValueError(f"`offset` must be an integer >= 0, got {offset!r}")
    if offset and spacing != "leading":
        raise ValueError(
            f"`offset` belongs to spacing 'leading', got offset={offset} with spacing={spacing!r}"
        )
    if isinstance(steps, str):
        if spacing != "ddpm":
            raise ValueError(
                f"`steps` as a string needs spacing 'ddpm', got {steps!r} with spacing={spacing!r}"
            )
        return _sections(total, steps)
    n = check_count("steps", steps)
    if n > total:
        raise ValueError(f"`steps` must be at most the schedule's {total} timesteps, got {n}")
    if spacing == "ddpm":
        return _spread(total, n) if n > 1 else [total - 1]  # one step goes from noise, not from time 0
    if spacing == "leading":
        times = [i * (total // n) + int(offset) for i in range(n)]
        if times[-1] >= total:
            raise ValueError(
                f"`offset` must keep the last time below {total}, got {offset}, which makes {times[-1]}"
            )
        return times
    if spacing == "trailing":
        # Half to even of the exact quotient: the float quotient falls on either side of a half.
        return [round(Fraction(total * (n - i), n)) - 1 for i in reversed(range(n))]
    return [int(t) for t in np.linspace(0, total - 1, n).round()]


def _spread(size: int, n: int) -> list[int]:
    """n of `size` times with both ends; the stride is summed in floats, as guided-diffusion sums it."""
    stride = (size - 1) / (n - 1) if n > 1 else 1.0
    times, now = [], 0.0
    for _ in range(n):
        times.append(round(now))
        now += stride
    return times


def _sections(total: int, steps: str) -> list[int]:
    if steps.startswith("ddim"):
        n = _parse(steps[4:], steps)
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == n:
                return list(range(0, total, stride))
        raise ValueError(
            f"`steps` {steps!r}: no integer stride makes {n} steps of {total}; give {n} as a number"
        )
    counts = [_parse(part, steps) for part in steps.split(",")]
    size, extra = divmod(total, len(counts))
    times, start = [], 0
    for i, n in enumerate(counts):
        width = size + (i < extra)
        if n > width:
            raise ValueError(
                f"`steps` {steps!r}: section {i} has only {width} of the {total} timesteps, got {n}"
            )
        times += [start + t for t in _spread(width, n)]
        start += width
    return times


def _parse(part: str, steps: str) -> int:
    if not part.strip().isdecimal() or int(part) < 1:
        raise ValueError(f"`steps` must be a number, counts like '10,15,20' or 'ddim50', got {steps!r}")
    return int(part)
