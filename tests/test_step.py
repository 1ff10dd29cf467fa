"""One step: however its batch is cut it is the same step; in bfloat16, compiled, with times that learn."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest import mock

import chains
import numpy as np
import pytest
import torch
from networks import arguments, network
from operators import Operators
from training_runs import CONFIG, Learning, Plain, Tiny, log, state, tiny_data, traced, trainer

from fastdiff.files import load_tensors
from fastdiff.nn import UNet
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective
from fastdiff.train.checkpoint import checkpoints


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on networks this small only wait for each other."""
    yield from chains.one_thread()


def run(out, config, make=lambda: Plain(torch.float64), **options):
    torch.manual_seed(1)
    made = trainer(out, config, model=make(), **options)
    made.run(progress=False)
    return made


# The cut of a batch


def gradients(made):
    """Of its last step, as they were used."""
    return made._stepper.flat.named_gradients()


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_gradient_of_the_parts_is_that_of_the_whole_batch(tmp_path, parts):
    """In a network of float64 only the order of sums differs.

    A weight's gradient is a sum over 8 samples and 36 pixels (of products over 9 places and 8 channels): n =
    8 * 36 * 9 * 8 terms at most, and two orders of it differ by at most 2 n u times the sum of the terms'
    sizes, which 8 * 36 times the largest gradient of a single pixel bounds; u = 2^-53. The largest entry of
    all gradients is at least a thousandth of that here.
    """
    config = replace(CONFIG, steps=1, grad_clip=None)
    whole = gradients(run(tmp_path / "whole", config))
    cut = gradients(run(tmp_path / "cut", replace(config, accumulate=parts)))
    assert whole.keys() == cut.keys()
    assert "unused" not in whole
    largest = max(g.abs().max().item() for g in whole.values())
    bound = 2 * 8 * 36 * 9 * 8 * 2**-53 * 1000 * largest
    assert bound < 1e-7 * largest
    for name, gradient in whole.items():
        assert (gradient - cut[name]).abs().max() <= bound
    [first], [second] = log(tmp_path / "whole"), log(tmp_path / "cut")
    assert first["loss"] == second["loss"]  # each sample's loss has the same bits, whatever is around it
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-7)


def test_the_comparison_sees_a_part_that_is_missing(tmp_path, monkeypatch):
    config = replace(CONFIG, steps=1, grad_clip=None)
    whole = gradients(run(tmp_path / "whole", config))
    cut = run(tmp_path / "cut", replace(config, accumulate=4))
    part = cut._cuts[0]
    assert part.tolist() == [0, 1]
    monkeypatch.setattr("fastdiff.train.trainer.cut", lambda *_: [part])
    with_one = trainer(tmp_path / "one", config, model=Plain(torch.float64))
    monkeypatch.undo()
    parts = [with_one._cuts[0]]
    from fastdiff.train.feed import Feed

    feed = Feed(with_one.data, config, parts, torch.device("cpu"), 0)
    with_one._stepper(0, feed.next_parts())
    feed.close()
    largest = max(g.abs().max().item() for g in whole.values())
    differing = [(whole[n] - g).abs().max().item() for n, g in gradients(with_one).items()]
    assert max(differing) > 1e-3 * largest


def test_a_whole_run_in_parts_has_the_losses_of_the_whole_batches(tmp_path):
    run(tmp_path / "whole", CONFIG)
    run(tmp_path / "cut", replace(CONFIG, accumulate=3))
    for one, two in zip(log(tmp_path / "whole"), log(tmp_path / "cut"), strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-6)


def test_the_clipped_gradient_of_the_parts_has_the_norm_asked_for(tmp_path):
    made = run(tmp_path / "cut", replace(CONFIG, steps=1, accumulate=4, grad_clip=1e-3))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients(made).values()))
    assert norm == pytest.approx(1e-3, rel=1e-4)


def test_dropout_of_a_part_depends_on_the_step_and_the_part_alone(tmp_path):
    """So runs with dropout and parts are reproduced bit for bit as well."""
    for name in ("one", "two"):
        run(tmp_path / name, replace(CONFIG, accumulate=2), Tiny)
        torch.randn(5)
    assert state(tmp_path / "one") == state(tmp_path / "two")


@pytest.mark.parametrize("trains", [False, True])
def test_an_activation_is_in_place_where_that_costs_no_copy(trains):
    """Where a gradient needs what was there before, autograd would copy it."""
    net = network(attention_levels=()).train(trains)
    x, t, labels = arguments(net)
    with Operators() as operators, torch.set_grad_enabled(trains):
        net(x, t, labels)
    assert (operators.counts["aten.silu_.default"] > 0) == (not trains)
    assert (operators.counts["aten.silu.default"] > 0) == trains
    assert operators.counts["aten.clone.default"] == 0


