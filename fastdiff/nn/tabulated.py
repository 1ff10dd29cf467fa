"""A U-Net's embedding, computed once for what a chain will ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.nn.unet import UNet

CHUNK_ROWS = 64
MAX_BYTES = 64 * 2**20
_OVERRIDABLE = ("forward", "embed", "forward_embedded", "__call__")


class EmbeddingTable:
    """What `UNet.embed` gives for the rows of a chain: one line for each distinct pair of time and class.

        model.forward_embedded(x, table.at(row)) = model(x, times[row], labels)

    It holds the lines of a chunk of rows; a row of another chunk refills it, in place. So it belongs to one
    call of a sampler, and weights that change between calls are followed.

    Args:
        model: the network.
        times: [rows] each row's time, as `UNet.embed` takes it.
        labels: [lanes] each lane's class, as `UNet.embed` takes it; None for none.
        chunk_rows: rows of a chunk.

    Attributes:
        buffer: [lines, embedding_size] of the current chunk; its address stays.
        lane_class: [lanes] which of the distinct classes is a lane's; None where there is but one.
        slot: [rows] int64, which of its chunk's distinct times is a row's.
        nbytes: of the buffer.
    """

    def __init__(self, model: UNet, times: Tensor, labels: Tensor | None, chunk_rows: int) -> None:
        self._model = model
        self._times = times
        self._chunk_rows = chunk_rows
        self._classes = self.lane_class = None
        if labels is not None:
            self._classes, lane_class = torch.unique(labels, return_inverse=True)
            self.lane_class = lane_class if len(self._classes) > 1 else None
        self._num_classes = 1 if self._classes is None else len(self._classes)
        self._slots, self._firsts = _slots_of(times.tolist(), chunk_rows)
        self.slot = torch.tensor(self._slots, device=times.device)
        lines = max(map(len, self._firsts)) * self._num_classes
        self.buffer = torch.empty(lines, model.embedding_size, dtype=_dtype_of(model), device=times.device)
        self._chunk = -1

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds."""
        return self.buffer.nbytes

    @property
    def is_whole(self) -> bool:
        """Whether one chunk holds every row, so that lanes may stand at different rows."""
        return len(self._firsts) == 1

    def hold(self, row: int) -> None:
        """See to it that the buffer holds a row's lines: computes a chunk where it does not."""
        chunk = row // self._chunk_rows
        if chunk == self._chunk:
            return
        times = self._times[self._firsts[chunk]]
        labels = None
        if self._classes is not None:
            labels = self._classes.repeat(len(times))
            times = times.repeat_interleave(self._num_classes)
        self.buffer[: len(times)].copy_(self._model.embed(times, labels))
        self._chunk = chunk

    def at(self, row: int) -> Tensor:
        """The embedding of all lanes at one row: [1, embedding_size] for all alike, else [lanes, ...]."""
        self.hold(row)
        first = self._slots[row] * self._num_classes
        lines = self.buffer[first : first + self._num_classes]
        return lines if self.lane_class is None else lines.index_select(0, self.lane_class)

    def gather(self, lane_row: Tensor) -> Tensor:
        """The embedding of lanes that stand at rows of the current chunk, each at its own: nothing is read.

        Args:
            lane_row: [lanes] integers on the table's device; those of other chunks give another row's.
        Returns:
            [lanes, embedding_size].
        """
        line = self.slot[lane_row] * self._num_classes
        return self.buffer.index_select(0, line if self.lane_class is None else line + self.lane_class)


def embedding_table(
    model: Any, times: Tensor, cond: Mapping[str, Any], *, max_bytes: int = MAX_BYTES
) -> EmbeddingTable | None:
    """The table of a chain; None where the network must be called as it is.

    That is a network which is no `fd.UNet`, is compiled, has forward hooks or methods of its own around the
    embedding, or is conditioned on more than classes; or a table of which one row exceeds `max_bytes`.

    Args:
        model: any network.
        times: [rows] each row's time.
        cond: the network's other arguments by lane.
        max_bytes: the most that the table may hold; fewer rows at a time fit where 64 would not.
    """
    labels = cond.get("labels")
    if not isinstance(model, UNet) or not set(cond) <= {"labels"} or not len(times) or not _is_plain(model):
        return None
    if labels is not None and (not model.num_classes or labels.dim() != 1 or labels.is_floating_point()):
        return None  # which the network refuses in its own words
    distinct = 1 if labels is None else len(torch.unique(labels))
    row_bytes = distinct * model.embedding_size * _dtype_of(model).itemsize
    chunk_rows = min(CHUNK_ROWS, max_bytes // max(row_bytes, 1))
    return EmbeddingTable(model, times, labels, chunk_rows) if distinct and chunk_rows else None


def _slots_of(times: Sequence[float], chunk_rows: int) -> tuple[list[int], list[list[int]]]:
    """Each row's place among the distinct times of its chunk, and for each chunk the rows that are first."""
    slots, firsts = [], []
    for start in range(0, len(times), chunk_rows):
        places: dict[float, int] = {}
        first: list[int] = []
        for row, time in enumerate(times[start : start + chunk_rows], start):
            if time not in places:
                places[time] = len(first)
                first.append(row)
            slots.append(places[time])
        firsts.append(first)
    return slots, firsts


def _dtype_of(model: UNet) -> torch.dtype:
    return torch.promote_types(model.embedding.project.weight.dtype, model.embedding.identity.dtype)


def _is_plain(model: UNet) -> bool:
    """Whether calling a U-Net is its two stages and nothing else."""
    own = any(
        getattr(type(model), name) is not getattr(UNet, name) or name in vars(model) for name in _OVERRIDABLE
    )
    hooked = any(
        module._forward_hooks or module._forward_pre_hooks for module in (model, *model.embedding.modules())
    )
    return not (own or hooked or model._compiled_call_impl is not None)
