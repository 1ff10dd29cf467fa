"""Networks and arguments as fake tensors that say they lie on a CUDA device, which need not be there."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda:0")


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor without values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def is_on(value: Any, device: str) -> bool:
    """Whether a value is a tensor on a kind of device."""
    return isinstance(value, torch.Tensor) and value.device.type == device


def as_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A fake CUDA tensor of a tensor's shape, strides and dtype; within a FakeTensorMode."""
    if is_fake(tensor) and is_on(tensor, "cuda"):
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def fake_arguments(arguments: Any) -> Any:
    """A tree of arguments with every tensor as a fake CUDA tensor; within a FakeTensorMode."""
    return tree_map(lambda a: as_cuda(a) if isinstance(a, torch.Tensor) else a, arguments)


class FakeCopy(TorchFunctionMode):
    """Copies networks with fake CUDA tensors for their parameters and buffers.

    What is no parameter and no buffer does not move with a network: a plain tensor stays on its device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memo: dict[int, Any] = {}

    def of(self, model: Any) -> tuple[Any, dict[int, str]]:
        """The copy, and the path of each of its modules by its id.

        Raises:
            TypeError: something in it cannot be copied.
        """
        found = list(_networks(model, ""))
        for _, network in found:
            for tensor in (*network.parameters(), *network.buffers()):
                if id(tensor) not in self.memo:
                    mine = as_cuda(tensor)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    self.memo[id(tensor)] = (
                        torch.nn.Parameter(mine, tensor.requires_grad) if is_parameter else mine
                    )
        try:
            with self:
                networks = [(prefix, copy.deepcopy(network, self.memo)) for prefix, network in found]
                copied = self._rebound(model)
        except Exception as error:
            raise TypeError(
                f"`model` must be copyable, but copy.deepcopy raised {type(error).__name__}: {error}; "
                "what cannot be copied (a lock, a file) belongs outside of the network"
            ) from error
        paths: dict[int, str] = {}
        for prefix, network in networks:
            for path, module in network.named_modules():
                module.training = False
                paths.setdefault(id(module), ".".join(part for part in (prefix, path) if part))
        return copied, paths

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            from torch._subclasses.fake_tensor import unset_fake_temporarily

            with unset_fake_temporarily():
                own = tensor.detach().clone() if tensor.device.type == "cpu" else None
            memo[id(tensor)] = as_cuda(tensor) if own is None else own
        return memo[id(tensor)]

    def _rebound(self, value: Any) -> Any:
        """A callable with its networks replaced by their copies."""
        if id(value) in self.memo:
            return self.memo[id(value)]
        if isinstance(value, partial):
            keywords = {key: self._rebound(v) for key, v in value.keywords.items()}
            return partial(self._rebound(value.func), *map(self._rebound, value.args), **keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._rebound(value.__self__))
        if next(_networks(value, ""), None) is None:
            return value
        if not isinstance(value, types.FunctionType):
            return copy.deepcopy(value, self.memo)
        scope = dict(value.__globals__)
        cells = tuple(types.CellType() for _ in value.__closure__ or ())
        bound = types.FunctionType(value.__code__, scope, value.__name__, value.__defaults__, cells)
        bound.__kwdefaults__ = value.__kwdefaults__
        self.memo[id(value)] = bound  # before what it names, which may name it
        names = value.__code__.co_freevars
        scope |= {name: self._rebound(held) for name, held in _globals_of(value).items()}
        for name, cell in zip(names, cells, strict=True):
            if name in (held := _closed_over(value)):
                cell.cell_contents = self._rebound(held[name])
        return bound


def _networks(value: Any, path: str, depth: int = 3) -> Iterator[tuple[str, torch.nn.Module]]:
    """The networks that a callable holds, with the names they go by."""
    if isinstance(value, torch.nn.Module):
        yield path, value
        return
    if depth == 0 or isinstance(value, type | types.ModuleType):
        return
    inner: Mapping[Any, Any] = {}
    if isinstance(value, partial):
        inner = {"": value.func, **dict(enumerate(value.args)), **value.keywords}
    elif isinstance(value, types.MethodType):
        inner = {"": value.__self__}
    elif isinstance(value, types.FunctionType):
        inner = {**_closed_over(value), **_globals_of(value)}
    elif isinstance(value, Mapping):
        inner = value
    elif isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    elif not isinstance(value, torch.Tensor):
        inner = getattr(value, "__dict__", {})
    for name, held in inner.items():
        yield from _networks(held, ".".join(part for part in (path, str(name)) if part), depth - 1)


def _closed_over(function: types.FunctionType) -> dict[str, Any]:
    """What a function has closed over, by name; without what has no value yet."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The networks, and the functions of the same file, that a function names."""
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    found = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, torch.nn.Module)
        or (isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__)
    }
