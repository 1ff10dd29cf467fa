"""A U-Net's embedding, computed once for what a chain will ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.nn.unet import UNet

CHUNK_ROWS = 64
MAX_BYTES = 64 * 2**20
_OVERRIDABLE = ("forward", "embed", "forward_embedded", "__call__")


class Layout(NamedTuple):
    """Where the rows of a chain lie in a table of so many rows at a time.

    Attributes:
        slots, slot: [rows] each row's place among its chunk's distinct times, on the host and the device.
        times: for each chunk its distinct times, on the device.
    """

    slots: list[int]
    slot: Tensor
    times: list[Tensor]


class RowTimes:
    """The time of each row of a chain, as a network takes it; made once for all calls.

    Args:
        times: [rows].
        device, dtype: of the network's times.
    """

    def __init__(self, times: Sequence[float], device: torch.device, dtype: torch.dtype) -> None:
        self._times = list(times)
        self._device = device
        self.dtype = dtype
        self._layouts: dict[int, Layout] = {}

    def __len__(self) -> int:
        return len(self._times)

    def layout(self, chunk_rows: int) -> Layout:
        """The layout for chunks of so many rows."""
        found = self._layouts.get(chunk_rows)
        if found is None:
            slots: list[int] = []
            times = []
            for start in range(0, len(self), chunk_rows):
                places: dict[float, int] = {}
                for time in self._times[start : start + chunk_rows]:
                    slots.append(places.setdefault(time, len(places)))
                times.append(torch.tensor(list(places)).to(self._device, self.dtype))
            found = Layout(slots, torch.tensor(slots, dtype=torch.int64, device=self._device), times)
            self._layouts[chunk_rows] = found
        return found


class EmbeddingTable:
    """What `UNet.embed` gives for the rows of a chain: one line for each distinct pair of time and class.

        model.forward_embedded(x, table.at(row)) = model(x, times[row], labels)

    It holds the lines of a chunk of rows; a row of another chunk refills it, in place. So it belongs to one
    call of a sampler, and weights that change between calls are followed.

    Args:
        model: the network.
        layout: where the rows lie.
        classes: [n] the distinct classes, as `UNet.embed` takes them; None for no class.
        lane_class: [lanes] int64, which of them is a lane's.
        chunk_rows: rows of a chunk, as in `layout`.

    Attributes:
        buffer: [lines, embedding_size] of the current chunk; its address stays.
        slot: [rows] int64, which of its chunk's distinct times is a row's.
        lane_class: [lanes] int64; None where there is but one class.
    """

    def __init__(
        self,
        model: UNet,
        layout: Layout,
        classes: Tensor | None,
        lane_class: Tensor | None,
        chunk_rows: int,
    ) -> None:
        self._model = model
        self._layout = layout
        self._chunk_rows = chunk_rows
        self._classes = classes
        self._num_classes = 1 if classes is None else len(classes)
        self.lane_class = lane_class if self._num_classes > 1 else None
        self.slot = layout.slot
        lines = max(map(len, layout.times)) * self._num_classes
        self.buffer = torch.empty(
            lines, model.embedding_size, dtype=_dtype_of(model), device=layout.slot.device
        )
        self._chunk = -1

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds."""
        return self.buffer.nbytes

    @property
    def is_whole(self) -> bool:
        """Whether one chunk holds every row, so that lanes may stand at different rows."""
        return len(self._layout.times) == 1

    def hold(self, row: int) -> None:
        """See to it that the buffer holds a row's lines: computes a chunk where it does not."""
        chunk = row // self._chunk_rows
        if chunk == self._chunk:
            return
        times = self._layout.times[chunk]
        labels = None
        if self._classes is not None:
            labels = self._classes.repeat(len(times))
            times = times.repeat_interleave(self._num_classes)
        self.buffer[: len(times)].copy_(self._model.embed(times, labels))
        self._chunk = chunk

    def at(self, row: int) -> Tensor:
        """The embedding of all lanes at one row: [1, embedding_size] for all alike, else [lanes, ...]."""
        self.hold(row)
        first = self._layout.slots[row] * self._num_classes
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
    model: Any, times: RowTimes, cond: Mapping[str, Any], *, max_bytes: int = MAX_BYTES
) -> EmbeddingTable | None:
    """The table of a chain; None where the network must be called as it is.

    That is a network which is no `fd.UNet`, is compiled, has forward hooks or methods of its own around the
    embedding, or is conditioned on more than classes; a chain of one row, which saves nothing; or a table of
    which one row exceeds `max_bytes`. Classes on a device are read once, before the chain runs.

    Args:
        model: any network.
        times: of the rows.
        cond: the network's other arguments by lane.
        max_bytes: the most that the table may hold; fewer rows at a time fit where 64 would not.
    """
    labels = cond.get("labels")
    if not isinstance(model, UNet) or not set(cond) <= {"labels"} or len(times) < 2 or not _is_plain(model):
        return None
    classes = lane_class = None
    if labels is not None:
        if not model.num_classes or labels.dim() != 1 or labels.is_floating_point():
            return None  # which the network refuses in its own words
        classes, lane_class = torch.unique(labels, return_inverse=True)
    lines = 1 if classes is None else len(classes)
    row_bytes = lines * model.embedding_size * _dtype_of(model).itemsize
    chunk_rows = min(CHUNK_ROWS, max_bytes // max(row_bytes, 1))
    if not (lines and chunk_rows):
        return None
    return EmbeddingTable(model, times.layout(chunk_rows), classes, lane_class, chunk_rows)


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
