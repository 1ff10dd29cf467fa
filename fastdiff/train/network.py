"""The network as a step calls it: compiled, in bfloat16, one of several processes; the weights stay alone."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdiff.kernels import _torch_ops
from fastdiff.nn import UNet, prediction_of
from fastdiff.train.config import TrainConfig
from fastdiff.train.objective import Objective
from fastdiff.train.ranks import Ranks


class Network:
    """model(x, t, **cond) for the objective.

    Parameters and their names are the model's own, so checkpoints know nothing of compilation, of bfloat16
    (autocast: float32 weights, products of bfloat16 copies) or of other processes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._device = next(p.device for p in model.parameters() if p.requires_grad)
        self._bf16 = config.amp == "bf16"
        if isinstance(model, UNet) and self._device.type == "cpu" and not (config.compile or self._bf16):
            model.fuse_norms(_has_operators(ranks))
        self._called: nn.Module = Compiled(model) if config.compile else model
        self._parallel: DistributedDataParallel | None = None

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Any:
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return (self._called if self._parallel is None else self._parallel)(x, t, **cond)

    @property
    def connected(self) -> bool:
        """Whether gradients are those of all processes: always where there is only one."""
        return self._ranks.size == 1 or self._parallel is not None

    def connect(self, objective: Objective, x0: Tensor, cond: dict[str, Tensor]) -> None:
        """From now on average the processes' gradients in every backward pass.

        Args:
            objective, x0, cond: the loss and a few samples, on which a copy of the model is run once to find
                parameters without a gradient, for which DistributedDataParallel must be told to look.
        """
        ids = [self._device.index] if self._device.type == "cuda" else None
        idle = _has_idle_parameters(self._model, objective, x0, cond)
        with self._ranks.watched("at the start"):
            self._parallel = DistributedDataParallel(
                self._called, device_ids=ids, find_unused_parameters=idle, gradient_as_bucket_view=True
            )

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Around the two passes of a part of the batch; only those of the last average gradients."""
        alone = self._parallel is None or last
        with nullcontext() if alone else self._parallel.no_sync():  # type: ignore[union-attr]
            yield


def _has_operators(ranks: Ranks) -> bool:
    """Whether torch's own kind of operators is there, or can be built.

    It is waited for: a run that began without would not go on from its checkpoint with the same bits.
    """
    if _torch_ops.operators() is None and _torch_ops.library.is_coming() and ranks.first:
        print("compiling operators for this torch, once on this machine: about 20 s", file=sys.stderr)
    return _torch_ops.operators(wait=True) is not None


def _has_idle_parameters(model: nn.Module, objective: Objective, x0: Tensor, cond: dict[str, Tensor]) -> bool:
    tried = copy.deepcopy(model)
    tried.zero_grad(set_to_none=True)
    # The prediction itself, not its loss: a weight whose gradient happens to be 0 is still in the graph.
    objective(lambda x, t, **c: prediction_of(tried(x, t, **c)), x0, cond=cond).total.sum().backward()
    return any(p.requires_grad and p.grad is None for p in tried.parameters())


class Compiled(nn.Module):
    """A network through torch.compile; or, with a warning, as it is, where that fails.

    Random numbers, those of dropout, stay torch's own, so it drops what the eager network drops.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._compiled: Any = None
        self._tried = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._tried:
            self._tried = True
            try:
                # Inductor's own numbers are others, and on a CPU they are slower
                compiled = torch.compile(self.model, options={"fallback_random": True})
                result = compiled(*args, **kwargs)
            except Exception as error:
                # Inductor raises errors of many kinds; one of the network itself is raised again below.
                warnings.warn(
                    "`compile` has no effect: torch.compile failed here and the network runs eagerly"
                    f" ({_reason(error)}); a CPU needs a C++ compiler, a GPU Triton",
                    stacklevel=2,
                )
            else:
                self._compiled = compiled
                return result
        # Not `or`: the truth of a module is its length, which a compiled one has only if the network has.
        return (self.model if self._compiled is None else self._compiled)(*args, **kwargs)


def _reason(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'without a message'}"
