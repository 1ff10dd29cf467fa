"""From a tape to a table: rows are assembled, the noise gets one symbol, x0 its column, and registers go.

What a driver (diffusers, k-diffusion) knows about each evaluation comes as `Heads`. At the end the other
project's code runs once more, on random numbers, and every state must be the table's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fastdiff.adapters import operations as ops
from fastdiff.adapters.basis import LEARNED, Epoch, Refused, Tape
from fastdiff.adapters.observable import reduce_registers
from fastdiff.clip import Clip
from fastdiff.editing import carries
from fastdiff.kernels.layout import MAX_REGISTERS
from fastdiff.levels import Level
from fastdiff.solvers.forms import Form, Row, assemble
from fastdiff.table import SamplingTable

SELF_CHECK_TOL = 1e-5  # other projects keep their schedules in float32
LEARNED_VALUES = (1.0, -1.0, 0.0)  # of v: the ends of the learned range, and its middle as a check
_EXACT_TOL, _ROUNDED_TOL = 1e-9, 1e-4  # of the final comparison, without and with float32 inside
_EPS = float(np.finfo(np.float64).eps)
_PROBE_SCALES = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64).reshape(3, 1, 1, 1)  # of its samples
_PROBE_SHAPE = (3, 3, 2, 3)


@dataclass(frozen=True)
class Heads:
    """What is known of each evaluation besides the tape; the attributes of `SamplingTable` of these names.

    `x0_from_x` and `x0_from_out` may hold NaN where nobody knows how x0 follows from the output: such a row
    uses the output as it is. With `ends_step` None a step ends where nothing of it is remembered.
    """

    t: np.ndarray
    c_in: np.ndarray
    x0_from_x: np.ndarray
    x0_from_out: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    ends_step: np.ndarray | None
    init_scale: float
    exempt: tuple[str, ...] = ()


def compile_tapes(tapes: Sequence[Tape], heads: Heads) -> tuple[SamplingTable, np.ndarray]:
    """The table of a tape, and weights [rows, draws] of the sampler's draws in each row's one noise.

    Args:
        tapes: one, or with a learned variance one for each of `LEARNED_VALUES`.
    Raises:
        ValueError: coefficients that are not finite, two independent noises in one row, clips that differ, or
            a learned variance that is not an interpolation of logarithms.
    """
    tape = tapes[0]
    weights = np.stack([_noise_weights(tape, row, epoch) for row, epoch in enumerate(tape.epochs)])
    raw = [_columns(tape, weights) for tape in tapes]
    columns = raw[0]
    log_var = _log_variances(tape, raw)
    px, po, clip = _predicted_x0(tape, heads)
    columns = reduce_registers(_through_x0(columns, px, po, clipped=clip is not None))
    registers = columns["from_state"].shape[1] - 1
    if registers > MAX_REGISTERS:
        raise Refused(
            f"{tape.name} cannot be imported: it remembers {registers} tensors of earlier evaluations, and a "
            f"table that runs has at most {MAX_REGISTERS} registers; give it a shorter history"
        )
    known = np.isfinite(px) & np.isfinite(po)
    table = SamplingTable(
        t=heads.t,
        c_in=heads.c_in,
        x0_from_x=np.where(known, px, 0.0),
        x0_from_out=np.where(known, po, 1.0),
        log_var_min=log_var[:, 0],
        log_var_max=log_var[:, 1],
        **columns,
        alpha=heads.alpha,
        sigma=heads.sigma,
        ends_step=np.ones(len(heads.t), bool) if heads.ends_step is None else heads.ends_step,
        init_scale=heads.init_scale,
        clip=clip,
        name=tape.name,
        learned=tape.learned is not None,
        exempt=heads.exempt,
    )
    if heads.ends_step is None:
        table = replace(table, ends_step=_ends_by_memory(table))
    return table, weights


def _ends_by_memory(table: SamplingTable) -> np.ndarray:
    """[rows] whether nothing but x goes on after a row; a sampler that never forgets has one-row steps."""
    ends = ~np.append(carries(table)[1:], False)
    return ends if ends[:-1].any() else np.ones_like(ends)


def _noise_weights(tape: Tape, row: int, epoch: Epoch) -> np.ndarray:
    """[draws] what each draw contributes to a row's noise; of length 1, or 0 where no noise is used.

    Several draws are one noise where everything reads them in the same proportion.
    """
    outputs = np.stack([coords for coords in (epoch.x, *epoch.saved.values()) if coords is not None])
    if not np.isfinite(outputs).all():
        raise Refused(f"{tape.name} cannot be imported: in row {row} a coefficient is not finite")
    if outputs[:, LEARNED].any():
        raise Refused(f"{tape.name} cannot be imported: in row {row} the variance channels enter the sample")
    draws = np.zeros((len(outputs), tape.draws))
    for slot, symbol in enumerate(epoch.symbols):
        if isinstance(symbol, tuple):
            draws[:, symbol[1]] = outputs[:, slot]
    used = np.flatnonzero(draws.any(axis=0))
    weights = np.zeros(tape.draws)
    if len(used) == 1:
        weights[used] = 1.0
    elif len(used):
        _, sizes, directions = np.linalg.svd(draws[:, used])
        if len(sizes) > 1 and sizes[1] > 1e-12 * sizes[0]:
            raise Refused(
                f"{tape.name} cannot be imported: row {row} needs two independent noises, and a row has one z"
            )
        weights[used] = directions[0] * np.sign(directions[0][0])
    return weights


def _columns(tape: Tape, weights: np.ndarray) -> dict[str, np.ndarray]:
    """from_state, from_x0, from_out and from_noise as the tape has them."""
    rows = []
    for epoch, drawn in zip(tape.epochs, weights, strict=True):

        def form(coords: Any, epoch: Epoch = epoch, drawn: np.ndarray = drawn) -> Form:
            terms: dict[Any, float] = {}
            for slot in np.flatnonzero(coords[: len(epoch.symbols)]):
                symbol, value = epoch.symbols[slot], float(coords[slot])
                if isinstance(symbol, tuple):
                    symbol, value = "z", value * float(drawn[symbol[1]])
                terms[symbol] = terms.get(symbol, 0.0) + value
            return Form(terms)

        saved = {register: form(coords) for register, coords in epoch.saved.items()}
        rows.append(Row(Level(0.0, 1.0, 0.0), form(epoch.x), saved))
    return assemble(rows)


def _log_variances(tape: Tape, raw: Sequence[dict[str, np.ndarray]]) -> np.ndarray:
    """[rows, 2] log_var_min and log_var_max; where they are not 0, x's noise in raw[0] becomes a sign."""
    rows = len(tape.epochs)
    log_var = np.zeros((rows, 2))
    if len(raw) == 1:
        return log_var
    high, low, middle = (columns["from_noise"][:, 0].copy() for columns in raw)
    learned = high != low
    fixed = [_but_noise_of_x(columns) for columns in raw]
    same = all(np.array_equal(a, b) for other in fixed[1:] for a, b in zip(fixed[0], other, strict=True))
    if not same or not np.allclose(middle**2, high * low, rtol=1e-9, atol=0.0):
        raise Refused(
            f"{tape.name} cannot be imported: its learned variance is no interpolation of logarithms, "
            "exp((w log_var_max + (1 - w) log_var_min) / 2), w = (v + 1) / 2"
        )
    log_var[learned] = 2.0 * np.log(np.abs(np.stack([low, high], axis=1)[learned]))
    raw[0]["from_noise"][learned, 0] = np.sign(high[learned])
    return log_var


