"""Compiled networks: weights, cache, comparison, when it pays. Compiler and runtime are stand-ins."""

from __future__ import annotations

import copy
import gc
import os
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from chains import SCHEDULE, SHAPE
from networks import network
from package_stand_in import Loader, Net, assert_same, both, refuse_to_compile, said, stand_ins

import fastdiff as fd
from fastdiff import compiled, execution, packages

compiler = pytest.fixture(stand_ins)


class Output(torch.nn.Module):
    """diffusers' way to return a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x, t):
        return SimpleNamespace(sample=self.net(x, t))


LABELS = {"cond": {"labels": [1, 2, 3]}}
CASES = {
    "ddpm": (Net(), {}, {}),
    "a history": (Net(), {"solver": "dpmpp_2m"}, {}),
    "EDM's input and times": (Net(), {"solver": "euler", "prediction": "v"}, {}),
    "learned variance": (Net(2), {"variance": "learned_range"}, {}),
    "bfloat16": (Net().bfloat16(), {}, {}),
    "classes": (Net(), {}, LABELS),
    "one class for all": (Net(), {}, {"cond": {"labels": 2}}),
    "guidance": (Net(), {}, LABELS | {"uncond": {"labels": -1}, "guidance_scale": [1.0, 2.0, 0.5]}),
    "an output object": (Output(), {}, {}),
    "a U-Net": (network(num_classes=3), {}, {"cond": {"labels": [0, 1, 2]}, "guidance_scale": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_chain_is_the_eager_chain(compiler, case, caplog):
    net, options, arguments = CASES[case]
    pair = both(net, **options)
    x, expected = (sampler.sample(3, **arguments) for sampler in pair)
    # eager U-Nets normalise in another order than exported ones: rounding over five rows, the first times 158
    assert (x - expected).abs().max() <= 5 * 158 * 2**-23
    assert len(compiler.runs) == 1
    assert not said(caplog)


def test_the_compiled_network_is_the_one_that_runs(compiler, monkeypatch):
    pair = both(Net())
    pair[0].sample(3)
    monkeypatch.setattr(Loader, "spoil", 0.5)  # after it was compared
    assert not torch.equal(pair[0].sample(3), pair[1].sample(3))


def test_weights_are_followed_however_they_change(compiler):
    net = Net()
    pair = both(net)
    results = [assert_same(pair)]
    changes = {
        "in place": lambda: net.conv.weight.data.mul_(1.5),
        "an optimiser": lambda: step(net),
        "load_state_dict": lambda: net.load_state_dict(Net(1).state_dict()),
        "a scalar": lambda: net.weight.data.fill_(-0.4),
        "a buffer": lambda: net.offset.add_(0.3),
        "other memory": lambda: setattr(net.conv.weight, "data", net.conv.weight.data * 0.5),
        "another parameter": lambda: setattr(net.conv, "bias", torch.nn.Parameter(torch.ones(2))),
    }
    for name, change in changes.items():
        change()
        results.append(assert_same(pair))
        assert not torch.equal(results[-1], results[-2]), name
    assert len(compiler.runs) == 1


def step(net: torch.nn.Module) -> None:
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.ones(1, *SHAPE), torch.tensor([5])).sum().backward()
    optimiser.step()


def test_weights_that_were_replaced_are_let_go(compiler):
    net = Net()
    pair = both(net)
    pair[0].sample(3)
    old = weakref.ref(net.conv.weight.untyped_storage())
    assert old() is not None
    net.conv.weight = torch.nn.Parameter(torch.ones_like(net.conv.weight))
    assert_same(pair)
    gc.collect()
    assert old() is None


def test_a_network_and_its_weights_end_with_their_samplers(compiler):
    net = Net()
    pair = both(net)
    pair[0].sample(3)
    alive = weakref.ref(net)
    del net, pair
    gc.collect()
    assert alive() is None
    assert not compiled._plans


@pytest.mark.parametrize("change", ["setting", "hook", "forward", "module", "layout", "dtype"])
def test_a_network_that_has_become_another_is_compiled_anew(compiler, change):
    net, act = Net(), torch.nn.Tanh()
    outer = Chain(net, act)
    hook = net.register_forward_hook(lambda module, args, out: out)
    pair = both(outer)
    before = pair[0].sample(3)
    if change == "setting":
        net.gain = 2.0
    elif change == "hook":
        hook.remove()  # and there are as many as before
        net.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "forward":
        net.forward = lambda x, t: 0.5 * x
    elif change == "module":
        outer.act = torch.nn.Sigmoid()
    elif change == "layout":
        net.conv.to(memory_format=torch.channels_last)
    else:
        outer.double()
        pair = both(outer)
    x, expected = (sampler.sample(3) for sampler in pair)
    assert torch.allclose(x, expected, atol=1e-4)
    if change not in ("layout", "dtype"):
        assert not torch.allclose(x, before, atol=1e-3)
    assert len(compiler.runs) == 2


class Chain(torch.nn.Module):
    def __init__(self, net: torch.nn.Module, act: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.act = net, act

    def forward(self, x, t):
        return self.act(self.net(x, t))


def test_a_network_that_changes_itself_from_chain_to_chain_is_left_alone(compiler, monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)

    class Counting(Net):
        def forward(self, x, t):
            self.gain += 0.01
            return super().forward(x, t)

    pair = both(Counting())
    for _ in range(6):
        pair[0].sample(1)
    assert len(compiler.runs) <= 1 + compiled._MOST_CHANGES
    assert "from chain to chain" in said(caplog)[-1]


def test_training_mode_is_put_back_and_dropout_is_off(compiler):
    net = Chain(Net(), torch.nn.Dropout(0.5)).train()
    pair = both(net)
    assert_same(pair)
    assert all(module.training for module in net.modules())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_its_parents_compilers_alone(compiler):
    packages._compiling.add("the parent's")
    compiled._plans_lock.acquire()
    child = os.fork()
    if not child:
        os._exit(0 if not packages._compiling and compiled._plans_lock.acquire(blocking=False) else 1)
    compiled._plans_lock.release()
    packages._compiling.clear()
    assert os.waitpid(child, 0)[1] == 0


def test_a_compiled_network_that_differs_is_not_used_and_that_is_said(compiler, monkeypatch, caplog):
    monkeypatch.setattr(Loader, "spoil", 1e-4)
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    pair = both(Net())
    assert_same(pair)
    assert_same(pair, seed=1)
    assert len(said(caplog)) == 1
    assert "compiled it is off by" in said(caplog)[-1]


def calls_on(x: torch.Tensor) -> list[packages.Call]:
    return [packages.Call((x, torch.full((len(x),), t)), {}) for t in (900, 450)]


@torch.inference_mode()
def test_agreement_is_rounding_and_no_more():
    net, calls = Net(), calls_on(torch.randn(3, *SHAPE))
    wide = [lambda x, t: net.double()(x.double(), t).float(), lambda x, t: net.float()(x, t)]
    assert all(compiled.agree(same, lambda x, t: net.float()(x, t), calls, 10) for same in wide)
    for off in (lambda x, t: net(x, t) * (1 + 1e-5), lambda x, t: net(x, t + 1), lambda x, t: net(x, t)[:1]):
        with pytest.raises(packages.Refused, match="compiled it"):
            compiled.agree(off, net, calls, 10)
    for silent in (torch.zeros_like, lambda x: x * float("nan"), lambda x: x / 0):
        assert not compiled.agree(lambda x, t, f=silent: f(x), lambda x, t, f=silent: f(x), calls, 10)
    with pytest.raises(packages.Refused, match="compiled it"):
        compiled.agree(lambda x, t: x * float("nan"), net, calls, 10)


class Steep(torch.nn.Module):
    """A network of bfloat16 whose time embedding turns the rounding of an angle into anything."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.nn.Parameter(torch.tensor([1.0, 0.37], dtype=torch.bfloat16))

    def forward(self, x, t):
        angle = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return x + torch.sin(angle)[:, :, None, None]


