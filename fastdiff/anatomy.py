"""What a network is made of, beside the values of its tensors: whether something made from it still is it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
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
    yield type(module)
    for name, value in vars(module).items():
        if value is None or isinstance(value, (bool, int, float, str)):
            yield name, value
        elif isinstance(value, dict) and name.endswith("_hooks"):
            yield name, tuple(value)  # the handles' ids, of which none is used twice
        elif callable(value):  # a forward of the object's own
            yield name, id(value)


_INTERNAL = frozenset(vars(torch.nn.Module()))
_MOST_FILES = 500
_VERSIONED = {"torch", "numpy", "triton", "builtins", *sys.stdlib_module_names}  # known by their versions


def description(network: torch.nn.Module) -> list[str] | None:
    """What a network's graph follows from beside its inputs: classes, settings, and the files of their code.

    Two processes with the same description have the same graph, unless the code reads what is neither: a
    variable set elsewhere, the environment.

    Returns:
        None where that cannot be written down: hooks, functions of an instance's own, objects with hidden
        state, code without a file.
    """
    parts: list[str] = []
    names: set[str] = set()
    for prefix, module in network.named_modules(remove_duplicate=False):
        parts.append(f"{prefix}: {type(module).__module__}.{type(module).__qualname__}")
        names |= {cls.__module__ for cls in type(module).__mro__}
        for name, value in vars(module).items():
            if name in _INTERNAL:
                if name.endswith("_hooks") and value:
                    return None
                continue
            if (text := _written(value, names)) is None:
                return None
            parts.append(f"{name} = {text}")
    files = _digests(names)
    return None if files is None else parts + files


def _written(value: Any, names: set[str]) -> str | None:
    """A setting as text: plain, a function of a module by its name, an object of such; modules are noted."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        return repr(value)
    if isinstance(value, (list, tuple, dict)):
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        texts = [_written(item, names) for item in items]
        return None if None in texts else f"{type(value).__name__}{texts}"
    name = getattr(value, "__qualname__", "")
    found = getattr(sys.modules.get(getattr(value, "__module__", None) or ""), name, None) if name else None
    if found is value and found is not None:
        names.add(value.__module__)
        return f"{value.__module__}.{name}"
    kind = type(value)
    source = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    is_python = source.endswith(".py") and kind.__module__.partition(".")[0] not in _VERSIONED
    if not is_python or kind.__base__ is not object or not hasattr(value, "__dict__"):
        return None  # a lambda, a partial, a lock: it may hold what nobody sees
    names.add(kind.__module__)
    text = _written(vars(value), names)
    return text and f"{kind.__module__}.{kind.__qualname__} {text}"


def _digests(names: set[str]) -> list[str] | None:
    """Digests of the files of modules and of those that they name, without what a version stands for."""
    todo, seen = list(names), set(names)
    digests: list[str] = []
    while todo:
        name = todo.pop()
        if name.partition(".")[0] in _VERSIONED:
            continue
        module = sys.modules.get(name)
        path = getattr(module, "__file__", None)
        if path is None and hasattr(module, "__path__"):  # a folder of modules, with no code of its own
            continue
        if path is None or len(digests) >= _MOST_FILES:
            return None
        try:
            digests.append(f"{name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}")
        except OSError:
            return None
        for value in list(vars(module).values()):
            other = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(other, str) and other not in seen:
                seen.add(other)
                todo.append(other)
    return sorted(digests)