# bfloat16 and torch.compile


class Watching(Plain):
    """Remembers the types that its layers see."""

    def forward(self, x, t, labels):
        out = super().forward(x, t, labels)
        self.saw = {"state": x.dtype, "product": self.enter(x.to(self.unused.dtype)).dtype}
        return out


def test_bf16_computes_in_bfloat16_and_keeps_weights_and_state_in_float32(tmp_path):
    made = run(tmp_path / "half", replace(CONFIG, amp="bf16"), Watching)
    model = made.model
    assert model.saw == {"state": torch.float32, "product": torch.bfloat16}
    tensors, _ = load_tensors(checkpoints(tmp_path / "half" / "checkpoints")[-1])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(made).values()} == {torch.float32}
    assert made.averaged_model().enter.weight.dtype == torch.float32
    run(tmp_path / "full", CONFIG, Watching)
    for half, full in zip(log(tmp_path / "half"), log(tmp_path / "full"), strict=True):
        assert half["loss"] != full["loss"]
        assert half["loss"] == pytest.approx(
            full["loss"], rel=0.02
        )  # 2^-8 a product, two layers, twelve steps


def test_bf16_trains_the_unet(tmp_path):
    def unet():
        return UNet(1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_classes=3)

    run(tmp_path / "run", replace(CONFIG, steps=3, amp="bf16", accumulate=2), unet)
    assert all(math.isfinite(record["loss"]) for record in log(tmp_path / "run"))


