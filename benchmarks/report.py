"""Tables from results: `python -m benchmarks.report` brings those in the documents up to date.

A document marks where a group's table stands; the group `begin` is the overview, one line for each task:

    <!-- results: chain -->
    (made anew at each run)
    <!-- results: end -->

    python -m benchmarks.report             rewrite README.md and benchmarks/README.md
    python -m benchmarks.report --print     print the overview and every group's table
    python -m benchmarks.report --check     exit status 1 where a document is behind the results
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, TIE, Comparison, Quantity, load
from fastdiff.files import atomic_path

DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_SECTION = re.compile(r"(<!-- results: (?!end)([a-z]+) -->\n).*?(<!-- results: end -->)", re.DOTALL)
# ours, and diffusers', with the network compiled: the first of them that a comparison has
COMPILED = ("fastdiff, optimised and compiled", "fastdiff, compiled", "fastdiff, torch.compile")
THEIRS_COMPILED = ("diffusers + torch.compile", "diffusers, torch.compile")
ON_A_GPU = ("gpukernels", "gpuops")  # the groups of benchmarks/gpu.py
UNMEASURED = "Not measured: no record of a GPU is in benchmarks/results.\n"
Result = tuple[Comparison | Quantity, dict[str, Any]]


def results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    """Every result by group, in the order of the files' names.

    Raises:
        ValueError: a file that holds something else.
    """
    groups: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*/*.json")):
        found = load(path)
        groups.setdefault(found[0].group, []).append(found)
    return groups


def table(found: Sequence[Result]) -> str:
    """Markdown: comparisons with a line for each variant, then quantities, then the machines."""
    parts = []
    if comparisons := [r for r, _ in found if isinstance(r, Comparison)]:
        rows = [row for result in comparisons for row in _lines(result)]
        parts.append(_markdown(("task", "variant", "ms (p20 to p80)", "speed-up"), rows))
    if quantities := [r for r, _ in found if isinstance(r, Quantity)]:
        rows = [
            (q.name, f"{q.value:.3g} {q.unit}", "" if q.limit is None else f"{q.limit:g}") for q in quantities
        ]
        parts.append(_markdown(("quantity", "measured", "limit"), rows))
    parts += dict.fromkeys(_where(machine) for _, machine in found)
    return "\n\n".join(parts) + "\n"


def overview(groups: Mapping[str, Sequence[Result]]) -> str:
    """Markdown: every comparison that has a variant `fastdiff` as one line, the largest speed-up first.

    Beside it stand both with their networks compiled. Operators that are no step of a chain have a table of
    their own, not this one.
    """
    found = [
        pair
        for name, group in groups.items()
        for pair in group
        if name not in ("ops", *ON_A_GPU) and "fastdiff" in getattr(pair[0], "times", ())
    ]
    found.sort(key=lambda pair: -pair[0].speed_ups["fastdiff"])
    rows = [
        (
            f"{result.group}: {result.name}",
            f"{_ms(result.times[result.baseline].median)} ({result.baseline})",
            _ms(result.times["fastdiff"].median),
            verdict(result.speed_ups["fastdiff"]),
            *(_first_of(result, labels) for labels in (COMPILED, THEIRS_COMPILED)),
        )
        for result, _ in found
    ]
    where = dict.fromkeys(_where(machine) for _, machine in found)
    head = ("task", "baseline, ms", "fastdiff, ms", "speed-up", "compiled", "baseline compiled")
    return "\n\n".join((_markdown(head, rows), *where)) + "\n"


def _first_of(result: Comparison, labels: Sequence[str]) -> str:
    return next((verdict(result.speed_ups[label]) for label in labels if label in result.times), "")


def _lines(result: Comparison) -> Iterable[tuple[str, ...]]:
    """A line for each variant: the baseline first, the task named once."""
    task = result.name
    for label in sorted(result.times, key=lambda label: label != result.baseline):
        times = result.times[label]
        speed = "baseline" if label == result.baseline else verdict(result.speed_ups[label])
        yield task, label, f"{_ms(times.median)} ({_ms(times.p20)} to {_ms(times.p80)})", speed
        task = ""


def verdict(speed_up: float) -> str:
    """`1.98x`; a tie or a loss is called so."""
    word = " (tie)" if abs(speed_up - 1) <= TIE else " (loss)" if speed_up < 1 else ""
    return f"{speed_up:.2f}x{word}"


def _ms(seconds: float) -> str:
    """Milliseconds to three figures."""
    return f"{float(f'{1e3 * seconds:.3g}'):g}"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _where(machine: Mapping[str, Any]) -> str:
    """The machine's record as a line."""
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "triton", "diffusers", "numpy") if machine[n])
    gpu = f"{machine['gpu']}; " if machine.get("gpu") else ""
    return gpu + (
        f"{machine['processor']}, {machine['threads']} threads on {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}, {versions}; {machine['compiler']}; "
        f"commit {machine['commit']}, {machine['when'][:10]}."
    )


def up_to_date(text: str, groups: Mapping[str, Sequence[Result]]) -> str:
    """A document with the table of each marked group in place of what stands between its markers.

    A group of a GPU's figures that has no results says that it was not measured.

    Raises:
        ValueError: a marker names a group that has no results.
    """

    def section(match: re.Match[str]) -> str:
        start, group, end = match.groups()
        if group in ON_A_GPU and group not in groups:
            return f"{start}\n{UNMEASURED}\n{end}"
        if group != "begin" and group not in groups:
            known = ", ".join(["begin", *groups])
            raise ValueError(f"`results: {group}` must name one of {known}; measure it first")
        return f"{start}\n{overview(groups) if group == 'begin' else table(groups[group])}\n{end}"

    return _SECTION.sub(section, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 where `--check` finds a document behind the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables from results.")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--print", action="store_true", help="print the tables, write nothing")
    choice.add_argument(
        "--check", action="store_true", help="write nothing; status 1 if a document is behind"
    )
    chosen = parser.parse_args(arguments)
    groups = results()
    if chosen.print:
        print(
            overview(groups), *(f"## {group}\n\n{table(found)}" for group, found in groups.items()), sep="\n"
        )
        return 0
    behind = [path for path in DOCUMENTS if (text := path.read_text()) != up_to_date(text, groups)]
    for path in behind:
        print(
            f"{path.relative_to(ROOT)} is behind the results"
            if chosen.check
            else f"wrote {path.relative_to(ROOT)}"
        )
        if not chosen.check:
            with atomic_path(path) as temporary:
                temporary.write_text(up_to_date(path.read_text(), groups))
    return 1 if chosen.check and behind else 0


if __name__ == "__main__":
    sys.exit(main())
