"""`fastdiff bench`: where the time of a chain goes on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

EXAMPLES = (
    "**Examples**\n\n"
    "Where a step's time goes: `fastdiff bench chain --model digits --solver ddpm --batch 1`\n\n"
    "Several side by side: `fastdiff bench chain --solver ddim,ddpm --batch 1,16 --out bench.png`\n\n"
    "With a network of your own: `fastdiff bench chain --model net.py:build --shape 3,32,32`"
)


def bench(
    what: Annotated[str, typer.Argument(help="chain.")],
    model: Annotated[
        str,
        typer.Option(
            help="An embedded model, a folder, or `file.py:name` or `module:name`, which is imported."
        ),
    ] = "digits",
    solver: Annotated[str, typer.Option(help="ddim, ddpm, ...; several by commas.")] = "ddim",
    steps: Annotated[str, typer.Option(help="A number, `ddim50`, or sections such as `10,15,20`.")] = "50",
    batch: Annotated[str, typer.Option(help="Samples at once; several by commas.")] = "1",
    guidance: Annotated[
        float, typer.Option(help="Guidance scale, 1 is none; for networks with classes.")
    ] = 1.0,
    shape: Annotated[
        str | None, typer.Option(help="Of one sample, such as 3,32,32; as saved by default.")
    ] = None,
    cond: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the network, `name=77,768` or `name=77:long`; may be repeated."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each chain is timed, in turn.")] = 9,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; a GPU if there is one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON in place of text.")] = False,
    out: Annotated[Path | None, typer.Option(help="A picture of the shares, `.png` and the like.")] = None,
) -> None:
    """Measure a chain's step on this machine: how much is the network, the update, the noise, the host."""
    import dataclasses

    import torch

    from fastdiff import plots
    from fastdiff.cli import options
    from fastdiff.files import to_json
    from fastdiff.kernels import cpu
    from fastdiff.pictures import check_target
    from fastdiff.shares import PARTS, chain_shares

    if what != "chain":
        raise ValueError(f"`what` must be chain, got {what!r}")
    if out is not None:
        check_target(out)
    batches = options.numbers("--batch", batch)
    if not batches or min(batches) < 1:
        raise ValueError(f"`--batch` must be numbers of at least 1, got {batch!r}")
    network, settings = options.network(model)
    on = options.device(device)
    if isinstance(network, torch.nn.Module):
        network = network.to(on).eval()
    cpu.library(wait=True)  # a chain that waits for no compiler is not what is measured
    found = []
    for name in solver.split(","):
        for size in batches:
            x, _, given = options.example(network, shape, settings, size, cond or [])
            sampler = _sampler(network, settings, tuple(x.shape[1:]), name, steps, on)
            title = f"{name}, batch {size}"
            found.append(
                chain_shares(sampler, size, cond=given, guidance_scale=guidance, rounds=rounds, name=title)
            )
            if not json:
                typer.echo(str(found[-1]))
    if json:
        typer.echo(to_json({"device": str(on), "chains": [dataclasses.asdict(shares) for shares in found]}))
    if out is not None:
        bars = {shares.name: {part: getattr(shares, part) for part in PARTS} for shares in found}
        typer.echo(f"wrote {plots.show_shares(bars, out)}", err=json)


def _sampler(
    network: Any, settings: dict[str, Any], shape: tuple[int, ...], solver: str, steps: str, device: Any
) -> Any:
    """The chain of a network, by its own settings where it has some, else a linear schedule's."""
    from fastdiff.sampler import Sampler
    from fastdiff.schedule import NoiseSchedule

    own = {key: value for key, value in settings.items() if key in ("prediction", "variance")}
    if "clip" in settings:
        own["clip"] = None if settings["clip"] is None else tuple(settings["clip"])
    schedule = settings.get("schedule")
    return Sampler(
        network,
        NoiseSchedule.linear(1000) if schedule is None else NoiseSchedule.from_config(schedule),
        solver=solver,
        steps=int(steps) if steps.isdecimal() else steps,
        shape=shape,
        device=device,
        **own,
    )
