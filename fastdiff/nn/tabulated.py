"""A U-Net's embedding, computed once for what a chain will ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as every  # where the hooks of all modules are kept
from torch import Tensor

from fastdiff.nn.unet import UNet

CHUNK_ROWS = 64
LEAST_ROWS = 16  # of a chunk in a captured step, between whose replays it is refilled
MAX_BYTES = 64 * 2**20
_OVERRIDABLE = ("forward", "embed", "forward_embedded", "__call__")


class Layout(NamedTuple):
    """Where the rows of a chain lie in a table of so many rows at a time.

    Attributes:
        slots: [rows] each row's place among its chunk's distinct times.
        slot: [rows + 1] the same on the device; the idle row, behind the last, has any place.
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
            slot = torch.tensor([*slots, 0], dtype=torch.int64, device=self._device)
            found = Layout(slots, slot, times)
            self._layouts[chunk_rows] = found
        return found


class EmbeddingTable:
    """What `UNet.embed` gives for the rows of a chain: one line for each distinct pair of time and class.

        model.forward_embedded(x, table.at(row)) = model(x, times[row], labels)

    It holds the lines of a chunk of rows; a row of another chunk refills it, in place. So it belongs to one
    call of a sampler, or to one after another (`renew`), and weights that change between calls are followed.

    Args:
        model: the network.
        layout: where the rows lie.
        given: `classes` [n], those that there are lines for, as `UNet.embed` takes them, and `lane_class`
            [lanes] int64, which of them is a lane's; or neither, for no class.
        chunk_rows: rows of a chunk, as in `layout`.

    Attributes:
        given: as above. Other values may be copied into them, with `renew`.
    """

    def __init__(self, model: UNet, layout: Layout, given: Mapping[str, Tensor], chunk_rows: int) -> None:
        self._model = model
        self._layout = layout
        self._chunk_rows = chunk_rows
        self.given = given
        self._num_classes = len(given["classes"]) if given else 1
        self._first = layout.slot * self._num_classes
        self._chunk = -1

    @cached_property
    def buffer(self) -> Tensor:
        """[lines, embedding_size] of the current chunk; its address stays."""
        lines = max(map(len, self._layout.times)) * self._num_classes
        size = lines, self._model.embedding_size
        return torch.empty(size, dtype=_dtype_of(self._model), device=self._first.device)

    @cached_property
    def _lines(self) -> tuple[Tensor, ...]:
        """The buffer by time: a view for each, [n, embedding_size]."""
        return self.buffer.view(-1, self._num_classes, self.buffer.shape[1]).unbind(0)

    @property
    def nbytes(self) -> int:
        """Bytes that the table holds."""
        return self.buffer.nbytes

    @property
    def num_rows(self) -> int:
        """Rows of the chain."""
        return len(self._layout.slots)

    @property
    def is_whole(self) -> bool:
        """Whether one chunk holds every row, so that lanes may stand at different rows."""
        return len(self._layout.times) == 1

    def reading(self, given: Mapping[str, Tensor]) -> EmbeddingTable:
        """An empty table of this one's shapes that reads these tensors in the place of `given`."""
        return EmbeddingTable(self._model, self._layout, given, self._chunk_rows)

    def renew(self) -> None:
        """Forget the lines: the weights, or the values of `given`, may be others from here on."""
        self._chunk = -1

    def hold(self, row: int) -> None:
        """See to it that the buffer holds a row's lines: computes a chunk where it does not."""
        chunk = row // self._chunk_rows
        if chunk == self._chunk:
            return
        times = self._layout.times[chunk]
        labels = None
        if self.given:
            labels = self.given["classes"].repeat(len(times))
            times = times.repeat_interleave(self._num_classes)
        with torch.no_grad():
            self.buffer[: len(times)].copy_(self._model.embed(times, labels))
        self._chunk = chunk

    def at(self, row: int) -> Tensor:
        """The embedding of all lanes at one row: [1, embedding_size] for all alike, else [lanes, ...]."""
        self.hold(row)
        lines = self._lines[self._layout.slots[row]]
        return lines if self._num_classes == 1 else lines.index_select(0, self.given["lane_class"])

    def by_lane(self, row: int) -> Tensor:
        """As `at`, for code of fixed shapes: [lanes, embedding_size] also where their classes are alike.

        Without classes [1, embedding_size]; so the shape does not follow from which classes there are.
        """
        self.hold(row)
        lines = self._lines[self._layout.slots[row]]
        lane_class = self.given.get("lane_class")
        return lines if lane_class is None or len(lane_class) == 1 else lines.index_select(0, lane_class)

    def example(self) -> Tensor:
        """What `by_lane` returns, without values."""
        lanes = len(self.given.get("lane_class", (None,)))
        size = self._model.embedding_size
        return torch.empty(lanes, size, dtype=_dtype_of(self._model), device="meta")

    def gather(self, lane_row: Tensor) -> Tensor:
        """The embedding of lanes that stand at rows of the current chunk, each at its own: nothing is read.

        Where they may stand at any row, the table must be whole.

        Args:
            lane_row: [lanes] integers on the table's device, or [1] for all; those of other chunks give
                another row's.
        Returns:
            [lanes, embedding_size], or [1, ...] without classes for one row.
        """
        line = self._first.index_select(0, lane_row)
        return self.buffer.index_select(0, line + self.given["lane_class"] if self.given else line)


def embedding_table(
    model: Any, times: RowTimes, cond: Mapping[str, Any], *, fixed: bool = False, max_bytes: int = MAX_BYTES
) -> EmbeddingTable | None:
    """The table of a chain; None where the network must be called as it is.

    That is a network which is no `fd.UNet`, is compiled, has forward hooks or methods of its own around the
    embedding, or is conditioned on more than classes; a chain of one row, which saves nothing; or a table of
    which one row, or 16 where `fixed`, exceed `max_bytes`.

    Args:
        model: any network.
        times: of the rows.
        cond: the network's other arguments by lane.
        fixed: let the table's shapes follow from those of `cond`, as a CUDA graph needs it: lines for every
            lane, or every class where those are fewer. Else for the classes in use, which are read once.
        max_bytes: the most that the table may hold; fewer rows at a time fit where 64 would not.
    """
    labels = cond.get("labels")
    if not isinstance(model, UNet) or not set(cond) <= {"labels"} or len(times) < 2 or not _is_plain(model):
        return None
    given = {}
    if labels is not None:
        if not model.num_classes or labels.dim() != 1 or labels.is_floating_point():
            return None  # which the network refuses in its own words
        if not fixed:
            classes, lane_class = torch.unique(labels, return_inverse=True)
        elif len(labels) <= model.num_classes + 1:
            classes, lane_class = labels, torch.arange(len(labels), device=labels.device)
        else:
            classes = torch.arange(-1, model.num_classes, device=labels.device)
            lane_class = labels.to(torch.int64).clamp(-1, model.num_classes - 1) + 1
        given = {"classes": classes, "lane_class": lane_class}
    lines = len(given["classes"]) if given else 1
    row_bytes = lines * model.embedding_size * _dtype_of(model).itemsize
    chunk_rows = min(CHUNK_ROWS, max_bytes // max(row_bytes, 1))
    if not (lines and chunk_rows) or (fixed and chunk_rows < min(LEAST_ROWS, len(times))):
        return None
    return EmbeddingTable(model, times.layout(chunk_rows), given, chunk_rows)


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
    hooked = hooked or bool(every._global_forward_hooks or every._global_forward_pre_hooks)
    return not (own or hooked or model._compiled_call_impl is not None)
