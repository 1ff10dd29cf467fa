"""How a chain's steps run: the network as it is, compiled on the CPU, or captured in a CUDA graph.

Three implementations of one thing, a `Step`: a function of a row and its noise that moves a batch one row on.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdiff.chain import Batch, Program, Step
from fastdiff.compiled import Plan, agree, calls, plan_of
from fastdiff.graph import Graphs
from fastdiff.packages import has_compiler

_OPERATIONS = 1024  # that a network may have of which no graph is known
_log = logging.getLogger("fastdiff")


class Execution:
    """The choice of one sampler.

    Args:
        device: where its chains run.
        graph, compile: as `Sampler` takes them.

    Raises:
        ValueError: neither "auto" nor a bool, or `graph` True without a CUDA device.
    """

    def __init__(self, device: torch.device, graph: str | bool, compile: str | bool) -> None:
        for name, value in (("graph", graph), ("compile", compile)):
            if not isinstance(value, bool) and value != "auto":
                raise ValueError(f'`{name}` must be "auto", True or False, got {value!r}')
        if graph is True and device.type != "cuda":
            raise ValueError(f'`graph` True needs a CUDA device, got {device}; use "auto"')
        self._arguments = device, graph, compile
        self._graph = graph
        # who forbids native code (FASTDIFF_NATIVE=0) wants none here either
        self._compile = compile if os.environ.get("FASTDIFF_NATIVE") != "0" else False
        self._graphs = Graphs()
        self._by_torch: tuple[Any, Callable[..., Any] | None] | None = None
        self._said: set[str] = set()

    def __reduce__(self) -> Any:
        """A copy, in this process or another, starts with nothing captured."""
        return Execution, self._arguments

    @contextmanager
    def steps(
        self, model: Any, program: Program, batch: Batch, takes_noise: bool = False
    ) -> Iterator[tuple[Step, Batch]]:
        """A function that runs a row, and the buffers that it works in. At the end `batch.x` is the result.

        Called in inference mode, while the model is in eval mode.

        Args:
            takes_noise: whether each row's noise is given.
        """
        plan, network, now = None, None, self._compile is True
        if self._compiles(model, batch):
            if isinstance(model, torch.nn.Module) and batch.x.device.type == "cpu":
                program.tabulate(model, batch)
                plan = plan_of(model, batch)
                network = plan.network(model, batch, wait=now)
            if network is None and now:
                table, batch.embedding = batch.embedding, None  # torch compiles it whole
                network = self._fallback(model, batch, plan)
                if network is None:
                    batch.embedding = table
        if self._captures(model, batch):
            evaluated = model if network is None else network
            program.tabulate(evaluated, batch, fixed=True)
            captured = self._graphs.find(model, evaluated, program, batch, takes_noise)
            if captured is not None:
                with captured.steps(batch) as running:
                    yield running
                return
        start = time.perf_counter()
        yield self._stepper(model, network, program, batch), batch
        if plan is not None and network is None and not now:
            plan.ran(time.perf_counter() - start, model)
            if plan.refused:
                self._say(f"the network runs eagerly, it cannot be compiled: {plan.refused}")

    def _stepper(self, model: Any, network: Any, program: Program, batch: Batch) -> Step:
        """The step of a chain that is compiled, where `network` is, or eager."""
        table = batch.embedding
        if network is not None:
            return program.stepper(network, batch, table.by_lane if table else None)
        table = table or program.tabulate(model, batch)
        if table is None:
            return program.stepper(model, batch)
        return program.stepper(model.forward_embedded, batch, table.at)

    def _captures(self, model: Any, batch: Batch) -> bool:
        """Whether a step is to be captured: what another callable holds may move, which nobody would see."""
        wanted = isinstance(model, torch.nn.Module) if self._graph == "auto" else self._graph
        return bool(wanted) and batch.x.device.type == "cuda" and batch.x.numel() > 0

    def _compiles(self, model: Any, batch: Batch) -> bool:
        """Whether there is something to compile, for arithmetic as the network's owner set it down."""
        if self._compile is False or not batch.x.numel() or hasattr(model, "_orig_mod"):  # compiled already
            return False
        return not torch.is_autocast_enabled(batch.x.device.type)

    def _fallback(self, model: Any, batch: Batch, plan: Plan | None) -> Callable[..., Any] | None:
        """torch.compile of what cannot be exported: it follows weights too, and compiles in every process."""
        if self._by_torch is not None and self._by_torch[0] is model:
            return self._by_torch[1]
        reason = plan.refused if plan else "only a torch.nn.Module on a CPU is compiled ahead of time"
        if not reason:  # its outputs have not said yet whether the compiled network is right
            return None
        found: Callable[..., Any] | None = None
        if has_compiler():
            try:
                found = torch.compile(model, dynamic=False)
                agree(found, model, calls(batch), _OPERATIONS)
                self._say(f"the network is compiled by torch.compile, in each process anew: {reason}")
            except Exception as error:  # whatever torch.compile raises of a network
                found = None
                reason += f"; torch.compile: {type(error).__name__}: {str(error)[:200]}"
        if found is None:
            self._say(f"the network runs eagerly, it cannot be compiled: {reason}")
        self._by_torch = model, found
        return found

    def _say(self, line: str) -> None:
        """A warning, once."""
        if line not in self._said:
            self._said.add(line)
            _log.warning(line)
