"""Packages on disk and when they are made: names, damage, the background; with stand-ins."""

from __future__ import annotations

import functools
import importlib
import os
import stat
import sys
import threading
import time
from typing import ClassVar

import pytest
import torch
from chains import SCHEDULE, SHAPE
from package_stand_in import Net, assert_same, both, refuse_to_compile, said, stand_ins

import fastdiff as fd
from fastdiff import compiled, packages
from fastdiff.anatomy import description
from fastdiff.kernels import _cache

compiler = pytest.fixture(stand_ins)


def test_a_package_is_found_by_the_next_process_and_is_private(compiler):
    assert_same(both(Net()))
    compiled._plans.clear()
    assert_same(both(Net()))
    assert len(compiler.runs) == 1
    files = list(_cache.folder().glob("step-*"))
    assert sorted(path.suffix for path in files) == [".pt2", ".sha256"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_the_next_process_does_not_export(compiler, monkeypatch, tmp_path):
    """The network has a file of its own: what a test's imports reach grows while other tests run."""
    source = (
        "import torch\nclass Alone(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
    )
    source += "        self.conv = torch.nn.Conv2d(2, 2, 3, padding=1)\n"
    source += (
        "    def forward(self, x, t):\n        return self.conv(x) + torch.cos(t / 300).view(-1, 1, 1, 1)\n"
    )
    (tmp_path / "alone_in_a_file.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    net = importlib.import_module("alone_in_a_file").Alone()
    assert_same(both(net))
    compiled._plans.clear()
    monkeypatch.setattr(packages, "export", refuse_to_compile)
    assert_same(both(net))
    assert len(compiler.runs) == 1


class Reading(Net):
    """A network that reads a variable that no outline knows."""

    factor: ClassVar = 1.0

    def forward(self, x, t):
        return super().forward(x, t) * self.factor


def test_a_package_that_an_outline_misled_to_is_replaced_by_its_graphs(compiler, monkeypatch):
    assert_same(both(Reading()))
    compiled._plans.clear()
    monkeypatch.setattr(Reading, "factor", 0.5)
    assert_same(both(Reading()))
    assert len(compiler.runs) == 2
    compiled._plans.clear()
    assert_same(both(Reading()))  # two packages of one outline: by its graph
    assert len(compiler.runs) == 2


def test_a_description_names_what_a_graph_follows_from(tmp_path, monkeypatch):
    def layer(gain: float) -> torch.nn.Module:
        return importlib.import_module("made_layer").Layer(gain)

    source = "import torch, made_helper\nclass Layer(torch.nn.Module):\n    def __init__(self, gain):\n"
    source += "        super().__init__()\n        self.gain, self.act = gain, torch.nn.functional.silu\n"
    helper = "class Helper:\n    def __init__(self, size):\n        self.size = size\n"
    (tmp_path / "made_layer.py").write_text(source)
    (tmp_path / "made_helper.py").write_text(helper)
    monkeypatch.syspath_prepend(str(tmp_path))
    plain = description(layer(1.0))
    assert plain is not None
    assert description(layer(1.0)) == plain
    assert description(layer(2.0)) != plain
    (tmp_path / "made_helper.py").write_text(helper + "FACTOR = 2\n")
    assert description(layer(1.0)) != plain, "a file that the layer's file imports"
    (tmp_path / "made_helper.py").write_text(helper)
    assert description(layer(1.0)) == plain
    net = layer(1.0)
    net.helper = importlib.import_module("made_helper").Helper(3)
    described = description(net)
    assert described is not None
    net.helper.size = 4
    assert description(net) not in (described, None)
    for change in ("hook", "function", "partial", "object", "no file"):
        net = layer(1.0)
        if change == "hook":
            net.register_forward_hook(lambda module, args, out: out)
        elif change == "function":
            net.act = lambda x: x
        elif change == "partial":
            net.act = functools.partial(torch.nn.functional.silu, inplace=True)
        elif change == "object":
            net.thing = threading.Lock()
        else:
            monkeypatch.delattr(sys.modules["made_helper"], "__file__")
        assert description(net) is None, change


@pytest.mark.parametrize("damage", ["truncated", "digest lost"])
def test_a_damaged_package_is_compiled_again(compiler, damage):
    assert_same(both(Net()))
    compiled._plans.clear()
    (path,) = _cache.folder().glob("*.pt2")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        _cache.digest_file(path).unlink()
    assert_same(both(Net()))
    assert len(compiler.runs) == 2


def test_a_package_of_another_user_is_not_loaded(compiler, monkeypatch, caplog):
    assert_same(both(Net()))
    compiled._plans.clear()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    assert_same(both(Net()))
    assert "belongs to another user" in said(caplog)[-1]


def test_what_compiled_code_depends_on_is_in_its_name(compiler, monkeypatch):
    def path(net, num=2, dtype=torch.int64, labels=False) -> str:
        cond = {"labels": torch.zeros(num, dtype=torch.int64)} if labels else {}
        x, t = torch.zeros(num, *SHAPE), torch.zeros(num, dtype=dtype)
        return packages.export(packages.structure_copy(net), packages.Call((x, t), cond)).path.name

    class Sine(Net):
        def forward(self, x, t, labels=None):
            return self.conv(torch.sin(x))

    sine, loud = Sine(), Net()
    loud.gain = 3.0
    names = [path(Net()), path(sine), path(loud), path(Net(), 3), path(Net(), dtype=torch.float32)]
    names += [
        path(Net(), labels=True),
        path(Net().double()),
        path(Net().to(memory_format=torch.channels_last)),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    names.append(path(Net()))
    torch.set_num_threads(threads)
    monkeypatch.setattr(packages, "_LEAST_CHUNK", 10_000)
    names.append(path(Net()))
    assert names[-1].split("-")[1] != names[0].split("-")[1], "nor is it found by its outline alone"
    monkeypatch.setattr(torch, "__version__", "9.9")
    names.append(path(Net()))
    monkeypatch.setattr(_cache, "processor", lambda: "another")
    names.append(path(Net()))
    assert len(set(names)) == len(names)
    assert path(Net()) == names[-1]


def test_native_zero_compiles_nothing(compiler, monkeypatch):
    monkeypatch.setenv("FASTDIFF_NATIVE", "0")
    assert_same(both(Net()))
    assert not compiler.runs


def wait_for(made) -> None:
    end = time.monotonic() + 60
    while not made() and time.monotonic() < end:
        time.sleep(0.01)
    assert made()


def background() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastdiff-compile"]


def test_auto_compiles_nothing_for_short_chains(compiler, monkeypatch):
    monkeypatch.setattr(packages, "export", refuse_to_compile)
    sampler = fd.Sampler(Net(), SCHEDULE, steps=20, shape=SHAPE)
    for seed in range(3):
        sampler.sample(2, seed=seed)
    assert not background()
    assert not compiler.runs


def test_auto_compiles_in_the_background_once_it_pays(compiler, monkeypatch):
    net, main, used = Net(), threading.get_ident(), []
    ran_in = []
    monkeypatch.setattr(packages, "_compile", lambda *a: ran_in.append(threading.get_ident()) or compiler(*a))
    sampler, eager = fd.Sampler(net, SCHEDULE, steps=5, shape=SHAPE), both(net, solver="ddim")[1]
    expected, stepper = eager.sample(2), sampler._program.stepper
    assert torch.equal(sampler.sample(2), expected)
    (plan,) = compiled._plans[net].values()
    cost = compiled._SECONDS_TO_COMPILE / compiled._SHARE_SAVED
    plan._spent = cost - 1
    sampler.sample(2)
    assert not background(), "not yet"
    plan._spent = cost
    assert torch.equal(sampler.sample(2), expected), "the chain that starts it is eager"
    wait_for(lambda: plan._made)
    assert ran_in
    assert main not in ran_in
    monkeypatch.setattr(
        sampler._program, "stepper", lambda network, *a: used.append(network) or stepper(network, *a)
    )
    assert torch.equal(sampler.sample(2), expected)
    assert set(used) == {plan._made}


def test_auto_uses_a_cached_package_sooner(compiler):
    assert_same(both(Net()))
    compiled._plans.clear()
    net = Net()
    sampler = fd.Sampler(net, SCHEDULE, steps=5, shape=SHAPE)
    sampler.sample(3)
    (plan,) = compiled._plans[net].values()
    plan._spent = compiled._SECONDS_TO_EXPORT / compiled._SHARE_SAVED
    sampler.sample(3)
    wait_for(lambda: plan._made)
    sampler.sample(3)
    assert plan._verified
    assert len(compiler.runs) == 1


def test_a_compilation_that_fails_in_the_background_is_said_once(compiler, caplog):
    compiler.fails = "the compilation failed: no space left"
    net = Net()
    sampler = fd.Sampler(net, SCHEDULE, steps=5, shape=SHAPE)
    sampler.sample(3)
    (plan,) = compiled._plans[net].values()
    plan._spent = 1e6
    sampler.sample(3)
    wait_for(lambda: plan.refused)
    for seed in range(3):
        sampler.sample(3, seed=seed)
    assert len(said(caplog)) == 1
    assert "no space left" in said(caplog)[-1]
    assert len(compiler.runs) == 1
