"""Measuring and keeping: variants interleaved in one run, and results as files that tables are made from.

    speed-up = median over rounds of (the baseline's time / the variant's time in the same round)

A round times every variant once, in an order that turns from round to round, so that whatever else the
machine does meets all of them. A result is one JSON file, `results/<device>/<group>-<name>.json`, with the
machine that it was measured on.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastdiff.files import read_json, write_json
from fastdiff.timing import interleaved

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
TIE = 0.03  # speed-ups this near to 1 are no difference


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, 20th and 80th percentile of `n` rounds."""

    median: float
    p20: float
    p80: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One task done in several ways, timed in one run.

    Attributes:
        group, name: which table, which task.
        times: by variant, the baseline among them.
        baseline: the variant that the others are compared with.
        speed_ups: by variant other than the baseline; above 1 it is faster.
        about: shape, dtype, steps and whatever else defines the task.
        guard: the test that fails when the result does not hold any more; "" for none.
    """

    group: str
    name: str
    times: Mapping[str, Times]
    baseline: str
    speed_ups: Mapping[str, float]
    about: Mapping[str, Any] = field(default_factory=dict)
    guard: str = ""


@dataclass(frozen=True)
class Quantity:
    """One number with its limit.

    Attributes:
        group, name: which table, which quantity.
        value, unit: what was measured.
        limit: the largest value that `guard` accepts; None where nothing is promised.
        about, guard: as in `Comparison`.
    """

    group: str
    name: str
    value: float
    unit: str
    limit: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    guard: str = ""


def compare(
    group: str,
    name: str,
    variants: Mapping[str, Callable[[], Any]],
    baseline: str,
    *,
    rounds: int = 15,
    least_seconds: float = 0.02,
    guard: str = "",
    settle: Callable[[], Any] = lambda: None,
    **about: Any,
) -> Comparison:
    """Time variants of one task against each other.

    Args:
        group, name, guard, about: as in `Comparison`.
        variants: functions without arguments, by label.
        baseline: the label of the one that the others are compared with.
        rounds: how often each variant is timed.
        least_seconds: a timing repeats a faster call until it takes this long.
        settle: waits for a device at both ends of a timing, which so holds its work and not its queue.

    Raises:
        ValueError: no such baseline.
    """
    if baseline not in variants:
        raise ValueError(f"`baseline` must be one of {', '.join(variants)}, got {baseline!r}")
    seconds = interleaved(variants, rounds, least_seconds, settle)
    speed_ups = {
        label: statistics.median(b / s for b, s in zip(seconds[baseline], seconds[label], strict=True))
        for label in variants
        if label != baseline
    }
    times = {label: times_of(values) for label, values in seconds.items()}
    return Comparison(group, name, times, baseline, speed_ups, about, guard)


def times_of(seconds: list[float]) -> Times:
    """Median and percentiles of timings."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Times(
        statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered)
    )


@functools.cache  # one record for all results of a run
def machine() -> dict[str, Any]:
    """What the figures belong to: processor, threads, versions, compiler, commit, and how busy it was."""
    return {
        "gpu": _gpu(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "numpy", "diffusers")},
        "compiler": _first_line(os.environ.get("CXX") or shutil.which("g++") or "c++", "--version"),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _processor() -> str:
    """The processor's name, with the vector extensions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    wide = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags]
    return " ".join([found.get("model name", platform.machine()), *wide])


def _gpu() -> str | None:
    """The current GPU, its driver and CUDA's version; None where there is none."""
    if not torch.cuda.is_available():
        return None
    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return f"{torch.cuda.get_device_name()}, driver {driver}, CUDA {torch.version.cuda}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """What a command says first; None where it cannot be run."""
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.splitlines()[0] if said else ""


def _commit() -> str | None:
    """The commit measured, with a `+` where files differ from it."""
    commit = _first_line("git", "rev-parse", "--short=10", "HEAD")
    changed = _first_line("git", "status", "--porcelain", "--", "fastdiff", "kernels", "benchmarks/*.py")
    return commit and commit + ("+" if changed else "")


def save(result: Comparison | Quantity, folder: Path = RESULTS, device: str = "cpu") -> Path:
    """Write a result and the machine's record into its file, atomically.

    Returns:
        The file.
    """
    words = "".join(c if c.isalnum() else " " for c in f"{result.group} {result.name}".lower())
    path = folder / device / f"{'-'.join(words.split())}.json"
    write_json(path, {"kind": type(result).__name__, **asdict(result), "machine": machine()})
    return path


def load(path: Path) -> tuple[Comparison | Quantity, dict[str, Any]]:
    """A result and its machine.

    Raises:
        ValueError: the file holds something else.
    """
    content = read_json(path)
    try:
        kind, where = content.pop("kind"), content.pop("machine")
        if kind == "Quantity":
            return Quantity(**content), where
        times = {label: Times(**values) for label, values in content.pop("times").items()}
        return Comparison(times=times, **content), where
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"`path` must be a result of this module, got {str(path)!r} ({error}); measure again"
        ) from None


def in_fresh_process(call: str, **environment: str) -> Any:
    """The JSON value of a Python expression in a new process.

    Args:
        call: a call of a benchmark module's function, such as "bench_noise.noise_share('mlp')".
        environment: variables of that process, e.g. FASTDIFF_NATIVE="0".
    """
    module = call.partition(".")[0]
    script = f"import json; from benchmarks import {module}; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
