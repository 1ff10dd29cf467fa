"""A chain: the network and the fused step, one row of the sampling table after the other.

A sampler holds what does not change from call to call (network, packed table, shapes); `sample` holds one
batch. Between two
evaluations of the network one operator runs, `reverse_step`, on buffers that are allocated once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import ops
from fastdiff.lanes import Condition, Lanes, conditions
from fastdiff.levels import NoiseLevels
from fastdiff.nn import UNet, load_config
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import compile_table
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

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
        x: [B, ...] float32, the state after it. The chain goes on in this tensor: clone what you keep.
    """

    row: int
    num_rows: int
    t: float
    x: torch.Tensor


@dataclass
class _Batch:
    """The buffers of one call: the state, the network's input and what says which lane is whose."""

    x: torch.Tensor
    registers: torch.Tensor | None
    u: torch.Tensor  # x itself where the network takes the state as it is
    t: torch.Tensor
    row: torch.Tensor
    seed: torch.Tensor
    sample_id: torch.Tensor
    cond: dict[str, torch.Tensor]
    cond_lane: torch.Tensor | None = None
    uncond_lane: torch.Tensor | None = None
    guidance_scale: torch.Tensor | None = None


class Sampler:
    """Samples from a network with any solver, by one fused operator per evaluation.

    Args:
        model: any callable `(x, t, **cond) -> Tensor` (or an object with `.sample`); 2C output channels
            with a learned variance.
        schedule: the noise schedule that it was trained with. Give `table` instead to bring your own sampler.
        solver: a solver's name, or a function like those in fastdiff/solvers.
        steps: evaluations' times, as `space_timesteps` takes them: a number, "ddim50", "10,15,20"; None:
            all of the schedule's.
        prediction: what the network predicts: "eps", "x0", "v", ...
        variance: "fixed_small", "fixed_large", "learned", "learned_range".
        clip: the range of x0, or None.
        shape: shape of one sample, e.g. (3, 32, 32).
        device: where the chain runs; the model's device by default.
        dtype: dtype of the network's input; the model's by default. The model is never cast, the state is
            float32.
        spacing: how `steps` times are chosen: "ddpm", "leading", "trailing", "linspace".
        table: a `SamplingTable` in place of schedule, solver, steps, prediction, variance and clip.
        **options: the solver's own, e.g. eta for "ddim".

    Raises:
        ValueError: what does not fit together, with the argument and the remedy, before any work.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        schedule: NoiseSchedule | None = None,
        *,
        solver: Any = "ddim",
        steps: int | str | None = 50,
        prediction: str = "eps",
        variance: str = "fixed_small",
        clip: tuple[float, float] | None = (-1.0, 1.0),
        shape: Sequence[int],
        device: Any = None,
        dtype: torch.dtype | None = None,
        spacing: str = "ddpm",
        table: SamplingTable | None = None,
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be callable as model(x, t, **cond), got {type(model).__name__}")
        if (schedule is None) == (table is None):
            got = "neither" if table is None else "both"
            raise ValueError(f"give either `schedule` (with a solver's name) or `table`, got {got}")
        if table is None:
            assert schedule is not None
            times = space_timesteps(
                len(schedule.betas), len(schedule.betas) if steps is None else steps, spacing=spacing
            )
            levels = NoiseLevels.from_schedule(schedule, times)
            table = compile_table(
                solver, levels, prediction=prediction, variance=variance, clip=clip, **options
            )
        elif options:
            option = next(iter(options))
            raise TypeError(
                f"`{option}` is a solver's option, but `table` is compiled; compile_table takes it"
            )
        self.shape = tuple(int(size) for size in shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`shape` must be the shape of one sample, e.g. (3, 32, 32), got {shape!r}")
        first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        self.model = model
        self.table = table
        self.device = torch.device(device or (first.device if first is not None else "cpu"))
        self.dtype = dtype or (first.dtype if first is not None else torch.float32)
        if not self.dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating dtype, got {self.dtype}")
        self._packed = table.pack(self.device)
        self._whole_times = bool((table.t == table.t.round()).all())
        self._reads_noise = (table.from_noise != 0).any(axis=1).tolist()
        self._feeds_state = self.dtype == torch.float32 and bool((table.c_in == 1).all())

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: Any = None, dtype: torch.dtype | None = None, **overrides: Any
    ) -> Sampler:
        """A saved network with its own schedule, prediction, variance, shape and clip.

        Args:
            name: an embedded model ("digits") or a folder written by `save_pretrained`.
            device: where network and chain go.
            dtype: dtype that the network is cast to and fed with.
            **overrides: arguments of `Sampler` that differ, e.g. solver="ddpm", steps=100.

        Raises:
            ValueError: there is no such model, or it was saved without its diffusion settings.
        """
        settings = dict(load_config(name).get("diffusion") or {})
        if "schedule" not in settings or "shape" not in settings:
            raise ValueError(
                f"`name` {name!r} was saved without `diffusion` settings; load it "
                f"with UNet.from_pretrained and use Sampler()"
            )
        settings["schedule"] = NoiseSchedule.from_config(settings["schedule"])
        if settings.get("clip") is not None:
            settings["clip"] = tuple(settings["clip"])
        model = UNet.from_pretrained(name).to(device=device, dtype=dtype).eval()
        if "table" in overrides:
            settings = {"shape": settings["shape"]}
        return cls(model, device=device, dtype=dtype, **{**settings, **overrides})

    def sample(
        self,
        num: int,
        *,
        seed: int = 0,
        sample_ids: Sequence[int] | torch.Tensor | None = None,
        cond: Condition | None = None,
        uncond: Condition | None = None,
        guidance_scale: float | Sequence[float] | torch.Tensor = 1.0,
        noise: torch.Tensor | None = None,
        x_T: torch.Tensor | None = None,
        progress: bool = False,
        callback: Callable[[Moment], object] | None = None,
        trajectory: bool = False,
    ) -> Any:
        """Run one chain for `num` samples.

        Args:
            num: how many samples.
            seed: 64 bits. Noise depends on nothing but seed, sample id, row and element.
            sample_ids: [num] identities in [0, 2^32), by default 0..num-1: `sample(8)[3]` is `sample(1,
                sample_ids=[3])[0]`.
            cond: keyword arguments of the network, each [num, ...] or one value for all.
            uncond: the same for its unconditional evaluation. None: an `fd.UNet`'s null class; other
                networks must give it.
            guidance_scale: w of out = uncond + w (cond - uncond), one for all or [num]; 1 evaluates the
                network once.
            noise: [rows, num, ...] normals used in place of the drawn ones, row r in row r.
            x_T: [num, ...] the state at the first level itself.
            progress: show a progress bar.
            callback: called with a `Moment` after each row that ends a step.
            trajectory: also return the states.

        Returns:
            [num, *shape] float32 on the chain's device; with `trajectory` the pair (samples, states), states
            [steps+1, num, *shape]
            from x_T to the sample.

        Raises:
            ValueError: arguments that do not fit, before any work.
        """
        batch = self._start(num, seed, sample_ids, cond or {}, uncond, guidance_scale, x_T)
        if noise is not None and tuple(noise.shape) != (self.table.num_rows, num, *self.shape):
            raise ValueError(
                f"`noise` must be [rows, num, *shape] = "
                f"{(self.table.num_rows, num, *self.shape)}, got {tuple(noise.shape)}"
            )
        states = [batch.x.clone()] if trajectory else []
        drawn = self._noise_rows(batch) if noise is None else iter(noise.to(self.device, torch.float32))
        with _evaluating(self.model), torch.inference_mode():
            for row in self._rows(progress):
                self._step(row, batch, next(drawn))
                if self.table.ends_step[row]:
                    if trajectory:
                        states.append(batch.x.clone())
                    if callback is not None:
                        callback(Moment(row, self.table.num_rows, float(self.table.t[row]), batch.x))
        return (batch.x, torch.stack(states)) if trajectory else batch.x

    def _start(
        self,
        num: int,
        seed: int,
        sample_ids: Sequence[int] | torch.Tensor | None,
        cond: Condition,
        uncond: Condition | None,
        guidance_scale: float | Sequence[float] | torch.Tensor,
        x_T: torch.Tensor | None,
    ) -> _Batch:
        """Check a call's arguments and allocate its buffers: x_T, and the network's first input."""
        if num < 0:
            raise ValueError(f"`num` must be at least 0, got {num}")
        key, ids = ops.noise_key(seed, num if sample_ids is None else sample_ids, num, self.device)
        state = (num, *self.shape)
        if x_T is None:
            x = ops.normal(self.shape, key, ids, draw=0, domain=0).mul_(self.table.init_scale)
        else:
            if tuple(x_T.shape) != state:
                raise ValueError(f"`x_T` must be [num, *shape] = {state}, got {tuple(x_T.shape)}")
            x = x_T.detach().to(self.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
        lanes = Lanes(guidance_scale, num, self.device)
        if lanes.guided and uncond is None:
            if not isinstance(self.model, UNet) or not cond:
                raise ValueError(
                    "`uncond` must be given with a `guidance_scale` other than "
                    "1: the network's unconditional arguments"
                )
            uncond = {"labels": -1}
        kwargs = conditions(self.model, cond, uncond if lanes.guided else None, num, lanes.order, self.device)
        u = x
        if lanes.guided or not self._feeds_state:
            u = (float(self.table.c_in[0]) * (x[lanes.order] if lanes.guided else x)).to(self.dtype)
        registers = (
            torch.zeros(self.table.registers, *state, device=self.device) if self.table.registers else None
        )
        t = torch.zeros(
            u.shape[0], dtype=torch.int64 if self._whole_times else torch.float32, device=self.device
        )
        return _Batch(
            x,
            registers,
            u,
            t,
            self._packed.start(num),
            key,
            ids,
            kwargs,
            lanes.cond,
            lanes.uncond,
            lanes.scale,
        )

    def _rows(self, progress: bool) -> Any:
        """The rows in order, behind a progress bar if one is wanted."""
        rows = range(self.table.num_rows)
        if not progress:
            return rows
        from tqdm import tqdm

        return tqdm(rows, desc=self.table.name, unit="step", leave=False)

    def _step(self, row: int, batch: _Batch, noise: torch.Tensor | None) -> None:
        """One evaluation of the network and the fused update."""
        batch.row.fill_(row)
        batch.t.fill_(int(self.table.t[row]) if self._whole_times else float(self.table.t[row]))
        out = self.model(batch.u, batch.t, **batch.cond)
        out = out if isinstance(out, torch.Tensor) else out.sample
        if row == 0:
            self._check_output(out, batch.u.shape[0])
        torch.ops.fastdiff.reverse_step_(
            batch.x, batch.registers, out, None if batch.u is batch.x else batch.u, self._packed.coef,
            self._packed.plan, batch.row, batch.seed, batch.sample_id, batch.cond_lane, batch.uncond_lane,
            batch.guidance_scale, noise,
        )  # fmt: skip

    def _check_output(self, out: torch.Tensor, lanes: int) -> None:
        """The network's first output against the table's contract."""
        channels, *rest = self.shape
        wanted = (lanes, 2 * channels if self.table.learned else channels, *rest)
        if tuple(out.shape) == wanted:
            return
        hint = ""
        if tuple(out.shape) == (lanes, 2 * channels, *rest):
            hint = '; 2C channels mean a learned variance: say variance="learned_range" (or "learned")'
        elif self.table.learned and tuple(out.shape) == (lanes, channels, *rest):
            hint = '; a learned variance needs 2C channels: say variance="fixed_small" (or "fixed_large")'
        raise ValueError(
            f"`model` must return {wanted} for `shape` {self.shape}, got {tuple(out.shape)}{hint}"
        )

    def _noise_rows(self, batch: _Batch) -> Iterator[torch.Tensor | None]:
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
                or not any(self._reads_noise[row:])
                or cpu.library() is not None
            ):
                yield None
                row += 1
                continue
            rows = torch.arange(row, min(row + ahead, num_rows))
            draws = rows.repeat_interleave(batch.x.shape[0])
            z = ops.normal(self.shape, batch.seed.repeat(len(rows)), batch.sample_id.repeat(len(rows)), draws)
            yield from z.view(len(rows), *batch.x.shape)
            row += len(rows)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode for the time of a chain; the flag is put back."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
