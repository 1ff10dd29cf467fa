"""The log of a run: one JSON line for each step, none missing and none twice, whatever happened."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from fastdiff.files import atomic_path


class StepLog:
    """An append-only JSONL file whose lines are the steps 1, 2, 3, ...

    A line holds step, loss, lr, grad_norm and samples_per_s; numbers are written so that they read back
    exactly.
    """

    def __init__(self, path: Path, step: int) -> None:
        """Open `path` to go on after `step`; lines past it, and a last line that was cut off, are removed."""
        self.records = _read(path, step)
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
        self._file.write("".join(map(_line, records)))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk: before a checkpoint says that their steps are done."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


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
