"""The exponential moving average of a network's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """A running average of a model's parameters, and a copy of its buffers.

        average <- d average + (1 - d) parameter,   d = min(decay, (1 + n) / (10 + n)) in update n = 0, 1, ...

    The warm-up (the fraction) forgets the untrained parameters in the first steps; without it d = decay, and
    they keep the weight decay^n. Averages are float32 where the model is of half precision, in which (1 - d)
    times a change would be rounded away.

    Args:
        model: the model to follow; copied, not kept.
        decay: in [0, 1).
        warmup: whether to begin with smaller decays.
    Raises:
        ValueError: `decay` outside of [0, 1).
    Source: Polyak & Juditsky 1992; the warm-up is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay!r}; 0.999 or 0.9999 are usual")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        stored = model.state_dict().keys()  # without the buffers that no checkpoint holds
        self.parameters = {
            name: _at_least_float32(p.detach()).clone() for name, p in model.named_parameters()
        }
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers() if name in stored}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's parameters, and copy its buffers.

        Raises:
            ValueError: the model's parameters are not those of the one that the average was made from.
        """
        parameters, _ = self._matching(model)
        self._move(list(self.parameters.values()), [parameters[name] for name in self.parameters])
        self._copy_buffers(model)

    def _move(self, averages: list[Tensor], current: list[Tensor]) -> None:
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.num_updates) / (10 + self.num_updates))
        targets = [c.to(a.device, a.dtype) for a, c in zip(averages, current, strict=True)]
        torch._foreach_lerp_(averages, targets, 1 - decay)
        self.num_updates += 1

    def _copy_buffers(self, model: nn.Module) -> None:
        _copy({name: b for name, b in model.named_buffers() if name in self.buffers}, self.buffers)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's parameters and buffers with the average, in place.

        Raises:
            ValueError: the model's parameters are not those of the one that the average was made from.
        """
        parameters, buffers = self._matching(model)
        _copy(self.parameters, parameters)
        _copy(self.buffers, buffers)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on bit for bit; the tensors are not copied."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "num_updates": self.num_updates,
            "parameters": dict(self.parameters),
            "buffers": dict(self.buffers),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the result of `state_dict`; its tensors are copied.

        Raises:
            ValueError: a key is missing, or the tensors are not of this model; nothing is changed.
        """
        keys = self.state_dict().keys()
        if set(state) != set(keys):
            raise ValueError(f"`state` must have the keys {sorted(keys)}, got {sorted(state)}")
        _check_same(state["parameters"], self.parameters, "`state['parameters']`")
        _check_same(state["buffers"], self.buffers, "`state['buffers']`")
        _copy(state["parameters"], self.parameters)
        _copy(state["buffers"], self.buffers)
        self.decay, self.warmup = float(state["decay"]), bool(state["warmup"])
        self.num_updates = int(state["num_updates"])

    def _matching(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parameters: dict[str, Tensor] = dict(model.named_parameters())  # a shared one once
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in self.buffers}
        _check_same(parameters, self.parameters, "the parameters of `model`")
        _check_same(buffers, self.buffers, "the buffers of `model`")
        return parameters, buffers


def _at_least_float32(parameter: Tensor) -> Tensor:
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    return parameter.float() if half else parameter


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    if target:
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])


def _check_same(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    got = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {name: tensor.shape for name, tensor in expected.items()}
    if got != wanted:
        names = [n for n in {**wanted, **got} if got.get(n) != wanted.get(n)]
        raise ValueError(
            f"{what} must be those that the average was made from, got another {', '.join(names[:5])}; "
            "give the same network, not a compiled or wrapped one"
        )
