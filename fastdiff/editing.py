"""Editing: chains that start from an image, keep a part of one, or run backwards, as tables made of tables.

    SDEdit      start at the level of row r:  x = alpha_r init + sigma_r z, and run the rest
    RePaint     after each step:  x = alpha' known + sigma' z where the image is known
    inversion   solve x' = F(x) for x, step by step from the clean end, F the sampler's own step

`Sampler.sample` and `Sampler.invert` are their faces. A step is a run of rows up to one that ends it; where
registers carry something over its start, it cannot be repeated, left out or solved for alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from fastdiff.levels import Level
from fastdiff.solvers.forms import OUT, X0, Form, Register, Row, X, assemble
from fastdiff.table import SamplingTable

_HEAD = ("t", "c_in", "x0_from_x", "x0_from_out", "log_var_min", "log_var_max")
_ROWS = (*_HEAD, "from_state", "from_x0", "from_out", "from_noise", "ends_step")


def steps_of(table: SamplingTable) -> list[tuple[int, int]]:
    """First and last row of each step."""
    lasts = sorted({*np.flatnonzero(table.ends_step).tolist(), table.num_rows - 1})
    return list(zip([0, *(last + 1 for last in lasts[:-1])], lasts, strict=True))


def require_levels(argument: str, table: SamplingTable) -> None:
    """Refuse to edit a chain that does not say how noisy its states are, or that makes them noisier.

    Raises:
        ValueError: a table without noise levels, or one that runs from clean to noisy.
    """
    if not table.sigma.any():
        why = "does not say how noisy its states are (alpha 1, sigma 0), so an image has no place in it"
    elif table.sigma[-1] * table.alpha[0] > table.sigma[0] * table.alpha[-1]:
        why = "runs from clean to noisy"
    else:
        return
    raise ValueError(f"`{argument}` needs a chain that removes noise, but {table.name!r} {why}")


def carries(table: SamplingTable) -> np.ndarray:
    """[rows] bool, whether registers that a row starts with are read there or later: a solver's history."""
    live = np.zeros((table.num_rows + 1, table.registers), bool)
    for row in reversed(range(table.num_rows)):
        wanted = np.append(True, live[row + 1])
        live[row] = np.any(table.from_state[row][wanted, 1:] != 0, axis=0)
    return np.array([bool(registers.any()) for registers in live[:-1]])


def last_steps(table: SamplingTable, steps: int) -> SamplingTable | None:
    """The rows of the last `steps` steps, or None where they read what earlier ones remember."""
    first = steps_of(table)[-steps][0]
    if first and carries(table)[first]:
        return None
    kept = {name: getattr(table, name)[first:] for name in (*_ROWS, "alpha", "sigma")}
    return replace(table, **kept)


class Ending(NamedTuple):
    """What happens to the state after a row that ends a step, as a packed table has it.

    known pixels:  x = alpha known + sigma y,   others:  x = ratio x + std y

    y is noise of its own, the same on both sides: normal(seed, sample_id, row, element) in domain 3.
    """

    alpha: float
    sigma: float
    ratio: float = 1.0
    std: float = 0.0


