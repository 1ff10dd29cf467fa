"""Chains: the sampler against the float64 table, identities, guidance, noise, callbacks, bad input."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastdiff as fd

SHAPE = (2, 4, 4)


class Net(torch.nn.Module):
    """A small non-linear network that depends on time and class, in any dtype."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))
        self.outputs = outputs

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        shift = torch.cos(t.to(x.dtype) / 300)
        if labels is not None:
            shift = shift + labels.to(x.dtype) / 5
        h = torch.tanh(self.weight * x + shift.view(-1, 1, 1, 1)) + 0.1 * x.roll(1, -1)
        return torch.cat([h] + [0.5 * torch.sin(h)] * (self.outputs - 1), dim=1)


@pytest.fixture
def schedule() -> fd.NoiseSchedule:
    return fd.NoiseSchedule.linear(1000)


def chain_noise(sampler: fd.Sampler, num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a chain draws: z of x_T, and every row's z."""
    first = fd.ops.normal(SHAPE, seed, num, 0, domain=0)
    return first, torch.stack([fd.ops.normal(SHAPE, seed, num, row) for row in range(sampler.table.num_rows)])


def small_unet() -> fd.UNet:
    """A U-Net whose zero-initialised layers are not 0, so that its class matters."""
    net = fd.UNet(2, model_channels=8, channel_mult=(1,), num_res_blocks=1, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return net


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_chain_is_the_float64_evaluation_of_its_table(schedule, solver, variance, prediction):
    outputs = 2 if variance.startswith("learned") else 1
    net = Net(outputs)
    sampler = fd.Sampler(
        net, schedule, solver=solver, steps=12, variance=variance, prediction=prediction, shape=SHAPE
    )
    x = sampler.sample(5, seed=11)
    first, noise = chain_noise(sampler, 5, 11)
    reference = sampler.table.evaluate(net.double(), first.double(), noise.double())
    # at t = 999 x0 multiplies float32's rounding by sigma/alpha = 158 before the clip; 12 steps, smooth net
    assert (x - reference).abs().max() <= 158 * 12 * 2**-23


def test_a_row_of_noise_is_added_at_its_own_row(schedule):
    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=6, shape=SHAPE)
    first, noise = chain_noise(sampler, 3, 4)
    drawn = sampler.sample(3, seed=4)
    assert torch.equal(sampler.sample(3, seed=99, noise=noise, x_T=first), drawn)
    assert not torch.equal(sampler.sample(3, seed=99, noise=noise.flip(0), x_T=first), drawn)


def test_a_sample_depends_on_its_identity_and_not_on_its_batch(schedule):
    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=8, shape=SHAPE)
    eight = sampler.sample(8, seed=5)
    assert torch.equal(sampler.sample(1, seed=5, sample_ids=[3])[0], eight[3])
    assert torch.equal(sampler.sample(3, seed=5, sample_ids=[7, 0, 2]), eight[[7, 0, 2]])
    assert not torch.equal(sampler.sample(8, seed=6), eight)


def test_seeds_of_64_bits_are_all_different(schedule):
    sampler = fd.Sampler(Net(), schedule, steps=2, shape=SHAPE)
    samples = [sampler.sample(1, seed=seed) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)]
    for i, x in enumerate(samples):
        assert not any(torch.equal(x, other) for other in samples[:i])
    assert torch.equal(sampler.sample(1, seed=-1), samples[-1])  # two's complement


def test_guidance_mixes_the_two_evaluations(schedule):
    net = Net()
    sampler = fd.Sampler(net, schedule, steps=10, shape=SHAPE)
    labels, null = torch.tensor([1, 2, 3]), torch.tensor([-1, -1, -1])
    x = sampler.sample(3, seed=2, cond={"labels": labels}, uncond={"labels": -1}, guidance_scale=2.5)

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        other = net(x, t, null)
        return other + 2.5 * (net(x, t, labels) - other)

    by_hand = fd.Sampler(guided, schedule, steps=10, shape=SHAPE).sample(3, seed=2)
    assert (x - by_hand).abs().max() <= 1e-4


def test_guidance_is_per_sample(schedule):
    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=10, shape=SHAPE)
    cond, uncond = {"labels": torch.tensor([4, 5, 6])}, {"labels": -1}
    mixed = sampler.sample(3, cond=cond, uncond=uncond, guidance_scale=[1.0, 3.0, 0.0])
    for i, scale in enumerate([1.0, 3.0, 0.0]):
        alone = sampler.sample(
            1, sample_ids=[i], cond={"labels": cond["labels"][i]}, uncond=uncond, guidance_scale=scale
        )
        assert torch.equal(alone[0], mixed[i])


def test_a_unet_knows_its_null_class(schedule):
    net = small_unet()
    sampler = fd.Sampler(net, schedule, steps=3, shape=SHAPE)
    labels = torch.tensor([0, 2])
    x = sampler.sample(2, cond={"labels": labels}, guidance_scale=2.0)
    said = sampler.sample(2, cond={"labels": labels}, uncond={"labels": [-1, -1]}, guidance_scale=2.0)
    assert torch.equal(x, said)
    assert not torch.equal(x, sampler.sample(2, cond={"labels": labels}))


