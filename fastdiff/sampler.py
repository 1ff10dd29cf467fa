"""A chain: the network and the fused step, one row of the sampling table after the other.

A sampler holds what does not change from call to call: the network, its table, shapes. `sample` checks one
call's arguments, starts a batch on a program (chain.py: the table on its device) and walks down its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastdiff import editing, ops
from fastdiff.chain import Batch, Moment, Program, evaluating, walk
from fastdiff.clip import Clip, clip_from_config
from fastdiff.execution import Execution
from fastdiff.lanes import Condition, Lanes, conditions, has_null_class
from fastdiff.levels import NoiseLevels
from fastdiff.nn import UNet, load_config
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import compile_table
from fastdiff.spacing import space_timesteps
from fastdiff.table import SamplingTable

Seeds = int | Sequence[int] | torch.Tensor
Guidance = float | Sequence[float] | torch.Tensor
_Edited = tuple[SamplingTable, Mapping[int, editing.Ending]]
_Known = tuple[torch.Tensor, torch.Tensor] | None
_KEPT_PROGRAMS = 16  # of edited tables: strengths, resamplings and inversions in use


class Sampler:
    """Samples from a network with any solver, by one fused operator per evaluation.

    Args:
        model: any callable `(x, t, **cond) -> Tensor` (or an object with `.sample`); 2C output channels
            with a learned variance. It must not write to x, which may be the chain's own state.
        schedule: the noise schedule that it was trained with. Give `table` instead to bring your own sampler.
        solver: a solver's name, or a function like those in fastdiff/solvers.
        steps: evaluations' times, as `space_timesteps` takes them: a number, "ddim50", "10,15,20"; None:
            all of the schedule's.
        prediction: what the network predicts: "eps", "x0", "v", ...
        variance: "fixed_small", "fixed_large", "learned", "learned_range".
        clip: the range of x0, an `fd.DynamicThreshold`, or None.
        shape: shape of one sample, e.g. (3, 32, 32).
        device: where the chain runs; the model's device by default.
        dtype: dtype of the network's input; the model's by default. The model is never cast, the state is
            float32.
        spacing: how `steps` times are chosen: "ddpm", "leading", "trailing", "linspace".
        table: a `SamplingTable` in place of schedule, solver, steps, prediction, variance and clip.
        graph: whether a step is captured in a CUDA graph. "auto": on a GPU, where the model is a
            `torch.nn.Module` that can be; True: any callable, whose parameters then must stay where they are.
        compile: whether the network is compiled. True: before the first chain, or torch.compile's way where
            it cannot be exported, or on a GPU, which takes a U-Net whole, its embedding too. "auto": on a
            CPU, in the background, once the time spent in its chains shows that it pays; a later chain then
            differs in the network's last bits. Compiled networks lie on disk and follow their weights.
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
        clip: Clip = (-1.0, 1.0),
        shape: Sequence[int],
        device: Any = None,
        dtype: torch.dtype | None = None,
        spacing: str = "ddpm",
        table: SamplingTable | None = None,
        graph: bool | str = "auto",
        compile: bool | str = "auto",
        **options: Any,
    ) -> None:
        if not callable(model):
            raise TypeError(f"`model` must be callable as model(x, t, **cond), got {type(model).__name__}")
        if (schedule is None) == (table is None):
            got = "neither" if table is None else "both"
            raise ValueError(f"give either `schedule` (with a solver's name) or `table`, got {got}")
        for name, value, kind in (("schedule", schedule, NoiseSchedule), ("table", table, SamplingTable)):
            if not isinstance(value, kind | None):
                raise TypeError(f"`{name}` must be a {kind.__name__}, got {type(value).__name__}")
        self._levels: NoiseLevels | None = None
        self._compile: Callable[..., SamplingTable] | None = None
        if table is None:
            assert schedule is not None
            times = space_timesteps(
                len(schedule.betas), len(schedule.betas) if steps is None else steps, spacing=spacing
            )
            self._levels = NoiseLevels.from_schedule(schedule, times)
            self._compile = partial(
                compile_table, solver, prediction=prediction, variance=variance, clip=clip, **options
            )
            table = self._compile(levels=self._levels)
        elif options:
            option = next(iter(options))
            raise TypeError(
                f"`{option}` is a solver's option, but `table` is compiled; compile_table takes it"
            )
        try:
            self.shape = tuple(operator.index(size) for size in shape)
        except TypeError:
            self.shape = ()
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"`shape` must be the shape of one sample, e.g. (3, 32, 32), got {shape!r}")
        first = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        self.model = model
        self.table = table
        self.device = torch.device(device or (first.device if first is not None else "cpu"))
        self.dtype = dtype or (first.dtype if first is not None else torch.float32)
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point:
            raise ValueError(f"`dtype` must be a floating torch.dtype, got {self.dtype!r}")
        self._execution = Execution(self.device, graph, compile)
        self._program = Program(table, self.device, self.dtype)
        self._edits: dict[tuple[Any, ...], Program] = {}

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
        if "clip" in settings:
            settings["clip"] = clip_from_config(settings["clip"])
        model = UNet.from_pretrained(name).to(device=device, dtype=dtype).eval()
        if "table" in overrides:
            settings = {"shape": settings["shape"]}
        return cls(model, device=device, dtype=dtype, **{**settings, **overrides})

    def sample(
        self,
        num: int,
        *,
        seed: Seeds = 0,
        sample_ids: Sequence[int] | torch.Tensor | None = None,
        cond: Condition | None = None,
        uncond: Condition | None = None,
        guidance_scale: Guidance = 1.0,
        noise: torch.Tensor | None = None,
        x_T: torch.Tensor | None = None,
        init: torch.Tensor | None = None,
        strength: float | None = None,
        known: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        resample: int = 1,
        progress: bool = False,
        callback: Callable[[Moment], object] | None = None,
        trajectory: bool = False,
    ) -> Any:
        """Run one chain for `num` samples.

        Args:
            num: how many samples.
            seed: 64 bits, for all samples or [num] of them. Noise depends on nothing but seed, sample id, row
                and element.
            sample_ids: [num] identities in [0, 2^32), by default 0..num-1: `sample(8)[3]` is `sample(1,
                sample_ids=[3])[0]`.
            cond: keyword arguments of the network, each [num, ...] or one value for all.
            uncond: the same for its unconditional evaluation. None: an `fd.UNet`'s null class; other
                networks must give it.
            guidance_scale: w of out = uncond + w (cond - uncond), one for all or [num]; 1 evaluates the
                network once.
            noise: [rows, num, ...] normals used in place of the steps' own, row r in row r of the table that
                runs: `strength` shortens it, `resample` repeats its rows. Known pixels keep noise of theirs.
            x_T: [num, ...] the state at the first level itself.
            init: [num, ...] or one for all, an image to start from part of the way down the chain (SDEdit).
            strength: how much of the chain runs from there, in (0, 1]: its last round(strength * steps)
                steps, at least 1. A solver with a history is compiled anew from that level; in place of
                its `table` give one that starts there (`NoiseLevels.last`), and 1.
            known: [num, ...] or one for all, an image of which a part is kept (RePaint).
            mask: where it is kept, 1 or True: [H, W], [num, 1, H, W] or like x. Those pixels come out exact.
            resample: how often each step but the last is run, with forward noise in between, so that the
                rest fits the known part better; for solvers without a history.
            progress: show a progress bar.
            callback: called with a `Moment` after each row that ends a step.
            trajectory: also return the states.

        Returns:
            [num, *shape] float32 on the chain's device; with `trajectory` the pair (samples, states), states
            [steps+1, num, *shape] from the start to the sample.

        Raises:
            ValueError: arguments that do not fit, before any work.
        """
        for pair in ({"init": init, "strength": strength}, {"known": known, "mask": mask}):
            missing = [name for name, value in pair.items() if value is None]
            if len(missing) == 1:
                raise ValueError(f"give `{'` and `'.join(pair)}` together; `{missing[0]}` is missing")
        if init is not None and x_T is not None:
            raise ValueError("give `init` or `x_T`, got both: each says where the chain starts")
        if known is None and resample != 1:
            raise ValueError(f"`resample` needs `known` and `mask`, got {resample} without them")
        edited = strength is not None or known is not None
        program = self._edit(strength, resample) if edited else self._program
        key, ids = self._key(num, seed, sample_ids)
        state = (num, *self.shape)
        if x_T is not None:
            x = self._own(x_T, "x_T", num)
        else:
            x = ops.normal(self.shape, key, ids, draw=0, domain=0)
            if init is None:
                x.mul_(program.table.init_scale)
            else:
                x.mul_(float(program.table.sigma[0]))
                x.add_(float(program.table.alpha[0]) * editing.image("init", init, state, self.device))
        part = None
        if known is not None and mask is not None:
            part = editing.known_part(known, mask, state, self.device)
        if noise is not None:
            _require_shape("noise", noise, (program.table.num_rows, *state), "[rows, num, *shape]")
        given = (cond or {}, uncond, guidance_scale)
        batch = self._start(program, x, key, ids, *given, part, callback is not None)
        return self._run(program, batch, noise, progress, callback, trajectory)

    def invert(
        self,
        x: torch.Tensor,
        *,
        iterations: int = 1,
        cond: Condition | None = None,
        uncond: Condition | None = None,
        guidance_scale: Guidance = 1.0,
        progress: bool = False,
        callback: Callable[[Moment], object] | None = None,
        trajectory: bool = False,
    ) -> Any:
        """The x_T from which this sampler makes x, for solvers that add no noise: DDIM inversion.

        `sampler.sample(len(x), x_T=sampler.invert(x))` is x again, up to an error that falls with the number
        of steps, and much faster with `iterations`.

        Args:
            x: [num, *shape] clean samples.
            iterations: of the fixed-point iteration for each step (`editing.inverted`); 1 is the usual
                inversion, with as many evaluations as sampling.
            cond, uncond, guidance_scale, progress, callback, trajectory: as in `sample`.

        Returns:
            [num, *shape] float32; with `trajectory` the pair (x_T, states), states from x to x_T.

        Raises:
            ValueError: a solver that adds noise or remembers earlier steps; arguments that do not fit.
        """
        program = self._kept(("inverted", iterations), lambda: (editing.inverted(self.table, iterations), {}))
        num = len(x)
        key, ids = self._key(num, 0, None)  # no row draws
        given = (cond or {}, uncond, guidance_scale)
        batch = self._start(program, self._own(x, "x", num), key, ids, *given, None, callback is not None)
        return self._run(program, batch, None, progress, callback, trajectory)

    def _edit(self, strength: float | None, resample: int) -> Program:
        """The program of a call that starts from an image or keeps a part of one."""
        editing.require_levels("known" if strength is None else "strength", self.table)
        steps = all_steps = len(editing.steps_of(self.table))
        if strength is not None:
            if not 0.0 < strength <= 1.0:
                raise ValueError(f"`strength` must be in (0, 1], 1 for the whole chain, got {strength!r}")
            steps = max(1, round(strength * all_steps))

        def make() -> _Edited:
            table = editing.last_steps(self.table, steps)
            if table is None:
                if self._compile is None or self._levels is None:
                    raise ValueError(
                        f"`strength` {strength} starts `table` {self.table.name!r} at a step that reads what "
                        "earlier ones remember; give `strength` 1 and a table that starts there, compiled "
                        f"from levels.last({steps}) or imported behind scheduler.set_begin_index(k), or use "
                        "a solver without a history"
                    )
                table = self._compile(levels=self._levels.last(steps))
            return editing.repeated(table, resample)

        return self._kept((steps, resample), make)

    def _kept(self, key: tuple[Any, ...], make: Callable[[], _Edited]) -> Program:
        """The program of an edited table, made when it is first used."""
        found = self._edits.get(key)
        if found is None:
            table, endings = make()
            found = Program(table, self.device, self.dtype, endings)
            if len(self._edits) >= _KEPT_PROGRAMS:
                self._edits.clear()
            self._edits[key] = found
        return found

    def _key(
        self,
        num: int,
        seed: int | Sequence[int] | torch.Tensor,
        sample_ids: Sequence[int] | torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise's key of each sample."""
        if isinstance(num, bool) or not hasattr(num, "__index__") or num < 0:
            raise ValueError(f"`num` must be a whole number of at least 0, got {num!r}")
        if isinstance(sample_ids, torch.Tensor) and sample_ids.device.type == "cpu":
            sample_ids = sample_ids.tolist()  # whose values are checked; on a device that would stop it
        return ops.noise_key(seed, num if sample_ids is None else sample_ids, num, self.device)

    def _own(self, x: torch.Tensor, name: str, num: int) -> torch.Tensor:
        """A state that a user gives, copied."""
        _require_shape(name, x, (num, *self.shape), "[num, *shape]")
        return x.detach().to(self.device, torch.float32, copy=True, memory_format=torch.contiguous_format)

    def _start(
        self,
        program: Program,
        x: torch.Tensor,
        key: torch.Tensor,
        ids: torch.Tensor,
        cond: Condition,
        uncond: Condition | None,
        guidance_scale: Guidance,
        known: _Known,
        preview: bool,
    ) -> Batch:
        """Check what the network is to be given, and allocate the buffers."""
        num = len(x)
        lanes = Lanes(guidance_scale, num, self.device)
        if lanes.guided and uncond is None:
            if not cond:
                raise ValueError("`guidance_scale` other than 1 needs `cond`, what the network is guided to")
            if not has_null_class(self.model):
                raise ValueError(
                    "`uncond` must be given with a `guidance_scale` other than 1: the network's arguments "
                    "without a condition; only an fd.UNet with classes knows its own"
                )
            uncond = {"labels": -1}
        kwargs = conditions(self.model, cond, uncond if lanes.guided else None, num, lanes.order, self.device)
        return program.start(x, key, ids, lanes, kwargs, known, preview)

    def _run(
        self,
        program: Program,
        batch: Batch,
        noise: torch.Tensor | None,
        progress: bool,
        callback: Callable[[Moment], object] | None,
        trajectory: bool,
    ) -> Any:
        """Walk down the rows."""
        drawn = program.noise_rows(batch) if noise is None else iter(noise.to(self.device, torch.float32))
        running = self._execution.steps(self.model, program, batch, noise is not None)
        with evaluating(self.model), torch.inference_mode(), running as (step, in_use):
            states = walk(program.table, in_use, step, drawn, progress, callback, trajectory)
        return (batch.x, states) if trajectory else batch.x


def _require_shape(name: str, value: Any, shape: tuple[int, ...], words: str) -> None:
    if not isinstance(value, torch.Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"`{name}` must be a tensor {words} = {shape}, got {got}")
