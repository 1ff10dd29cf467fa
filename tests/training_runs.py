"""A small run for the tests of the trainer: a network, data, numbers, and what such a run left."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastdiff.files import load_tensors
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective, TrainConfig, Trainer, draws, load_data
from fastdiff.train.checkpoint import checkpoints

CONFIG = TrainConfig(
    steps=12,
    batch_size=8,
    lr=1e-2,
    warmup=4,
    label_dropout=0.3,
    log_every=2,
    sample_every=6,
    checkpoint_every=3,
)


class Tiny(nn.Module):
    """All that a run must carry: classes, dropout, a buffer that moves, a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.leave = nn.Conv2d(8, 1, 3, padding=1)
        self.classes = nn.Embedding(4, 8)
        self.unused = nn.Parameter(torch.ones(3))
        self.seen: list[list[int]] = []
        # As fd.UNet lays its weights out: moments restored in another layout would meet the wrong weights.
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, labels=None):
        shift = 0.001 * t.view(-1, 1, 1, 1)
        if labels is not None:
            self.seen.append(labels.tolist())
            shift = shift + self.classes(labels + 1)[:, :, None, None]
        return self.leave(self.dropout(torch.relu(self.norm(self.enter(x)) + shift)))


class Plain(nn.Module):
    """A network that no cut of a batch changes: no dropout, no statistics of it; a parameter is idle."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.classes = nn.Embedding(4, 8)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, x, t, labels):
        shift = 0.001 * t.view(-1, 1, 1, 1) + self.classes(labels + 1)[:, :, None, None]
        return self.leave(torch.relu(self.enter(x.to(self.unused.dtype)) + shift)).float()


_compile = torch.compile


def traced(model, options):
    """torch.compile as a run calls it, less the code generation; to be put in its place."""
    return _compile(model, backend="eager")


class Learning:
    """Draws from the times it has seen least, weights by 2, and has a state."""

    learns = True

    def __init__(self):
        self.counts, self.heard = torch.zeros(50), []

    def draw(self, seed, step, ids):
        t = (draws.times(seed, step, ids, 50) + int(self.counts.sum())) % 50
        return t, np.full(len(ids), 2.0)

    def learn(self, t, losses):
        self.heard.append((t.tolist(), losses.tolist()))
        self.counts += torch.bincount(torch.from_numpy(t), minlength=50)

    def to_config(self):
        return {"name": "learning"}

    def state_dict(self):
        return {"counts": self.counts, "rounds": len(self.heard)}

    def load_state_dict(self, state):
        self.counts.copy_(state["counts"])
        self.heard = [None] * state["rounds"]


def tiny_data(labels=True):
    shades = np.random.default_rng(0).integers(0, 256, (20, 6, 6), dtype=np.uint8)
    return load_data((shades, np.arange(20) % 3 if labels else None))


def trainer(out, config=CONFIG, data=None, model=None, objective=None, seeded=True, **options):
    if seeded:
        torch.manual_seed(1)
    return Trainer(
        Tiny() if model is None else model,
        Objective(NoiseSchedule.cosine(50)) if objective is None else objective,
        tiny_data() if data is None else data,
        config,
        out,
        **options,
    )


def log(out) -> list[dict]:
    """The log's lines without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def state(out) -> dict[str, bytes]:
    """All tensors of the last checkpoint, as bytes: weights, averaged weights, the optimiser's moments."""
    tensors, _ = load_tensors(checkpoints(Path(out) / "checkpoints")[-1])
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