def test_evaluation_mode_is_put_back_whatever_happens(schedule):
    class Fails(Net):
        def forward(self, x, t, labels=None):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            raise RuntimeError("on purpose")

    net = Fails().train()
    with pytest.raises(RuntimeError, match="on purpose"):
        fd.Sampler(net, schedule, steps=2, shape=SHAPE).sample(1)
    assert net.training


def test_samples_can_be_trained_on(schedule):
    x = fd.Sampler(Net(), schedule, steps=2, shape=SHAPE).sample(1)
    weight = torch.ones((), requires_grad=True)
    (weight * x).sum().backward()
    assert weight.grad == x.sum()


def test_an_output_object_gives_its_sample(schedule):
    class Output:
        def __init__(self, sample):
            self.sample = sample

    net = Net()
    wrapped = fd.Sampler(lambda x, t: Output(net(x, t)), schedule, steps=4, shape=SHAPE)
    assert torch.equal(wrapped.sample(2), fd.Sampler(net, schedule, steps=4, shape=SHAPE).sample(2))


def test_a_half_precision_network_has_a_float32_state(schedule):
    net = Net().to(torch.bfloat16)
    seen = []

    def spy(x, t):
        seen.append(x.dtype)
        return net(x, t)

    sampler = fd.Sampler(spy, schedule, solver="ddpm", steps=5, shape=SHAPE, dtype=torch.bfloat16)
    x = sampler.sample(2)
    assert set(seen) == {torch.bfloat16}
    assert x.dtype == torch.float32
    assert not torch.equal(x, x.to(torch.bfloat16).float())


def test_noise_added_in_half_precision_is_still_there_at_the_last_rows(schedule):
    """diffusers 9004: rounded to bfloat16, the noise of t = 0..5 vanishes; here the state is float32."""
    sampler = fd.Sampler(Net().to(torch.bfloat16), schedule, solver="ddpm", steps=None, shape=SHAPE)
    _, states = sampler.sample(1, trajectory=True)
    zero = fd.Sampler(Net().to(torch.bfloat16), schedule, solver="ddpm", steps=None, shape=SHAPE)
    _, silent = zero.sample(1, trajectory=True, noise=torch.zeros(1000, 1, *SHAPE), x_T=states[0])
    for steps_left in range(1, 6):
        assert not torch.equal(states[1000 - steps_left], silent[1000 - steps_left])


def test_callback_and_trajectory_see_every_step(schedule):
    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=7, shape=SHAPE)
    seen = []
    x, states = sampler.sample(
        2, trajectory=True, callback=lambda moment: seen.append((moment.row, moment.t, moment.x.clone()))
    )
    assert states.shape == (8, 2, *SHAPE)
    assert [row for row, _, _ in seen] == list(range(7))
    assert [t for _, t, _ in seen] == list(sampler.table.t)
    assert torch.equal(states[1:], torch.stack([x for _, _, x in seen]))
    assert torch.equal(states[-1], x)
    assert torch.equal(states[0], fd.ops.normal(SHAPE, 0, 2, 0, domain=0))


def test_progress_shows_a_bar(schedule, capfd):
    fd.Sampler(Net(), schedule, steps=3, shape=SHAPE).sample(1, progress=True)
    assert "ddim" in capfd.readouterr().err


def test_an_empty_batch_is_an_empty_result(schedule):
    def never(x, t):
        return x

    assert fd.Sampler(never, schedule, steps=2, shape=SHAPE).sample(0).shape == (0, *SHAPE)


def test_a_table_of_ones_own_replaces_schedule_and_solver(schedule):
    levels = fd.NoiseLevels.from_schedule(schedule, fd.space_timesteps(1000, 9))
    table = fd.compile_table("ddim", levels, clip=(-1.0, 1.0), eta=0.5)
    own = fd.Sampler(Net(), table=table, shape=SHAPE).sample(3)
    assert torch.equal(own, fd.Sampler(Net(), schedule, steps=9, eta=0.5, shape=SHAPE).sample(3))


def test_the_network_sees_times_of_the_schedule(schedule):
    seen = []

    def spy(x, t):
        seen.append(t.clone())
        return x

    fd.Sampler(spy, schedule, steps="ddim5", shape=SHAPE).sample(2)
    assert [t.tolist() for t in seen] == [[800, 800], [600, 600], [400, 400], [200, 200], [0, 0]]
    assert seen[0].dtype == torch.int64


@pytest.mark.parametrize("batch", [1, 3])
def test_compiled_and_numpy_noise_give_the_same_chain(batch):
    """Without a compiler the sampler draws many rows at a time: the bits are those of the rows one by one."""
    script = f"""
import torch, fastdiff as fd
from fastdiff.kernels import cpu
cpu.library(wait=True)
net = torch.nn.Tanh()
s = fd.Sampler(lambda x, t: net(x), fd.NoiseSchedule.linear(1000), solver="ddpm", steps=300, shape=(3, 5, 7))
print(s.sample({batch}, seed=3).numpy().tobytes().hex())
"""
    results = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "FASTDIFF_NATIVE": native},
            capture_output=True,
            text=True,
        )
        for native in ("1", "0")
    ]
    assert all(result.returncode == 0 for result in results), results[0].stderr + results[1].stderr
    assert results[0].stdout == results[1].stdout


