"""How good the embedded model is: what a classifier of digits reads, how varied and how new its samples are.

    python -m benchmarks.digits        1 000 samples per line; the card and the picture brought up to date

- read: the share of samples that carry their class, read by an SVC (gamma 0.001) trained on all real digits.
- spread: the standard deviation within a class, averaged over pixels and classes, over the real digits'.
- near: the share of samples nearer to a training image than the 1 % quantile of held-out digits' distances
  to the training images (Euclidean, in the data's units 0..16): about 1 % for new digits, more for copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import fastdiff as fd
from benchmarks.sections import rewrite
from fastdiff.pictures import save_grid, to_uint8
from fastdiff.train import load_data

HOLDOUT = 0.2  # the embedded model's own: its command says so
MODEL = Path(__file__).parents[1] / "fastdiff" / "models" / "digits"


@dataclass(frozen=True)
class Quality:
    """Shares and ratios as the module says them, with the sampler that made the samples."""

    samples: int
    solver: str
    steps: int
    guidance: float
    read: float
    spread: float
    near: float


def sample(sampler: fd.Sampler, per_class: int, guidance: float, seed: int = 0) -> torch.Tensor:
    """[10 * per_class, 1, 8, 8] in [-1, 1], `per_class` of each class in turn."""
    labels = torch.arange(10).repeat_interleave(per_class)
    parts = []
    for ids in torch.arange(len(labels)).split(250):
        parts.append(
            sampler.sample(
                len(ids), seed=seed, sample_ids=ids, cond={"labels": labels[ids]}, guidance_scale=guidance
            )
        )
    return torch.cat(parts)


def quality(sampler: fd.Sampler, per_class: int = 100, guidance: float = 2.0, seed: int = 0) -> Quality:
    """Sample and judge."""
    from sklearn.svm import SVC

    data = load_data("digits", holdout=HOLDOUT)
    real = load_data("digits")
    samples = _pixels(sample(sampler, per_class, guidance, seed))
    labels = np.arange(10).repeat(per_class)
    classifier = SVC(gamma=0.001).fit(_pixels(real.images), real.labels)
    of_class = [
        samples[labels == c].std(axis=0).mean() / _pixels(real.images[real.labels == c]).std(axis=0).mean()
        for c in range(10)
    ]
    training = _pixels(data.images)
    limit = np.quantile(_distance(_pixels(data.held_out.images), training), 0.01)
    return Quality(
        samples=len(samples),
        solver=sampler.table.name,
        steps=sampler.table.num_rows,
        guidance=guidance,
        read=float((classifier.predict(samples) == labels).mean()),
        spread=float(np.mean(of_class)),
        near=float((_distance(samples, training) < limit).mean()),
    )


def _pixels(images: torch.Tensor) -> np.ndarray:
    """[n, 64] in whole steps of the data's own units, 0..16."""
    return np.round(to_uint8(images).reshape(len(images), -1).numpy() * (16 / 255))


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[len(a)] distance of each row to the nearest row of b."""
    return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2).min(axis=1))


def main() -> None:
    """Bring the card's figures and the picture up to date."""
    rows = []
    for solver, steps, guidance in (
        ("ddim", 50, 2.0),
        ("ddim", 50, 1.0),
        ("ddim", 20, 2.0),
        ("dpmpp_2m", 10, 2.0),
        ("ddpm", 100, 2.0),
    ):
        sampler = fd.Sampler.from_pretrained("digits", solver=solver, steps=steps)
        q = quality(sampler, guidance=guidance)
        rows.append(
            f"| {q.solver}, {q.steps} steps | {q.guidance:g} "
            f"| {100 * q.read:.1f} % | {q.spread:.2f} | {100 * q.near:.1f} % |"
        )
        print(rows[-1], flush=True)
    table = "| sampler | guidance | read | spread | near |\n|---|---|---|---|---|\n" + "\n".join(rows)
    rewrite(MODEL / "README.md", "quality", f"{table}\n")
    sampler = fd.Sampler.from_pretrained("digits", solver="ddim", steps=50)
    picture = sample(sampler, per_class=10, guidance=2.0)
    save_grid(
        picture.view(10, 10, 1, 8, 8).transpose(0, 1).reshape(100, 1, 8, 8),
        MODEL / "samples.png",
        columns=20,
        scale=5,
    )


if __name__ == "__main__":
    main()
