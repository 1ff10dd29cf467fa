"""The README's bits/dim: from the files that `fastdiff eval --out` wrote, kept in benchmarks/likelihood.

python -m benchmarks.likelihood FOLDER/eval.json NAME   keep a result under a name, and make the table anew
python -m benchmarks.likelihood                         make the table anew
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT
from benchmarks.sections import replaced
from fastdiff.files import atomic_path, read_json, write_json

KEPT = Path(__file__).with_name("likelihood")


def results() -> list[dict[str, Any]]:
    """Every kept result, in the order of the files' names."""
    return [read_json(path) for path in sorted(KEPT.glob("*.json"))]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model, with its difference from the first of its own result."""
    lines = ["| model | T | bits/dim (95 % interval) | L_0 | less the first, image by image |"]
    lines.append("|---|---|---|---|---|")
    for result in found:
        differences = {entry["model"]: entry for entry in result["differences"]}
        for model in result["models"]:
            bits = model["bits_per_dim"]
            interval = f"{bits['mean']:.3f} ({bits['low']:.3f} to {bits['high']:.3f})"
            less = ""
            if d := differences.get(model["model"]):
                less = f"{d['mean']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f})"
            first = f"{model['L_0']['mean']:.3f}"
            lines.append(f"| `{model['model']}` | {model['T']} | {interval} | {first} | {less} |")
    images = {model["images"] for result in found for model in result["models"]}
    return "\n".join(lines) + f"\n\nOn {' and '.join(map(str, sorted(images)))} held-out digits, every term."


def up_to_date(text: str) -> str:
    """The README with the table in place of what stands between its markers."""
    return replaced(text, "likelihood", f"\n{table(results())}\n\n")


def main(arguments: list[str]) -> None:
    """The command."""
    if arguments:
        source, name = arguments
        write_json(KEPT / f"{name}.json", read_json(source))
    readme = ROOT / "README.md"
    with atomic_path(readme) as temporary:
        temporary.write_text(up_to_date(readme.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
