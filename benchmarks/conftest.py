"""What the benchmarks share: every result is kept, and shows in pytest-benchmark's table as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.record import Comparison, Quantity, save


@pytest.fixture
def keep() -> Callable[[Comparison | Quantity], None]:
    """Write a result into benchmarks/results."""
    return save


@pytest.fixture
def measured(benchmark: Any) -> Callable[[Comparison, Callable[[], Any]], None]:
    """Keep a comparison; pytest-benchmark times our variant once more, alone, for its own history."""

    def keep_and_show(result: Comparison, ours: Callable[[], Any]) -> None:
        save(result)
        benchmark.extra_info |= {f"speed-up over {result.baseline}": result.speed_ups}
        benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

    return keep_and_show
