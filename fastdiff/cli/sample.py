"""`fastdiff sample`: a picture or an archive from a trained model."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import options

EXAMPLES = (
    "**Examples**\n\n"
    "A grid of every class: `fastdiff sample --out samples.png`\n\n"
    "64 sevens: `fastdiff sample --class 7 --num 64 --guidance 2 --out sevens.png`\n\n"
    "How noise becomes a digit: `fastdiff sample --num 10 --trajectory --out strip.png`\n\n"
    "A data set: `fastdiff sample --num 10000 --solver ddpm --steps 1000 --out digits.npz`\n\n"
    "Your own model: `fastdiff sample --model runs/digits/model --out mine.png`"
)


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
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Clip x0 to this quantile of its own, 0.995 say: less saturated at strong guidance."
        ),
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
    from fastdiff.clip import DynamicThreshold
    from fastdiff.sampler import Sampler

    pictures.check_target(out, (".npz",) if not trajectory else ())
    if trajectory and num > 100:
        raise ValueError(f"`--trajectory` draws a line for each sample, at most 100, got --num {num}")
    chain: dict[str, Any] = {"solver": solver, "steps": int(steps) if steps.isdecimal() else steps}
    if eta is not None:
        chain["eta"] = eta
    if threshold is not None:
        chain["clip"] = DynamicThreshold(threshold)
    sampler = Sampler.from_pretrained(
        model,
        device=options.device(device),
        **chain,
    )
    labels = options.labels(class_, num, getattr(sampler.model, "num_classes", 0))
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


def _columns(num: int) -> int | None:
    """Ten a line where that fills lines, so that ten classes stand one a line at --num 100."""
    return 10 if num % 10 == 0 and num <= 400 else None
