"""Checkpoints of a run: safetensors files with everything that the next step needs, and nothing executable.

Batches, times, noise and dropout are functions of (seed, step), so weights, averaged weights, the optimiser's
moments and the step are the whole state. A checkpoint is one file, written atomically: whole or not there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.files import load_tensors, save_tensors

FORMAT = 1

_NAME = re.compile(r"step-\d{8,}\.safetensors")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.[0-9a-f]+\.safetensors")  # as `atomic_path` names them


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step-{step:08d}.safetensors"


def checkpoint_step(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.stem.removeprefix("step-"))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; temporary and foreign files are passed over."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=checkpoint_step)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        path.unlink()


def remove_temporaries(folder: Path) -> None:
    """Delete what killed writers left: each may be as large as a checkpoint."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink()


def save_checkpoint(
    path: Path, model: nn.Module, ema: Any, optimizer: torch.optim.Optimizer, step: int, seconds: float
) -> None:
    """Write the state after `step` steps, of which training took `seconds`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    tensors: dict[str, Tensor] = {}
    # What is no tensor (an EMA's count, say) goes to the JSON, which keeps numbers exactly.
    numbers: dict[str, Any] = {}
    _flatten(
        {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": moments}, "", tensors, numbers
    )
    about = {"format": FORMAT, "step": step, "seconds": seconds, "numbers": numbers}
    save_tensors(path, tensors, {"fastdiff": json.dumps(about)})


def load_checkpoint(
    path: Path, model: nn.Module, ema: Any, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put a checkpoint's state into model, EMA and optimiser, bit for bit; return (step, seconds).

    Raises:
        ValueError: the file is truncated, of another format, or of another network; nothing was changed
            unless the networks differ.
    """
    tensors, metadata = load_tensors(path)
    try:
        about = json.loads(metadata["fastdiff"])
        kind = about["format"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{str(path)!r} is no checkpoint of a training run; remove it to go on without it"
        ) from None
    if kind != FORMAT:
        raise ValueError(
            f"{str(path)!r} has the format {kind}, this version reads {FORMAT}; use the one that wrote it"
        )
    state = _unflatten(tensors, about["numbers"])
    parameters = dict(model.named_parameters())
    _check_same(path, parameters, state["optimizer"], model.state_dict(), state["model"])
    model.load_state_dict(state["model"])
    ema.load_state_dict(state["ema"])
    moments = {
        i: {key: _laid_out_as(parameter, value) for key, value in state["optimizer"][name].items()}
        for i, (name, parameter) in enumerate(parameters.items())
        if name in state["optimizer"]
    }
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return about["step"], about["seconds"]


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A moment with the strides of its parameter; the file keeps none.

    The fused AdamW pairs the two by their place in memory: with other strides it updates the wrong weights.
    """
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_same(
    path: Path,
    names: Mapping[str, Any],
    moments: Mapping[str, Any],
    now: Mapping[str, Tensor],
    then: Mapping[str, Tensor],
) -> None:
    differing = sorted((now.keys() ^ then.keys()) | (moments.keys() - names.keys()))
    differing += [name for name in now.keys() & then.keys() if now[name].shape != then[name].shape]
    if differing:
        raise ValueError(
            f"`model` must be the network of {str(path)!r}, but these entries are missing, extra or of"
            f" another shape: {', '.join(differing[:8])}{' ...' if differing[8:] else ''}; build it with the"
            " same arguments"
        )


def _flatten(node: Any, path: str, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            # A slash parts the levels: names of parameters contain dots.
            _flatten(value, f"{path}/{key}" if path else str(key), tensors, numbers)
    elif isinstance(node, Tensor):
        tensors[path] = node
    else:
        numbers[path] = node  # an empty mapping as well, which would leave no trace otherwise


def _unflatten(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {"model": {}, "ema": {}, "optimizer": {}}
    for path, value in [*tensors.items(), *numbers.items()]:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
