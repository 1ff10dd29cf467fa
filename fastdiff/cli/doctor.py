"""`fastdiff doctor`: what kernels cost on a GPU, and what in a network it cannot capture, without one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

EXAMPLES = (
    "**Examples**\n\n"
    "What the kernels cost on an H100, no GPU needed: `fastdiff doctor --kernels --target sm_90`\n\n"
    "Everything, for a program: `fastdiff doctor --kernels --json`\n\n"
    "Whether a network can be captured in a CUDA graph: `fastdiff doctor --model digits`\n\n"
    "One of your own, built by a function: `fastdiff doctor --model net.py:build --shape 3,32,32`"
)


def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Compile them, and read machine code.")] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; may be repeated. All by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Say what in this network a CUDA graph cannot capture: an embedded model, a folder that "
            "`save_pretrained` wrote, or `file.py:name` or `module:name`, which is imported: a network, or "
            "what builds one."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Of one sample, such as 3,32,32; as saved by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples that the network is examined with.")] = 2,
    cond: Annotated[
        list[str] | None,
        typer.Option(help="An argument of the network, `name=77,768` or `name=77:long`; may be repeated."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON in place of text.")] = False,
) -> None:
    """Say what stands in a GPU's way, without one: what kernels cost, what in a network is not capturable.

    With `--model` the exit status is 0 when nothing was found and 1 otherwise.
    """
    if model is not None:
        _capture(model, shape, batch, cond or [], json)
        return
    if not kernels:
        raise ValueError("`doctor` needs to be told what to examine: `--kernels` or `--model`")
    from fastdiff.kernels import _triton, inspect

    if unknown := [name for name in target or () if name not in inspect.TARGETS]:
        raise ValueError(f"`--target` must be one of {', '.join(inspect.TARGETS)}, got {unknown[0]!r}")
    if not _triton.HAS_TRITON:
        raise ImportError(
            "`doctor --kernels` compiles with Triton, which is not installed; pip install triton"
        )
    rows = inspect.report(target or inspect.TARGETS)
    typer.echo(inspect.to_json(rows) if json else inspect.to_table(rows))


def _capture(model: str, shape: str | None, batch: int, cond: list[str], json: bool) -> None:
    """Print the report of `explain_capture`."""
    from fastdiff.capture import CAVEAT, explain_capture
    from fastdiff.cli import options
    from fastdiff.files import to_json

    network, settings = options.network(model)
    report = explain_capture(network, options.example(network, shape, settings, batch, cond))
    typer.echo(to_json({"ok": report.ok, **asdict(report), "note": CAVEAT}) if json else str(report))
    raise typer.Exit(0 if report.ok else 1)
