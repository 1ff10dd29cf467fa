"""What several commands read from their options: classes, devices, numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

_Number = TypeVar("_Number", int, float)


def labels(chosen: str | None, num: int, num_classes: int) -> Any:
    """[num] classes: the chosen ones, or all, in equal runs; None for a network without classes."""
    import torch

    if not num_classes:
        if chosen is not None:
            raise ValueError(
                f"`--class` is for networks with classes, this one has none, got {chosen!r}; leave it out"
            )
        return None
    try:
        classes = list(range(num_classes)) if chosen is None else [int(part) for part in chosen.split(",")]
    except ValueError:
        raise ValueError(f"`--class` must be numbers such as 7 or 3,7, got {chosen!r}") from None
    if outside := [c for c in classes if not 0 <= c < num_classes]:
        raise ValueError(f"`--class` must be in 0..{num_classes - 1}, got {outside[0]}")
    return torch.tensor([classes[i * len(classes) // num] for i in range(num)])


def device(chosen: str | None) -> Any:
    """The chosen device, or a GPU if there is one, else the CPU; each of torchrun's processes its own GPU.

    Raises:
        ValueError: it does not exist here.
    """
    import torch

    if chosen is None:
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and "LOCAL_RANK" in os.environ:
        chosen = f"cuda:{os.environ['LOCAL_RANK']}"  # torchrun's processes share the machine's GPUs out
    try:
        return torch.zeros(1, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there = ", ".join(["cpu", *gpus, *["mps"] * torch.backends.mps.is_available()])
        raise ValueError(f"`--device` must be one of {there} here, got {chosen!r}") from error


def numbers(option: str, text: str, kind: Callable[[str], _Number] = int) -> list[_Number]:  # type: ignore[assignment]
    """`1,2` -> [1, 2]; of `kind`, int or float."""
    try:
        return [kind(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"`{option}` must be numbers such as 1,2, got {text!r}") from None
