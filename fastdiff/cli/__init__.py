"""The command line: one file for each command, `fastdiff sample`, `fastdiff train` and so on.

A command is a function of typer's annotated options with its `EXAMPLES`; what it needs is imported when it
runs, so that `--help` answers at once. A library's error becomes one line that names the option.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import typer

from fastdiff.cli import bench, doctor, evaluate, sample, show, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Train the reverse chain of a diffusion model, and sample from it by one fused kernel a step.\n\n"
    "    fastdiff sample --model digits --out samples.png\n\n"
    "    fastdiff train --data digits --out runs/digits",
)


def main() -> None:
    """The entry point `fastdiff`."""
    app()


def _plain_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake, a full disk, a missing file: one line on stderr and status 2, no traceback."""
    takes = {name.replace("_", "-") for name in inspect.signature(command).parameters}

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
            typer.secho(f"fastdiff: {_as_options(str(error), takes)}", fg="red", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.secho("fastdiff: stopped; a training goes on with --resume", fg="red", err=True)
            raise typer.Exit(130) from None

    return wrapped


_OPTIONS = {
    "seed": "seed", "guidance": "guidance", "steps": "steps", "eta": "eta", "solver": "solver", "lr": "lr",
    "out_dir": "out", "path": "out", "source": "data", "name_or_path": "model", "name": "model",
    "guidance_scale": "guidance", "resume=True": "resume", "skip_bad=True": "skip-bad",
    "attention_levels": "attention", "channel_mult": "mult", "model_channels": "channels",
    "num_res_blocks": "blocks", "batch_size": "batch", "ema_decay": "ema", "num_timesteps": "timesteps",
    "quantile": "threshold", "holdout": "holdout", "times": "times", "variance": "variance",
    "value_range": "value-range", "layout": "layout", "crop": "crop", "grad_clip": "grad-clip", "amp": "amp",
    "accumulate": "accumulate", "keep_checkpoints": "keep", "lr_schedule": "lr-schedule", "warmup": "warmup",
    "label_dropout": "label-dropout", "weight_decay": "weight-decay", "cache": "cache", "compile": "compile",
    "resume": "resume",
    "example": "shape",
}  # fmt: skip


def _as_options(message: str, takes: set[str]) -> str:
    """A library's message with its arguments in backticks named as options, where the command has them."""

    def option(found: re.Match[str]) -> str:
        return f"`--{name}`" if (name := _OPTIONS.get(found[1])) in takes else found[0]

    return re.sub(r"`([a-z_=A-Z]+)`", option, message)


for _module in (sample, train, evaluate, show, doctor, bench):
    _command = getattr(_module, _module.__name__.rpartition(".")[2])
    app.command(getattr(_module, "NAME", None), epilog=_module.EXAMPLES)(_plain_errors(_command))
