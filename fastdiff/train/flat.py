"""Weights in one piece of memory, so that whatever a step does to all of them is one operation.

    weights                         [ w_1 | w_2 | ... | w_n ]   each begins at a multiple of 64 bytes
    gradients, moments, averages    the same places in buffers of their own; the gaps hold zeros

A parameter is a view of its place, with the strides it had: the network, its state_dict and its copies see no
difference. There is a buffer for each type and device.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdiff._overlaps import overlapping
from fastdiff.nn import EMA

_ALIGN = 64  # bytes: a cache line, and more than the vectors of compiled code ask for
_BLOCK = 1024  # elements; see `Flat.norm`


@dataclass(frozen=True)
class _Place:
    """Where a parameter lies: elements [start, end) of a buffer, in the order of its strides."""

    buffer: int
    start: int
    end: int
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        buffer = buffers[self.buffer]
        return buffer.as_strided(self.shape, self.stride, buffer.storage_offset() + self.start)


class Flat:
    """The trained parameters of a model, moved into buffers, and their gradients in others.

    A parameter that shares memory with another tensor of the model (tied by `.data`, say) stays where it is
    and is a buffer of its own. One that needs no gradient is left alone.

    Args:
        model: changed in place: `.data` of its parameters becomes a view of a buffer; the values stay.
    Attributes:
        names, parameters: of those that are trained, a tied one once.
        weights: the buffers, each 1-D.
        gradients: the like of them, with what `collect` found.
        active: for each parameter, whether `collect` found a gradient.
    Raises:
        ValueError: a parameter that must stay where it is has gaps.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.names, self.parameters = tuple(trained), list(trained.values())
        self._all = list(model.parameters())  # one that is unfrozen later gathers no gradient
        ids = set(map(id, self.parameters))
        self._slots = [
            (module._parameters, key, p)
            for module in model.modules()
            for key, p in module._parameters.items()
            if id(p) in ids
        ]
        self.weights: list[Tensor] = []
        self._places = self._lay_out(overlapping(model))
        self._views = [place.view(self.weights) for place in self._places]
        self.gradients, self._gradient_views = self.like()
        self.active = [False] * len(self.parameters)
        self._bind()

    def _lay_out(self, staying: set[int]) -> list[_Place]:
        """Make the buffers; the parameters' places in them."""
        places: dict[int, _Place] = {}
        moving: dict[Hashable, list[int]] = {}
        for i, (name, p) in enumerate(zip(self.names, self.parameters, strict=True)):
            if id(p) not in staying:
                moving.setdefault((p.device, p.dtype), []).append(i)
                continue
            if _dense_stride(p) != p.stride():
                raise ValueError(
                    f"`model` must not have a parameter with gaps that shares memory, got {name!r}; clone it"
                )
            places[i] = _Place(len(self.weights), 0, p.numel(), p.shape, p.stride())
            self.weights.append(p.data.as_strided((p.numel(),), (1,)))
        for members in moving.values():
            end = 0
            for i in members:
                p = self.parameters[i]
                start = _up(end, _ALIGN // p.element_size())
                end = start + p.numel()
                places[i] = _Place(len(self.weights), start, end, p.shape, _dense_stride(p))
            self.weights.append(p.data.new_zeros(_up(end, _BLOCK)))
        return [places[i] for i in range(len(self.parameters))]

    def like(self, at_least: torch.dtype | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers of zeros for what has the parameters' shapes, and the view for each parameter.

        Args:
            at_least: float32, say, where half precision will not do.
        """
        dtypes = [
            w.dtype if at_least is None else torch.promote_types(w.dtype, at_least) for w in self.weights
        ]
        buffers = [torch.zeros_like(w, dtype=dtype) for w, dtype in zip(self.weights, dtypes, strict=True)]
        return buffers, [place.view(buffers) for place in self._places]

    def begin(self) -> None:
        """Before the first backward pass of a step: no gradients, and every parameter in its place.

        Raises:
            ValueError: a parameter has been replaced, or given another shape, type or device.
        """
        for holder, key, p in self._slots:
            if holder.get(key) is not p:
                name = next(n for n, q in zip(self.names, self.parameters, strict=True) if q is p)
                raise ValueError(
                    f"`model` must keep its parameters while it is trained, but {name!r} is another one now,"
                    " as after an assignment or load_state_dict(assign=True); make another Trainer"
                )
        self._clear()
        if any(p.data_ptr() != view.data_ptr() for p, view in zip(self.parameters, self._views, strict=True)):
            self._bind()

    def _clear(self) -> None:
        for p in self._all:
            p.grad = None

    @torch.no_grad()
    def _bind(self) -> None:
        for name, p, view in zip(self.names, self.parameters, self._views, strict=True):
            if p.data_ptr() == view.data_ptr():
                continue
            if (p.shape, p.dtype, p.device) != (view.shape, view.dtype, view.device):
                got, was = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (p, view))
                raise ValueError(
                    "`model` must keep the shapes, types and device of its parameters while it is trained,"
                    f" got {got} for {name!r}, which was {was}; make another Trainer"
                )
            view.copy_(p.data)
            p.data = view

    @torch.no_grad()
    def collect(self) -> None:
        """After the last backward pass of a step: gradients move into `gradients`; 0 where there is none."""
        found = [p.grad for p in self.parameters]
        active = [gradient is not None for gradient in found]
        if active != self.active:
            for buffer in self.gradients:
                buffer.zero_()
            self.active = active
        views = [view for view, is_active in zip(self._gradient_views, active, strict=True) if is_active]
        if views:
            torch._foreach_copy_(views, [gradient for gradient in found if gradient is not None])
        self._clear()

    def named_gradients(self) -> dict[str, Tensor]:
        """name -> the gradient of the last step, as it was used; parameters without one are left out."""
        views = zip(self.names, self._gradient_views, self.active, strict=True)
        return {name: view for name, view, is_active in views if is_active}

    def norm(self) -> Tensor:
        """The 2-norm of all gradients, 0-dim, of at least float32.

        By blocks: on a CPU torch sums a vector of float32 in float32, which leaves the norm of 36 million
        normal numbers 0.2 % too small; that of their blocks' norms is right to 3e-9.
        """
        norms = [_norm_of(gradient) for gradient in self.gradients]
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device).float() for norm in norms]))

    def runs(self, keys: Sequence[Hashable | None]) -> Iterator[tuple[int, slice, Hashable]]:
        """(buffer, where in it, key) in as few pieces as can be: neighbours of one key are one piece.

        Args:
            keys: one for each parameter; None: left out.
        """
        order = sorted(range(len(keys)), key=lambda i: (self._places[i].buffer, self._places[i].start))
        for (buffer, key), members in itertools.groupby(order, lambda i: (self._places[i].buffer, keys[i])):
            places = [self._places[i] for i in members]
            if key is not None:
                yield buffer, slice(places[0].start, places[-1].end), key


class FlatEMA(EMA):
    """An `fd.EMA` of a flat model: the average of all trained parameters is one operation."""

    def __init__(self, model: nn.Module, decay: float, flat: Flat) -> None:
        super().__init__(model, decay)
        averages, views = flat.like(at_least=torch.float32)
        for name, view in zip(flat.names, views, strict=True):
            self.parameters[name] = view.copy_(self.parameters[name])
        # What is not trained may still be changed by its owner.
        others = {name: p for name, p in model.named_parameters() if name not in flat.names}
        self._averages = [*averages, *(self.parameters[name] for name in others)]
        self._current = [*flat.weights, *others.values()]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """As `EMA.update`, of the model that it was made from."""
        self._move(self._averages, self._current)
        if self.buffers:
            self._copy_buffers(model)


def _norm_of(vector: Tensor) -> Tensor:
    """Its 2-norm by blocks of _BLOCK and a rest; see `Flat.norm`."""
    dtype = torch.promote_types(vector.dtype, torch.float32)
    count, rest = divmod(vector.numel(), _BLOCK)
    rows = (vector[: count * _BLOCK] if rest else vector).view(count, _BLOCK)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    if rest:
        norms = torch.cat((norms, torch.linalg.vector_norm(vector[-rest:], dtype=dtype)[None]))
    return torch.linalg.vector_norm(norms)


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it has no gaps, else those of a copy."""
    return torch.empty_like(tensor, device="meta").stride()


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
