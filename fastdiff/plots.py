"""Pictures of schedules, levels and tables: what a sampler does, at a look. They need matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.clip import described
from fastdiff.files import atomic_path
from fastdiff.levels import NoiseLevels
from fastdiff.pictures import check_target
from fastdiff.schedule import NoiseSchedule
from fastdiff.table import SamplingTable

_SIGNAL, _NOISE, _THIRD, _GREY = "#1b4f8f", "#c8452f", "#3f7f3f", "#8a8a8a"
_COLOURS = (_SIGNAL, _NOISE, _THIRD, "#8f5aa8", "#c98a1b")
_ANNOTATED = 26  # rows whose coefficients still fit into their cells as numbers


def show_schedule(schedules: Mapping[str, NoiseSchedule], path: str | os.PathLike[str]) -> Path:
    """Draw alpha_bar, log-SNR, alpha and sigma, and beta over t, for one schedule or several side by side.

    Args:
        schedules: name -> schedule.
        path: file to write, `.png` and the like; its folder exists.
    Returns:
        The path written.
    Raises:
        ValueError: a path that cannot be written.
        ImportError: matplotlib is not installed.
    """
    target = check_target(path)
    figure = _figure(11, 7)
    axes = figure.subplots(2, 2)
    titles = (
        "alpha_bar: the share of signal power",
        "log-SNR = log(alpha² / sigma²)",
        "alpha (line) and sigma (dashed)",
        "beta: noise added by each step",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        _style(axis, title, "t")
    for i, (name, schedule) in enumerate(schedules.items()):
        t, colour = schedule.timesteps, _COLOURS[i % len(_COLOURS)]
        axes[0, 0].plot(t, schedule.alpha_bar, color=colour, label=name)
        axes[0, 1].plot(t, _finite(2.0 * schedule.lam), color=colour)
        axes[1, 0].plot(t, schedule.alpha, color=colour)
        axes[1, 0].plot(t, schedule.sigma, color=colour, linestyle="--")
        axes[1, 1].plot(t, schedule.betas, color=colour)
    axes[1, 1].set_yscale("log")
    axes[0, 1].axhline(0.0, color=_GREY, linewidth=0.8)
    axes[0, 0].legend(frameon=False)
    counts = ", ".join(f"{name} T={len(schedule)}" for name, schedule in schedules.items())
    figure.suptitle(f"noise schedule: {counts}", x=0.02, ha="left", weight="bold")
    return _save(figure, target)


def show_levels(
    levels: NoiseLevels, path: str | os.PathLike[str], schedule: NoiseSchedule | None = None
) -> Path:
    """Draw where a chain calls its network: sigma_ve, log-SNR, alpha and sigma, and t of every step.

    Args:
        levels: the path of a chain.
        path: as for `show_schedule`.
        schedule: what the network was trained on, drawn behind the levels; by default the levels' own.
    Returns, Raises: as `show_schedule`.
    """
    target = check_target(path)
    schedule = schedule or levels.schedule
    figure = _figure(11, 7)
    axes = figure.subplots(2, 2)
    step = np.arange(len(levels))  # without the clean end, which has no logarithm
    marks: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1}
    _style(axes[0, 0], "sigma_ve = sigma / alpha, logarithmic", "step")
    axes[0, 0].plot(step, _finite(levels.sigma_ve[:-1]), color=_NOISE, **marks)
    axes[0, 0].set_yscale("log")
    _style(axes[0, 1], "log-SNR: each step's length is what a solver feels", "step")
    lam = np.array([level.lam for level in levels.levels[:-1]])
    axes[0, 1].plot(step, _finite(2.0 * lam), color=_SIGNAL, **marks)
    _style(axes[1, 0], "alpha (signal) and sigma (noise)", "step")
    axes[1, 0].plot(np.arange(len(levels) + 1), levels.alpha, color=_SIGNAL, label="alpha", **marks)
    axes[1, 0].plot(np.arange(len(levels) + 1), levels.sigma, color=_NOISE, label="sigma", **marks)
    axes[1, 0].legend(frameon=False)
    if schedule is None:
        _style(axes[1, 1], "t: what the network is told", "step")
        axes[1, 1].plot(step, levels.t[:-1], color=_THIRD, **marks)
    else:
        _style(axes[1, 1], "the steps on the schedule's log-SNR", "t")
        axes[1, 1].plot(schedule.timesteps, _finite(2.0 * schedule.lam), color=_GREY, linewidth=1)
        axes[1, 1].plot(levels.t[:-1], _finite(2.0 * lam), "o", color=_SIGNAL, markersize=4)
    figure.suptitle(
        f"noise levels: {len(levels)} steps, path {levels.path!r}", x=0.02, ha="left", weight="bold"
    )
    return _save(figure, target)


def show_table(table: SamplingTable, path: str | os.PathLike[str]) -> Path:
    """Draw a solver: its levels, what each next x is made of, and every coefficient of every row.

    In the large panel a line is a row and a box an output: x0, the next x, the registers. A grey cell is a
    term that is not there, which the kernel neither reads nor computes. Dotted lines end the steps of more
    than one row.

    Args:
        table: a sampler.
        path: as for `show_schedule`.
    Returns, Raises: as `show_schedule`.
    """
    target = check_target(path)
    groups = _groups(table)
    cells = sum(max(len(names), 1) + 0.6 for _, names, _, _ in groups)
    figure = _figure(4.5 + max(5.0, 0.55 * cells), max(7.0, min(2.5 + 0.26 * table.num_rows, 12.0)))
    grid = figure.add_gridspec(2, 2, width_ratios=[4.0, max(5.0, 0.55 * cells)])
    rows = np.arange(table.num_rows)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = 2.0 * (np.log(table.alpha[:-1]) - np.log(table.sigma[:-1]))
    dot = "." if table.num_rows <= 4 * _ANNOTATED else ""
    levels = figure.add_subplot(grid[0, 0])
    _style(levels, "log-SNR of the x that enters each row", "row")
    levels.plot(rows, _finite(log_snr), color=_SIGNAL, linewidth=1)
    inner = np.append(False, ~table.ends_step[:-1])
    size = 4 if dot else 0
    levels.plot(
        rows[~inner], _finite(log_snr)[~inner], "o", color=_SIGNAL, markersize=size, label="a step starts"
    )
    if inner.any():
        levels.plot(
            rows[inner], _finite(log_snr)[inner], "o", color=_SIGNAL, markerfacecolor="white",
            markersize=size, label="inner stage",
        )  # fmt: skip
        levels.legend(frameon=False)
    made = figure.add_subplot(grid[1, 0])
    _style(made, "what the next x is made of", "row")
    history = np.abs(table.from_state[:, 0, 1:]).sum(axis=1)
    for values, label, colour in (
        (table.from_state[:, 0, 0], "x", _SIGNAL),
        (table.from_x0[:, 0], "x0", _THIRD),
        (table.from_out[:, 0], "out", "#c98a1b"),
        (table.from_noise[:, 0], "fresh noise", _NOISE),
        (history, "registers, |sum|", "#8f5aa8"),
    ):
        if values.any():
            made.plot(rows, values, color=colour, label=label, marker=dot, markersize=5, linewidth=1)
    made.axhline(0.0, color=_GREY, linewidth=0.8)
    if np.abs(made.get_ylim()).max() > 4:
        made.set_yscale("symlog", linthresh=1.0)
    made.legend(frameon=False, fontsize=8)
    _draw_coefficients(figure.add_subplot(grid[:, 1]), table, groups)
    noise = "adds noise" if table.from_noise.any() else "deterministic"
    figure.suptitle(
        f"{table.name}: {table.num_rows} evaluations, {int(table.ends_step.sum())} steps, "
        f"{table.registers} register{'s' * (table.registers != 1)}, {noise}, {described(table.clip)}",
        x=0.02, ha="left", weight="bold",
    )  # fmt: skip
    return _save(figure, target)


def show_latencies(seconds: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw how long calls took: a histogram of each series, with its median and its 99th percentile.

    Args:
        seconds: name -> [calls] seconds.
        path: as for `show_schedule`.
    Returns, Raises: as `show_schedule`; ValueError: a series without calls.
    """
    target = check_target(path)
    series = {name: 1e3 * np.asarray(values, dtype=np.float64) for name, values in seconds.items()}
    if not series or any(not values.size for values in series.values()):
        raise ValueError("`seconds` must hold series of at least one call each; measure some")
    figure = _figure(9, 1.2 + 2.2 * len(series))
    axes = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
    # What lies beyond is counted in the last bin: one long call must not squeeze the others into a line.
    end = 1.3 * max(np.percentile(values, 99) for values in series.values())
    bins = np.linspace(0.9 * min(values.min() for values in series.values()), end, 80)
    for axis, (name, values) in zip(axes, series.items(), strict=True):
        p50, p99 = np.percentile(values, (50, 99))
        title = (
            f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {len(values)} calls, longest {values.max():.1f} ms"
        )
        _style(axis, title, "ms; the last bin holds what is longer" if axis is axes[-1] else "")
        axis.hist(values.clip(max=end), bins=bins, color=_SIGNAL)
        axis.axvline(p50, color=_THIRD, linewidth=1.2, label="p50")
        axis.axvline(p99, color=_NOISE, linewidth=1.2, linestyle="--", label="p99")
        axis.set_ylabel("calls")
    axes[0].legend(frameon=False)
    return _save(figure, target)


