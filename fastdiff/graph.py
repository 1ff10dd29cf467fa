"""CUDA graphs: one step of a chain (network, update, next row) is captured once and replayed for every row.

Capturing costs the same for 10 rows and for 1 000. Between the first and the last replay nothing is allocated
and nothing waits for the device: what a chain is given is copied into the graph's own buffers before, a row's
noise between replays, and the state is copied out after. Rows and times move on the device (`advance`). A
step gathers by the row what is tabulated of the network; between two replays the table's next chunk is
computed, in place: that alone allocates.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor, cuda

from fastdiff.anatomy import Anatomy, tensors_of
from fastdiff.chain import Batch, Program, Step

_KEPT = 8  # captured steps of a sampler: each holds its buffers and the network's memory
_WARM_UPS = 3  # libraries choose their algorithms and allocate their workspaces in the first runs
_log = logging.getLogger("fastdiff")


def tensors_in(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch by its name."""
    named = {**vars(batch), **{f"lanes.{name}": value for name, value in vars(batch.lanes).items()}}
    named |= {f"cond.{name}": value for name, value in batch.cond.items()}
    if batch.embedding is not None:
        named |= {f"embedding.{name}": value for name, value in batch.embedding.given.items()}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def buffers_like(batch: Batch) -> Batch:
    """The same structure in dense memory of its own; what was one tensor is one."""
    own = {id(a): torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in tensors_in(batch).values()}

    def moved(holder: Mapping[str, Any]) -> dict[str, Any]:
        return {name: own.get(id(value), value) for name, value in holder.items()}

    lanes, table = copy.copy(batch.lanes), batch.embedding
    vars(lanes).update(moved(vars(lanes)))
    held = {
        "lanes": lanes,
        "cond": moved(batch.cond),
        "embedding": table and table.reading(moved(table.given)),
    }
    return replace(batch, **moved(vars(batch)) | held)


class Captured:
    """One step as a CUDA graph, its buffers, and the lock of the chain that runs in them.

    Args:
        network: what the step evaluates.
        program: the table, whose addresses are captured.
        batch: of the shapes and the structure to capture.
        takes_noise: whether each row's noise is given.

    Raises:
        RuntimeError, ...: what the network raises where it cannot be captured.
    """

    def __init__(
        self, network: Callable[..., Any], program: Program, batch: Batch, takes_noise: bool
    ) -> None:
        self._lock = Lock()
        self._owner = 0
        self._program = program
        self._network = network
        self._batch = buffers_like(batch)
        self._noise = torch.zeros_like(self._batch.x) if takes_noise else None
        self._fill(batch)
        self._warm_up()
        self._graph = cuda.CUDAGraph()
        # other threads may allocate meanwhile
        with cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._step()
        self._done = cuda.Event()

    @property
    def is_in_use_here(self) -> bool:
        """Whether this thread's chain runs in the buffers, from whose callback another may be started."""
        return self._owner == get_ident()

    def _fill(self, batch: Batch) -> None:
        """Copy what a chain is given into the buffers."""
        given = tensors_in(batch)
        for name, mine in tensors_in(self._batch).items():
            mine.copy_(given[name])
        if self._batch.embedding is not None:
            self._batch.embedding.renew()
            self._batch.embedding.hold(0)

    def _warm_up(self) -> None:
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._step()
        cuda.current_stream().wait_stream(side)

    def _step(self) -> None:
        self._program.evaluate(self._network, self._batch, self._noise)
        self._program.advance(self._batch)

    @contextmanager
    def steps(self, batch: Batch) -> Iterator[tuple[Step, Batch]]:
        """As `Execution.steps`: a chain alone in the buffers, from what `batch` holds to its `x`."""
        with self._lock, cuda.device(self._batch.x.device):
            stream = cuda.current_stream()
            stream.wait_event(self._done)  # the chain before may have run on another stream
            self._owner = get_ident()
            try:
                self._fill(batch)
                yield self._replay, self._batch
                batch.x.copy_(self._batch.x)
            finally:
                self._owner = 0
                self._done.record(stream)

    def _replay(self, row: int, noise: Tensor | None) -> None:
        if self._batch.embedding is not None:
            self._batch.embedding.hold(row)  # the graph gathers from it: another chunk takes this one's place
        if self._noise is not None and noise is not None:
            self._noise.copy_(noise)
        self._graph.replay()


class Graphs:
    """The captured steps of one sampler, least recently used out."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[Any, tuple[Captured | None, Anatomy | None, Any]] = OrderedDict()
        self._said: set[str] = set()

    def find(
        self, model: Any, network: Callable[..., Any], program: Program, batch: Batch, takes_noise: bool
    ) -> Captured | None:
        """The captured step for a batch, made when there is none; None for what cannot be captured.

        What a graph has frozen must be as it was: shapes, dtypes, conditions, lanes, flags and settings of
        the modules, and where the weights lie.

        Args:
            model: whose anatomy and weights count.
            network: what is evaluated, the model itself or a compiled form of it.
        """
        anatomy = Anatomy(model) if isinstance(model, torch.nn.Module) else None
        weights = [a.data_ptr() for _, a in tensors_of(model)] if anatomy else []
        given = sorted(tensors_in(batch).items())
        first: dict[int, str] = {}  # what was one tensor has one buffer, in which two would not fit
        shapes = tuple((name, first.setdefault(id(a), name), a.shape, a.dtype) for name, a in given)
        device = batch.x.device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        state = (batch.embedding is None, takes_noise, *autocast)
        key = (id(network), program, device, *state, shapes, tuple(weights))
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or (found[1] and anatomy and not found[1].same(anatomy)):
                found = self._capture(network, program, batch, takes_noise), anatomy, network
            self._kept[key] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        captured = found[0]
        return None if captured is not None and captured.is_in_use_here else captured

    def _capture(
        self, network: Callable[..., Any], program: Program, batch: Batch, takes_noise: bool
    ) -> Captured | None:
        try:
            with cuda.device(batch.x.device):
                return Captured(network, program, batch, takes_noise)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            # the end of a capture that has failed raises once more
            first = error.__context__ if "previous error" in str(error) else None
            line = (str(first or error).strip().splitlines() or [type(error).__name__])[0]
            if line not in self._said:
                self._said.add(line)
                _log.warning(
                    "the network runs eagerly, its step cannot be captured as a CUDA graph: %s", line
                )
            return None