def repeated(table: SamplingTable, times: int) -> tuple[SamplingTable, dict[int, Ending]]:
    """RePaint's chain: each step but the last `times` times, and what its endings do.

    Between two runs of a step the state goes back over it by the forward chain, which is part of the ending:

        ratio = alpha/alpha',   std = sqrt(sigma^2 - ratio^2 sigma'^2)

    Args:
        times: U of Lugmayr et al. 2022, algorithm 1; 1 leaves the table as it is.
    Raises:
        ValueError: `times` is not a whole number of at least 1, or above 1 for a table whose steps read what
            earlier ones remember.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ValueError(f"`resample` must be a whole number of at least 1, got {times!r}")
    steps = steps_of(table)
    if times > 1 and carries(table)[[first for first, _ in steps]].any():
        raise ValueError(
            f"`resample` {times} goes back over a step, which {table.name!r} cannot: it remembers earlier "
            "steps; use a solver without a history, such as ddpm, ddim, euler or heun, or `resample` 1"
        )
    order: list[int] = []
    endings = {}
    for first, last in steps:
        runs = times if (first, last) != steps[-1] else 1
        for run in range(runs):
            order += range(first, last + 1)
            ending = Ending(float(table.alpha[last + 1]), float(table.sigma[last + 1]))
            if (first, last) == steps[-1]:
                ending = Ending(1.0, 0.0)  # exact, though some imported chains end a little noisy
            if run < runs - 1:
                alpha, sigma = float(table.alpha[first]), float(table.sigma[first])
                ratio = alpha / ending.alpha
                std = math.sqrt(max(0.0, (sigma - ratio * ending.sigma) * (sigma + ratio * ending.sigma)))
                ending = Ending(alpha, sigma, ratio, std)
            endings[len(order) - 1] = ending
    if times == 1:
        return table, endings
    columns = {name: getattr(table, name)[order] for name in _ROWS}
    ends = {name: getattr(table, name)[[*order, table.num_rows]] for name in ("alpha", "sigma")}
    return replace(table, **columns, **ends, exempt=("mean", "noise")), endings


def known_part(
    known: torch.Tensor, mask: torch.Tensor, state: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of an image that a chain must keep, as the step reads it: float32 and bool, both of `state`.

    Args:
        known: what broadcasts to [num, *shape].
        mask: the same, 1 or True where it is known (numbers: from 0.5 up).
        state: (num, *shape).
    Raises:
        ValueError: shapes that do not broadcast.
    Source: Lugmayr et al. 2022 (arXiv 2201.09865), eq. 8.
    """
    chosen = torch.as_tensor(mask)
    _require_broadcast("mask", chosen, state)
    chosen = chosen if chosen.dtype == torch.bool else chosen >= 0.5
    kept = image("known", known, state, device)
    return kept.contiguous(), chosen.to(device).expand(*state).contiguous()


def image(name: str, value: torch.Tensor, state: Sequence[int], device: torch.device) -> torch.Tensor:
    """An image argument as float32 [num, *shape] in memory of its own or broadcast.

    Raises:
        ValueError: a shape that does not broadcast to `state`.
    """
    tensor = torch.as_tensor(value).detach()
    _require_broadcast(name, tensor, state)
    return tensor.to(device, torch.float32).expand(*state)


def _require_broadcast(name: str, tensor: torch.Tensor, state: Sequence[int]) -> None:
    try:
        fits = torch.broadcast_shapes(tensor.shape, tuple(state)) == tuple(state)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"`{name}` must broadcast to [num, *shape] = {tuple(state)}, got {tuple(tensor.shape)}"
        )


