"""The moving average of parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastdiff.nn import EMA


class Small(nn.Module):
    """Parameters, one of them shared, a counting buffer, and a buffer that no checkpoint holds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=dtype)
        self.second = nn.Linear(3, 3, dtype=dtype)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("constant", torch.ones(2), persistent=False)


def walk(model: nn.Module, step: int) -> None:
    """Move every parameter to values that depend on the step alone."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.count += 1


def test_parameters_meet_by_name_not_by_order():
    left, right = nn.ParameterDict(), nn.ParameterDict()
    left["a"], left["b"] = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    right["b"], right["a"] = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    ema = EMA(left, warmup=False)
    ema.update(right)
    assert torch.equal(ema.parameters["a"], torch.zeros(2))
    assert torch.equal(ema.parameters["b"], torch.ones(2))


@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_the_weighted_sum_of_all_it_saw(warmup):
    model = Small()
    ema = EMA(model, decay=0.6, warmup=warmup)
    expected = model.first.weight.detach().double()
    for n in range(20):
        walk(model, n)
        ema.update(model)
        decay = min(0.6, (1 + n) / (10 + n)) if warmup else 0.6
        expected = decay * expected + (1 - decay) * model.first.weight.detach().double()
    # Three roundings an update, and earlier errors shrink by 0.6: 3 / (1 - 0.6) half-ulps of numbers below 4.
    bound = 7.5 * 4 * 2**-24
    assert float((ema.parameters["first.weight"] - expected).abs().max()) <= bound
    assert ema.num_updates == 20


def test_warm_up_forgets_the_start():
    model = Small()
    slow, warm = EMA(model, decay=0.9999, warmup=False), EMA(model, decay=0.9999)
    start = model.first.weight.detach().clone()
    for _ in range(50):
        with torch.no_grad():
            model.first.weight.fill_(1.0)
        slow.update(model)
        warm.update(model)
    # The start's weight after n updates is 9! n! / (n + 9)! with the warm-up and 0.9999^n without.
    torch.testing.assert_close(
        slow.parameters["first.weight"], 1 + (start - 1) * 0.9999**50, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(warm.parameters["first.weight"], torch.ones(3, 3), rtol=0, atol=1e-5)


def test_copy_to_gives_the_average_and_the_buffers():
    model, target = Small(), Small()
    ema = EMA(model)
    walk(model, 1)
    ema.update(model)
    weight = target.first.weight
    ema.copy_to(target)
    assert target.first.weight is weight
    assert torch.equal(weight, ema.parameters["first.weight"])
    assert target.second.weight is weight
    assert int(target.count) == 1


def test_a_shared_parameter_is_averaged_once():
    ema = EMA(Small())
    assert list(ema.parameters) == ["first.weight", "first.bias", "second.bias"]
    assert list(ema.buffers) == ["count"]


def test_a_model_of_half_precision_has_an_average_that_moves():
    model = Small(torch.bfloat16)
    nn.init.zeros_(model.first.weight)
    ema = EMA(model, decay=0.999, warmup=False)
    nn.init.ones_(model.first.weight)
    for _ in range(1000):
        ema.update(model)
    assert ema.parameters["first.weight"].dtype == torch.float32
    assert float(ema.parameters["first.weight"].min()) == pytest.approx(1 - 0.999**1000, abs=1e-4)
    ema.copy_to(model)
    assert model.first.weight.dtype == torch.bfloat16


def test_it_goes_on_bit_for_bit_from_its_state():
    model = Small()
    whole = EMA(model, decay=0.99)
    for n in range(3):
        walk(model, n)
        whole.update(model)
    resumed = EMA(Small(), decay=0.5, warmup=False)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for n in range(3, 6):
        walk(model, n)
        whole.update(model)
        resumed.update(model)
    a, b = whole.state_dict(), resumed.state_dict()
    assert {k: v for k, v in a.items() if k not in ("parameters", "buffers")} == {
        "decay": 0.99,
        "warmup": True,
        "num_updates": 6,
    }
    assert all(torch.equal(a["parameters"][name], b["parameters"][name]) for name in a["parameters"])
    assert torch.equal(a["buffers"]["count"], b["buffers"]["count"])
    assert (b["decay"], b["warmup"], b["num_updates"]) == (0.99, True, 6)


def test_loading_copies():
    ema, other = EMA(Small()), EMA(Small())
    other.load_state_dict(ema.state_dict())
    ema.parameters["first.bias"].add_(1.0)
    assert not torch.equal(ema.parameters["first.bias"], other.parameters["first.bias"])


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    ema = EMA(Small())
    before = copy.deepcopy(ema.state_dict())
    states = [
        {**before, "parameters": {**before["parameters"], "first.bias": torch.zeros(4)}},
        {**before, "buffers": {}},
        {"decay": 0.5},
    ]
    for state in states:
        with pytest.raises(ValueError, match="`state"):
            ema.load_state_dict(state)
    assert all(torch.equal(ema.parameters[name], p) for name, p in before["parameters"].items())
    assert ema.decay == before["decay"]


def test_another_model_is_refused():
    ema = EMA(Small())
    with pytest.raises(ValueError, match=r"`model`.*same network"):
        ema.update(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"`model`.*same network"):
        ema.copy_to(nn.Sequential(Small()))
    assert ema.num_updates == 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_of_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="`decay` must be in"):
        EMA(Small(), decay=decay)