def show_shares(chains: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> Path:
    """Draw where the time of a row goes: a bar for each chain, a colour for each part.

    Args:
        chains: name -> part -> seconds of one row; the parts of all chains are those of the first.
        path: as for `show_schedule`.
    Returns, Raises: as `show_schedule`.
    """
    target = check_target(path)
    figure = _figure(9, 1.4 + 0.7 * len(chains))
    axis = figure.subplots()
    _style(axis, "", "share of a row's time")
    names = list(chains)
    left = np.zeros(len(names))
    totals = np.array([sum(parts.values()) for parts in chains.values()])
    for part, colour in zip(next(iter(chains.values())), (_GREY, _SIGNAL, _NOISE, _THIRD), strict=True):
        seconds = np.array([parts[part] for parts in chains.values()])
        width = seconds / np.maximum(totals, 1e-12)
        axis.barh(names, width, left=left, color=colour, label=part, height=0.6)
        for y, share in enumerate(width):
            if share > 0.04:
                axis.text(left[y] + share / 2, y, f"{share:.0%}", ha="center", va="center", color="white")
        left += width
    for y, total in enumerate(totals):
        axis.text(1.01, y, f"{1e6 * total:.0f} µs", va="center", fontsize=9)
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_locator(_plain_locator())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.grid(axis="y", visible=False)
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    return _save(figure, target)


def _plain_locator() -> Any:
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(0.2)


def show_bound(bounds: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]) -> Path:
    """Draw the terms of the variational bound and the errors of x0 and eps over t, a line for each model.

    Args:
        bounds: name -> terms by rising t, each with first_t, last_t, bits_per_dim, low, high, x0_mse and
            eps_mse, as `fastdiff eval` writes them; the last is the prior's and has no errors.
        path: as for `show_schedule`.
    Returns, Raises: as `show_schedule`.
    """
    target = check_target(path)
    figure = _figure(12, 4.6)
    axes = figure.subplots(1, 3)
    titles = ("bits/dim of each term", "mean squared error of x0", "mean squared error of eps")
    for axis, title in zip(axes, titles, strict=True):
        _style(axis, title, "t + 1")
        axis.set_xscale("log")
        axis.set_yscale("log")
    for i, (name, rows) in enumerate(bounds.items()):
        colour, mark, terms = _COLOURS[i % len(_COLOURS)], "." if len(rows) <= 60 else "", rows[:-1]
        total = sum(row["count"] * row["bits_per_dim"] for row in rows)
        label = f"{name}: {total:.3f}, of it the prior {rows[-1]['bits_per_dim']:.2g}"
        t = [math.sqrt((row["first_t"] + 1) * (row["last_t"] + 1)) for row in terms]
        for axis, key in zip(axes, ("bits_per_dim", "x0_mse", "eps_mse"), strict=True):
            axis.plot(t, [row[key] for row in terms], color=colour, marker=mark, label=label)
        ends = ([max(row[key], 0.0) for row in terms] for key in ("low", "high"))
        axes[0].fill_between(t, *ends, color=colour, alpha=0.15, linewidth=0)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("the variational bound, term by term", x=0.02, ha="left", weight="bold")
    return _save(figure, target)


