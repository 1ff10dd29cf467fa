"""Checks of arguments, and the noise's key from what users say."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def noise_key(
    seed: int | Sequence[int] | torch.Tensor,
    sample_ids: Sequence[int] | torch.Tensor | int,
    batch: int | None,
    device: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The noise's key of each sample, as the operators take it: seed [B] int64, sample_id [B] int64.

    Args:
        seed: an int of 64 bits for all, or [B] of them.
        sample_ids: [B] ints in [0, 2^32), or B for 0..B-1. Of a tensor, which may lie on a device or in a
            traced graph and is not looked into, the low 32 bits count.
        batch: how many there must be; None: as many as `sample_ids` names.
        device: where both go.

    Raises:
        ValueError: a seed outside 64 bits, an id outside 32 bits, or another number of them than `batch`.
        TypeError: something that is not whole numbers.
    """
    if not isinstance(sample_ids, torch.Tensor | Sequence) and hasattr(sample_ids, "__index__"):
        sample_ids = operator.index(sample_ids)
    if isinstance(sample_ids, int):
        if isinstance(sample_ids, bool) or sample_ids < 0:
            raise ValueError(f"`sample_ids` must be a number of at least 0, or ids, got {sample_ids}")
        ids = torch.arange(sample_ids, dtype=torch.int64, device=device)
    elif isinstance(sample_ids, torch.Tensor):
        if sample_ids.is_floating_point():
            raise TypeError(f"`sample_ids` must be int64, got {sample_ids.dtype}")
        ids = sample_ids.to(device=device, dtype=torch.int64).contiguous()
    else:
        listed = [_whole("sample_ids", i) for i in sample_ids]
        if outside := [i for i in listed if not 0 <= i < 2**32]:
            raise ValueError(f"`sample_ids` must be in [0, 2^32), got {outside[0]}")
        ids = torch.tensor(listed, dtype=torch.int64, device=device)
    if ids.dim() != 1 or (batch is not None and ids.shape[0] != batch):
        wanted = "B" if batch is None else batch
        raise ValueError(f"`sample_ids` must be [{wanted}], got shape {tuple(ids.shape)}")
    if isinstance(seed, torch.Tensor):
        return integers("seed", seed, ids.shape[0], ids.device), ids
    if not isinstance(seed, Sequence):
        return torch.full_like(ids, _seed(seed)), ids
    seeds = [_seed(s) for s in seed]
    if len(seeds) != ids.shape[0]:
        raise ValueError(
            f"`seed` must be one number or one for each of {ids.shape[0]} samples, got {len(seeds)}"
        )
    return torch.tensor(seeds, dtype=torch.int64, device=device), ids


def _seed(value: Any) -> int:
    """64 bits as a signed number, as int64 holds them."""
    seed = _whole("seed", value)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must fit 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed


def integers(name: str, value: int | torch.Tensor, batch: int, device: torch.device) -> torch.Tensor:
    """[B] int64 from one integer of 32 bits or one per sample."""
    if isinstance(value, torch.Tensor):
        if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != batch) or value.is_floating_point():
            raise ValueError(
                f"`{name}` must be an int or [{batch}] int64, got {tuple(value.shape)} {value.dtype}"
            )
        return value.to(device=device, dtype=torch.int64).expand(batch).contiguous()
    value = _whole(name, value)
    if not 0 <= value < 2**32:
        raise ValueError(f"`{name}` must be in [0, 2^32), got {value}")
    return torch.full((batch,), value, dtype=torch.int64, device=device)


def require(
    name: str,
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    shape: tuple[int | None, ...] | None = None,
    dense: bool = False,
    remedy: str = "",
) -> None:
    """Refuse a tensor that breaks the contract, with what it is and what it should be."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
    fits = (
        (dtype is None or tensor.dtype == dtype)
        and (device is None or tensor.device == device)
        and (shape is None or _same_shape(shape, tensor.shape))
        and (not dense or tensor.is_contiguous())
    )
    if not fits:
        shown = shape and "[" + ", ".join("any" if a is None else str(a) for a in shape) + "]"
        wanted = [str(a) for a in (dtype, shown) if a is not None] + ["dense"] * dense
        wanted.append(f"on {device or tensor.device}")
        dense_or_not = "" if tensor.is_contiguous() else " not dense"
        raise ValueError(
            f"`{name}` must be {' '.join(wanted)}, got {tensor.dtype} {list(tensor.shape)}{dense_or_not} "
            f"on {tensor.device}{remedy and '; ' + remedy}"
        )


_KINDS: dict[str, tuple[str, Any, Callable[[Any], Any]]] = {
    "bool": ("True or False", bool | np.bool_, bool),
    "int": ("a whole number", numbers.Integral, int),
    "float": ("a number", numbers.Real, float),
    "str": ("a string", str, str),
}


def as_kind(name: str, value: Any, kind: str, default: Any) -> Any:
    """`value` as Python's own `kind`, one of `_KINDS`: a narrower float rounds all that is computed from it.

    Args:
        default: named in the message; a float may be infinite if this is, None is no default.
    Raises:
        TypeError: another kind of value.
        ValueError: a float that is no number, or infinite.
    """
    words, types, convert = _KINDS[kind]
    usual = "" if default is None else f", {default!r} by default"
    if not isinstance(value, types) or (isinstance(value, bool) and kind != "bool"):
        raise TypeError(f"`{name}` must be {words}{usual}, got {value!r} ({type(value).__name__})")
    try:
        found = convert(value)
    except OverflowError:  # an int beyond any float
        found = math.inf
    if kind == "float" and not (math.isfinite(found) or found == default):
        raise ValueError(f"`{name}` must be a finite number{usual}, got {found}")
    return found


def at_least_zero(**values: float) -> None:
    """Refuse a negative number, with its name."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must be >= 0, got {value}")


def _same_shape(wanted: tuple[int | None, ...], shape: torch.Size) -> bool:
    """Whether `shape` is `wanted`, where None stands for any size."""
    if wanted == shape:
        return True
    return len(wanted) == len(shape) and all(a is None or a == b for a, b in zip(wanted, shape, strict=True))


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be whole numbers, got {value!r}") from None
