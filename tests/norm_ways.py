"""The ways to group_norm_silu's result on a CPU, for tests that take each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fastdiff import _norm
from fastdiff.kernels import _torch_ops

WAYS = ("operator", "direct", "torch")


def go(way: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Send what follows one way; what is returned collects whether each call took it."""
    taken: list[bool] = []
    native = _torch_ops.operators(wait=True) or pytest.skip("needs a C++ compiler")

    def counting(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any) -> Any:
            done = run(*operands)
            taken.append(done is not None)
            return done

        return call

    if way == "operator":
        monkeypatch.setattr(_norm, "_by_short_way", counting(lambda operands: None))
    if way == "direct":
        direct = native._replace(group_norm_silu=counting(native.group_norm_silu))
        monkeypatch.setattr(_torch_ops.library, "loaded", direct)
    if way == "torch":
        monkeypatch.setattr(_torch_ops.library, "loaded", None)
        monkeypatch.setenv("FASTDIFF_NATIVE", "0")
        monkeypatch.setattr(_norm, "_by_torch", counting(_norm._by_torch))
    return taken
