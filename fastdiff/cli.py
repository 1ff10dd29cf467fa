"""The command line: `fastdiff sample`, `fastdiff train`, `fastdiff show`, `fastdiff doctor`."""

from __future__ import annotations

import functools
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.doctor import EXAMPLES, doctor

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

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, FloatingPointError, ImportError) as error:
            typer.secho(f"fastdiff: {_as_options(str(error))}", fg="red", err=True)
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
}  # fmt: skip


def _as_options(message: str) -> str:
    """A library's message with its arguments in backticks named as the options that they come from."""

    def option(found: re.Match[str]) -> str:
        return f"`--{_OPTIONS[found[1]]}`" if found[1] in _OPTIONS else found[0]

    return re.sub(r"`([a-z_=A-Z]+)`", option, message)


@app.command(
    epilog="**Examples**\n\n"
    "A grid of every class: `fastdiff sample --out samples.png`\n\n"
    "64 sevens: `fastdiff sample --class 7 --num 64 --guidance 2 --out sevens.png`\n\n"
    "How noise becomes a digit: `fastdiff sample --num 10 --trajectory --out strip.png`\n\n"
    "A data set: `fastdiff sample --num 10000 --solver ddpm --steps 1000 --out digits.npz`\n\n"
    "Your own model: `fastdiff sample --model runs/digits/model --out mine.png`"
)
@_plain_errors
def sample(
    model: Annotated[
        str, typer.Option(help="An embedded model, or a folder that `fastdiff train` wrote.")
    ] = "digits",
    num: Annotated[int, typer.Option(min=1, help="How many samples.")] = 100,
    class_: Annotated[
        str | None, typer.Option("--class", help="A class, or several: `7` or `3,7`. All in turn by default.")
    ] = None,
    solver: Annotated[str, typer.Option(help="ddim, ddpm, ...: a file of fastdiff/solvers.")] = "ddim",
    steps: Annotated[str, typer.Option(help="A number, `ddim50`, or sections such as `10,15,20`.")] = "50",
    eta: Annotated[float | None, typer.Option(help="ddim: share of DDPM's noise, 0 to 1.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 is none; 2 for a network with classes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same samples, whatever the batch size.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples in one pass of the network.")] = 100,
    trajectory: Annotated[bool, typer.Option("--trajectory", help="Write the denoising strip.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(help="`.png` writes a grid, `.npz` uint8 NHWC `arr_0`.")] = Path(
        "samples.png"
    ),
) -> None:
    """Sample from a trained model, and write a picture or an archive."""
    from fastdiff import pictures
    from fastdiff.sampler import Sampler

    pictures.check_target(out, (".npz",) if not trajectory else ())
    if trajectory and num > 100:
        raise ValueError(f"`--trajectory` draws a line for each sample, at most 100, got --num {num}")
    chain: dict[str, Any] = {"solver": solver, "steps": int(steps) if steps.isdecimal() else steps}
    if eta is not None:
        chain["eta"] = eta
    sampler = Sampler.from_pretrained(
        model,
        device=_device(device),
        **chain,
    )
    labels = _labels(class_, num, getattr(sampler.model, "num_classes", 0))
    scale = guidance if guidance is not None else 1.0 if labels is None else 2.0
    if not math.isfinite(scale):
        raise ValueError(f"`guidance` must be a finite number, got {guidance}")
    if labels is None and scale != 1:
        raise ValueError(f"`guidance` is for networks with classes, this one has none, got {guidance}")
    started = time.perf_counter()
    images, states = _chain(sampler, num, seed, labels, scale, batch, trajectory)
    seconds = time.perf_counter() - started
    if trajectory:
        pictures.save_strip(states, out)
    elif out.suffix.lower() == ".npz":
        pictures.save_npz(images, out, labels)
    else:
        pictures.save_grid(images, out, columns=_columns(num))
    size = "x".join(map(str, sampler.shape))
    typer.echo(
        f"wrote {out}: {num} samples of {size}, {sampler.table.name} in {sampler.table.num_rows} steps, "
        f"{seconds:.2f} s on {sampler.device} ({num / seconds:.1f} samples/s)"
    )


def _chain(
    sampler: Any, num: int, seed: int, labels: Any, guidance: float, batch: int, trajectory: bool
) -> tuple[Any, Any]:
    """All samples on the CPU, `batch` at a time, behind one progress bar; and the states if wanted."""
    import torch
    from tqdm import tqdm

    ends = int(sampler.table.ends_step.sum())
    images, states = [], []
    with tqdm(total=ends * -(-num // batch), desc="sampling", unit="step", leave=False) as bar:
        for first in range(0, num, batch):
            ids = range(first, min(first + batch, num))
            result = sampler.sample(
                len(ids),
                seed=seed,
                sample_ids=ids,
                cond=None if labels is None else {"labels": labels[first : first + len(ids)]},
                guidance_scale=guidance,
                callback=lambda moment: bar.update(),
                trajectory=trajectory,
            )
            if trajectory:
                states.append(result[1].cpu())
                result = result[0]
            images.append(result.cpu())
    return torch.cat(images), torch.cat(states, dim=1) if trajectory else None


def _labels(chosen: str | None, num: int, num_classes: int) -> Any:
    """[num] classes: the chosen ones, or all, in equal runs; None for a network without classes."""
    import torch

    if not num_classes:
        if chosen is not None:
            raise ValueError(
                f"`--class` is for networks with classes, this one has none, got {chosen!r}; leave it out"
            )
        return None
    try:
        classes = list(range(num_classes)) if chosen is None else [int(part) for part in chosen.split(",")]
    except ValueError:
        raise ValueError(f"`--class` must be numbers such as 7 or 3,7, got {chosen!r}") from None
    if outside := [c for c in classes if not 0 <= c < num_classes]:
        raise ValueError(f"`--class` must be in 0..{num_classes - 1}, got {outside[0]}")
    return torch.tensor([classes[i * len(classes) // num] for i in range(num)])


def _columns(num: int) -> int | None:
    """Ten a line where that fills lines, so that ten classes stand one a line at --num 100."""
    return 10 if num % 10 == 0 and num <= 400 else None


def _device(chosen: str | None) -> Any:
    """The chosen device, or a GPU if there is one, else the CPU.

    Raises:
        ValueError: it does not exist here.
    """
    import torch

    if chosen is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=chosen).device
    except (RuntimeError, AssertionError) as error:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        there = ", ".join(["cpu", *gpus, *["mps"] * torch.backends.mps.is_available()])
        raise ValueError(f"`--device` must be one of {there} here, got {chosen!r}") from error


@app.command(
    epilog="**Examples**\n\n"
    "The embedded model's data, in minutes on a CPU: `fastdiff train --data digits --out runs/digits`\n\n"
    "A folder with a sub-folder for each class: `fastdiff train "
    "--data photos --size 32 --out runs/photos`\n\n"
    "Go on after a kill, bit for bit: the same command with `--resume`\n\n"
    "Then: `fastdiff sample --model runs/digits/model --out samples.png`"
)
@_plain_errors
def train(
    data: Annotated[str, typer.Option(help="`digits`, a folder of images, or FILE.npz.")],
    out: Annotated[Path, typer.Option(help="The run's folder: log, curve, grids, checkpoints, model.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps.")] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 128,
    lr: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 1e-3,
    lr_schedule: Annotated[str, typer.Option(help="constant, or cosine: down to 0 at the end.")] = "cosine",
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 200,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.0,
    ema: Annotated[
        float, typer.Option(help="Decay of the averaged weights, which sample and are saved.")
    ] = 0.995,
    label_dropout: Annotated[float, typer.Option(help="Share of labels dropped; guidance needs some.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Same seed, same weights.")] = 0,
    size: Annotated[int | None, typer.Option(help="Scale and crop images to this many pixels.")] = None,
    holdout: Annotated[float, typer.Option(help="Share of every class kept from training.")] = 0.0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unreadable images, by name.")
    ] = False,
    schedule: Annotated[str, typer.Option(help="cosine, linear, scaled_linear, sigmoid.")] = "cosine",
    timesteps: Annotated[int, typer.Option(min=1, help="T, the length of the chain.")] = 1000,
    prediction: Annotated[str, typer.Option(help="What the network predicts: eps, v, x0.")] = "v",
    loss: Annotated[str, typer.Option(help="simple, min_snr.")] = "simple",
    channels: Annotated[int, typer.Option(help="Channels of the finest level.")] = 32,
    mult: Annotated[str, typer.Option(help="Their factor at each level.")] = "1,2",
    blocks: Annotated[int, typer.Option(help="Residual blocks of a level.")] = 2,
    attention: Annotated[
        str, typer.Option(help="Levels with self-attention, 0 the finest; empty: none.")
    ] = "1",
    dropout: Annotated[float, typer.Option(help="Dropout in the residual blocks.")] = 0.1,
    sample_every: Annotated[int, typer.Option(min=1, help="Steps between sample grids.")] = 1000,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the saved model: float32, float16, bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a GPU if there is one.")] = None,
) -> None:
    """Train a U-Net on images, with checkpoints, sample grids and a loss curve."""
    import torch

    from fastdiff import words
    from fastdiff.nn import UNet
    from fastdiff.train import Objective, TrainConfig, Trainer, load_data

    noise_schedule = words.schedule(schedule, timesteps)
    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    if dtype not in dtypes:
        raise ValueError(f"`--dtype` must be one of {', '.join(dtypes)}, got {dtype!r}")
    config = TrainConfig(
        steps=steps, batch_size=batch, lr=lr, lr_schedule=lr_schedule, warmup=warmup,
        weight_decay=weight_decay, ema_decay=ema, label_dropout=label_dropout, seed=seed,
        sample_every=sample_every, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    factors = _numbers("--mult", mult)
    images = load_data(data, size=size, holdout=holdout, skip_bad=skip_bad)
    torch.manual_seed(seed)
    network = UNet(
        images.shape[0],
        model_channels=channels,
        channel_mult=factors,
        num_res_blocks=blocks,
        attention_levels=_numbers("--attention", attention),
        head_channels=math.gcd(32, *(channels * factor for factor in factors)),
        dropout=dropout,
        num_classes=images.num_classes or 0,
    ).to(_device(device))
    objective = Objective(noise_schedule, prediction=prediction, loss=loss)
    typer.echo(
        f"{len(images)} images of {'x'.join(map(str, images.shape))}, {network.num_parameters:,} parameters"
    )
    trainer = Trainer(
        network, objective, images, config, out, resume=resume, sample_fn=_grid_of(objective, images),
        about={"command": shlex.join(["fastdiff", *sys.argv[1:]])},
    )  # fmt: skip
    result = trainer.run()
    if dtype != "float32" and result.model_path is not None:
        trainer.save_pretrained(result.model_path, dtype=dtypes[dtype])
    typer.echo(
        f"trained {result.steps} steps in {result.seconds:.0f} s "
        f"({result.samples_per_s:.0f} samples/s), loss {result.loss:.4f}\n"
        f"next: fastdiff sample --model {shlex.quote(str(result.model_path))} --out samples.png"
    )


def _grid_of(objective: Any, images: Any) -> Callable[[Any], Any]:
    """The grid that training writes every so often: DDIM-50, ten samples of every class, guidance 2."""

    def grid(model: Any) -> Any:
        from fastdiff.sampler import Sampler

        sampler = Sampler(
            model,
            objective.schedule,
            steps=min(50, len(objective.schedule)),
            prediction=objective.prediction,
            variance=objective.variance,
            shape=images.shape,
        )
        labels = _labels(None, 100, images.num_classes or 0)
        cond = None if labels is None else {"labels": labels}
        return sampler.sample(100, cond=cond, guidance_scale=1.0 if labels is None else 2.0)

    return grid


def _numbers(option: str, text: str) -> list[int]:
    """`1,2` -> [1, 2]."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"`{option}` must be numbers such as 1,2, got {text!r}") from None


@app.command(
    epilog="**Examples**\n\n"
    "Schedules side by side: `fastdiff show schedule --schedule linear,cosine --out schedules.png`\n\n"
    "Where a chain calls its network: `fastdiff show levels --levels karras --steps 20 --out levels.png`\n\n"
    "A solver: `fastdiff show table --solver unipc --steps 12 --option order=2 --out unipc.png`\n\n"
    "A table that `SamplingTable.save` wrote: `fastdiff show table --file mine.safetensors --out mine.png`"
)
@_plain_errors
def show(
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

    if what not in ("schedule", "levels", "table"):
        raise ValueError(f"`what` must be schedule, levels or table, got {what!r}")
    if what == "schedule":
        named = {name: words.schedule(name, timesteps, zero_snr) for name in schedule.split(",")}
        plots.show_schedule(named, out)
    elif file is not None and what == "table":
        plots.show_table(SamplingTable.load(file), out)
    else:
        path = words.levels(levels, words.schedule(schedule, timesteps, zero_snr), steps, spacing)
        if what == "levels":
            plots.show_levels(path, out)
        else:
            options = words.options(option or [])
            table = compile_table(solver, path, prediction=prediction, variance=variance, **options)
            plots.show_table(table, out)
    typer.echo(f"wrote {out}")


app.command(epilog=EXAMPLES)(_plain_errors(doctor))


if __name__ == "__main__":
    main()
