"""What one call of a sampler runs on: a table on its device, the buffers of a batch, a step, the walk.

Between two evaluations of the network one operator runs, `reverse_step`, on buffers that are allocated once.
`walk` goes down the rows and does not know how a step runs: execution.py chooses among the network as it is,
compiled (compiled.py), and captured with its update in a CUDA graph (graph.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fastdiff import ops
from fastdiff._step import bound_reverse_step
from fastdiff.editing import Ending
from fastdiff.lanes import Lanes
from fastdiff.nn import EmbeddingTable, RowTimes, embedding_table, prediction_of
from fastdiff.table import SamplingTable

# one step of a batch: its row, and the noise to use in place of what the operator draws
Step = Callable[[int, torch.Tensor | None], None]
# how many normals are drawn in one pass where no compiled kernel draws them: enough that NumPy's calls cost
# little per normal
_NORMALS_AHEAD = 65536


@dataclass(frozen=True)
class Moment:
    """Where a chain stands, as a callback sees it.

    Attributes:
        row: the row that has just run.
        num_rows: rows of the whole chain.
        t: the network's time in that row.
        x: [B, ...] float32, the state after it. The chain goes on in this tensor: clone what you keep, and
            do not write to it.
        x0: [B, ...] float32, the clean sample that the network saw in that row: a preview. Overwritten by
            the next row as well.
    """

    row: int
    num_rows: int
    t: float
    x: torch.Tensor
    x0: torch.Tensor


@dataclass
class Batch:
    """The buffers of one call: the state, the network's input and what says which lane is whose.

    Attributes:
        x: [num, ...] float32, the state.
        registers: [K, num, ...] float32, or None where the table has none.
        u, t: [lanes, ...] the network's input and its times; u is x itself where it takes the state as it is.
        row: [num] int32, each sample's row of the table.
        seed, sample_id: [num] int64, the noise's key.
        lanes: which evaluation belongs to which sample.
        cond: the network's arguments by lane.
        known, mask: [num, ...] the part of an image that is kept (bool mask), or None.
        x0: [num, ...] float32, the network's x0 of the last row, or None where nobody looks at it.
        embedding: the network's embedding for the rows to come, where it is tabulated; it then takes that in
            place of `t` and `cond`.
    """

    x: torch.Tensor
    registers: torch.Tensor | None
    u: torch.Tensor
    t: torch.Tensor
    row: torch.Tensor
    seed: torch.Tensor
    sample_id: torch.Tensor
    lanes: Lanes
    cond: dict[str, torch.Tensor]
    known: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    x0: torch.Tensor | None = None
    embedding: EmbeddingTable | None = None


class Program:
    """A sampling table on its device, with what the host must know of its rows.

    Args:
        table: the sampler.
        device: where it runs.
        dtype: of the network's input.
        endings: of its rows, for chains that keep a part of an image (editing.py).
    """

    def __init__(
        self,
        table: SamplingTable,
        device: torch.device,
        dtype: torch.dtype,
        endings: Mapping[int, Ending] | None = None,
    ) -> None:
        self.table = table
        self.device = device
        self.dtype = dtype
        self._packed = table.pack(device, endings=endings)
        whole = bool((table.t == table.t.round()).all())
        self._times = RowTimes(table.t.tolist(), device, torch.int64 if whole else torch.float32)
        self._time_of = [int(t) if whole else float(t) for t in table.t]
        self._reads_noise = (table.from_noise != 0).any(axis=1).tolist()
        self._feeds_state = dtype == torch.float32 and bool((table.c_in == 1).all())

    def start(
        self,
        x: torch.Tensor,
        seed: torch.Tensor,
        ids: torch.Tensor,
        lanes: Lanes,
        cond: dict[str, Any],
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
        preview: bool = False,
    ) -> Batch:
        """The buffers of a batch at row 0 with the state x, in which it goes on.

        Args:
            known: the image of which a part is kept, and the mask.
            preview: whether each row leaves its x0 in the batch.
        """
        num, sample = x.shape[0], x.shape[1:]
        own_input = lanes.guided or not self._feeds_state
        u = torch.empty(len(lanes.order), *sample, dtype=self.dtype, device=self.device) if own_input else x
        registers = self.table.registers
        batch = Batch(
            x=x,
            registers=torch.zeros(registers, *x.shape, dtype=torch.float32, device=self.device)
            if registers
            else None,
            u=u,
            t=torch.full((len(u),), self._time_of[0], dtype=self._times.dtype, device=self.device),
            row=self._packed.start(num),
            seed=seed,
            sample_id=ids,
            lanes=lanes,
            cond=cond,
            known=known[0] if known else None,
            mask=known[1] if known else None,
            x0=torch.empty_like(x) if preview else None,
        )
        self._feed(batch)
        return batch

    def _feed(self, batch: Batch) -> None:
        """Make the first row's input from the state; later ones come from the step before."""
        if batch.u is batch.x:
            return
        num, c_in = batch.x.shape[0], float(self.table.c_in[0])
        own, others = batch.u[:num], batch.u[num:]
        if self.dtype == torch.float32:
            torch.mul(batch.x, c_in, out=own)
        else:
            own.copy_(batch.x if c_in == 1 else c_in * batch.x)
        torch.index_select(own, 0, batch.lanes.order[num:], out=others)

    def stepper(
        self,
        network: Callable[..., Any],
        batch: Batch,
        embedded: Callable[[int], torch.Tensor] | None = None,
    ) -> Step:
        """A row of a batch: an evaluation of the network and the fused update.

        Args:
            network: called as `network(u, t, **cond)`, or as `network(u, embedded(row))`.
            embedded: the embedding of a row, for what takes that in place of times and conditions.
        Raises:
            ValueError: (the step) an output that does not fit the table, before the update.
        """
        # what is the same in every row is looked up once: a step of a small network on a CPU is short
        times, cond, shape = self._time_of, batch.cond, batch.u.shape
        bound = None
        if batch.x.device.type == "cpu":
            lanes, channels, *rest = shape
            like = batch.u.new_empty(lanes, (1 + self.table.learned) * channels, *rest)
            bound = bound_reverse_step(*self._operands(batch, like, None))
            rows, lane_times = batch.row.numpy(), batch.t.numpy()

        def step(row: int, noise: torch.Tensor | None) -> None:
            if bound is None:
                batch.row.fill_(row)
                batch.t.fill_(times[row])
            else:
                rows[...] = row
                lane_times[...] = times[row]
            if embedded is None:
                out = prediction_of(network(batch.u, batch.t, **cond))
            else:
                out = network(batch.u, embedded(row))
            self._check_output(out, shape)
            if bound is None or not bound(out, noise):
                torch.ops.fastdiff.reverse_step_(*self._operands(batch, out, noise))

        return step

    def evaluate(self, model: Callable[..., Any], batch: Batch, noise: torch.Tensor | None = None) -> None:
        """The network and the update at the rows and times that stand in the buffers; nothing on the host."""
        if batch.embedding is None:
            out = prediction_of(model(batch.u, batch.t, **batch.cond))
        else:  # one call's samples all stand at one row
            embedding = batch.embedding.gather(batch.row[:1])
            out = model.forward_embedded(batch.u, embedding)  # type: ignore[attr-defined]
        self._check_output(out, batch.u.shape)
        torch.ops.fastdiff.reverse_step_(*self._operands(batch, out, noise))

    def _operands(self, batch: Batch, out: torch.Tensor, noise: torch.Tensor | None) -> tuple[Any, ...]:
        """What `reverse_step_` takes."""
        packed, lanes = self._packed, batch.lanes
        return (
            batch.x, batch.registers, out, None if batch.u is batch.x else batch.u, packed.coef, packed.plan,
            batch.row, batch.seed, batch.sample_id, lanes.cond, lanes.uncond, lanes.scale, noise,
            packed.threshold, batch.known, batch.mask, batch.x0,
        )  # fmt: skip

    def tabulate(self, model: Callable[..., Any], batch: Batch, fixed: bool = False) -> EmbeddingTable | None:
        """Give a batch a table of what depends on time and class alone, where one fits its network.

        Args:
            fixed: as in `embedding_table`.
        """
        batch.embedding = embedding_table(model, self._times, batch.cond, fixed=fixed)
        return batch.embedding

    def advance(self, batch: Batch) -> None:
        """Every sample to its next row, on the device."""
        lanes = batch.lanes
        torch.ops.fastdiff.advance_(
            batch.row, self._packed.coef, batch.t, None, lanes.cond, lanes.uncond, None
        )

    def _check_output(self, out: torch.Tensor, given: torch.Size) -> None:
        """The network's output against the table's contract."""
        lanes, channels, *rest = given
        wanted = (lanes, 2 * channels if self.table.learned else channels, *rest)
        if out.shape == wanted and out.device == self.device and out.is_floating_point():
            return
        hint = ""
        if tuple(out.shape) == (lanes, 2 * channels, *rest):
            hint = '; 2C channels mean a learned variance: say variance="learned_range" (or "learned")'
        elif self.table.learned and tuple(out.shape) == (lanes, channels, *rest):
            hint = '; a learned variance needs 2C channels: say variance="fixed_small" (or "fixed_large")'
        raise ValueError(
            f"`model` must return {wanted} for `shape` {(channels, *rest)}, "
            f"floating point on {self.device}, got {tuple(out.shape)} {out.dtype} on {out.device}{hint}"
        )

    def noise_rows(self, batch: Batch) -> Iterator[torch.Tensor | None]:
        """Each row's noise where it pays to draw many rows in one pass, else None: the operator draws it.

        It pays for a small state on a CPU without compiled kernels: many rows share NumPy's cost per call.
        """
        from fastdiff.kernels import cpu

        num_rows, numel = self.table.num_rows, batch.x.numel()
        ahead = _NORMALS_AHEAD // max(numel, 1)
        row = 0
        while row < num_rows:
            if (
                ahead < 2
                or self.device.type != "cpu"
                or cpu.library() is not None
                or not any(self._reads_noise[row:])
            ):
                yield None
                row += 1
                continue
            rows = torch.arange(row, min(row + ahead, num_rows))
            draws = rows.repeat_interleave(batch.x.shape[0])
            seeds, ids = batch.seed.repeat(len(rows)), batch.sample_id.repeat(len(rows))
            yield from ops.normal(batch.x.shape[1:], seeds, ids, draws).view(len(rows), *batch.x.shape)
            row += len(rows)


