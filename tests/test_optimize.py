"""`optimize` changes what a network costs on a CPU and nothing else: results, names, training, hooks stay."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import one_thread
from torch import nn

import fastdiff as fd
from examples.action_unet import ActionUNet
from fastdiff import optimization
from fastdiff.train.flat import Flat

_one_thread = pytest.fixture(autouse=True)(one_thread)
EXAMPLE = torch.randn(2, 16, 7), torch.tensor([3, 700]), torch.randn(2, 20)
WEIGHT = "weight in channels_last order"


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return ActionUNet(7, 20).eval()


@pytest.fixture
def always(monkeypatch):
    """Every measurement says that the change is twice as fast."""
    monkeypatch.setattr(optimization, "_measured", lambda old, new, x: (2.0, 1.0))
    seconds = iter([2.0, 1.0] * 100)
    monkeypatch.setattr(optimization, "_best", lambda run: next(seconds))


def near(a, b, bound=1e-5):
    return float((a - b).detach().abs().max()) <= bound * float(b.detach().abs().max())


def test_the_comparison_sees_a_planted_error():
    a = torch.ones(3)
    assert near(a, a + 1e-6)
    assert not near(a, a + torch.tensor([0, 0, 2e-5]))


def images():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)]
    return nn.Sequential(*body).eval(), (torch.randn(2, 3, 8, 8),)


@pytest.mark.parametrize("with_example", [False, True])
def test_results_stay_within_1e_5_and_undo_brings_everything_back(policy, with_example, always):
    wanted = policy(*EXAMPLE)
    keys = list(policy.state_dict())
    strides = {name: p.stride() for name, p in policy.named_parameters()}
    kinds = [type(m) for m in policy.modules()]
    done = fd.optimize(policy, EXAMPLE if with_example else None)
    assert WEIGHT in {change.what for change in done.changes}
    assert near(policy(*EXAMPLE), wanted)
    assert list(policy.state_dict()) == keys
    assert all(isinstance(m, kind) for m, kind in zip(policy.modules(), kinds, strict=True))
    changed = [name for name, p in policy.named_parameters() if p.stride() != strides[name]]
    assert {f"{change.module}.weight" for change in done.changes if change.what == WEIGHT} == set(changed)
    done.undo()
    assert {name: p.stride() for name, p in policy.named_parameters()} == strides
    assert [type(m) for m in policy.modules()] == kinds
    assert torch.equal(policy(*EXAMPLE), wanted)


def test_without_an_example_large_weights_of_1d_convolutions_change(policy):
    done = fd.optimize(policy)
    expected = {
        name
        for name, m in policy.named_modules()
        if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)
        and m.weight.numel() >= 2**16
        and m.kernel_size != (1,)
    }
    assert {change.module for change in done.changes} == expected
    assert len(expected) >= 5
    assert str(done).startswith(f"ActionUNet: {len(expected)} changes")


def test_a_second_call_finds_nothing_and_undoes_nothing(policy, always):
    first = fd.optimize(policy, EXAMPLE)
    second = fd.optimize(policy, EXAMPLE)
    assert first.changes
    assert second.changes == ()
    assert "nothing to change" in str(second)
    second.undo()
    assert fd.optimize(policy, EXAMPLE).changes == ()


def test_with_an_example_only_what_measures_faster_changes(policy, monkeypatch):
    monkeypatch.setattr(optimization, "_measured", lambda old, new, x: (1.0, 0.95))
    monkeypatch.setattr(optimization, "_best", lambda run: 1.0)
    before = {name: p.stride() for name, p in policy.named_parameters()}
    assert fd.optimize(policy, EXAMPLE).changes == ()
    model, example = images()
    assert fd.optimize(model, example).changes == ()
    assert all(p.is_contiguous() for p in model.parameters())
    assert {name: p.stride() for name, p in policy.named_parameters()} == before


def test_2d_convolutions_change_together_and_a_norm_joins_its_silu(always):
    model, example = images()
    wanted = model(*example)
    done = fd.optimize(model, example)
    assert [change.what for change in done.changes] == [
        "norm and SiLU in one pass",
        "weights of 2 2-D convolutions in channels_last order",
    ]
    assert near(model(*example), wanted)
    assert "1000000 µs" in str(done)
    done.undo()
    assert torch.equal(model(*example), wanted)


def test_measuring_leaves_no_trace(policy):
    hooks = [len(m._forward_pre_hooks) for m in policy.modules()]
    done = fd.optimize(policy.train(), EXAMPLE)
    done.undo()
    assert policy.training
    assert [len(m._forward_pre_hooks) for m in policy.modules()] == hooks
    assert not any(p.is_inference() for p in policy.parameters())


def test_training_goes_on_and_undo_keeps_what_was_learned(policy, always):
    twin = copy.deepcopy(policy)
    done = fd.optimize(policy, EXAMPLE)
    for model in (policy, twin):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(*EXAMPLE).square().mean().backward()
            optimizer.step()
    # Adam divides by the root of a squared gradient, so a last bit may become a whole step of 1e-3
    assert near(policy(*EXAMPLE), twin(*EXAMPLE), 1e-2)
    learned = policy(*EXAMPLE)
    done.undo()
    assert near(policy(*EXAMPLE), learned)
    assert all(p.is_contiguous() for p in policy.parameters())


def test_a_state_dict_goes_in_and_out_and_copies_stay_fast(policy, always):
    fresh = ActionUNet(7, 20).eval()
    fd.optimize(policy, EXAMPLE)
    fresh.load_state_dict(policy.state_dict())
    assert near(fresh(*EXAMPLE), policy(*EXAMPLE))
    twin = copy.deepcopy(policy)
    assert [p.stride() for p in twin.parameters()] == [p.stride() for p in policy.parameters()]
    assert torch.equal(twin(*EXAMPLE), policy(*EXAMPLE))
    policy.load_state_dict(ActionUNet(7, 20).state_dict())
    assert not all(p.is_contiguous() for p in policy.parameters())


def test_hooks_are_called_and_hooked_norms_stay(always):
    model, example = images()
    called = []
    model[0].register_forward_hook(lambda *_: called.append("conv"))
    model[1].register_forward_hook(lambda *_: called.append("norm"))
    done = fd.optimize(model, example)
    assert all(change.what != "norm and SiLU in one pass" for change in done.changes)
    called.clear()
    model(*example)
    assert called == ["conv", "norm"]
    later, example = images()
    fd.optimize(later, example)
    later[2].register_forward_hook(lambda *_: called.append("silu"))
    called.clear()
    later(*example)
    assert called == ["silu"]


class Own(nn.Conv1d):
    pass


def test_what_is_not_a_plain_float32_convolution_stays():
    parametrised = nn.utils.parametrizations.weight_norm(nn.Conv1d(64, 256, 5))
    tied = nn.Sequential(nn.Conv1d(256, 256, 3), nn.Conv1d(256, 256, 3))
    tied[1].weight.data = tied[0].weight.data
    over = nn.Conv1d(256, 256, 3)
    over.register_buffer("part", over.weight.data.view(-1)[100:200])
    others = [
        parametrised,
        tied,
        over,
        Own(64, 256, 5),
        nn.Conv1d(1024, 1024, 256, groups=1024),
        nn.Conv1d(256, 256, 5).bfloat16(),
        nn.Conv1d(256, 256, 5, device="meta"),
        nn.Conv1d(512, 256, 1),
    ]
    for model in others:
        assert fd.optimize(model).changes == ()
    same = nn.Sequential(nn.Conv1d(256, 256, 3), nn.Conv1d(256, 256, 3))
    same[1].weight = same[0].weight
    assert {change.module for change in fd.optimize(same).changes} == {"1"}
    assert same[1].weight is same[0].weight


def test_weights_in_one_piece_of_memory_change_as_others_do_until_their_trainer_goes_on(policy):
    wanted = fd.optimize(copy.deepcopy(policy)).changes
    flat = Flat(policy)
    strides = {name: p.stride() for name, p in policy.named_parameters()}
    assert fd.optimize(policy).changes == wanted
    weight = policy.get_parameter(f"{wanted[0].module}.weight")
    assert not weight.is_contiguous()
    values = weight.detach().clone()
    flat.begin()
    assert {name: p.stride() for name, p in policy.named_parameters()} == strides
    assert torch.equal(policy.get_parameter(f"{wanted[0].module}.weight"), values)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module"):
        fd.optimize(lambda x: x)
    with pytest.raises(TypeError, match="`example` must be a tuple"):
        fd.optimize(nn.Identity(), torch.zeros(2))
