"""Timing variants of one task against each other on a machine that does other things as well."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    rounds: int,
    least_seconds: float = 0.02,
    settle: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of one call of each variant, round by round.

    A round times every variant once, in an order that turns from round to round, so that whatever else the
    machine does meets all of them.

    Args:
        variants: functions without arguments, by label.
        rounds: how often each is timed.
        least_seconds: a timing repeats a faster call until it takes this long.
        settle: waits for a device at both ends of a timing, which so holds its work and not its queue.
    """
    repeats = {label: _repeats(run, least_seconds, settle) for label, run in variants.items()}
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    labels = list(variants)
    for i in range(rounds):
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(_time(variants[label], repeats[label], settle))
    return seconds


def _time(run: Callable[[], Any], repeats: int, settle: Callable[[], Any]) -> float:
    """Seconds of one call, over `repeats` calls."""
    settle()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    settle()
    return (time.perf_counter() - start) / repeats


def _repeats(run: Callable[[], Any], least_seconds: float, settle: Callable[[], Any]) -> int:
    """How many calls take `least_seconds`, after one call that warms up."""
    run()
    return max(1, round(least_seconds / max(_time(run, 1, settle), 1e-9)))
