"""Weights in one piece: the numbers of torch's own optimiser and of fd.EMA, in a few operations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from operators import Operators
from torch import nn
from training_runs import Plain, tiny_data, trainer

from fastdiff.nn import EMA, UNet
from fastdiff.train import TrainConfig, adamw
from fastdiff.train.adamw import AdamW
from fastdiff.train.feed import Part
from fastdiff.train.flat import Flat, FlatEMA


class Mixed(nn.Module):
    """Weights of two orders in memory, one module used twice, a frozen weight, a buffer, one idle weight."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, dtype=dtype).to(memory_format=torch.channels_last)
        self.idle = nn.Parameter(torch.ones(7))
        self.first = nn.Linear(5, 3)
        self.second = self.first
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.tensor(0.0))

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


def gradients(model, step, channels_last=True):
    """Gradients that depend on the step; `idle` has one in every third alone."""
    generator = torch.Generator().manual_seed(step)
    for name, p in model.named_parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)
        if p.ndim == 4 and channels_last:
            gradient = gradient.to(memory_format=torch.channels_last)
        p.grad = gradient if p.requires_grad and (name != "idle" or step % 3 == 1) else None


def pair():
    torch.manual_seed(0)
    model = Mixed()
    return model, copy.deepcopy(model)


def assert_equal_weights(one, other, ulps=4):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= ulps * 2**-23 * q.abs().max(), name


@pytest.mark.parametrize("layout", ["as the weight", "another"])
def test_it_is_torch_s_adamw_for_every_parameter(layout):
    """Also of one that lacks a gradient in some steps: n counts its own steps, and it is not decayed then.

    A step's sums are rounded a few times, each relative to a weight, in an order that vectors may change.
    """
    flat_model, model = pair()
    flat = Flat(flat_model)
    mine = AdamW(flat, weight_decay=0.1)
    theirs = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)  # not fused: any layout is right
    for step in range(7):
        for m in (flat_model, model):
            gradients(m, step, layout == "as the weight")
        flat.collect()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        assert torch.allclose(flat.norm(), norm, rtol=1e-6)
        theirs.param_groups[0]["lr"] = 0.01 * (step + 1)
        theirs.step()
        mine.step(0.01 * (step + 1), ((norm + 1e-6) / 1.5).clamp(min=1.0))
        assert_equal_weights(flat_model, model, 4 * (step + 1))
    assert set(flat.named_gradients()) == {"conv.weight", "conv.bias", "first.weight", "first.bias"}
    state = mine.state_dict()
    for name, p in model.named_parameters():
        assert (name in state) == (p in theirs.state)
        for key, value in theirs.state.get(p, {}).items():
            assert torch.allclose(state[name][key], value, rtol=1e-5, atol=1e-7), (name, key)


