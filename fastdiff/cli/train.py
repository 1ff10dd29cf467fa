"""`fastdiff train`: a network from images."""

from __future__ import annotations

import math
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import options

EXAMPLES = (
    "**Examples**\n\n"
    "The embedded model's data, in minutes on a CPU: `fastdiff train --data digits --out runs/digits`\n\n"
    "A folder with a sub-folder for each class: `fastdiff train "
    "--data photos --size 40 --crop 32 --flip --out runs/photos`\n\n"
    "Bytes or numbers of your own: `fastdiff train --data images.npz --value-range 0,1 --out runs/mine`\n\n"
    "On a GPU, faster: `--amp bf16 --compile`. Memory too small for the batch: `--accumulate 4`\n\n"
    "On all GPUs of a machine: `torchrun --nproc-per-node 8 -m fastdiff train ...`; the batch is shared "
    "out, the losses stay those of one process\n\n"
    "Go on after a kill, bit for bit: the same command with `--resume`; so it may go on with another number "
    "of processes\n\n"
    "Then: `fastdiff sample --model runs/digits/model --out samples.png`; of a second `--ema` decay, "
    "`--model runs/digits/model-ema-0.9999`\n\n"
    "**What a run leaves in --out**\n\n"
    "log.jsonl (each step's loss, also by quarters of the chain), loss.png, samples/, checkpoints/, model/, "
    "run.json"
)

_data = partial(typer.Option, rich_help_panel="Data")
_network = partial(typer.Option, rich_help_panel="Network")
_diffusion = partial(typer.Option, rich_help_panel="Diffusion")
_optimisation = partial(typer.Option, rich_help_panel="Optimisation")
_speed = partial(typer.Option, rich_help_panel="Speed and memory")
_files = partial(typer.Option, rich_help_panel="Files")