@torch.inference_mode()
def test_a_compiled_network_may_round_less_but_not_more():
    net, calls = Steep(), calls_on(torch.randn(3, *SHAPE, dtype=torch.bfloat16))
    exact = copy.deepcopy(net).double()

    def less(x, t, off=0.0):
        return (exact(x.double(), t) + off).to(torch.bfloat16)

    (x, t), *_ = calls[0]
    assert (less(x, t) - net(x, t)).abs().max() > 0.1
    assert compiled.agree(less, net, calls, 4)
    with pytest.raises(packages.Refused, match="compiled it is off"):
        compiled.agree(lambda x, t: less(x, t, 1.5), net, calls, 4)
    with pytest.raises(packages.Refused, match="compiled it is off"):  # what is no module has no float64
        compiled.agree(less, lambda x, t: net(x, t), calls, 4)


def test_outputs_of_zero_are_compared_again_when_they_say_something(compiler, monkeypatch, caplog):
    net = Net()
    monkeypatch.setattr(Loader, "spoil", 0.1)
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    weight = net.conv.weight.detach().clone()
    torch.nn.init.zeros_(net.conv.weight)
    torch.nn.init.zeros_(net.conv.bias)
    pair = both(net)
    assert_same(pair)
    net.conv.weight.data.copy_(weight)
    assert_same(pair)
    assert "compiled it is off by" in said(caplog)[-1]


