"""The trainer: it learns, it logs every step, and a kill at any moment changes nothing."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import CONFIG, Tiny, log, state, tiny_data, trainer

from fastdiff.kernels import _torch_ops
from fastdiff.nn import UNet, load_config
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective, TrainConfig
from fastdiff.train.checkpoint import checkpoints
from fastdiff.train.network import Network
from fastdiff.train.ranks import Ranks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads on networks this small only wait for each other, endlessly where other work runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, one_thread):
    """A run without interruption."""
    out = tmp_path_factory.mktemp("straight") / "run"
    trainer(out).run(progress=False)
    return out


def test_the_comparison_sees_one_bit(straight, tmp_path):
    trainer(tmp_path / "run", replace(CONFIG, seed=1)).run(progress=False)
    assert log(tmp_path / "run") != log(straight)
    good, other = state(straight), state(tmp_path / "run")
    assert good.keys() == other.keys()
    assert {name.split("/")[0] for name in good if good[name] != other[name]} == {"model", "ema", "optimizer"}
    assert any(name.startswith("ema/0/buffers/norm.running_mean") for name in good)


def test_a_finished_run_can_be_resumed_and_lengthened(straight, tmp_path):
    out = tmp_path / "run"
    trainer(out, replace(CONFIG, steps=7)).run(progress=False)
    again = trainer(out, replace(CONFIG, steps=7), resume=True).run(progress=False)
    assert again.steps == 7
    assert math.isnan(again.samples_per_s)
    # with a constant rate no step depends on how many follow; what is only reported may change as well
    longer = trainer(out, replace(CONFIG, log_every=5, checkpoint_every=4), resume=True)
    assert longer.run(progress=False).steps == 12
    assert log(out) == log(straight)
    assert state(out) == state(straight)
    with pytest.raises(ValueError, match="`steps` must be at least the 12"):
        trainer(out, replace(CONFIG, steps=11), resume=True)


def test_the_same_seed_gives_the_same_run_and_leaves_the_caller_s_generator_alone(straight, tmp_path):
    run = trainer(tmp_path / "run")
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    run.model.eval()
    run.run(progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not run.model.training
    assert state(tmp_path / "run") == state(straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, lr=1e-3)}, r"config.lr was 0.01, is 0.001"),
        ({"config": replace(CONFIG, lr_schedule="cosine")}, r"config.steps was None, is 12|lr_schedule was"),
        (
            {"config": replace(CONFIG, batch_size=9, seed=2)},
            r"batch_size was 8, is 9; config.seed was 0, is 2",
        ),
        (
            {"objective": Objective(NoiseSchedule.linear(50))},
            r"objective.schedule.name was 'cosine', is 'linear'",
        ),
        ({"objective": Objective(NoiseSchedule.cosine(50), "v")}, r"objective.prediction was 'eps', is 'v'"),
        ({"data": tiny_data(labels=False)}, r"data.fingerprint was"),
        ({"model": nn.Conv2d(1, 1, 3)}, r"model.class was 'Tiny', is 'Conv2d'"),
    ],
)
def test_resuming_another_run_is_refused_by_the_field_that_differs(straight, change, message):
    before = (straight / "run.json").read_bytes()
    with pytest.raises(ValueError, match=f"`resume` must go on .*{message}"):
        trainer(straight, **change, resume=True)
    assert (straight / "run.json").read_bytes() == before


def test_a_folder_with_a_run_is_not_overwritten_and_one_without_not_resumed(straight, tmp_path):
    before = state(straight)
    with pytest.raises(ValueError, match=r"`out_dir` must not hold another run.*resume=True"):
        trainer(straight)
    assert state(straight) == before
    with pytest.raises(ValueError, match=r"`resume` needs a run .* holds none"):
        trainer(tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`out_dir` must be a folder .* got the file"):
        trainer(tmp_path / "file")


def test_a_lost_log_does_not_stop_a_run(tmp_path):
    out = tmp_path / "run"
    trainer(out, replace(CONFIG, steps=3)).run(progress=False)
    (out / "log.jsonl").unlink()
    with pytest.warns(UserWarning, match="holds 0 of the 3 steps"):
        trainer(out, resume=True).run(progress=False)
    assert [record["step"] for record in log(out)] == list(range(4, 13))


def test_a_run_leaves_its_log_curve_grids_and_the_last_checkpoints(tmp_path, capsys):
    out = tmp_path / "run"
    asked = []

    def sample(model):
        asked.append(model)
        assert not model.training
        return model(torch.zeros(4, 1, 6, 6), torch.zeros(4, dtype=torch.int64))

    run = trainer(out, sample_fn=sample)
    result = run.run()
    assert [record["step"] for record in log(out)] == list(range(1, 13))
    assert [record["lr"] for record in log(out)] == [0.0025, 0.005, 0.0075] + [0.01] * 9
    quarters = {"loss_q1", "loss_q2", "loss_q3", "loss_q4"}
    assert all(set(record) == {"step", "loss", "lr", "grad_norm"} | quarters for record in log(out))
    assert [path.stem for path in checkpoints(out / "checkpoints")] == ["step-00000009", "step-00000012"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-00000006.png",
        "step-00000012.png",
    ]
    assert Image.open(out / "loss.png").size == (960, 480)
    assert result.steps == 12
    assert result.loss == pytest.approx(np.mean([record["loss"] for record in log(out)]), rel=1e-12)
    assert result.samples_per_s == pytest.approx(12 * 8 / result.seconds)
    assert result.model_path is None  # Tiny cannot be saved
    assert asked[0] is asked[1]
    bar = capsys.readouterr().err
    assert "12/12" in bar
    assert "samples_per_s" in bar


def test_the_sampler_gets_averaged_weights_and_a_missing_grid_is_made_up_for(tmp_path):
    out = tmp_path / "run"
    run = trainer(out)
    run.run(progress=False)
    averaged = run.averaged_model()
    for name, parameter in averaged.named_parameters():
        assert torch.equal(parameter, run.ema.parameters[name])
        assert not parameter.requires_grad
    assert not torch.equal(averaged.enter.weight, run.model.enter.weight)
    with torch.inference_mode():
        assert run.averaged_model() is averaged
    resumed = trainer(out, resume=True, sample_fn=lambda model: torch.zeros(1, 1, 6, 6))
    resumed.run(progress=False)
    assert [path.name for path in (out / "samples").iterdir()] == ["step-00000012.png"]


def test_the_saved_unet_is_the_averaged_one_with_all_that_a_sampler_needs(tmp_path):
    model = UNet(1, model_channels=8, channel_mult=(1,), num_res_blocks=1, num_classes=3)
    data = replace(tiny_data(), attribution="made up", class_names=("a", "b", "c"))
    objective = Objective(NoiseSchedule.cosine(50), "v")
    run = trainer(tmp_path / "run", replace(CONFIG, steps=3), data, model, objective, about={"command": "x"})
    result = run.run(progress=False)
    saved = UNet.from_pretrained(result.model_path)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, run.ema.parameters[name])
    config = load_config(result.model_path)
    assert NoiseSchedule.from_config(config["diffusion"].pop("schedule")) == objective.schedule
    assert config["diffusion"] == {
        "prediction": "v",
        "variance": "fixed_small",
        "shape": [1, 6, 6],
        "clip": [-1, 1],
    }
    assert config["about"].pop("training_seconds") >= 0
    assert config["about"] == {
        "data": "made up",
        "class_names": ["a", "b", "c"],
        "seed": 0,
        "steps": 3,
        "ema_decay": 0.999,
        "command": "x",
    }


@pytest.mark.parametrize(
    ("options", "is_built", "fused"),
    [({}, True, True), ({}, False, False), ({"compile": True}, True, False), ({"amp": "bf16"}, True, False)],
)
def test_an_eager_step_on_a_cpu_fuses_the_norms(options, is_built, fused, monkeypatch):
    monkeypatch.setattr(_torch_ops, "operators", lambda wait=False: is_built or None)
    model = UNet(1, model_channels=8, channel_mult=(1,))
    Network(model, replace(CONFIG, **options), Ranks())
    assert model.norm.fused is fused


def test_who_trains_first_on_a_machine_is_told_what_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(_torch_ops, "operators", lambda wait=False: True if wait else None)
    monkeypatch.setattr(_torch_ops.library, "is_coming", lambda: True)
    Network(UNet(1, model_channels=8, channel_mult=(1,)), CONFIG, Ranks())
    assert "compiling operators for this torch, once on this machine" in capsys.readouterr().err


def test_training_lowers_the_loss(tmp_path):
    config = TrainConfig(steps=150, batch_size=16, lr=1e-2, warmup=5, checkpoint_every=150, label_dropout=0.0)
    trainer(tmp_path / "run", config).run(progress=False)
    losses = [record["loss"] for record in log(tmp_path / "run")]
    assert np.mean(losses[-30:]) < 0.6 * np.mean(losses[:5])


def test_labels_are_dropped_at_the_given_rate_and_belong_to_their_images(tmp_path):
    run = trainer(tmp_path / "run", replace(CONFIG, steps=1, batch_size=2000, label_dropout=0.25))
    run.run(progress=False)
    labels = torch.tensor(run.model.seen[0])
    share = (labels == -1).double().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 2000)  # five standard errors
    counts = torch.bincount(labels[labels >= 0], minlength=3) / 2000 / (1 - share)
    assert (counts - torch.tensor([7, 7, 6]) / 20).abs().max() < 0.06
    unlabelled = trainer(tmp_path / "none", replace(CONFIG, steps=1), tiny_data(labels=False))
    unlabelled.run(progress=False)
    assert unlabelled.model.seen == []


def test_the_gradient_is_clipped_to_its_norm(tmp_path):
    tight = trainer(tmp_path / "tight", replace(CONFIG, steps=1, grad_clip=1e-3))
    tight.run(progress=False)
    norm = math.sqrt(sum(g.square().sum().item() for g in tight._stepper.flat.named_gradients().values()))
    assert norm == pytest.approx(1e-3, rel=1e-4)
    free = trainer(tmp_path / "free", replace(CONFIG, steps=1, grad_clip=None))
    free.run(progress=False)
    assert log(tmp_path / "free")[0]["grad_norm"] == log(tmp_path / "tight")[0]["grad_norm"] > 1e-2


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(tmp_path):
    class Diverges(Tiny):
        def forward(self, x, t, labels=None):
            out = super().forward(x, t, labels)
            return out * math.nan if len(self.seen) == 5 else out

    with pytest.raises(FloatingPointError, match=r"loss was nan .* at step 5: .*lower `lr`"):
        trainer(tmp_path / "run", model=Diverges()).run(progress=False)
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].stem == "step-00000003"
    assert log(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": lambda x, t: x}, TypeError, "`model` must be a Module, got function"),
        ({"model": nn.Identity()}, ValueError, "`model` must have parameters to train"),
        ({"data": torch.zeros(4, 1, 6, 6)}, TypeError, "`data` must be a ImageData, got Tensor"),
        ({"config": {"steps": 3}}, TypeError, "`config` must be a TrainConfig, got dict"),
        ({"objective": "simple"}, TypeError, "`objective` must be a Objective, got str"),
        (
            {"model": UNet(1, model_channels=8)},
            ValueError,
            "knows no classes and `data` has 3; .*num_classes=3",
        ),
        ({"model": UNet(1, model_channels=8, num_classes=2)}, ValueError, "knows 2 classes and `data` has 3"),
        (
            {"model": UNet(1, model_channels=8, num_classes=2), "data": tiny_data(labels=False)},
            ValueError,
            "knows 2 classes and `data` has none; .*num_classes=0",
        ),
    ],
)
def test_bad_arguments_are_named_and_leave_no_folder(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []
