"""`fastdiff show`: a schedule, the levels of a chain or a solver's table as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "**Examples**\n\n"
    "Schedules side by side: `fastdiff show schedule --schedule linear,cosine --out schedules.png`\n\n"
    "Where a chain calls its network: `fastdiff show levels --levels karras --steps 20 --out levels.png`\n\n"
    "A solver: `fastdiff show table --solver unipc --steps 12 --option order=2 --out unipc.png`\n\n"
    "A table that `SamplingTable.save` wrote: `fastdiff show table --file mine.safetensors --out mine.png`"
)

# What each picture is made of: the options that it takes, beside --out.
_SCHEDULE = {"schedule", "timesteps", "zero_snr"}
_LEVELS = _SCHEDULE | {"steps", "spacing", "levels"}
_TABLE = _LEVELS | {"solver", "prediction", "variance", "option", "file"}
_USED = {"schedule": _SCHEDULE, "levels": _LEVELS, "table": _TABLE}


def show(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="schedule, levels or table.")],
    schedule: Annotated[
        str, typer.Option(help="linear, cosine, scaled_linear, sigmoid; `show schedule`: several, by commas.")
    ] = "linear",
    timesteps: Annotated[int, typer.Option(min=1, help="T, the length of the schedule.")] = 1000,
    zero_snr: Annotated[
        bool, typer.Option("--zero-snr", help="Rescale the schedule to end without signal.")
    ] = False,
    steps: Annotated[str, typer.Option(help="A number, `ddim50`, or sections such as `10,15,20`.")] = "12",
    spacing: Annotated[str, typer.Option(help="ddpm, leading, trailing, linspace.")] = "ddpm",
    levels: Annotated[
        str, typer.Option(help="schedule, or by formula: karras, exponential, polyexponential, vp, flow.")
    ] = "schedule",
    solver: Annotated[str, typer.Option(help="ddim, ddpm, ...: a file of fastdiff/solvers.")] = "ddim",
    prediction: Annotated[str, typer.Option(help="What the network predicts: eps, v, x0, flow, edm.")] = "v",
    variance: Annotated[
        str, typer.Option(help="ddpm: fixed_small, fixed_large, learned_range.")
    ] = "fixed_small",
    option: Annotated[
        list[str] | None, typer.Option(help="One of the solver's own, `name=value`; may be repeated.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Show this saved table in place of a solver.")] = None,
    out: Annotated[Path, typer.Option(help="The picture, `.png` and the like.")] = Path("show.png"),
) -> None:
    """Draw a noise schedule, the levels of a chain, or a solver's table: what it does, at a look."""
    from fastdiff import plots, words
    from fastdiff.solvers import compile_table
    from fastdiff.table import SamplingTable

    if what not in _USED:
        raise ValueError(f"`what` must be schedule, levels or table, got {what!r}")
    _refuse_unused(context, {"file"} if file is not None and what == "table" else _USED[what], what)
    if what == "schedule":
        named = {name: words.schedule(name, timesteps, zero_snr) for name in schedule.split(",")}
        plots.show_schedule(named, out)
    elif file is not None:
        try:
            table = SamplingTable.load(file)
        except ValueError as error:
            raise ValueError(str(error).replace("`path`", "`--file`")) from error
        plots.show_table(table, out)
    else:
        path = words.levels(levels, words.schedule(schedule, timesteps, zero_snr), steps, spacing)
        if what == "levels":
            plots.show_levels(path, out)
        else:
            options = words.options(option or [])
            table = compile_table(solver, path, prediction=prediction, variance=variance, **options)
            plots.show_table(table, out)
    typer.echo(f"wrote {out}")


def _refuse_unused(context: typer.Context, used: set[str], what: str) -> None:
    """Refuse an option that was given and would change nothing.

    Raises:
        ValueError: its name, and what the picture is made of.
    """
    given = [
        name
        for name in context.params
        if (source := context.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"
    ]
    if unused := [name for name in given if name not in {*used, "what", "out"}]:
        flags = [f"--{name.replace('_', '-')}" for name in (unused[0], *sorted(used))]
        raise ValueError(
            f"`{flags[0]}` does not belong to what is shown, {what} of {', '.join(flags[1:])}; leave it out"
        )
