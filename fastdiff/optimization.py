"""Makes a network of any project faster on the CPU and changes nothing else: names, weights, training stay.

A convolution's weight moves into channels_last order in memory. That is all it takes for torch to run a
Conv1d as the Conv2d that is fast there: 76 -> 26 µs for 256 x 256 channels, kernel 5, length 4, two threads
of a Xeon; 79 -> 21 µs for a ConvTranspose1d of kernel 4. A long signal loses (64 channels at length 256: 43
-> 56 µs), so small weights are left alone, or every layer is measured.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._overlaps import overlapping
from fastdiff.chain import evaluating
from fastdiff.kernels import _torch_ops
from fastdiff.ops import group_norm_silu

# Weights from this size on gain at short lengths and lose nothing worth naming at others: see above.
_LEAST_WEIGHTS = 2**16
_ROUNDS = 12
_GAIN = 1.1  # a layer changes if it is this much faster
_GAIN_ALL = 1.05  # and all 2-D convolutions together, which are measured in the whole network
_LINES = (nn.Conv1d, nn.ConvTranspose1d)
_PLANES = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Change:
    """One thing that `optimize` changed.

    Attributes:
        module: its path.
        what: "weight in channels_last order" or "norm and SiLU in one pass".
        before, after: seconds of one call that were measured; None without an example.
    """

    module: str
    what: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Optimization:
    """What `optimize` did to a network.

    Attributes:
        model: the network, which was changed in place.
        changes: what was changed; empty where nothing pays, or all is done already.
    """

    model: nn.Module
    changes: tuple[Change, ...]
    _undo: tuple[Callable[[], None], ...]

    def undo(self) -> None:
        """Bring the network back into the form that it had; its weights keep the values of now."""
        for back in reversed(self._undo):
            back()

    def __str__(self) -> str:
        name = type(self.model).__name__
        if not self.changes:
            return f"{name}: nothing to change"
        lines = [f"{name}: {len(self.changes)} changes"]
        for change in self.changes:
            times = ""
            if change.before is not None and change.after is not None:
                times = f", {1e6 * change.before:.0f} -> {1e6 * change.after:.0f} µs"
            lines.append(f"  {change.module or '(the network)'}: {change.what}{times}")
        return "\n".join(lines)


def optimize(model: nn.Module, example: tuple[Any, ...] | None = None) -> Optimization:
    """Make a network faster on the CPU, in place, by what it is made of.

    Weights of convolutions move into channels_last order in memory, which changes no shape, no key of the
    state dict and no result by more than 1e-5; training, hooks and copies go on. With an example each layer
    is measured at the sizes that it meets, all 2-D convolutions together in the whole network, and changed
    if that is faster; a GroupNorm followed by a SiLU in a Sequential may then become one pass. Without one,
    1-D convolutions of at least 65 536 weights change, which is what pays for short signals.

    Left alone: layers of other classes (parametrised, quantised, subclasses), grouped convolutions, weights
    that share bytes with another tensor of the network, that are not float32, or not on the CPU. One that is
    a view of a larger piece of memory, as in training, leaves it. A second call finds nothing left to do.

    Args:
        model: the network.
        example: what it is called with, as `explain_capture` takes it: (x, t) or (x, t, {"labels": y}).

    Returns:
        What was changed, with `undo`.

    Raises:
        TypeError: `model` is no torch module, or `example` no tuple.

    A weight in this order is not contiguous: `safetensors.torch.save_file` refuses it, `torch.save` and
    `save_pretrained` do not; undo() before such a save.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    if example is not None and (not isinstance(example, tuple) or not example):
        raise TypeError(
            f"`example` must be a tuple of what the network is called with, got {type(example).__name__}"
        )
    shared = overlapping(model)
    by_weight = {id(m.weight): name for name, m in model.named_modules() if _is_candidate(m, shared)}
    modules = {name: m for name, m in model.named_modules() if name in by_weight.values()}
    pairs = {name: m for name, m in model.named_modules() if type(m) is nn.Sequential and _norms(m)}
    changes: list[Change] = []
    undo: list[Callable[[], None]] = []
    if example is None:
        for name, module in modules.items():
            if isinstance(module, _LINES) and module.weight.numel() >= _LEAST_WEIGHTS:
                undo.append(_reorder(module))
                changes.append(Change(name, "weight in channels_last order"))
        return Optimization(model, tuple(changes), tuple(undo))
    with evaluating(model), torch.no_grad():  # not inference_mode, whose tensors could not be trained
        inputs = _inputs(model, example, {**modules, **pairs})
        for name, module in modules.items():
            if isinstance(module, _LINES) and name in inputs:
                times = _measured(module.forward, _reordered(module).forward, inputs[name])
                if times[1] * _GAIN <= times[0]:
                    undo.append(_reorder(module))
                    changes.append(Change(name, "weight in channels_last order", *times))
        if pairs:
            _torch_ops.operators(wait=True)  # or what is measured is not what will run
        for name, sequence in pairs.items():
            if name in inputs:
                times = _measured(sequence.forward, _fused(sequence).forward, inputs[name])
                if times[1] * _GAIN <= times[0]:
                    undo.append(_fuse(sequence))
                    changes.append(Change(name, "norm and SiLU in one pass", *times))
        planes = {name: m for name, m in modules.items() if isinstance(m, _PLANES)}
        if planes:
            _try_planes(model, example, planes, changes, undo)
    return Optimization(model, tuple(changes), tuple(undo))


