"""What the compiled kernels cost: the table of kernels/README.md, from their machine code.

python -m benchmarks.kernels          bring the table up to date; needs Triton, no GPU
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path

from benchmarks.sections import rewrite
from fastdiff.kernels.inspect import Report, report

PAGE = Path(__file__).parents[1] / "kernels" / "README.md"
TARGETS = ("sm_80", "sm_90", "sm_100")


def table(found: Sequence[Report]) -> str:
    """Markdown: a row for each specialisation, whose reports of all targets stand together."""
    rows = []
    for (kernel, variant), group in groupby(found, lambda r: (r.kernel, r.variant)):
        each = list(group)
        registers = [r.registers for r in each]
        instructions = ", ".join(f"{r.executed:.0f}" for r in each)
        ends = f"{min(registers)}-{max(registers)}" if len(set(registers)) > 1 else f"{registers[0]}"
        rows.append(f"| `{kernel}` | {variant} | {each[0].least:g} | {instructions} | {ends} |")
    head = (
        f"| kernel | variant | bytes | executed instructions per element: {', '.join(TARGETS)} | registers |"
    )
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def main() -> None:
    """Rewrite the table between its marks."""
    if not version("triton").startswith("3.7."):
        sys.exit(f"the table is of what Triton 3.7 compiles, got {version('triton')}; install triton==3.7.1")
    rewrite(PAGE, "kernels", f"\n{table(report(TARGETS))}\n\n")


if __name__ == "__main__":
    main()