def _groups(table: SamplingTable) -> list[tuple[str, list[str], np.ndarray, np.ndarray]]:
    """Of each output: its name, the terms that any row has, their coefficients, rows that only keep it."""
    state = ["x", *(f"r{k}" for k in range(1, table.registers + 1))]
    x0 = np.stack([table.x0_from_x, table.x0_from_out], axis=1)
    found = [("x0 =", ["x", "out"], x0, np.zeros(table.num_rows, bool))]
    for j, name in enumerate(state):
        parts = (table.from_x0, table.from_out, table.from_noise)
        columns = np.column_stack([table.from_state[:, j], *(part[:, j] for part in parts)])
        kept = np.array([j > 0 and bool((row == np.eye(columns.shape[1])[j]).all()) for row in columns])
        found.append((f"{name}' =", [*state, "x0", "out", "z"], columns, kept))
    shown = []
    for title, names, columns, kept in found:
        used = np.flatnonzero(columns.any(axis=0)).tolist()
        shown.append((title, [names[i] for i in used], columns[:, used], kept))
    return shown


def _draw_coefficients(axis: Any, table: SamplingTable, groups: list[Any]) -> None:
    """The rows as a map of colours; a coefficient 0 stays blank."""
    places: list[float] = []
    labels: list[str] = []
    left, height = 0.0, table.num_rows
    for title, names, columns, kept in groups:
        width = max(len(names), 1)
        shown = np.where((columns == 0) | kept[:, None], np.nan, np.arcsinh(columns))
        axis.add_patch(_box(left, width, height))
        if names:
            axis.imshow(
                shown, cmap="RdBu_r", vmin=-math.asinh(3), vmax=math.asinh(3), aspect="auto",
                extent=(left, left + width, height - 0.5, -0.5), interpolation="nearest", zorder=2,
            )  # fmt: skip
        if height <= _ANNOTATED:
            for (row, column), value in np.ndenumerate(columns):
                if value != 0:
                    colour = _GREY if kept[row] else "white" if abs(value) > 1.8 else "black"
                    axis.text(
                        left + column + 0.5, row, "kept" if kept[row] else _short(value), color=colour,
                        ha="center", va="center", fontsize=6.5, zorder=3,
                    )  # fmt: skip
        axis.annotate(
            title, (left + width / 2, -0.5), (0, 4), textcoords="offset points", ha="center", weight="bold"
        )
        places += [left + i + 0.5 for i in range(len(names))]
        labels += names
        left += width + 0.6
    if not table.ends_step.all() and height <= 4 * _ANNOTATED:
        for row in np.flatnonzero(table.ends_step)[:-1]:
            axis.axhline(row + 0.5, color="black", linewidth=0.7, linestyle=":", zorder=4)
    axis.set_xlim(-0.1, left - 0.5)
    axis.set_ylim(height - 0.48, -0.52)
    axis.set_xticks(places, labels, fontsize=8)
    axis.tick_params(length=0)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("row")
    axis.set_title("every coefficient; grey: a term that is not there", fontsize=10, loc="left", pad=18)
    for side in axis.spines.values():
        side.set_visible(False)


def _short(value: float) -> str:
    return f"{value:.2g}" if abs(value) < 99.5 else f"{value:.0f}"


def _box(left: float, width: int, height: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (left, -0.5), width, height, facecolor="#dcdcdc", edgecolor=_GREY, linewidth=0.8, zorder=1
    )


def _finite(values: np.ndarray) -> np.ndarray:
    """Infinities, of alpha 0, as gaps."""
    return np.where(np.isfinite(values), values, np.nan)


def _style(axis: Any, title: str, along: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(along)
    axis.grid(color="#e4e4e4", linewidth=0.6)
    axis.set_axisbelow(True)
    if along != "t":
        axis.xaxis.get_major_locator().set_params(integer=True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib; install it with `pip install matplotlib` "
            "or `pip install 'fastdiff-engine[bench]'`"
        ) from error
    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _save(figure: Any, target: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    with atomic_path(target) as temporary:
        Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()).save(temporary)
    return target