def _try_planes(
    model: nn.Module,
    example: tuple[Any, ...],
    planes: Mapping[str, nn.Module],
    changes: list[Change],
    undo: list[Callable[[], None]],
) -> None:
    """Reorder all 2-D convolutions if the whole network is faster: the order goes from one to the next."""
    before = after = float("inf")
    for _ in range(3):
        before = min(before, _best(lambda: _call(model, example)))
        back = [_reorder(module) for module in planes.values()]
        after = min(after, _best(lambda: _call(model, example)))
        for restore in back:
            restore()
    if after * _GAIN_ALL <= before:
        undo.extend(_reorder(module) for module in planes.values())
        what = f"weights of {len(planes)} 2-D convolutions in channels_last order"
        changes.append(Change("", what, before, after))


def _is_candidate(module: nn.Module, shared: set[int]) -> bool:
    """Whether a module is a convolution whose weight may be reordered, and is not yet."""
    weight = module._parameters.get("weight")
    return bool(
        type(module) in (*_LINES, *_PLANES)
        and weight is not None
        and type(weight) is nn.Parameter
        and module.groups == 1
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not weight.movedim(1, -1).is_contiguous()  # kernel 1: both orders are one
        and id(weight) not in shared
    )


def _laid(weight: Tensor) -> Tensor:
    """A copy with the second dimension last in memory."""
    return weight.detach().movedim(1, -1).contiguous().movedim(-1, 1)


def _reorder(module: nn.Module) -> Callable[[], None]:
    """Reorder a convolution's weight; returns what brings it back."""
    weight = module._parameters["weight"]
    assert weight is not None
    weight.data = _laid(weight)

    def back() -> None:
        now = module._parameters.get("weight")
        if now is not None:
            now.data = now.detach().contiguous()

    return back


def _reordered(module: nn.Module) -> nn.Module:
    """The same convolution over a reordered copy of its weight, to be measured."""
    weight = module._parameters["weight"]
    assert weight is not None
    other = copy.copy(module)
    other._parameters = {**module._parameters, "weight": nn.Parameter(_laid(weight), requires_grad=False)}
    return other


class _FusedSequential(nn.Sequential):
    """A Sequential that runs GroupNorm and SiLU in one pass where neither has hooks."""

    def forward(self, x: Tensor) -> Tensor:
        norms = _norms(self)
        skip = False
        for index, module in enumerate(self):
            if skip:
                skip = False
            elif index in norms and x.device.type == "cpu" and x.dtype == torch.float32:
                assert isinstance(module, nn.GroupNorm)
                x = group_norm_silu(x, module.num_groups, module.weight, module.bias, module.eps)
                skip = True
            else:
                x = module(x)
        return x


def _norms(sequence: nn.Sequential) -> set[int]:
    """Where in a Sequential a GroupNorm is followed by a SiLU, both plain."""
    modules = list(sequence)
    return {
        index
        for index, (norm, activation) in enumerate(pairwise(modules))
        if type(norm) is nn.GroupNorm
        and type(activation) is nn.SiLU
        and not any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in (norm, activation)
        )
    }


def _fuse(sequence: nn.Sequential) -> Callable[[], None]:
    """Fuse a Sequential's norms; returns what brings it back."""
    sequence.__class__ = _FusedSequential

    def back() -> None:
        sequence.__class__ = nn.Sequential

    return back


def _fused(sequence: nn.Sequential) -> nn.Sequential:
    """The same Sequential, fused, to be measured."""
    other = copy.copy(sequence)
    other.__class__ = _FusedSequential
    return other


def _inputs(
    model: nn.Module, example: tuple[Any, ...], modules: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """What each module is given, first, when the network runs on an example."""
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in modules.items():

        def keep(_: nn.Module, given: tuple[Any, ...], name: str = name) -> None:
            if given and isinstance(given[0], Tensor):
                found.setdefault(name, given[0].clone(memory_format=torch.preserve_format))

        handles.append(module.register_forward_pre_hook(keep))
    try:
        _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call(model: nn.Module, example: tuple[Any, ...]) -> Any:
    *args, last = example
    if isinstance(last, Mapping) and args:
        return model(*args, **last)
    return model(*args, last)


def _measured(old: Callable[..., Any], new: Callable[..., Any], x: Tensor) -> tuple[float, float]:
    """Seconds of one call of each: the best of interleaved rounds."""
    best = [float("inf"), float("inf")]
    for _ in range(_ROUNDS):
        for i, run in enumerate((old, new)):
            start = time.perf_counter()
            run(x)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0], best[1]


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the best of some calls."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