def inverted(table: SamplingTable, iterations: int = 1) -> SamplingTable:
    """The chain from a clean sample back to the x_T from which the table makes it.

    A step x' = F(x) is solved for x by a fixed-point iteration, from x = x':

        x <- x + s (x' - F(x)),   s = alpha/alpha'  (where alpha is 0: sigma/sigma')

    For DDIM's step this is x = alpha (x'/alpha' + (sigma_ve - sigma_ve') eps(x)), so that one iteration is
    the usual DDIM inversion, with eps at x' and the time of x; more of them converge to the exact inverse
    where a step changes the network's output little. x0 is not clipped: where a clip bites, x' says nothing
    about x.

    Args:
        table: of a deterministic solver whose steps read nothing that earlier ones remember: ddim (eta 0),
            euler, heun, dpm_2, ...
        iterations: of each step, each as many evaluations as the step has.
    Returns:
        A table whose rows run from the clean end to the first level.
    Raises:
        ValueError: a solver that adds noise or keeps a history, a step without signal before it and without
            noise after it, or `iterations` below 1.
    Source: Song et al. 2020 (arXiv 2010.02502), sec. 4.3; Pan et al. 2023 (arXiv 2309.04907), the iteration.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"`iterations` must be a whole number of at least 1, got {iterations!r}")
    steps = steps_of(table)
    for wrong, why in (
        (table.from_noise.any(), "adds noise"),
        (carries(table)[[first for first, _ in steps]].any(), "remembers earlier steps"),
    ):
        if wrong:
            raise ValueError(
                f"only a deterministic solver without a history can be inverted, and {table.name!r} {why}; "
                'use solver="ddim" with eta 0, "euler", "heun" or "dpm_2"'
            )
    if any(table.alpha[first] == table.sigma[last + 1] == 0 for first, last in steps):
        raise ValueError(
            f"{table.name!r} cannot be inverted: its one step, from pure noise to the sample, keeps nothing "
            "of x; take more steps of a deterministic solver without a history"
        )
    rows: list[Row] = []
    order: list[int] = []
    for first, last in reversed(steps):
        before, after = (Level(0.0, table.alpha[r], table.sigma[r]) for r in (first, last + 1))
        gain = before.alpha / after.alpha if before.alpha else before.sigma / after.sigma
        goal = Register()
        for iteration in range(iterations):
            start: Form = X if first == last else Register()
            state = [X, *[Form({})] * table.registers]
            for row in range(first, last + 1):
                new = [_output(table, row, j, state) for j in range(len(state))]
                save: dict[Register, Form] = {}
                if row == first:
                    save |= {goal: X} if iteration == 0 else {}
                    save |= {start: X} if isinstance(start, Register) else {}
                if row == last:
                    new[0] = start + gain * ((goal if iteration else start) - new[0])
                kept = [Register() for _ in new[1:]]
                save |= dict(zip(kept, new[1:], strict=True))
                state = [X, *kept]
                entering = after if row == first and iteration == 0 else _level(table, row)
                ends = row == last and iteration == iterations - 1
                rows.append(Row(entering, new[0], save, ends_step=ends))
                order.append(row)
    _, alpha, sigma = np.array([row.level for row in rows] + [_level(table, 0)]).T
    columns = {name: getattr(table, name)[order] for name in _HEAD} | assemble(rows)
    columns |= {"alpha": alpha, "sigma": sigma, "ends_step": np.array([row.ends_step for row in rows])}
    return replace(
        table,
        **columns,  # type: ignore[arg-type]
        init_scale=1.0,
        clip=None,
        name=f"{table.name} inverted",
        exempt=("mean", "noise"),
    )


def _level(table: SamplingTable, row: int) -> Level:
    return Level(0.0, float(table.alpha[row]), float(table.sigma[row]))


def _output(table: SamplingTable, row: int, j: int, state: Sequence[Form]) -> Form:
    """Output j of a row as a form of what the row starts with."""
    total = table.from_x0[row, j] * X0 + table.from_out[row, j] * OUT
    for factor, form in zip(table.from_state[row, j], state, strict=True):
        total = total + factor * form
    return total


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """Spherical interpolation of initial noise, sample by sample: from a (weight 0) to b (weight 1).

        (sin((1 - w) angle) a + sin(w angle) b) / sin(angle),   angle between a and b

    Unlike a straight line it keeps the length that Gaussian noise has, on which networks rely.

    Args:
        a, b: [B, ...] floating point; [1, ...] goes with any B.
        weight: a number, or [B] of them, a path from one a to one b. Parallel a and b are joined by a line.
    Returns:
        [B, ...] of a's dtype.
    Raises:
        ValueError, TypeError: shapes that do not fit, or tensors that are not floating point.
    Source: Shoemake 1985; Song et al. 2020 (arXiv 2010.02502), app. D.5.
    """
    for name, tensor in (("a", a), ("b", b)):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"`{name}` must be a floating-point tensor, got {got}")
    w = torch.as_tensor(weight, dtype=torch.float32, device=a.device)
    sizes = {len(tensor) for tensor in (a, b, w) if tensor.dim()} - {1}
    if a.dim() < 2 or a.shape[1:] != b.shape[1:] or w.dim() > 1 or len(sizes) > 1:
        raise ValueError(
            "`a` and `b` must be [B, ...] of one shape and `weight` a number or [B], "
            f"got {tuple(a.shape)}, {tuple(b.shape)} and {tuple(w.shape)}"
        )
    unit_a, unit_b = (torch.nn.functional.normalize(tensor.float().flatten(1), dim=1) for tensor in (a, b))
    # exact for small angles too, where the arccosine of a product is not
    angle = 2.0 * torch.atan2((unit_a - unit_b).norm(dim=1), (unit_a + unit_b).norm(dim=1))
    sine = angle.sin()
    flat = sine < 1e-6
    shares = [
        torch.where(flat, share, (share * angle).sin() / torch.where(flat, 1.0, sine))
        for share in (1.0 - w, w)
    ]
    from_a, from_b = (share.view(-1, *[1] * (a.dim() - 1)) for share in shares)
    return (from_a * a.float() + from_b * b.float()).to(a.dtype)