def test_it_goes_on_bit_for_bit_from_a_state_of_any_strides():
    flat_model, other_model = pair()
    flat, other = Flat(flat_model), Flat(other_model)
    mine = AdamW(flat, 0.0)
    for step in range(3):
        gradients(flat_model, step)
        flat.collect()
        mine.step(0.1)
    resumed = AdamW(other, 0.0)
    state = {name: {k: v.contiguous() for k, v in s.items()} for name, s in mine.state_dict().items()}
    resumed.load_state_dict(state)
    other_model.load_state_dict(flat_model.state_dict())
    for step in range(3, 6):
        for model, buffers, optimizer in ((flat_model, flat, mine), (other_model, other, resumed)):
            gradients(model, step)
            buffers.collect()
            optimizer.step(0.1)
    for p, q in zip(flat_model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_device_whose_kernel_ignores_the_scale_clips_as_well(monkeypatch):
    found = []
    for dividing in (("cpu",), ()):
        monkeypatch.setattr(adamw, "_DIVIDING", dividing)
        model, _ = pair()
        flat = Flat(model)
        optimizer = AdamW(flat, 0.1)
        for step in range(3):
            gradients(model, step)
            flat.collect()
            with Operators() as operators:
                optimizer.step(0.1, torch.tensor(3.0))
        assert (operators.counts["aten.div_.Tensor"] > 0) == (not dividing)
        found.append([*model.parameters(), *flat.named_gradients().values()])
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_its_average_is_that_of_the_plain_one():
    torch.manual_seed(0)
    model = Mixed(torch.bfloat16)
    plain, flat = EMA(model, 0.9), FlatEMA(model, 0.9, Flat(model))
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():  # the frozen one too, as its owner may
                p += step + 1
            model.count += 1
        plain.update(model)
        flat.update(model)
    one, two = plain.state_dict(), flat.state_dict()
    assert two["num_updates"] == 4
    assert torch.equal(one["buffers"]["count"], two["buffers"]["count"])
    assert list(one["parameters"]) == list(two["parameters"])
    for name, average in one["parameters"].items():
        assert two["parameters"][name].dtype == torch.float32
        assert torch.allclose(two["parameters"][name], average, rtol=1e-6), name
    flat.load_state_dict(copy.deepcopy(one))
    flat.update(model)
    plain.update(model)
    assert torch.allclose(flat.parameters["conv.weight"], plain.parameters["conv.weight"], rtol=1e-6)


@pytest.mark.parametrize(("blocks", "weights"), [(1, 73), (4, 157)])
def test_a_step_s_operations_do_not_grow_with_the_number_of_weights(tmp_path, monkeypatch, blocks, weights):
    """Between the backward pass and the step's end: norm, clipping, AdamW, two averages; a dozen."""
    model = UNet(1, model_channels=8, channel_mult=(1, 1), num_res_blocks=blocks, num_classes=3)
    config = TrainConfig(steps=9, batch_size=4, ema_decay=(0.9, 0.99))
    stepper = trainer(tmp_path / "run", config, model=model)._stepper
    data = tiny_data()
    part = Part(np.arange(4), *data.rows(np.arange(4)))
    stepper(0, [part])
    operators = Operators()
    collect = stepper.flat.collect

    def watched():
        operators.__enter__()
        collect()

    monkeypatch.setattr(stepper.flat, "collect", watched)
    try:
        stepper(1, [part])
    finally:
        operators.__exit__(None, None, None)
    assert len(stepper.flat.parameters) == weights
    assert operators.counts["aten._fused_adamw_.default"] == 1
    # Two of them put the parts' losses together.
    assert operators.counts.total() <= 14, operators.counts


def test_the_network_sees_no_difference():
    model, before = pair()
    strides = {name: p.stride() for name, p in model.named_parameters()}
    Flat(model)
    assert {name: p.stride() for name, p in model.named_parameters()} == strides
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.second.weight is model.first.weight
    places = [p.untyped_storage().data_ptr() for p in model.trained]
    assert len(set(places)) == 1
    assert {p.data_ptr() % 64 for p in model.trained} == {places[0] % 64}
    assert model.fixed.untyped_storage().data_ptr() != places[0]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.first.weight.zero_()
    assert bool(model.first.weight.any())
    assert copied.first.weight.untyped_storage().nbytes() == copied.first.weight.nbytes


def test_a_second_flat_and_a_new_layout_are_seen_and_other_types_refused():
    model, expected = pair()
    flat = Flat(model)
    Flat(model)  # another trainer takes the weights over
    flat.begin()
    assert all(p.data_ptr() == view.data_ptr() for p, view in zip(flat.parameters, flat._views, strict=True))
    model.to(memory_format=torch.contiguous_format)
    flat.begin()
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_equal_weights(model, expected, 0)
    model.conv.to(torch.float64)
    with pytest.raises(ValueError, match=r"`model` must keep the .*float64 .*'conv.weight', which was"):
        flat.begin()


@pytest.mark.parametrize("replace", ["in a state", "by name"])
def test_a_parameter_that_was_replaced_is_refused_as_it_would_not_be_trained(replace):
    model, other = pair()
    flat = Flat(model)
    if replace == "by name":
        model.first.weight = other.first.weight
    else:
        model.load_state_dict(other.state_dict(), assign=True)
    name = "first.weight" if replace == "by name" else "idle"
    with pytest.raises(ValueError, match=f"`model` must keep its parameters .*'{name}' is another one now"):
        flat.begin()


def test_a_weight_that_is_unfrozen_later_gathers_no_gradient():
    model, _ = pair()
    flat = Flat(model)
    model.fixed.requires_grad_()
    for _ in range(2):
        flat.begin()
        model.fixed.sum().backward()
        flat.collect()
        assert model.fixed.grad is None


def test_weights_that_share_memory_stay_together():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight.data = model[0].weight.data
    flat = Flat(model)
    optimizer = AdamW(flat, 0.0)
    shared, alone = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    flat.collect()
    optimizer.step(0.1)
    assert model[0].weight.data_ptr() == model[1].weight.data_ptr()
    assert torch.allclose(model[0].weight, shared - 0.2)  # under either name it has a gradient
    assert torch.allclose(model[2].weight, alone - 0.1)
    assert float(flat.norm()) == pytest.approx((3 * 20) ** 0.5)
    whole = nn.Parameter(torch.ones(4, 4))
    model = nn.ParameterList([whole, nn.Parameter(whole.data[:, :2])])
    with pytest.raises(ValueError, match="with gaps that shares memory, got '1'"):
        Flat(model)


def test_each_type_has_its_own_buffer():
    model = Mixed(torch.bfloat16)
    flat = Flat(model)
    optimizer = AdamW(flat, 0.0)
    assert {w.dtype for w in flat.weights} == {torch.bfloat16, torch.float32}
    before = copy.deepcopy(model)
    gradients(model, 1)
    squares = sum(p.grad.double().square().sum() for p in model.trained)
    flat.collect()
    assert float(flat.norm()) == pytest.approx(float(squares) ** 0.5, rel=1e-6)
    optimizer.step(0.1)
    for p, q in zip(model.trained, before.trained, strict=True):
        # The first step moves every weight by the rate, whatever its gradient.
        assert torch.allclose((p - q).abs().float(), torch.tensor(0.1), rtol=0, atol=0.02)


@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize("count", [6_000_001, 2048, 5])
def test_the_norm_of_many_numbers_is_right(count, stays):
    """Also of a weight that shares memory, and so stays where it is: whole blocks, with a rest, or a rest."""
    weight = torch.empty(count)
    model = nn.ParameterList([nn.Parameter(weight), *[nn.Parameter(weight)] * stays])
    flat = Flat(model)
    assert len(flat.weights) == 1 + stays
    model[0].grad = torch.randn(count, generator=torch.Generator().manual_seed(0))
    exact = float(torch.linalg.vector_norm(model[0].grad.double()))
    flat.collect()
    assert float(flat.norm()) == pytest.approx(exact, rel=1e-6)


def test_no_gradient_at_all_moves_nothing():
    model, expected = pair()
    flat = Flat(model)
    optimizer = AdamW(flat, 0.5)
    flat.begin()
    flat.collect()
    optimizer.step(0.1)
    assert float(flat.norm()) == 0
    assert optimizer.state_dict() == {}
    assert_equal_weights(model, expected, 0)


def test_a_trainer_s_network_has_its_current_weights_and_no_gradients(tmp_path):
    made = trainer(tmp_path / "run", TrainConfig(steps=2, batch_size=4, warmup=0), model=Plain())
    before = made.model.leave.bias.detach().clone()
    made.run(progress=False)
    assert not torch.equal(made.model.leave.bias, before)
    assert torch.equal(made.model.unused, torch.ones(3))
    assert all(p.grad is None for p in made.model.parameters())
