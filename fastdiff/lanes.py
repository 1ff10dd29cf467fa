"""Lanes: which evaluation of the network belongs to which sample, and with which arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdiff.nn import UNet

Condition = Mapping[str, Any]


class Lanes:
    """Lane b for sample b, and behind those an unconditional lane for each sample with guidance.

    Attributes:
        guided: whether there is any.
        order: [lanes] the sample of each lane.
        cond, uncond, scale: as `ops.reverse_step` takes them; None without guidance.
    """

    def __init__(
        self, guidance_scale: float | Sequence[float] | torch.Tensor, num: int, device: torch.device
    ) -> None:
        scale = torch.as_tensor(guidance_scale, dtype=torch.float32).cpu()
        if (
            scale.dim() > 1
            or (scale.dim() == 1 and scale.shape[0] != num)
            or not bool(scale.isfinite().all())
        ):
            raise ValueError(
                f"`guidance_scale` must be a finite number or [num] = [{num}] of them, got {guidance_scale!r}"
            )
        scale = scale.expand(num)
        guided = (scale != 1).nonzero().flatten()
        self.guided = len(guided) > 0
        self.order = torch.cat([torch.arange(num), guided]).to(device)
        self.cond = self.uncond = self.scale = None
        if self.guided:
            uncond = torch.full((num,), -1, dtype=torch.int32)
            uncond[guided] = torch.arange(num, num + len(guided), dtype=torch.int32)
            self.cond = torch.arange(num, dtype=torch.int32, device=device)
            self.uncond = uncond.to(device)
            self.scale = scale.contiguous().to(device)


def _unet(model: Any) -> UNet | None:
    """The U-Net of this package that `model` is, compiled by torch or not."""
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, UNet) else None


def has_null_class(model: Any) -> bool:
    """Whether a network knows by itself what an evaluation without a class is."""
    unet = _unet(model)
    return unet is not None and unet.num_classes > 0


def conditions(
    model: Any, cond: Condition, uncond: Condition | None, num: int, order: torch.Tensor, device: torch.device
) -> dict[str, torch.Tensor]:
    """The network's arguments by lane: the samples' own, then the unconditional ones of guided samples."""

    for argument, given in (("cond", cond), ("uncond", uncond)):
        if not isinstance(given, Mapping | None):
            raise TypeError(f"`{argument}` must map argument names to values, got {type(given).__name__}")
    unet = _unet(model)

    def per_sample(argument: str, key: str, value: Any) -> torch.Tensor:
        try:
            tensor = torch.as_tensor(value)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"`{argument}[{key!r}]` must be a tensor or numbers, got {type(value).__name__}; "
                "bind what is no tensor to the network first, with functools.partial"
            ) from error
        if unet is not None and key == "labels" and tensor.device.type == "cpu" and tensor.numel():
            if not unet.num_classes:
                raise ValueError(f"`{argument}['labels']` is for networks with classes, this one has none")
            low, high = int(tensor.min()), int(tensor.max())
            if low < -1 or high >= unet.num_classes:
                raise ValueError(
                    f"`{argument}['labels']` must be in [0, {unet.num_classes}), or -1 for no class, "
                    f"got {low if low < -1 else high}"
                )
        tensor = tensor.to(device)
        if tensor.dim() == 0:
            tensor = tensor.expand(num)
        if tensor.shape[0] != num:
            raise ValueError(
                f"`{argument}[{key!r}]` must hold {num} values, one per "
                f"sample, got shape {tuple(tensor.shape)}"
            )
        return tensor

    own = {key: per_sample("cond", key, value) for key, value in cond.items()}
    if uncond is None:
        return own
    if set(uncond) != set(own):
        raise ValueError(f"`uncond` must have the keys of `cond`, {sorted(own)}, got {sorted(uncond)}")
    other = {key: per_sample("uncond", key, value) for key, value in uncond.items()}
    return {key: torch.cat([value, other[key].to(value.dtype)[order[num:]]]) for key, value in own.items()}
