"""The folder of a run: what is in it, and whether a resumed run is the same run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.files import read_json, write_json
from fastdiff.train.checkpoint import checkpoint_step, checkpoints, remove_temporaries
from fastdiff.train.config import TrainConfig
from fastdiff.train.data import ImageData
from fastdiff.train.objective import Objective

RUN_FORMAT = 2


class RunDir:
    """The paths of a run's folder, and the record of what the run is."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        self.record = self.root / "run.json"
        self.log = self.root / "log.jsonl"
        self.curve = self.root / "loss.png"
        self.checkpoints = self.root / "checkpoints"
        self.model = self.root / "model"
        self._samples = self.root / "samples"

    def sample(self, step: int) -> Path:
        """Where the sample grid of `step` lies."""
        return self._samples / f"step-{step:08d}.png"

    @staticmethod
    def describe(
        model: nn.Module, objective: Objective, data: ImageData, config: TrainConfig, times: Mapping[str, Any]
    ) -> dict[str, Any]:
        """All that decides the result of a step, as JSON data."""
        shapes = {name: "x".join(map(str, value.shape)) for name, value in model.state_dict().items()}
        kind, made = type(model).__name__, getattr(model, "config", None)
        described = {
            "format": RUN_FORMAT,
            "config": config.identity(),
            "objective": objective.to_config(),
            "times": times,
            "data": {"shape": data.shape, "samples": len(data), "fingerprint": data.fingerprint},
            "model": {"class": kind, "config": made, "shapes": shapes},
        }
        # Through JSON, so that tuples and numbers look as they will when they are read back.
        return json.loads(json.dumps(described))

    def model_of(self, decay: float, config: TrainConfig) -> Path:
        """Where the averaged model of one of the run's decays lies."""
        return self.model if decay == config.ema_decays[0] else self.root / f"model-ema-{decay!r}"

    @staticmethod
    def check_same(first: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
        """Refuse to be a process of another run than the first process's; both are results of `describe`."""
        differing = list(_differences(first, mine))
        if differing:
            raise ValueError(
                "the processes of a run must have the same arguments and data, but here, against rank 0,"
                f" {'; '.join(differing[:8])}"
            )

    def claim(self, now: Mapping[str, Any], config: TrainConfig, resume: bool) -> None:
        """Make the folder this run's, or find the same run in it.

        Args:
            now: from `describe`.
        Raises:
            ValueError: it is a file; it holds a run and `resume` is False, or none and it is True; the run in
                it differs.
        """
        name = str(self.root)
        if self.root.exists() and not self.root.is_dir():
            raise ValueError(f"`out_dir` must be a folder or not exist yet, got the file {name!r}")
        if not resume and (self.record.exists() or self.log.exists() or checkpoints(self.checkpoints)):
            raise ValueError(
                f"`out_dir` must not hold another run, but {name!r} does; choose another folder, or go on"
                " with that run by resume=True"
            )
        if resume and not self.record.exists():
            raise ValueError(f"`resume` needs a run to go on with, but {name!r} holds none; start it without")
        if resume:
            differing = list(_differences(read_json(self.record), now))
            if differing:
                more = f"; and {len(differing) - 8} more" if differing[8:] else ""
                raise ValueError(
                    f"`resume` must go on with the run in {name!r} as it was, but these differ:"
                    f" {'; '.join(differing[:8])}{more}; give the same arguments, or start a new run"
                    " elsewhere"
                )
            done = checkpoint_step(last[0]) if (last := checkpoints(self.checkpoints)[-1:]) else 0
            if done > config.steps:
                raise ValueError(
                    f"`steps` must be at least the {done} that the run in {name!r} has done, got"
                    f" {config.steps}"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._samples.mkdir(exist_ok=True)
        remove_temporaries(self.checkpoints)
        write_json(self.record, {**now, "settings": asdict(config)})


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """ "config.lr was 0.001, is 0.002" for each field of `now` that `then` has otherwise."""
    for key, value in now.items():
        name, before = f"{path}{key}", then.get(key) if isinstance(then, Mapping) else None
        if isinstance(value, dict):
            yield from _differences(before if isinstance(before, Mapping) else {}, value, f"{name}.")
        elif value != before:
            yield f"{name} was {_short(before)}, is {_short(value)}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
