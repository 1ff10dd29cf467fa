"""The processes of one training run: who they are, what they agree on, and what the end of one means."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# What torchrun tells each process.
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LOST = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out",
    "socket timeout",
)
_ERRORS = {kind.__name__: kind for kind in (ValueError, TypeError, OSError, FileNotFoundError)}


@dataclass(frozen=True)
class Ranks:
    """This process among the `size` that train together; alone: rank 0 of 1, and nothing is ever sent.

    Attributes:
        rank: 0 <= rank < size; rank 0 is the only one that writes.
        size: how many processes there are.
        device: where tensors that are exchanged must lie.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """The processes of the default group, which is formed if torchrun started this process.

        Raises:
            ValueError: several processes on a device that cannot exchange tensors.
        """
        started = all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1
        if not dist.is_available() or not (started or dist.is_initialized()):
            return cls()
        if device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"`device` must be cpu or cuda for several processes, got {device}; train with one process"
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where NCCL puts what it broadcasts
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def leave(self) -> None:
        """Dissolve the group, at the very end; without it NCCL complains when the process ends."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def by_first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns in rank 0, in every process; an error of it is raised in every process.

        `work` runs in rank 0 alone and returns what can be copied to other processes.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None, None]
        caught: Exception | None = None
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                caught, outcome[1:] = error, [type(error).__name__, str(error)]
        with self.watched("while the processes agreed"):
            dist.broadcast_object_list(outcome, src=0)
        if caught is not None:
            raise caught
        if outcome[1] is not None:
            raise _ERRORS.get(outcome[1], RuntimeError)(outcome[2])
        return outcome[0]

    def meet(self) -> None:
        """Return when every process has come here."""
        self.any(False)

    def share(self, model: nn.Module) -> None:
        """Overwrite parameters and buffers by those of rank 0."""
        if self.size > 1:
            with torch.no_grad(), self.watched("while the weights were shared"):
                for tensor in (*model.parameters(), *model.buffers()):
                    dense = tensor.contiguous()
                    dist.broadcast(dense, src=0)
                    tensor.copy_(dense)

    def gather(self, mine: Tensor, start: int, total: int) -> Tensor:
        """[n, total]: the columns of all processes, of which [n, k] from `start` on are `mine`."""
        if self.size == 1:
            return mine
        whole = mine.new_zeros(len(mine), total)
        whole[:, start : start + mine.shape[1]] = mine
        with self.watched("while the losses were gathered"):
            dist.all_reduce(whole)  # the others' zeros change nothing
        return whole

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process, the same in all of them."""
        if self.size == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        with self.watched("while the processes agreed"):
            dist.all_reduce(found)
        return bool(found)

    @contextmanager
    def watched(self, moment: str) -> Iterator[None]:
        """Say clearly that another process died, where torch reports a connection that was closed.

        Raises:
            ConnectionError: it did.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not any(sign in str(error).lower() for sign in _LOST):
                raise
            raise ConnectionError(
                f"another of the {self.size} processes of this run ended {moment}: its own output says why."
                " This one stops; resume=True goes on from the last checkpoint, under any number of processes"
            ) from error
