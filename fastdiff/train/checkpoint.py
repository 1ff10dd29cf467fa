"""Checkpoints of a run: safetensors files with everything that the next step needs, and nothing executable.

Batches, times, noise and dropout are functions of (seed, step), so weights, averaged weights, the
optimiser's moments, what the choice of times has learnt and the step are the whole state. A checkpoint is one
file, written atomically, whole or not there, with a checksum: a disk that spoils it later is noticed as well.
"""

from __future__ import annotations

import json
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.files import load_tensors, save_tensors

FORMAT = 2

_PARTS = ("model", "ema", "optimizer", "times")
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
    path: Path,
    model: nn.Module,
    emas: Sequence[Any],
    optimizer: Any,
    times: Any,
    step: int,
    seconds: float,
) -> None:
    """Write the state after `step` steps, of which training took `seconds`.

    Raises:
        OSError: it could not be written (a full disk); the checkpoints that were there are untouched.
    """
    averages = {str(i): ema.state_dict() for i, ema in enumerate(emas)}
    state = dict(
        zip(_PARTS, (model.state_dict(), averages, optimizer.state_dict(), times.state_dict()), strict=True)
    )
    tensors: dict[str, Tensor] = {}
    # What is no tensor (an EMA's count, say) goes to the JSON, which keeps numbers exactly.
    numbers: dict[str, Any] = {}
    _flatten(state, "", tensors, numbers)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = {"format": FORMAT, "step": step, "seconds": seconds, "crc32": _crc32(tensors), "numbers": numbers}
    try:
        save_tensors(path, tensors, {"fastdiff": json.dumps(about)})
    except OSError as error:
        before = [other.name for other in checkpoints(path.parent)]
        left = f"the last whole one is {before[-1]}" if before else "there is none before it"
        raise OSError(
            error.errno,
            f"the checkpoint of step {step} could not be written ({error.strerror or error}); {left}:"
            " make room and go on with resume=True",
            str(path),
        ) from error


def last_whole(folder: Path) -> Path | None:
    """The last checkpoint that can be read, or None if there is none at all.

    A damaged one is set aside as `step-....damaged`, with a warning, and the one before it is taken.

    Raises:
        ValueError: there are checkpoints, and all are damaged, or the last is of another format.
    """
    damaged = []
    for path in reversed(checkpoints(folder)):
        try:
            _read(path)
        except Damaged as error:
            damaged.append(str(error))
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            warnings.warn(
                f"{error}; it is set aside as {aside.name!r} and the checkpoint before it is taken",
                stacklevel=2,
            )
        else:
            return path
    if damaged:
        raise ValueError(
            f"`resume` needs a checkpoint that can be read, but all in {str(folder)!r} are damaged:"
            f" {'; '.join(damaged)}; start the run again in another folder"
        )
    return None


class Damaged(ValueError):
    """A checkpoint that no longer holds what was written."""


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and the JSON beside them.

    Raises:
        Damaged: the file is cut off, changed or no checkpoint.
        ValueError: its format is another version's.
    """
    try:
        tensors, metadata = load_tensors(path)
        about = json.loads(metadata["fastdiff"])
        kind, crc32 = about["format"], about.get("crc32")
    except (KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{str(path)!r} is no checkpoint or damaged: {error}") from None
    if kind != FORMAT:
        raise ValueError(
            f"{str(path)!r} has the format {kind}, this version reads {FORMAT}; use the one that wrote it"
        )
    if crc32 != _crc32(tensors):
        raise Damaged(f"{str(path)!r} is damaged: its checksum is not that of what it holds")
    return tensors, about


def _crc32(tensors: Mapping[str, Tensor]) -> int:
    """The checksum of all names and bytes, in the order of the names."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(
            tensors[name].flatten().view(torch.uint8).numpy().data, zlib.crc32(name.encode(), value)
        )
    return value


def restore(
    path: Path, model: nn.Module, emas: Sequence[Any], optimizer: Any, times: Any
) -> tuple[int, float]:
    """Put a checkpoint's state into all of these, bit for bit; return (step, seconds).

    Raises:
        ValueError: the file is damaged, of another format, or of another network; nothing was changed.
    """
    tensors, about = _read(path)
    state = _unflatten(tensors, about["numbers"])
    parameters = dict(model.named_parameters())
    _check_same(path, parameters, state["optimizer"], model.state_dict(), state["model"])
    model.load_state_dict(state["model"])
    for i, ema in enumerate(emas):
        ema.load_state_dict(state["ema"][str(i)])
    times.load_state_dict(state["times"])
    optimizer.load_state_dict(state["optimizer"])
    return about["step"], about["seconds"]


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
    tree: dict[str, Any] = {part: {} for part in _PARTS}
    for path, value in [*tensors.items(), *numbers.items()]:
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
