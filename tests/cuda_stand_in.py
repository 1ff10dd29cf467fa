"""A stand-in for `torch.cuda` on the CPU: it records calls in order, and its graphs replay what they hold.

A capture notes every operation with its operands; a replay runs them again on the very same tensors and
writes into the very same results, as a CUDA graph does with addresses. What Python read while capturing (a
row, a scale) is therefore frozen, what lies in a tensor is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff import execution, graph


class Tape(TorchDispatchMode):
    """Notes operations with their operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.notes.append((func, args, kwargs or {}, result))
        return result

    def names(self) -> list[str]:
        return [str(func) for func, *_ in self.notes]


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.cuda.calls.append("wait for the chain before")


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def record(self, stream: Stream) -> None:
        self.cuda.calls.append("record")


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.tape = cuda, Tape()

    def replay(self) -> None:
        self.cuda.calls.append("replay")
        self.cuda.replaying = True
        for func, args, kwargs, result in self.tape.notes:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        self.cuda.replaying = False


class Cuda:
    """What graph.py uses of `torch.cuda`.

    Attributes:
        calls: the calls, in their order.
        refuses: an error that the end of a capture raises.
        replaying: whether a replay is under way.
        tape: what the latest graph replays.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refuses: Exception | None = None
        self.replaying = False
        self.current = Stream(self, "the chain's stream")

    def current_stream(self) -> Stream:
        return self.current

    def Stream(self) -> Stream:
        return Stream(self, "a side stream")

    def Event(self) -> Event:
        return Event(self)

    def CUDAGraph(self) -> Graph:
        made = Graph(self)
        self.tape = made.tape
        return made

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        self.calls.append(f"enter {stream.name}")
        yield
        self.calls.append(f"leave {stream.name}")
        self.current = before

    @contextmanager
    def graph(self, graph: Graph, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.calls.append("capture")
        with graph.tape:
            yield
        if self.refuses is not None:
            raise self.refuses
        self.calls.append("captured")

    def between(self) -> Tape:
        """A tape of what runs outside of replays, each note with the number of replays before it."""
        cuda = self

        class Between(Tape):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if cuda.replaying:
                    return func(*args, **(kwargs or {}))
                result = super().__torch_dispatch__(func, types, args, kwargs)
                self.notes[-1] = (func, cuda.calls.count("replay"), None, None)
                return result

        return Between()


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A fixture: the stand-in in torch.cuda's place, and every chain of a module captured."""
    stand_in = Cuda()
    monkeypatch.setattr(graph, "cuda", stand_in)
    monkeypatch.setattr(
        execution.Execution,
        "_captures",
        lambda self, model, batch: self._graph is not False and len(batch.x) > 0,
    )
    return stand_in