def test_labels_outside_of_the_classes_are_refused(schedule):
    net = small_unet()
    sampler = fd.Sampler(net, schedule, steps=2, shape=SHAPE)
    for labels in ([0, 3], [-2, 0]):
        with pytest.raises(ValueError, match="labels"):
            sampler.sample(2, cond={"labels": labels})


@pytest.mark.parametrize(
    ("outputs", "variance", "hint"),
    [(2, "fixed_small", "learned_range"), (1, "learned_range", "fixed_small")],
)
def test_channels_that_do_not_fit_the_variance_are_named(schedule, outputs, variance, hint):
    sampler = fd.Sampler(Net(outputs), schedule, steps=2, variance=variance, shape=SHAPE)
    with pytest.raises(ValueError, match=hint):
        sampler.sample(1)


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:1], lambda x: x.to("meta"), lambda x: x.to(torch.complex64), lambda x: (x,)],
    ids=["shape", "device", "dtype", "tuple"],
)
def test_an_output_that_does_not_fit_is_refused_at_any_row(schedule, spoil):
    calls = []

    def turns_bad(x, t):
        calls.append(t)
        return x if len(calls) < 3 else spoil(x)

    with pytest.raises((ValueError, TypeError), match="`model` must return"):
        fd.Sampler(turns_bad, schedule, steps=5, shape=SHAPE).sample(4)


def test_every_module_gets_its_own_mode_back(schedule):
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(2).eval(), torch.nn.Dropout(0.5))
    before = [module.training for module in net.modules()]
    sampler = fd.Sampler(lambda x, t: net(x), schedule, steps=2, shape=SHAPE)
    sampler.model = wrapped = torch.nn.Module()
    wrapped.net = net
    wrapped.forward = lambda x, t: net(x)
    assert torch.equal(sampler.sample(2), sampler.sample(2))  # no dropout
    assert [module.training for module in net.modules()] == before


def test_chains_that_overlap_evaluate_until_the_last_has_ended(schedule):
    from concurrent.futures import ThreadPoolExecutor

    modes = []

    class Spy(Net):
        def forward(self, x, t, labels=None):
            modes.append(self.training)
            return super().forward(x, t)

    net = Spy().train()
    samplers = [fd.Sampler(net, schedule, steps=steps, shape=SHAPE) for steps in (20, 60)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda sampler: sampler.sample(1), samplers * 4))
    assert modes.count(True) == 0
    assert net.training


def test_a_compiled_unet_keeps_its_null_class(schedule):
    net = small_unet()
    labels = {"labels": [0, 2]}
    plain = fd.Sampler(net, schedule, steps=2, shape=SHAPE).sample(2, cond=labels, guidance_scale=2.0)
    wrapped = torch.compile(net, backend="eager")
    compiled = fd.Sampler(wrapped, schedule, steps=2, shape=SHAPE).sample(2, cond=labels, guidance_scale=2.0)
    assert torch.allclose(plain, compiled, atol=1e-5)


def test_seeds_may_be_one_for_each_sample(schedule):
    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=4, shape=SHAPE)
    each = sampler.sample(2, seed=[5, 9])
    for i, seed in enumerate((5, 9)):
        assert torch.equal(sampler.sample(1, seed=seed, sample_ids=[i])[0], each[i])


def test_one_step_starts_from_noise(schedule):
    assert fd.Sampler(Net(), schedule, steps=1, shape=SHAPE).table.t.tolist() == [999]


def test_threads_may_share_a_sampler(schedule):
    from concurrent.futures import ThreadPoolExecutor

    sampler = fd.Sampler(Net(), schedule, solver="ddpm", steps=20, shape=SHAPE)
    alone = [sampler.sample(2, seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: sampler.sample(2, seed=seed), range(8)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_saved_network_comes_with_its_own_settings(tmp_path, schedule):
    net = small_unet()
    diffusion = {
        "schedule": schedule.to_config(),
        "prediction": "v",
        "variance": "fixed_large",
        "shape": list(SHAPE),
        "clip": [-1, 1],
    }
    net.save_pretrained(tmp_path / "net", diffusion=diffusion)
    loaded = fd.Sampler.from_pretrained(str(tmp_path / "net"), solver="ddpm", steps=5)
    direct = fd.Sampler(
        net, schedule, solver="ddpm", steps=5, prediction="v", variance="fixed_large", shape=SHAPE
    )
    assert torch.equal(loaded.sample(2, cond={"labels": 1}), direct.sample(2, cond={"labels": 1}))
    net.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="diffusion"):
        fd.Sampler.from_pretrained(str(tmp_path / "bare"))
