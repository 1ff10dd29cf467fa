"""Which of diffusers' schedulers become tables: the README's list, made by importing every class.

python -m benchmarks.schedulers          bring the list in README.md up to date
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from benchmarks.sections import rewrite
from fastdiff.adapters.diffusers import survey

README = Path(__file__).parents[1] / "README.md"
_NEEDS_MORE = (
    "torchsde"  # what a scheduler asks for that may or may not be installed does not belong in the list
)


def table() -> str:
    """Markdown: every class that imports, with its rows for 10 steps and registers; the rest, with why."""
    found = [report for report in survey() if _NEEDS_MORE not in (report.reason or "")]
    tables = [f"{r.name} ({r.rows} rows, K={r.registers})" for r in found if r.outcome == "imported"]
    refused = [f"| {r.name} | {_brief(r.reason)} |" for r in found if r.outcome != "imported"]
    version = importlib.metadata.version("diffusers")
    return "\n".join(
        [
            f"Imported from diffusers {version}, {len(tables)} classes: {', '.join(tables)}.",
            "",
            "| refused | because |",
            "| --- | --- |",
            *refused,
        ]
    )


def _brief(reason: str) -> str:
    """A reason without the class's own name in front, and without what would break a table."""
    return reason.split(" cannot be imported: ")[-1].replace("|", "/").replace("\n", " ")


def main() -> None:
    """Rewrite the list between its markers."""
    rewrite(README, "schedulers", f"\n{table()}\n\n")


if __name__ == "__main__":
    main()
