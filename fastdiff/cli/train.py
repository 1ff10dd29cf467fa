"""`fastdiff train`: a network from images."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import options

EXAMPLES = (
    "**Examples**\n\n"
    "The embedded model's data, in minutes on a CPU: `fastdiff train --data digits --out runs/digits`\n\n"
    "A folder with a sub-folder for each class: `fastdiff train "
    "--data photos --size 32 --out runs/photos`\n\n"
    "Go on after a kill, bit for bit: the same command with `--resume`\n\n"
    "Then: `fastdiff sample --model runs/digits/model --out samples.png`"
)


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
    factors = options.numbers("--mult", mult)
    images = load_data(data, size=size, holdout=holdout, skip_bad=skip_bad)
    torch.manual_seed(seed)
    network = UNet(
        images.shape[0],
        model_channels=channels,
        channel_mult=factors,
        num_res_blocks=blocks,
        attention_levels=options.numbers("--attention", attention),
        head_channels=math.gcd(32, *(channels * factor for factor in factors)),
        dropout=dropout,
        num_classes=images.num_classes or 0,
    ).to(options.device(device))
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
        labels = options.labels(None, 100, images.num_classes or 0)
        cond = None if labels is None else {"labels": labels}
        return sampler.sample(100, cond=cond, guidance_scale=1.0 if labels is None else 2.0)

    return grid