def train(
    data: Annotated[str, _data(help="`digits`, a folder of images, or FILE.npz or .npy.")],
    out: Annotated[Path, _files(help="The run's folder: log, curve, grids, checkpoints, model.")],
    size: Annotated[int | None, _data(help="Scale and crop images to this many pixels.")] = None,
    crop: Annotated[
        int | None, _data(help="Train on random windows of this many pixels; give a larger --size.")
    ] = None,
    flip: Annotated[
        bool, _data("--flip", help="Mirror half of the images, at random, left to right.")
    ] = False,
    value_range: Annotated[
        str | None, _data(help="FILE.npz: the values of black and white, such as 0,1; needed for floats.")
    ] = None,
    layout: Annotated[
        str | None, _data(help="FILE.npz: NHWC or NCHW, where the shape leaves it open.")
    ] = None,
    cache: Annotated[
        Path | None, _data(help="Folder: keep the decoded images there, not in memory, for later runs too.")
    ] = None,
    holdout: Annotated[float, _data(help="Share of every class kept from training.")] = 0.0,
    skip_bad: Annotated[bool, _data("--skip-bad", help="Leave out unreadable images, by name.")] = False,
    label_dropout: Annotated[float, _data(help="Share of labels dropped; guidance needs some.")] = 0.1,
    steps: Annotated[int, _optimisation(min=1, help="Optimisation steps.")] = 3000,
    batch: Annotated[int, _optimisation(min=1, help="Samples a step, of all processes together.")] = 128,
    lr: Annotated[float, _optimisation(help="AdamW's learning rate.")] = 1e-3,
    lr_schedule: Annotated[str, _optimisation(help="constant, or cosine: down to 0 at the end.")] = "cosine",
    warmup: Annotated[int, _optimisation(help="Steps of linear warm-up.")] = 200,
    weight_decay: Annotated[float, _optimisation(help="AdamW's weight decay.")] = 0.0,
    grad_clip: Annotated[float, _optimisation(help="The gradient's largest norm; 0: not clipped.")] = 1.0,
    ema: Annotated[
        str,
        _optimisation(help="Decay of the averaged weights, or several: each is saved, the first samples."),
    ] = "0.995",
    seed: Annotated[int, _optimisation(help="Same seed, same weights.")] = 0,
    schedule: Annotated[str, _diffusion(help="cosine, linear, scaled_linear, sigmoid.")] = "cosine",
    timesteps: Annotated[int, _diffusion(min=1, help="T, the length of the chain.")] = 1000,
    prediction: Annotated[str, _diffusion(help="What the network predicts: eps, v, x0.")] = "v",
    loss: Annotated[str, _diffusion(help="simple, min_snr, hybrid, vlb.")] = "simple",
    variance: Annotated[
        str, _diffusion(help="fixed_small, fixed_large; hybrid and vlb train learned_range or learned.")
    ] = "fixed_small",
    times: Annotated[
        str, _diffusion(help="uniform; loss_aware: by importance, for vlb; log_normal: as EDM trains.")
    ] = "uniform",
    channels: Annotated[int, _network(help="Channels of the finest level.")] = 32,
    mult: Annotated[str, _network(help="Their factor at each level.")] = "1,2",
    blocks: Annotated[int, _network(help="Residual blocks of a level.")] = 2,
    attention: Annotated[str, _network(help="Levels with self-attention, 0 the finest; empty: none.")] = "1",
    dropout: Annotated[float, _network(help="Dropout in the residual blocks.")] = 0.1,
    amp: Annotated[
        str | None, _speed(help="bf16: compute in bfloat16; weights and state stay float32.")
    ] = None,
    compile: Annotated[
        bool, _speed("--compile", help="torch.compile the network; minutes at first, then faster.")
    ] = False,
    accumulate: Annotated[
        int, _speed(min=1, help="Compute the batch in this many parts: less memory, same gradient.")
    ] = 1,
    prefetch: Annotated[int, _speed(min=0, help="Batches prepared ahead, beside the step.")] = 2,
    device: Annotated[str | None, _speed(help="cpu, cuda, cuda:1, mps; a GPU if there is one.")] = None,
    sample_every: Annotated[int, _files(min=1, help="Steps between sample grids.")] = 1000,
    checkpoint_every: Annotated[int, _files(min=1, help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, _files(min=1, help="How many of the last checkpoints stay.")] = 2,
    resume: Annotated[bool, _files("--resume", help="Go on with the run in --out.")] = False,
    dtype: Annotated[str, _files(help="Of the saved model: float32, float16, bfloat16.")] = "float32",
) -> None:
    """Train a U-Net on images, with checkpoints, sample grids and a loss curve."""
    import torch

    from fastdiff import words
    from fastdiff.nn import UNet
    from fastdiff.train import Objective, TrainConfig, Trainer, load_data
    from fastdiff.train.ranks import Ranks
    from fastdiff.train.stop import Stopped
    from fastdiff.train.times import times_of

    objective = Objective(words.schedule(schedule, timesteps), prediction, variance, loss)
    chosen = times_of(times, objective.schedule)
    dtypes = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
    if dtype not in dtypes:
        raise ValueError(f"`--dtype` must be one of {', '.join(dtypes)}, got {dtype!r}")
    config = TrainConfig(
        steps=steps, batch_size=batch, lr=lr, lr_schedule=lr_schedule, warmup=warmup,
        weight_decay=weight_decay, grad_clip=grad_clip or None, label_dropout=label_dropout, seed=seed,
        ema_decay=tuple(options.numbers("--ema", ema, float)), flip=flip, crop=crop, amp=amp, compile=compile,
        accumulate=accumulate, prefetch=prefetch, sample_every=sample_every,
        checkpoint_every=checkpoint_every, keep_checkpoints=keep,
    )  # fmt: skip
    factors = options.numbers("--mult", mult)
    place = options.device(device)
    ranks = Ranks.join(place)
    scale: Any = value_range and tuple(options.numbers("--value-range", value_range, float))
    load = partial(
        load_data, data, size=size, holdout=holdout, skip_bad=skip_bad, value_range=scale, layout=layout,
        cache=cache,
    )  # fmt: skip
    images = _loaded(load, ranks, first_alone=cache is not None)
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
        learned_variance=objective.learned_variance,
    ).to(place)
    if ranks.first:
        shape = "x".join(map(str, images.shape))
        typer.echo(f"{len(images)} images of {shape}, {network.num_parameters:,} parameters")
    trainer = Trainer(
        network, objective, images, config, out, times=chosen, resume=resume,
        sample_fn=_grid_of(objective, crop, images),
        about={"command": shlex.join(["fastdiff", *sys.argv[1:]])},
    )  # fmt: skip
    try:
        result = trainer.run(dtype=dtypes[dtype])
    except Stopped:  # every process ends after the same step
        ranks.leave()
        raise
    if ranks.first:
        typer.echo(
            f"trained {result.steps} steps in {result.seconds:.0f} s "
            f"({result.samples_per_s:.0f} samples/s), loss {result.loss:.4f}\n"
            f"next: fastdiff sample --model {shlex.quote(str(result.model_path))} --out samples.png"
        )
    ranks.leave()


def _loaded(load: Callable[[], Any], ranks: Any, first_alone: bool) -> Any:
    """What `load` returns; its warnings are said by rank 0, which runs alone first where it fills a cache."""
    if first_alone and ranks.size > 1:
        ranks.by_first(lambda: len(load()))
    with warnings.catch_warnings():
        if not ranks.first:
            warnings.simplefilter("ignore")
        return load()


def _grid_of(objective: Any, crop: int | None, images: Any) -> Callable[[Any], Any]:
    """The grid that training writes every so often: DDIM-50, ten samples of every class, guidance 2."""

    def grid(model: Any) -> Any:
        from fastdiff.sampler import Sampler

        sampler = Sampler(
            model,
            objective.schedule,
            steps=min(50, len(objective.schedule)),
            prediction=objective.prediction,
            variance=objective.variance,
            shape=images.shape if crop is None else (images.shape[0], crop, crop),
        )
        labels = options.labels(None, 100, images.num_classes or 0)
        cond = None if labels is None else {"labels": labels}
        return sampler.sample(100, cond=cond, guidance_scale=1.0 if labels is None else 2.0)

    return grid
