"""`fastdiff bench chain`: the parts of a row's time are what they say, and add up."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from chains import one_thread
from networks import network
from PIL import Image
from typer.testing import CliRunner

import fastdiff as fd
from fastdiff import shares
from fastdiff.cli import app
from fastdiff.plots import show_shares
from fastdiff.shares import PARTS, Shares, chain_shares
from fastdiff.timing import interleaved

_one_thread = pytest.fixture(autouse=True)(one_thread)
SCHEDULE = fd.NoiseSchedule.linear(1000)


def test_the_parts_are_the_differences_of_the_four_chains(monkeypatch):
    seconds = {"step": [10.0, 12.0, 11.0], "bare": [4.0, 4.0, 4.0], "given": [2.5] * 3, "host": [0.5] * 3}

    def fake(chains, rounds, settle):
        assert set(chains) == set(seconds)
        for run in chains.values():
            run()
        return {label: list(values) for label, values in seconds.items()}

    monkeypatch.setattr(shares, "interleaved", fake)
    sampler = fd.Sampler(lambda x, t: x, SCHEDULE, solver="ddpm", steps=10, shape=(2, 4, 4))
    found = chain_shares(sampler, 3)
    assert found == Shares("ddpm", 10, 3, step=1.1, network=0.7, update=0.2, noise=0.15, host=0.05)
    assert sum(found.share(part) for part in PARTS) == pytest.approx(1.0)
    assert "network" in str(found)
    assert "63.6%" in str(found)


def test_a_slow_network_is_nearly_all_of_a_row():
    def slow(x, t):
        time.sleep(0.004)
        return x

    sampler = fd.Sampler(slow, SCHEDULE, steps=5, shape=(2, 4, 4))
    found = chain_shares(sampler, 1, rounds=3)
    assert found.network >= 0.0036
    assert found.share("network") > 0.5
    assert found.noise == 0.0  # DDIM draws none


def test_noise_and_update_of_a_large_state_outweigh_the_host():
    sampler = fd.Sampler(lambda x, t: x, SCHEDULE, solver="ddpm", steps=4, shape=(8, 128, 128))
    found = chain_shares(sampler, 8, rounds=3)
    assert found.update + found.noise > found.host


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"cond": {"labels": torch.tensor([0, 1])}, "guidance_scale": 2.0}, {}),
        ({}, {"learned_variance": True}),
        ({}, {"rank": 1}),
    ],
    ids=["guidance", "learned variance", "signals"],
)
def test_every_kind_of_chain_can_be_measured(options, model):
    net = network(**model)
    variance = "learned_range" if model.get("learned_variance") else "fixed_small"
    shape = (2, *[4] * net.rank)
    sampler = fd.Sampler(net, SCHEDULE, solver="ddpm", steps=2, variance=variance, shape=shape)
    found = chain_shares(sampler, 2, rounds=1, **options)
    assert found.step > 0
    assert all(getattr(found, part) >= 0 for part in PARTS)
    assert not net.training


def test_interleaving_times_every_variant_in_turning_order():
    order = []
    variants = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = interleaved(variants, 2, 0.0, settle=lambda: order.append("|"))
    assert "".join(order).endswith("|a||b||b||a|")
    assert {label: len(values) for label, values in seconds.items()} == {"a": 2, "b": 2}


def test_shares_are_drawn_as_bars(tmp_path):
    bars = {
        "one": {"network": 3e-3, "update": 1e-4, "noise": 1e-3, "host": 1e-4},
        "two": {"network": 1e-3, "update": 1e-3, "noise": 1e-3, "host": 1e-3},
    }
    path = show_shares(bars, tmp_path / "shares.png")
    with Image.open(path) as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    red, blue = colours[:, 0] - colours[:, 2] > 80, colours[:, 2] - colours[:, 0] > 80
    assert min(red.sum(), blue.sum()) > 1000


def bench(*given):
    result = CliRunner().invoke(app, ["bench", *given])
    return result.exit_code, result.output


def test_the_command_prints_and_draws(tmp_path):
    out = tmp_path / "bench.png"
    quick = ["--steps", "2", "--rounds", "1"]
    code, text = bench("chain", "--solver", "ddim,ddpm", "--batch", "1", *quick, "--out", str(out))
    assert code == 0
    assert text.count("a row, 2 rows, batch 1") == 2
    assert all(text.count(part) == 2 for part in PARTS)
    assert out.is_file()
    file = tmp_path / "net.py"
    file.write_text("def net(x, t, obs):\n    return x + obs.mean(1)[:, None, None, None]\n")
    code, text = bench(
        "chain",
        "--model",
        f"{file}:net",
        "--shape",
        "2,4,4",
        "--cond",
        "obs=3",
        "--batch",
        "2",
        *quick,
        "--json",
    )
    assert code == 0
    assert [chain["batch"] for chain in json.loads(text)["chains"]] == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["chains"], "must be chain"),
        (["chain", "--batch", "0"], "`--batch` must be numbers of at least 1"),
        (["chain", "--batch", "x"], "`--batch` must be numbers"),
        (["chain", "--solver", "ddimm"], "ddim"),
        (["chain", "--out", "bench.txt"], "bench.txt"),
        (["chain", "--model", "digts"], "did you mean 'digits'"),
    ],
)
def test_wrong_options_are_one_line(given, message):
    code, text = bench(*given)
    assert code == 2
    assert message in text
    assert len(text.splitlines()) == 1
