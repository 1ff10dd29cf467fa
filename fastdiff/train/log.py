"""The log of a run: one JSON line for each step, none missing and none twice, whatever happened."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastdiff.files import atomic_path
from fastdiff.train.step import Measured

QUARTILES = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")  # of the quarters of the chain, t = 0 in the first


class StepLog:
    """An append-only JSONL file whose lines are the steps 1, 2, 3, ...

    A line is what `records` gives; numbers are written so that they read back exactly.
    """

    def __init__(self, path: Path, step: int, writes: bool = True) -> None:
        """Open `path` to go on after `step`; lines past it, and a last line that was cut off, are removed.

        Args:
            writes: False: keep the records of this run in memory and touch no file.
        """
        self._file: TextIO | None = None
        self.records = _read(path, step) if writes else []
        if not writes:
            return
        text = "".join(_line(record) for record in self.records)
        if not path.exists() or path.read_bytes() != text.encode():
            with atomic_path(path) as temporary:
                temporary.write_text(text)
        steps = [record["step"] for record in self.records]
        if steps != list(range(1, step + 1)):
            warnings.warn(
                f"the log {str(path)!r} holds {len(steps)} of the {step} steps done so far; it goes on from"
                " here",
                stacklevel=2,
            )
        self._file = path.open("a")

    def write(self, records: list[dict[str, Any]]) -> None:
        """Append lines and hand them to the system, so that a reader sees them now."""
        self.records += records
        if self._file is not None:
            self._file.write("".join(map(_line, records)))
            self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: before a checkpoint says that their steps are done."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def records(
    measured: Sequence[Measured],
    t: np.ndarray,
    losses: Mapping[str, np.ndarray],
    norms: np.ndarray,
    num_timesteps: int,
    samples_per_s: float,
) -> list[dict[str, Any]]:
    """The log's lines of some steps: step, loss, loss_q1 .. loss_q4, lr, grad_norm, samples_per_s, mse, vlb.

    loss is the mean over the batch, loss_qk that over its samples with t in the k-th quarter of the chain,
    None where there is none; neither has the weights of importance sampling. mse and vlb are means as well,
    where the objective has them besides its total.

    Args:
        measured: n steps; their step and rate are read.
        t: [n, batch_size], of whole batches.
        losses: name -> [n, batch_size]; "total" is there.
        norms: [n].
    Raises:
        FloatingPointError: a loss or a norm is not finite.
    """
    lines = []
    more = {name: whole.mean(1, dtype=np.float64) for name, whole in losses.items() if name != "total"}
    totals = losses["total"].astype(np.float64)
    for i, (step, times, values, norm) in enumerate(zip(measured, t, totals, norms.tolist(), strict=True)):
        loss = values.mean().item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(
                f"the loss was {loss} and the gradient's norm {norm} at step {step.step}: training diverged;"
                " lower `lr` or `grad_clip`, lengthen `warmup`, or look for a broken image in the data"
            )
        quarters = [values[4 * times // num_timesteps == k] for k in range(4)]
        means = {key: q.mean().item() if q.size else None for key, q in zip(QUARTILES, quarters, strict=True)}
        rest = {"lr": step.rate, "grad_norm": norm, "samples_per_s": samples_per_s}
        besides = {name: mean[i].item() for name, mean in more.items()}
        lines.append({"step": step.step, "loss": loss, **means, **besides, **rest})
    return lines


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _read(path: Path, step: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
                if record["step"] <= step:
                    records.append(record)
            except (KeyError, TypeError, ValueError):
                continue  # a line that the kill cut off
    return records