def _but_noise_of_x(columns: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [value[:, 1:] if name == "from_noise" else value for name, value in columns.items()]


def _predicted_x0(tape: Tape, heads: Heads) -> tuple[np.ndarray, np.ndarray, Clip]:
    """x0_from_x, x0_from_out and the clip; a row that clips says itself what its x0 is."""
    px, po = heads.x0_from_x.copy(), heads.x0_from_out.copy()
    clips: list[Clip] = []
    for row, epoch in enumerate(tape.epochs):
        if epoch.clipped is not None:
            px[row], po[row], clip = epoch.clipped
            clips += [clip] if clip not in clips else []
    if len(clips) > 1:
        found = ", ".join(map(str, clips))
        raise Refused(f"{tape.name} cannot be imported: it clips x0 to {found}, a table in one way")
    return px, po, next(iter(clips), None)


def _through_x0(
    columns: dict[str, np.ndarray], px: np.ndarray, po: np.ndarray, *, clipped: bool
) -> dict[str, np.ndarray]:
    """The output written as x0, out = (x0 - px x)/po; a chain that clips keeps its own choice of the two."""
    usable = np.isfinite(px) & np.isfinite(po) & (po != 0)
    if clipped:
        return columns
    share = columns["from_out"] / np.where(usable, po, 1.0)[:, None]
    share[~usable] = 0.0
    state = columns["from_state"].copy()
    taken = np.where(usable, px, 0.0)[:, None] * share
    left = state[:, :, 0] - taken
    # What cancels to the last bits was meant to cancel: x is then not read.
    rest = np.abs(left) <= 4.0 * _EPS * (np.abs(state[:, :, 0]) + np.abs(taken))
    state[:, :, 0] = np.where(rest & (taken != 0), 0.0, left)
    return {
        "from_state": state,
        "from_x0": columns["from_x0"] + share,
        "from_out": np.where(usable[:, None], 0.0, columns["from_out"]),
        "from_noise": columns["from_noise"],
    }


class Numbers(TorchFunctionMode):
    """Replays a sampler on real numbers: every normal it draws comes from here and is kept.

    Args:
        scale: of what is drawn, a number or what broadcasts to it; a linear sampler cannot tell.
    Attributes:
        draws: [evaluations + 1] lists of float64 normals, the first list of before the first evaluation.
    """

    def __init__(self, seed: int = 0, scale: float | torch.Tensor = 1.0) -> None:
        super().__init__()
        self.draws: list[list[torch.Tensor]] = [[]]
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Any) -> torch.Tensor:
        """Float64 normals of scale 1 that do not count as a draw."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def evaluate(self) -> None:
        """The network is called: later draws belong to this evaluation."""
        self.draws.append([])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ops.NORMAL:
            return func(*args, **kwargs)
        shape, dtype = ops.shape_and_dtype(args, kwargs)
        z = (self._scale * self.normal(shape)).to(dtype)
        self.draws[-1].append(z.to(torch.float64, copy=True))  # the sampler may write into its own
        return z


class ProbeNetwork:
    """A bounded, non-linear, time-dependent network for a table, that notes every state it is asked about.

    Its x0 is 1.3 scale tanh(x / scale + cos t): now and then outside of a clip range of the sample's scale.
    """

    def __init__(self, table: SamplingTable) -> None:
        self.table = table
        self.states: list[torch.Tensor] = []

    def __call__(self, u: torch.Tensor, t: Any) -> torch.Tensor:
        row = len(self.states)
        table = self.table
        if row == table.num_rows:
            raise ValueError(f"the network is evaluated more than {row} times")
        u = u.to(torch.float64, copy=True)  # the sampler may go on in place
        self.states.append(u)
        px, po, c_in = (float(column[row]) for column in (table.x0_from_x, table.x0_from_out, table.c_in))
        x = u / c_in if c_in else u
        shift = np.cos(float(torch.as_tensor(t).flatten()[0]))
        x0 = 1.3 * _PROBE_SCALES * torch.tanh(x / _PROBE_SCALES + shift)
        out = (x0 - px * x) / po if po else x0
        return torch.cat([out, torch.tanh(2.0 * x / _PROBE_SCALES)], dim=1) if table.learned else out


def confirm(
    table: SamplingTable,
    weights: np.ndarray,
    run: Callable[[ProbeNetwork, Numbers, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    *,
    rounds: bool,
) -> None:
    """Run the original on random numbers and demand that the table goes through the same states.

    The samples of its batch are of different sizes, beyond any clip and far within: what is linear cannot
    tell. Where a chain starts at a large sigma they are smaller, as what the original rounds is then not the
    difference of large ones.

    Args:
        weights: [rows, draws] of the draws in each row's noise.
        run: (network, numbers, x_T) -> (the state that entered row 0, the result), by the original's code.
        rounds: whether the original rounds to less than float64.
    Raises:
        ValueError: the first row whose result differs: something there is not linear, or depends on the data.
    """
    numbers = Numbers(scale=_PROBE_SCALES / max(1.0, table.init_scale))
    network = ProbeNetwork(table)
    failed = f"{table.name} cannot be imported: on random numbers it"
    try:
        x, result = run(network, numbers, _PROBE_SCALES * numbers.normal(_PROBE_SHAPE))
    except Exception as error:  # whatever a stranger's code raises
        raise Refused(f"{failed} fails with {type(error).__name__}: {error}") from error
    draws = [z for zs in numbers.draws for z in zs]
    if (len(network.states), len(draws)) != weights.shape:
        raise Refused(
            f"{failed} evaluates the network or draws noise another number of times than on a basis"
        )
    noise = [
        sum((float(used[n]) * draws[n] for n in np.flatnonzero(used)), torch.zeros_like(x))
        for used in weights
    ]
    ours = ProbeNetwork(table)
    end = table.evaluate(ours, x, noise)
    tol = _ROUNDED_TOL if rounds else _EXACT_TOL
    pairs = zip([*network.states[1:], result.double()], [*ours.states[1:], end], strict=True)
    for row, (theirs, mine) in enumerate(pairs):
        scale = theirs.abs().amax(dim=(1, 2, 3), keepdim=True).maximum(_PROBE_SCALES)
        gap = float(((theirs - mine).abs() / scale).max())
        if not gap <= tol:
            raise Refused(
                f"{failed} takes another step {row} than its row (relative error {gap:.3g}): something "
                "there is not linear or depends on the data"
            )


def warn_of_misses(table: SamplingTable) -> None:
    """Warn where an imported table misses the marginals of its levels by more than float32 explains."""
    try:
        table.check(SELF_CHECK_TOL)
    except ValueError as error:
        warnings.warn(f"imported as it is, but by its own levels {error}", stacklevel=3)
