"""Quality gates on real digits: `pytest -m slow`. The trainings are the README's, and take minutes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chains import one_thread
from test_cli import run

import fastdiff as fd
from benchmarks.digits import quality
from benchmarks.guidance import sweep

pytestmark = pytest.mark.slow
_one_thread = pytest.fixture(scope="module", autouse=True)(one_thread)
COMMON = "--data digits --holdout 0.2 --timesteps 200 --prediction eps --channels 16 --blocks 1 --batch 64"
RUNS = {
    "simple": "",
    "hybrid": "--loss hybrid --variance learned_range",
    "linear": "--schedule linear",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a trained model for each of RUNS, and eval/eval.json, which compares them."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in RUNS.items():
        run("train", *COMMON.split(), *options.split(), "--out", str(folder / name))
    models = [word for name in RUNS for word in ("--model", str(folder / name / "model"))]
    run("eval", *models, "--holdout", "0.2", "--times", "all", "--out", str(folder / "eval"))
    return folder


@pytest.fixture(scope="module")
def less_simple(runs: Path) -> dict[str, Any]:
    """By model: its bits/dim less those of L_simple on the cosine schedule, on the same images."""
    found = json.loads((runs / "eval" / "eval.json").read_text())["differences"]
    return {Path(entry["model"]).parent.name: entry for entry in found}


def test_the_hybrid_loss_with_a_learned_variance_beats_the_simple_loss_in_bits_per_dim(less_simple):
    assert less_simple["hybrid"]["high"] < -0.3  # measured: -0.47


def test_the_cosine_schedule_beats_the_linear_one_in_bits_per_dim(less_simple):
    assert less_simple["linear"]["low"] > 0.1  # measured: +0.18


@pytest.mark.parametrize("name", RUNS)
def test_samples_of_every_ablation_are_readable(runs, name):
    sampler = fd.Sampler.from_pretrained(str(runs / name / "model"), solver="ddim", steps=50)
    assert quality(sampler, per_class=50).read >= 0.97


@pytest.mark.parametrize(("solver", "steps", "least"), [("ddim", 50, 0.97), ("dpmpp_2m", 10, 0.93)])
def test_the_embedded_model_s_samples_stay_readable_in_few_steps(solver, steps, least):
    result = quality(fd.Sampler.from_pretrained("digits", solver=solver, steps=steps), per_class=100)
    assert result.read >= least
    assert 0.7 <= result.spread <= 1.3


def test_guidance_trades_diversity_for_fidelity():
    found = sweep((0.0, 0.5, 1.0, 2.0, 4.0), per_class=30)
    read, spread = [q.read for q in found], [q.spread for q in found]
    assert read[0] < 0.3  # a scale of 0 knows no class
    assert (np.diff(read[:3]) > 0.1).all()
    assert min(read[2:]) >= 0.95
    assert (np.diff(spread[:4]) < 0).all()  # beyond 2 it no longer falls
    assert min(spread) >= 0.7
