"""`fastdiff eval`: what it measures, prints and writes, and how it refuses."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import one_thread
from PIL import Image
from test_cli import run

import fastdiff as fd
from fastdiff.train import load_data

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network with a learned variance and ten classes, as `fastdiff train` would save it."""
    torch.manual_seed(0)
    net = fd.UNet(
        1, model_channels=8, channel_mult=(1,), num_res_blocks=1, num_classes=10, learned_variance=True
    )
    with torch.no_grad():  # a new network's output and classes are 0
        for parameter in net.parameters():
            parameter.normal_(0, 0.3)
    folder = tmp_path_factory.mktemp("eval") / "net"
    net.save_pretrained(
        folder,
        diffusion={
            "schedule": fd.NoiseSchedule.cosine(30).to_config(),
            "prediction": "eps",
            "variance": "learned_range",
            "shape": [1, 8, 8],
            "clip": [-1.0, 1.0],
        },
        about={"command": shlex.join(["fastdiff", "train", "--data", "digits", "--holdout", "0.2"])},
    )
    return folder


def measured(model: Path, labelled: bool = True, **options: Any) -> fd.BitsPerDim:
    """The library's own answer for five held-out digits."""
    data = load_data("digits", holdout=0.2).held_out
    index = torch.arange(5) * len(data) // 5
    x0, labels = data.batch(index)
    return fd.bits_per_dim(
        fd.UNet.from_pretrained(model), fd.NoiseSchedule.cosine(30), x0, variance="learned_range",
        sample_ids=index, cond={"labels": labels} if labelled else {}, **options,
    )  # fmt: skip


def total(said: str) -> float:
    """The bits/dim that a table says."""
    return float(re.search(r"bits/dim +([\d.]+) ", said)[1])


def test_the_table_and_the_files_are_the_library_s_result(tmp_path, model):
    said = run(
        "eval", "--model", str(model), "--holdout", "0.2", "--num", "5", "--out", str(tmp_path / "out")
    )
    result = measured(model)
    mean, low, high = result.interval()
    assert f"bits/dim  {mean:.4f}   (95 % interval {low:.4f} to {high:.4f})" in said
    assert "5 images of 1x8x8, T = 30, every term" in said  # fewer than the default number of terms
    assert "trained on" not in said
    with (tmp_path / "out" / "terms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["first_t"]) for row in rows] == list(range(31))
    total = sum(int(row["count"]) * float(row["bits_per_dim"]) for row in rows)
    assert total == pytest.approx(mean, rel=1e-6)
    np.testing.assert_allclose([float(r["bits_per_dim"]) for r in rows[:-1]], result.vlb.mean(0), rtol=1e-6)
    np.testing.assert_allclose([float(r["x0_mse"]) for r in rows[:-1]], result.x0_mse.mean(0), rtol=1e-6)
    np.testing.assert_allclose([float(r["eps_mse"]) for r in rows[:-1]], result.mse.mean(0), rtol=1e-6)
    summary = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert summary["models"][0]["bits_per_dim"] == pytest.approx({"mean": mean, "low": low, "high": high})
    assert (summary["holdout"], summary["models"][0]["terms"]) == (0.2, 30)
    with Image.open(tmp_path / "out" / "terms.png") as picture:
        assert picture.width > 2 * picture.height


def test_the_table_s_groups_add_up_to_the_total(model):
    said = run("eval", "--model", str(model), "--holdout", "0.2", "--num", "5", "--times", "all")
    lines = [line.split() for line in said.splitlines() if line.strip()[:1].isdigit() or "L_T" in line]
    groups = [line for line in lines if len(line) in (5, 4)]
    assert sum(int(line[1]) for line in groups if line[0] != "L_T") == 30
    total = sum(float(line[2] if line[0] != "L_T" else line[3]) for line in groups)
    assert total == pytest.approx(float(measured(model).total.mean()), abs=1e-3)  # 13 numbers of 4 decimals


def test_an_estimate_is_the_library_s_and_no_class_can_be_told(tmp_path, model):
    command = ["eval", "--model", str(model), "--holdout", "0.2", "--num", "5", "--seed", "4"]
    estimate = run(*command, "--times", "6", "--batch", "3")
    assert "6 terms an image, estimating 30" in estimate
    assert total(estimate) == pytest.approx(float(measured(model, seed=4, times=6).total.mean()), abs=1e-4)
    plain = float(measured(model, labelled=False, seed=4).total.mean())
    assert total(run(*command, "--unconditional")) == pytest.approx(plain, abs=1e-4)
    assert abs(plain - float(measured(model, seed=4).total.mean())) > 1e-3


def test_models_are_compared_image_by_image(tmp_path, model):
    command = ["eval", "--model", str(model), "--model", "digits", "--holdout", "0.2", "--num", "5"]
    said = " ".join(run(*command, "--times", "5", "--out", str(tmp_path)).split())
    written = json.loads((tmp_path / "eval.json").read_text())
    (difference,) = written["differences"]
    assert f"digits less {model}: {difference['mean']:+.4f} bits/dim (95 % interval" in said
    means = [entry["bits_per_dim"]["mean"] for entry in written["models"]]
    assert difference["mean"] == pytest.approx(means[1] - means[0], abs=1e-5)
    widths = [entry["bits_per_dim"]["high"] - entry["bits_per_dim"]["low"] for entry in written["models"]]
    assert 0 < difference["high"] - difference["low"] < sum(widths)
    run(*command[:-1], "1", "--times", "5", "--out", str(tmp_path))
    assert json.loads((tmp_path / "eval.json").read_text())["differences"][0]["low"] is None


def test_a_learned_variance_is_trained_measured_and_sampled(tmp_path):
    command = "train --data digits --holdout 0.2 --timesteps 20 --steps 4 --channels 8 --mult 1 --blocks 1"
    options = "--attention= --batch 8 --warmup 1 --loss hybrid --variance learned_range --times loss_aware"
    run(*command.split(), *options.split(), "--out", str(tmp_path / "run"))
    model = str(tmp_path / "run" / "model")
    assert "T = 20, every term" in run("eval", "--model", model, "--holdout", "0.2", "--num", "3")
    run("sample", "--model", model, "--solver", "ddpm", "--steps", "5", "--num", "2", "--out",
        str(tmp_path / "x.png"))  # fmt: skip
    said = run(*command.split(), "--loss", "hybrid", "--out", str(tmp_path / "other"), code=2)
    assert "`--variance` must be learned_range or learned" in " ".join(said.split())


def test_images_that_were_trained_on_are_pointed_out(model):
    assert "--holdout 0.2 would measure" in run("eval", "--model", str(model), "--num", "2", "--times", "3")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "digit"], "did you mean 'digits'"),
        (["--times", "some"], "`--times` must be `all` or a number"),
        (["--times", "1"], "`--times` must be a number from 2 to T"),
        (["--num", "5000"], "`--num` must be at most the 1797 images"),
        (["--model", "digits", "--model", "digits"], "`--model` must name each model once"),
        (["--holdout", "1.5"], "`--holdout`"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "wide.npz"], "`--data` must have images of 1x8x8"),
        (["--out", "/proc/eval"], "/proc/eval"),
        (["--num", "2", "--times", "2", "--seed", str(2**64)], "`--seed`"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    np.savez("wide.npz", images=np.zeros((3, 8, 9), dtype=np.uint8))
    said = " ".join(run("eval", *arguments, code=2).split())
    assert named in said
    assert [path.name for path in tmp_path.iterdir()] == ["wide.npz"]
