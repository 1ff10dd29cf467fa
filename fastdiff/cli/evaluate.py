"""`fastdiff eval`: the bits per dimension of trained models on images."""

from __future__ import annotations

import csv
import itertools
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli import options

NAME = "eval"
EXAMPLES = (
    "**Examples**\n\n"
    "The embedded model on the digits that it has not seen: "
    "`fastdiff eval --model digits --data digits --holdout 0.2`\n\n"
    "Every term in place of an estimate, with a table of them and a picture: "
    "`fastdiff eval --holdout 0.2 --times all --out eval`\n\n"
    "Models side by side: `fastdiff eval --model runs/simple/model --model runs/hybrid/model --holdout 0.2`"
)
_LINES = 12  # of the table on the screen


def evaluate(
    model: Annotated[
        list[str] | None,
        typer.Option(help="An embedded model or a folder that `fastdiff train` wrote; may be repeated."),
    ] = None,
    data: Annotated[str, typer.Option(help="`digits`, a folder of images, or FILE.npz.")] = "digits",
    holdout: Annotated[
        float, typer.Option(help="The share kept from training; it alone is measured. 0: all images.")
    ] = 0.0,
    num: Annotated[int | None, typer.Option(min=1, help="Measure so many images, spread over all.")] = None,
    times: Annotated[
        str, typer.Option(help="Terms an image: `all`, or a number for an unbiased estimate of all.")
    ] = "100",
    unconditional: Annotated[
        bool, typer.Option("--unconditional", help="Tell a network with classes none.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Scale and crop images to this many pixels.")] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out unreadable images, by name.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the noise; same seed, same result.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Noisy images in one pass of the network.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="A folder for terms.csv, eval.json and terms.png.")] = None,
) -> None:
    """Measure the variational bound in bits/dim: L_T, every L_{t-1}, L_0, and the errors of x0 and eps."""
    from fastdiff.files import write_json
    from fastdiff.train import load_data

    if not times.isdecimal() and times != "all":
        raise ValueError(f"`--times` must be `all` or a number such as 100, got {times!r}")
    images = load_data(data, size=size, holdout=holdout, skip_bad=skip_bad)
    images = images.held_out or images
    if num is not None and num > len(images):
        raise ValueError(f"`--num` must be at most the {len(images)} images that there are, got {num}")
    names = model or ["digits"]
    if len(set(names)) < len(names):
        raise ValueError(f"`--model` must name each model once, got {', '.join(names)}")
    loaded = {name: _load(name, images, options.device(device)) for name in names}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, (network, settings, command) in loaded.items():
        if note := _about_training(command, data, holdout):
            typer.secho(f"{name}: {note}", fg="yellow", err=True)
        results[name] = _measure(
            network, settings, images, num, times, seed, batch, options.device(device), unconditional
        )
        typer.echo(_table(name, results[name], images.shape))
    differences = _differences(results)
    for d in differences:
        interval = "" if d["low"] is None else f" (95 % interval {d['low']:+.4f} to {d['high']:+.4f})"
        typer.echo(f"{d['model']} less {d['less']}: {d['mean']:+.4f} bits/dim{interval}")
    if out is None:
        return
    with (out / "terms.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_rows(*next(iter(results.items())))[0]))
        writer.writeheader()
        writer.writerows(row for name, result in results.items() for row in _rows(name, result))
    about = {"data": data, "holdout": holdout, "seed": seed, "times": times, "unconditional": unconditional}
    models = [_summary(*item) for item in results.items()]
    write_json(out / "eval.json", {**about, "models": models, "differences": differences})
    written = ["terms.csv", "eval.json", *_draw(results, out / "terms.png")]
    typer.echo(f"wrote {', '.join(str(out / file) for file in written)}")


def _load(name: str, images: Any, device: Any) -> tuple[Any, dict[str, Any], str]:
    """A network, the arguments of `bits_per_dim` that belong to it, and the command that trained it."""
    from fastdiff.nn import UNet, load_config
    from fastdiff.schedule import NoiseSchedule

    config = load_config(name)
    settings = config["diffusion"] or {}
    if "schedule" not in settings:
        raise ValueError(f"`--model` {name!r} was saved without `diffusion` settings; use fd.bits_per_dim")
    if "shape" in settings and tuple(settings["shape"]) != images.shape:
        wanted, got = ("x".join(map(str, shape)) for shape in (settings["shape"], images.shape))
        raise ValueError(
            f"`--data` must have images of {wanted}, as {name!r} was trained on, got {got}; see `--size`"
        )
    network = UNet.from_pretrained(name).to(device)
    if network.num_classes and images.num_classes and images.num_classes > network.num_classes:
        raise ValueError(
            f"`--data` has {images.num_classes} classes and {name!r} knows {network.num_classes};"
            " use `--unconditional`"
        )
    arguments = {
        "schedule": NoiseSchedule.from_config(settings["schedule"]),
        "prediction": settings.get("prediction", "eps"),
        "variance": settings.get("variance", "fixed_small"),
        "clip": settings.get("clip") or False,
    }
    return network, arguments, (config["about"] or {}).get("command", "")


def _measure(
    network: Any, settings: dict[str, Any], images: Any, num: int | None, times: str, seed: int, batch: int,
    device: Any, unconditional: bool,
) -> Any:  # fmt: skip
    import torch

    from fastdiff.likelihood import bits_per_dim

    num = num or len(images)
    index = torch.arange(num) * len(images) // num
    x0, labels = images.batch(index)
    steps = len(settings["schedule"])
    cond = {}
    if labels is not None and network.num_classes and not unconditional:
        cond["labels"] = labels.to(device)
    return bits_per_dim(
        network,
        x0=x0.to(device),
        seed=seed,
        times=None if times == "all" or int(times) >= steps else int(times),
        cond=cond,
        sample_ids=index.to(device),  # an image's noise is its own, whichever others are measured
        batch_size=batch,
        progress=True,
        **settings,
    )


def _about_training(command: str, data: str, holdout: float) -> str:
    """What a reader must know where measured images may be training images; "" where they are not."""
    words = shlex.split(command)
    told = {a: b for a, b in itertools.pairwise(words) if a in ("--data", "--holdout")}
    if told.get("--data") != data or float(told.get("--holdout", 0)) == holdout:
        return ""
    remedy = f"--holdout {told['--holdout']}" if "--holdout" in told else "other images"
    return f"trained on some of these images; {remedy} would measure what it has not seen"


def _rows(name: str, result: Any) -> list[dict[str, Any]]:
    """The terms from t = 0 on, then L_T; the sum of count times bits_per_dim is the total."""
    from fastdiff.likelihood import mean_interval

    rows, first = [], 0
    for k, count in enumerate(result.counts.tolist()):
        mean, low, high = mean_interval(result.vlb[:, k])
        errors = (float(a[:, k].double().mean()) for a in (result.x0_mse, result.mse))
        numbers = zip(("x0_mse", "eps_mse"), errors, strict=True)
        rows.append(
            {"model": name, "first_t": first, "last_t": first + count - 1, "count": count}
            | {"bits_per_dim": mean, "low": low, "high": high, **dict(numbers)}
        )
        first += count
    mean, low, high = mean_interval(result.prior)
    rows.append(
        {"model": name, "first_t": first, "last_t": first, "count": 1}
        | {"bits_per_dim": mean, "low": low, "high": high, "x0_mse": "", "eps_mse": ""}
    )
    return rows


def _table(name: str, result: Any, shape: tuple[int, ...]) -> str:
    """Totals, then the terms in at most `_LINES` groups."""
    import numpy as np

    from fastdiff.likelihood import strata

    rows = _rows(name, result)[:-1]
    steps, images = sum(row["count"] for row in rows), len(result.total)
    kind = "every term" if len(rows) == steps else f"{len(rows)} terms an image, estimating {steps}"
    mean, low, high = result.interval()
    lines = [
        f"{name}: {images} images of {'x'.join(map(str, shape))}, T = {steps}, {kind}",
        f"  bits/dim  {mean:.4f}   (95 % interval {low:.4f} to {high:.4f})",
        "",
        "           t   terms   bits/dim     x0-MSE    eps-MSE",
    ]
    lengths = np.diff(strata(min(_LINES, len(rows)), len(rows))) if len(rows) > 1 else np.ones(1, int)
    first = 0
    for length in lengths.tolist():
        group, first = rows[first : first + length], first + length
        weight = np.array([row["count"] for row in group])
        bits = sum(row["count"] * row["bits_per_dim"] for row in group)
        x0, eps = (np.average([row[key] for row in group], weights=weight) for key in ("x0_mse", "eps_mse"))
        last = group[-1]["last_t"]
        label = f"{group[0]['first_t']}" + (f"..{last}" if last > group[0]["first_t"] else "")
        lines.append(f"{label:>12}{weight.sum():>8}{bits:>11.4f}{x0:>11.5f}{eps:>11.5f}")
    lines.append(f"{'L_T (prior)':>12}{1:>8}{float(result.prior.mean()):>11.4f}")
    return "\n".join(lines) + "\n"


def _differences(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each model less the first, image by image: the same noise makes the difference surer than either."""
    (first, base), *others = results.items()
    return [{"model": name, "less": first, **_numbers(result.total - base.total)} for name, result in others]


def _numbers(values: Any) -> dict[str, float | None]:
    """The mean over images and the ends of its 95 % interval."""
    from fastdiff.likelihood import mean_interval

    found = zip(("mean", "low", "high"), mean_interval(values), strict=True)
    return {key: value if value == value else None for key, value in found}  # JSON knows no nan


def _summary(name: str, result: Any) -> dict[str, Any]:
    return {
        "model": name,
        "images": len(result.total),
        "T": int(result.counts.sum()),
        "terms": len(result.counts),
        "bits_per_dim": _numbers(result.total),
        "L_T": _numbers(result.prior),
        "L_0": _numbers(result.vlb[:, 0]),
    }


def _draw(results: dict[str, Any], path: Path) -> list[str]:
    """The picture's name; none, and a line on stderr, where matplotlib is missing."""
    from fastdiff import plots

    try:
        plots.show_bound({name: _rows(name, result) for name, result in results.items()}, path)
    except ImportError as error:
        typer.secho(f"no picture: {error}", fg="yellow", err=True)
        return []
    return [path.name]
