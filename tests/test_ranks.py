"""Several processes train one network: the same losses, one writer, and a clear end when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import log, state

from fastdiff.cli.options import device
from fastdiff.train.feed import cut
from fastdiff.train.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def runs(forks, tmp_path_factory):
    """(folder, how each group of processes ended)."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, forks("two_processes", folder)


def losses(out):
    """Of each step; a quarter of the chain in which no sample fell counts as -1."""
    keys = ("loss", "grad_norm", "loss_q1", "loss_q4")
    return [[-1.0 if record[key] is None else record[key] for key in keys] for record in log(out)]


def assert_same_losses(run, alone):
    assert len(losses(run)) == 12
    for mine, theirs in zip(losses(run), losses(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_every_process_of_every_run_ends_well(runs):
    _, ended = runs
    assert {name: [status for status, _ in group] for name, group in ended.items()} == {
        "alone": [0], "together": [0, 0], "begun alone": [0], "ended together": [0, 0],
        "begun together": [0, 0], "ended alone": [0], "compiled": [0, 0],
        "learning": [0, 0, 0],
    }, ended  # fmt: skip


def test_two_processes_have_the_losses_of_one_with_the_same_batch(runs):
    """Seven samples in two processes of two parts: 2, 2 and 2, 1."""
    folder, _ = runs
    assert_same_losses(folder / "two", folder / "one")


def test_the_comparison_sees_another_batch(runs):
    folder, _ = runs
    values = losses(folder / "two")
    assert values[0] != pytest.approx(values[1], rel=1e-5)


def test_a_compiled_network_in_bfloat16_trains_in_two_processes(runs):
    folder, ended = runs
    assert [said for _, said in ended["compiled"]] == [
        "",
        "",
    ]  # no warning
    assert "model/enter.weight" in state(folder / "compiled")
    for mine, theirs in zip(losses(folder / "compiled"), losses(folder / "one"), strict=True):
        assert mine[0] == pytest.approx(theirs[0], rel=0.02)  # as bfloat16 alone in test_step


def test_times_that_learn_hear_of_the_whole_batch_in_every_process(runs):
    """They move on by what they have heard, so another part of it would give other times."""
    folder, _ = runs
    assert_same_losses(folder / "learnt by two", folder / "learnt by one")
    assert state(folder / "learnt by two")["times/counts"] == state(folder / "learnt by one")["times/counts"]


def test_the_same_cut_gives_the_same_bits_up_to_the_change(runs):
    folder, _ = runs
    assert log(folder / "grown")[:6] == log(folder / "one")[:6]


@pytest.mark.parametrize("name", ["grown", "shrunk"])
def test_a_run_goes_on_under_another_number_of_processes(runs, name):
    folder, _ = runs
    assert_same_losses(folder / name, folder / "one")


def test_only_rank_0_writes(runs):
    """Rank 1 of `together` could not write a byte to any file."""
    folder, ended = runs
    assert [status for status, _ in ended["together"]] == [0, 0]
    assert (folder / "two" / "loss.png").exists()
    assert state(folder / "two").keys() == state(folder / "one").keys()


def test_a_process_that_dies_or_differs_ends_all_with_the_reason(forks, tmp_path):
    ended = forks("processes_that_fail", tmp_path)
    (status, said), (killed, _) = ended["lost"]
    assert (status, killed) == (1, -signal.SIGKILL)
    assert "ConnectionError: another of the 2 processes of this run ended at step 5" in said
    assert "resume=True goes on from the last checkpoint" in said
    for (status, said), words in (
        (ended["taken"][0], "`out_dir` must not hold another run"),
        (ended["taken"][1], "`out_dir` must not hold another run"),
        (
            ended["other"][1],
            "must have the same arguments and data, but here, against rank 0, data",
        ),
        (ended["too small"][0], "`batch_size` must give every part of every process a sample, got 5 for 2"),
        (ended["too small"][1], "`batch_size` must give every part of every process a sample, got 5 for 2"),
    ):
        assert status == 1
        assert words in said


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_cut_is_complete_ordered_and_even(size, parts):
    runs = [ids for rank in range(size) for ids in cut(13, parts, rank, size)]
    assert [i for ids in runs for i in ids] == list(range(13))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_a_device_that_cannot_exchange_tensors_is_named(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="`device` must be cpu or cuda for several processes, got meta"):
        Ranks.join(torch.device("meta"))
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Ranks.join(torch.device("meta")).size == 1


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="there is such a GPU")
def test_each_of_torchrun_s_processes_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="got 'cuda:3'"):
        device("cuda")
    assert device("cpu").type == "cpu"


@pytest.mark.slow
def test_torchrun_trains_the_command_line_s_network(tmp_path):
    numbers = "--channels 8 --mult 1 --blocks 1 --batch 8 --warmup 1 --timesteps 50 --steps 4 --dropout 0"
    tiny = [*numbers.split(), "--attention="]
    command = [sys.executable, "-m", "fastdiff", "train", "--data", "digits", *tiny]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for arguments in ([*command, "--out", str(tmp_path / "one")],
                      [*launcher, *command[2:], "--out", str(tmp_path / "two")]):  # fmt: skip
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("trained 4 steps") == 1
    for one, two in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
