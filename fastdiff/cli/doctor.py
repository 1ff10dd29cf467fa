"""`fastdiff doctor`: what the compiled kernels cost on a GPU, which need not be there."""

from __future__ import annotations

from typing import Annotated

import typer

EXAMPLES = (
    "**Examples**\n\n"
    "What the kernels cost on an H100, no GPU needed: `fastdiff doctor --kernels --target sm_90`\n\n"
    "Everything, for a program: `fastdiff doctor --kernels --json`"
)


def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Compile them, and read machine code.")] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942; may be repeated. All by default.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON in place of a table.")] = False,
) -> None:
    """Say what the compiled kernels cost on a GPU: registers, instructions, bytes, what bounds them."""
    from fastdiff.kernels import _triton, inspect

    if not kernels:
        raise ValueError("`doctor` needs to be told what to examine; `--kernels` is what there is")
    if unknown := [name for name in target or () if name not in inspect.TARGETS]:
        raise ValueError(f"`--target` must be one of {', '.join(inspect.TARGETS)}, got {unknown[0]!r}")
    if not _triton.HAS_TRITON:
        raise ImportError(
            "`doctor --kernels` compiles with Triton, which is not installed; pip install triton"
        )
    rows = inspect.report(target or inspect.TARGETS)
    typer.echo(inspect.to_json(rows) if json else inspect.to_table(rows))