class Branching(Net):
    """A network whose code depends on its values."""

    def forward(self, x, t):
        return super().forward(x, t) if t[0] > 500 else x


class Writing(Net):
    """A network that writes to a buffer of its own."""

    def forward(self, x, t):
        self.offset.add_(0.001)
        return super().forward(x, t)


class Literal(Net):
    """A network that makes a tensor of numbers in its code."""

    def forward(self, x, t):
        return super().forward(x, t) * torch.tensor([0.5, 0.25]).view(1, 2, 1, 1)


REFUSED = {"branch": Branching(), "write": Writing(), "literal": Literal(), "function": lambda x, t: 0.5 * x}


@pytest.mark.parametrize("model", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_exported_is_left_to_torch_compile_with_one_line(compiler, model, monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: asked.append(f) or f)
    sampler = both(model)[0]
    for seed in range(2):
        sampler.sample(2, seed=seed)
    assert asked == [model]
    assert len(said(caplog)) == 1
    assert "compiled by torch.compile" in said(caplog)[-1]
    assert not compiler.runs


def test_without_a_compiler_chains_are_eager_and_one_line_says_so(compiler, monkeypatch, caplog):
    for module in (packages, execution):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    pair = both(Net())
    assert_same(pair)
    assert_same(pair, seed=1)
    assert said(caplog) == [
        "the network runs eagerly, it cannot be compiled: no C++ compiler was found; install g++"
    ]


def test_threads_share_a_compiled_network(compiler):
    pair = both(Net(), steps=20)
    alone = [pair[1].sample(2, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: pair[0].sample(2, seed=seed), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len(compiler.runs) == 1


def test_exporting_leaves_the_network_to_other_threads(compiler):
    net = Net()
    copy = packages.structure_copy(net)
    ours, theirs = set(net.modules()), set(copy.modules())
    assert not ours & theirs
    pairs = zip(packages.tensors_of(net), packages.tensors_of(copy), strict=True)
    assert all(a is b for (_, a), (_, b) in pairs)


def test_autocast_is_not_compiled_into_a_network(compiler):
    pair = both(Net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(pair)
    assert_same(pair)
    assert len(compiler.runs) == 1


def test_a_sampler_is_copied_with_its_network(compiler):
    pair = both(Net())
    expected = assert_same(pair)
    assert torch.equal(copy.deepcopy(pair[0]).sample(3), expected)


def test_a_compiled_network_that_fails_is_not_used(compiler, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("wrong size")

    monkeypatch.setattr(Loader, "run", fail)
    monkeypatch.setattr(torch, "compile", refuse_to_compile)
    assert_same(both(Net()))
    (line,) = said(caplog)
    assert "compiled it fails: wrong size; torch.compile: RuntimeError: torch.compile is not" in line


def test_modes_are_checked():
    with pytest.raises(ValueError, match="`compile` must be \"auto\", True or False, got 'always'"):
        fd.Sampler(Net(), SCHEDULE, shape=SHAPE, compile="always")
