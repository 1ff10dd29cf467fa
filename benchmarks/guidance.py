"""What guidance trades: fidelity against diversity of the embedded model's samples, scale by scale.

    python -m benchmarks.guidance        the card's table and its picture brought up to date

Read, spread and near are those of benchmarks/digits.py: a scale of 0 samples without a class, 1 with the
class alone, and above 1 away from what has no class.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fastdiff as fd
from benchmarks.digits import MODEL, Quality, quality
from benchmarks.sections import rewrite
from fastdiff.files import atomic_path

SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
PER_CLASS = 50


def sweep(scales: Sequence[float] = SCALES, per_class: int = PER_CLASS) -> list[Quality]:
    """The embedded model judged at each scale, DDIM in 50 steps, the same noise for all."""
    sampler = fd.Sampler.from_pretrained("digits", solver="ddim", steps=50)
    return [quality(sampler, per_class, guidance=scale) for scale in scales]


def table(found: Sequence[Quality]) -> str:
    """Markdown: a line for each scale."""
    lines = [
        f"| {q.guidance:g} | {100 * q.read:.1f} % | {q.spread:.2f} | {100 * q.near:.1f} % |" for q in found
    ]
    return "\n".join(["| guidance | read | spread | near |", "|---|---|---|---|", *lines])


def draw(found: Sequence[Quality], path: Path) -> None:
    """Fidelity, diversity and novelty over the guidance scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("fidelity: % read as their class", [100 * q.read for q in found], "#1b4f8f"),
        ("diversity: spread over the real digits'", [q.spread for q in found], "#c8452f"),
        ("copies: % near a training image", [100 * q.near for q in found], "#3f7f3f"),
    )
    for axis, (title, values, colour) in zip(figure.subplots(1, 3), panels, strict=True):
        axis.plot([q.guidance for q in found], values, color=colour, marker="o")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("guidance scale")
        axis.set_ylim(bottom=0)
        axis.grid(color="#e4e4e4", linewidth=0.6)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    """Bring the card's table and its picture up to date."""
    found = sweep()
    rewrite(MODEL / "README.md", "guidance", f"{table(found)}\n")
    draw(found, MODEL / "guidance.png")
    print(table(found))


if __name__ == "__main__":
    main()
