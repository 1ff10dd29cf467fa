"""The command line: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastdiff.cli import app
from fastdiff.train import Trainer
from fastdiff.train.ranks import Ranks
from fastdiff.train.stop import Stopped

TINY = ["--channels", "8", "--mult", "1", "--blocks", "1", "--attention=", "--batch", "8", "--warmup", "1"]
TINY += ["--timesteps", "50"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_help_teaches_by_example():
    assert "fastdiff sample" in run("--help")
    assert "--class 7 --num 64 --guidance 2" in " ".join(run("sample", "--help").split())
    assert "--resume" in run("train", "--help")


def test_a_png_is_a_grid(tmp_path):
    out = tmp_path / "grid.png"
    said = run("sample", "--num", "20", "--steps", "3", "--out", str(out))
    with Image.open(out) as picture:
        assert picture.width > 4 * picture.height  # two lines of ten
    assert str(out) in said.replace("\n", "")
    assert "samples/s" in said


def test_an_npz_holds_uint8_nhwc_and_the_labels(tmp_path):
    out = tmp_path / "digits.npz"
    run("sample", "--num", "12", "--class", "7,3", "--steps", "4", "--batch", "5", "--out", str(out))
    with np.load(out) as archive:
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].shape == (12, 8, 8, 1)
        assert archive["arr_1"].tolist() == [7] * 6 + [3] * 6


def test_samples_do_not_depend_on_the_batch(tmp_path):
    archives = []
    for batch in ("3", "7"):
        out = tmp_path / f"{batch}.npz"
        run("sample", "--num", "7", "--solver", "ddpm", "--steps", "5", "--batch", batch, "--out", str(out))
        archives.append(np.load(out)["arr_0"].astype(int))
    assert np.abs(archives[0] - archives[1]).max() <= 1  # the network's last bits may turn a rounding


def test_a_threshold_keeps_strong_guidance_from_saturating(tmp_path):
    shares = []
    for name, options in (("range.npz", []), ("threshold.npz", ["--threshold", "0.9"])):
        run(
            "sample",
            "--num",
            "10",
            "--steps",
            "10",
            "--guidance",
            "8",
            *options,
            "--out",
            str(tmp_path / name),
        )
        pixels = np.load(tmp_path / name)["arr_0"]
        shares.append(np.isin(pixels, (0, 255)).mean())
    assert shares[1] < 0.8 * shares[0]


def test_a_trajectory_is_a_strip_of_its_moments(tmp_path):
    out = tmp_path / "strip.png"
    run("sample", "--num", "2", "--steps", "10", "--trajectory", "--out", str(out))
    with Image.open(out) as picture:
        assert picture.width > 5 * picture.height  # 11 moments by 2 samples


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "digit"], "digits"),
        (["--class", "10"], "--class"),
        (["--class", "seven"], "--class"),
        (["--solver", "ddimm"], "ddim"),
        (["--steps", "1001"], "steps"),
        (["--eta", "2"], "eta"),
        (["--seed", str(2**64)], "seed"),
        (["--out", "samples.gif.txt"], "samples.gif.txt"),
        (["--out", "nowhere/samples.png"], "nowhere"),
        (["--trajectory", "--num", "500"], "--trajectory"),
        (["--trajectory", "--out", "strip.npz"], "strip.npz"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    said = run("sample", *arguments, code=2)
    assert named in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "toaster"], "`--device` must be one of cpu"),
        (["--out", "/proc/samples.png"], "`--out` must lie in a folder that can be written"),
        (["--guidance", "nan"], "`--guidance`"),
        (["--threshold", "99.5"], "`--threshold` must be in [0, 1]"),
        (["--model", "nowhere"], "`--model`"),
        (["--num", "2", "--steps", "2", "--seed", str(-(2**64))], "`--seed`"),
    ],
)
def test_a_mistake_is_named_as_the_option(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    said = " ".join(run("sample", *arguments, code=2).split())
    assert named in said


def test_guidance_of_a_network_without_classes_is_refused(tmp_path):
    import fastdiff as fd

    net = fd.UNet(1, model_channels=8, channel_mult=(1,), num_res_blocks=1)
    settings = {"schedule": fd.NoiseSchedule.cosine(50).to_config(), "shape": [1, 4, 4]}
    net.save_pretrained(tmp_path / "net", diffusion=settings)
    command = ["sample", "--model", str(tmp_path / "net"), "--num", "2", "--steps", "2"]
    out = ["--out", str(tmp_path / "x.png")]
    assert "`--guidance` is for networks with classes" in " ".join(
        run(*command, "--guidance", "5", *out, code=2).split()
    )
    run(*command, *out)


def test_training_leaves_a_model_that_samples(tmp_path):
    folder = tmp_path / "run"
    said = run("train", "--data", "digits", "--out", str(folder), "--steps", "3", *TINY)
    assert "fastdiff sample --model" in said
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    assert (folder / "loss.png").exists()
    assert list((folder / "samples").iterdir())
    about = json.loads((folder / "model" / "config.json").read_text())["about"]
    assert "CC BY" in about["data"]
    assert about["seed"] == 0
    run(
        "sample",
        "--model",
        str(folder / "model"),
        "--num",
        "2",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "x.png"),
    )
    assert (tmp_path / "x.png").exists()


def test_training_of_arrays_in_windows_keeps_every_average_that_was_asked_for(tmp_path):
    shades = np.random.default_rng(0).random((20, 8, 8))
    np.savez(tmp_path / "shades.npz", images=shades, labels=np.arange(20) % 2)
    folder = tmp_path / "run"
    arguments = ["train", "--data", str(tmp_path / "shades.npz"), "--out", str(folder), "--steps", "2", *TINY]
    assert "--value-range" in run(*arguments, code=2)
    more = "--value-range 0,1 --crop 6 --flip --ema 0.9,0.99 --accumulate 2 --amp bf16 --grad-clip 0 --keep 1"
    run(*arguments, *more.split())
    out = tmp_path / "few.npz"
    for name in ("model", "model-ema-0.99"):
        run("sample", "--model", str(folder / name), "--num", "3", "--steps", "2", "--out", str(out))
        assert np.load(out)["arr_0"].shape == (3, 6, 6, 1)
    assert len(list((folder / "checkpoints").iterdir())) == 1


def test_training_on_a_cached_folder_does_not_need_the_pictures_decoded_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(np.full((9, 9), 99, np.uint8)).save(tmp_path / "photos" / name / "1.png")
    arguments = ["train", "--data", str(tmp_path / "photos"), "--size", "8", "--steps", "1", *TINY]
    for name in ("one", "two"):
        run(*arguments, "--cache", str(tmp_path / "kept"), "--out", str(tmp_path / name))
    assert len(list((tmp_path / "kept").glob("*.bytes"))) == 1
    assert "--cache" in run("train", "--data", "digits", "--cache", "x", "--out", str(tmp_path / "c"), code=2)


def test_training_on_a_folder_without_classes(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(photos / f"{i}.png")
    folder = tmp_path / "run"
    run("train", "--data", str(photos), "--size", "8", "--out", str(folder), "--steps", "2", *TINY)
    out = tmp_path / "x.npz"
    run("sample", "--model", str(folder / "model"), "--num", "3", "--steps", "2", "--out", str(out))
    assert np.load(out)["arr_0"].shape == (3, 8, 8, 3)
    assert "--class" in run(
        "sample", "--model", str(folder / "model"), "--class", "1", "--out", str(out), code=2
    )


def test_a_run_is_not_overwritten_and_resumes_only_as_it_was(tmp_path):
    folder = str(tmp_path / "run")
    run("train", "--data", "digits", "--out", folder, "--steps", "2", *TINY, "--lr-schedule", "constant")
    again = ["train", "--data", "digits", "--out", folder, "--steps", "4", *TINY, "--lr-schedule", "constant"]
    assert "resume" in run(*again, code=2)
    assert "lr" in run(*again, "--resume", "--lr", "0.5", code=2)
    assert "trained 4 steps" in run(*again, "--resume")


def test_a_training_that_is_asked_to_end_leaves_the_group_of_its_processes(tmp_path, monkeypatch):
    left = []

    def ends(*_, **__):
        raise Stopped(143)

    monkeypatch.setattr(Trainer, "run", ends)
    monkeypatch.setattr(Ranks, "leave", lambda ranks: left.append(ranks))
    run("train", "--data", "digits", "--out", str(tmp_path / "run"), *TINY, code=143)
    assert len(left) == 1


def test_a_killed_training_resumes_to_the_same_model(tmp_path):
    def command(folder: Path) -> list[str]:
        arguments = ["train", "--data", "digits", "--out", str(folder), "--steps", "40", *TINY]
        return [*arguments, "--checkpoint-every", "5"]

    straight, killed = tmp_path / "straight", tmp_path / "killed"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed: sums of two threads have other bits
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff", *command(killed)], stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list(killed.glob("checkpoints/step-0000001*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    run(*command(killed), "--resume")
    run(*command(straight))
    torch.set_num_threads(threads)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (straight, killed)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", "digits", "--schedule", "cosin"], "--schedule"),
        (["--data", "digits", "--dtype", "int8"], "--dtype"),
        (["--data", "digits", "--mult", "1;2"], "--mult"),
        (["--data", "digits", "--lr", "-1"], "lr"),
        (["--data", "digits", "--prediction", "epsilon"], "prediction"),
        (["--data", "digits", "--loss", "simpel"], "loss"),
        (["--data", "digits", "--ema", "0.9,1"], "--ema"),
        (["--data", "digits", "--ema", "much"], "--ema"),
        (["--data", "digits", "--amp", "fp8"], "--amp"),
        (["--data", "digits", "--crop", "9"], "--crop"),
        (["--data", "digits", "--accumulate", "999"], "--accumulate"),
        (["--data", "digits", "--value-range", "0,1"], "--value-range"),
    ],
)
def test_a_training_mistake_is_one_line_and_leaves_nothing(tmp_path, arguments, named):
    said = run("train", *arguments, "--out", str(tmp_path / "run"), code=2)
    assert named in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["schedule", "--schedule", "linear,cosine"],
        ["levels", "--levels", "karras", "--steps", "9"],
        ["table", "--solver", "unipc", "--option", "order=2"],
        ["table", "--solver", "ddpm", "--steps", "ddim10", "--zero-snr"],
    ],
)
def test_show_draws_what_it_is_asked_for(tmp_path, arguments):
    out = tmp_path / "show.png"
    assert "wrote" in run("show", *arguments, "--out", str(out))
    with Image.open(out) as picture:
        assert min(picture.size) > 500


def test_show_draws_a_saved_table(tmp_path):
    import fastdiff as fd

    levels = fd.NoiseLevels.karras(5, 0.02, 40.0)
    fd.compile_table("heun", levels, prediction="edm").save(tmp_path / "mine.safetensors")
    run("show", "table", "--file", str(tmp_path / "mine.safetensors"), "--out", str(tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["tabel"], "schedule, levels or table"),
        (["table", "--solver", "unipcc"], "unipc"),
        (["table", "--option", "order=2"], "order"),
        (["table", "--option", "eta"], "--option"),
        (["table", "--file", "nowhere.safetensors"], "nowhere"),
        (["levels", "--levels", "karas"], "--levels"),
        (["schedule", "--schedule", "linear,cosin"], "--schedule"),
        (["schedule", "--out", "show.txt"], "show.txt"),
        (["levels", "--solver", "bogus"], "`--solver` does not belong"),
        (["schedule", "--steps", "12"], "`--steps` does not belong"),
        (["levels", "--file", "mine.safetensors"], "`--file` does not belong"),
        (["table", "--file", "mine.safetensors", "--solver", "ddim"], "`--solver` does not belong"),
        (["table", "--option", "eta=abc"], "`eta` must be a number, 0.0 by default, got 'abc'"),
        (["table", "--solver", "lms", "--option", "order=2.5"], "`order` must be a whole number"),
        (["table", "--file", "."], "`--file` must be a safetensors file, got '.', a folder"),
    ],
)
def test_a_mistake_in_show_is_one_line_and_draws_nothing(tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    said = run("show", *arguments, code=2)
    assert named in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