def walk(
    table: SamplingTable,
    batch: Batch,
    step: Step,
    noise: Iterator[torch.Tensor | None],
    progress: bool = False,
    callback: Callable[[Moment], object] | None = None,
    trajectory: bool = False,
) -> torch.Tensor | None:
    """Run every row.

    Args:
        table: whose rows.
        batch: the buffers that `step` works in.
        step: called with each row and its noise.
        noise: of each row.
        progress, callback, trajectory: as in `Sampler.sample`.
    Returns:
        The states from the start to the sample, where they are wanted.
    """
    rows: Any = range(table.num_rows)
    if progress:
        from tqdm import tqdm

        rows = tqdm(rows, desc=table.name, unit="step", leave=False)
    x, ends = batch.x, table.ends_step.tolist()
    # allocated here, since nothing is while captured steps run
    states = x.new_empty(1 + sum(ends), *x.shape) if trajectory else None
    seen = 1
    if states is not None:
        states[0].copy_(x)
    for row in rows:
        step(row, next(noise))
        if ends[row]:
            if states is not None:
                states[seen].copy_(x)
                seen += 1
            if callback is not None and batch.x0 is not None:
                callback(Moment(row, table.num_rows, float(table.t[row]), x, batch.x0))
    return states


# how many chains are in a model just now, and which of its modules were in training mode before the first
_modes: WeakKeyDictionary[torch.nn.Module, tuple[int, list[torch.nn.Module]]] = WeakKeyDictionary()
_modes_lock = Lock()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode while chains run, in however many threads; every module's flag is put back."""
    if not isinstance(model, torch.nn.Module):
        yield
        return
    with _modes_lock:
        chains, training = _modes.get(model, (0, []))
        if not chains:
            training = [module for module in model.modules() if module.training]
            for module in training:
                module.training = False
        _modes[model] = (chains + 1, training)
    try:
        yield
    finally:
        with _modes_lock:
            chains, training = _modes[model]
            _modes[model] = (chains - 1, training)
            if chains == 1:
                del _modes[model]
                for module in training:
                    module.training = True