def test_a_compiled_network_has_the_checkpoints_of_an_eager_one(tmp_path, monkeypatch):
    watched = mock.Mock(side_effect=traced)
    monkeypatch.setattr(torch, "compile", watched)
    run(tmp_path / "compiled", replace(CONFIG, compile=True, accumulate=2), Plain)
    watched.assert_called_once()
    run(tmp_path / "eager", replace(CONFIG, accumulate=2), Plain)
    assert state(tmp_path / "compiled").keys() == state(tmp_path / "eager").keys()
    for one, two in zip(log(tmp_path / "compiled"), log(tmp_path / "eager"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    # and the other goes on with either's checkpoint
    longer = replace(CONFIG, steps=14, accumulate=2)
    trainer(tmp_path / "compiled", longer, model=Plain(), resume=True).run(progress=False)


def test_a_network_that_cannot_be_compiled_runs_eagerly_and_says_so(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("inductor\nfailed") from FileNotFoundError("no g++")

    monkeypatch.setattr(torch, "compile", lambda model, options: fails)
    with pytest.warns(
        UserWarning,
        match=r"`compile` has no effect: .*eagerly \(FileNotFoundError: no g\+\+\).*C\+\+ compiler",
    ):
        run(tmp_path / "run", replace(CONFIG, compile=True), Plain)
    run(tmp_path / "eager", CONFIG, Plain)
    assert state(tmp_path / "run") == state(tmp_path / "eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_without_a_compiler_the_network_runs_eagerly_and_says_so(tmp_path):
    import torch._inductor.config as inductor

    torch.compiler.reset()
    with (
        inductor.patch({"cpp.cxx": ("/nowhere/g++",), "fx_graph_cache": False}),
        pytest.warns(UserWarning, match=r"`compile` has no effect: .*eagerly \(.*C\+\+ compiler"),
    ):
        run(tmp_path / "run", replace(CONFIG, compile=True), Plain)
    run(tmp_path / "eager", CONFIG, Plain)
    assert state(tmp_path / "run") == state(tmp_path / "eager")


class Dropping(Plain):
    """Drops some of the state that it sees."""

    def forward(self, x, t, labels):
        return super().forward(torch.nn.functional.dropout(x, 0.2, self.training), t, labels)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [Dropping, lambda: network(1, attention_levels=(), dropout=0.2)], ids=["plain", "unet"]
)
def test_the_code_of_torch_compile_trains_as_the_eager_network_and_drops_the_same(tmp_path, make):
    run(tmp_path / "compiled", replace(CONFIG, compile=True, accumulate=2), make)
    run(tmp_path / "eager", replace(CONFIG, accumulate=2), make)
    for one, two in zip(log(tmp_path / "compiled"), log(tmp_path / "eager"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


# Several averages


def test_each_of_several_averages_is_kept_saved_and_resumed(tmp_path):
    decays = (0.5, 0.9, 0.0)
    config = replace(CONFIG, ema_decay=decays)

    def unet():
        return UNet(1, model_channels=8, channel_mult=(1,), num_res_blocks=1, num_classes=3)

    out = tmp_path / "run"
    made = run(out, config, unet)
    assert made.ema.decay == 0.5
    saved = {decay: UNet.from_pretrained(out / name) for decay, name in
             ((0.5, "model"), (0.9, "model-ema-0.9"), (0.0, "model-ema-0.0"))}  # fmt: skip
    for decay, model in saved.items():
        average = dict(made.averaged_model(decay).named_parameters())
        assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())
    last = dict(made.model.named_parameters())  # decay 0 is the last step's weights
    assert all(torch.equal(p, last[name]) for name, p in saved[0.0].named_parameters())
    assert any(not torch.equal(p, last[name]) for name, p in saved[0.9].named_parameters())
    run(tmp_path / "short", replace(config, steps=6), unet)
    run(tmp_path / "short", config, unet, resume=True)
    assert state(tmp_path / "short") == state(out)
    with pytest.raises(ValueError, match=r"`decay` must be one of \(0.5, 0.9, 0.0\), got 0.99"):
        made.averaged_model(0.99)
    with pytest.raises(ValueError, match=r"config.ema_decay was \[0.5, 0.9, 0.0\], is \[0.5\]"):
        trainer(out, replace(config, ema_decay=0.5), model=unet(), resume=True)


def test_every_grid_shows_the_averaged_weights_of_its_step(tmp_path):
    """One average after another, recomputed here from the weights after every step."""
    seen, weights = [], []

    def sample(model):
        seen.append(model.leave.bias.clone())
        return torch.zeros(1, 1, 6, 6)

    made = trainer(tmp_path / "run", replace(CONFIG, ema_decay=0.6), model=Plain(), sample_fn=sample)
    expected = made.model.leave.bias.detach().clone()
    step = made._stepper.optimizer.step

    def watched(*given):
        step(*given)
        weights.append(made.model.leave.bias.detach().clone())

    made._stepper.optimizer.step = watched
    made.run(progress=False)
    averages = []
    for n, weight in enumerate(weights):
        expected = torch.lerp(expected, weight, 1 - min(0.6, (1 + n) / (10 + n)))
        averages.append(expected)
    assert len(seen) == 2
    for got, wanted in zip(seen, (averages[5], averages[11]), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-7)
    assert not torch.equal(seen[0], seen[1])


# Times


def test_the_unweighted_error_is_logged_beside_a_weighted_loss(tmp_path):
    objective = Objective(NoiseSchedule.cosine(50), "v", loss="min_snr")
    run(tmp_path / "weighted", replace(CONFIG, accumulate=2), Plain, objective=objective)
    run(tmp_path / "simple", CONFIG, Plain, objective=Objective(NoiseSchedule.cosine(50), "v"))
    first, plain = log(tmp_path / "weighted")[0], log(tmp_path / "simple")[0]
    assert first["mse"] == pytest.approx(plain["loss"], rel=1e-6)
    assert first["loss"] < 0.99 * first["mse"]
    assert "mse" not in plain


def test_times_that_learn_see_whole_batches_weigh_the_loss_and_are_resumed(tmp_path):
    config = replace(CONFIG, accumulate=3)
    straight = Learning()
    made = run(tmp_path / "straight", config, Plain, times=straight)
    records = log(tmp_path / "straight")
    for (t, losses), record in zip(straight.heard, records, strict=True):
        assert (len(t), len(losses)) == (8, 8)
        assert record["loss"] == pytest.approx(np.mean(losses), rel=1e-12)  # without the weights
        quarters = {k: [v for s, v in zip(t, losses, strict=True) if 4 * s // 50 == k] for k in range(4)}
        for k, values in quarters.items():
            mean = pytest.approx(np.mean(values), rel=1e-12) if values else None
            assert record[f"loss_q{k + 1}"] == mean
    run(tmp_path / "run", replace(config, steps=6), Plain, times=Learning())
    run(tmp_path / "run", config, Plain, times=Learning(), resume=True)
    assert log(tmp_path / "run") == records
    assert state(tmp_path / "run") == state(tmp_path / "straight")
    with pytest.raises(ValueError, match=r"times\.name was 'learning', is 'uniform'"):
        run(tmp_path / "run", config, Plain, resume=True)
    # a weight of 2 doubles the gradient
    one = replace(CONFIG, steps=1, grad_clip=None)
    run(tmp_path / "weighted", one, Plain, times=Learning())
    run(tmp_path / "plain", one, Plain)
    double = log(tmp_path / "weighted")[0]["grad_norm"] / log(tmp_path / "plain")[0]["grad_norm"]
    assert double == pytest.approx(2, rel=1e-5)
    assert made.data.shape == tiny_data().shape
