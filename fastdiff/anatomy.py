"""What a network is made of, beside the values of its tensors: whether something made from it still is it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import ref

import torch
from torch import Tensor


def tensors_of(network: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer by its name, shared ones by each of their names."""
    for prefix, module in network.named_modules(remove_duplicate=False):
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


class Anatomy:
    """A network's modules, their plain settings, hooks, and layouts of tensors, at one moment.

    It keeps no module and no tensor alive.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        self._modules = [ref(module) for module in network.modules()]
        self._settings = [setting for module in network.modules() for setting in _settings(module)]
        self._layouts = [(name, a.dtype, a.shape, a.stride()) for name, a in tensors_of(network)]

    def same(self, other: Anatomy) -> bool:
        """Whether the other is of the same network, unchanged but for the values of its tensors."""
        return (
            self._settings == other._settings
            and self._layouts == other._layouts
            and len(self._modules) == len(other._modules)
            and all(a() is b() for a, b in zip(self._modules, other._modules, strict=True))
        )


def _settings(module: torch.nn.Module) -> Iterator[Any]:
    for name, value in vars(module).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            yield name, value
        elif isinstance(value, dict) and name.endswith("_hooks"):
            yield name, len(value)
        elif callable(value):  # a forward of the object's own
            yield name, id(value)
