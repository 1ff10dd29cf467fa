"""The training loss: its values, weights, gradients, determinism and bad input."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdiff import ops
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective

COSINE = NoiseSchedule.cosine(100)
IDS = torch.tensor([5, 2, 9, 2**32 - 1])
TIMES = torch.tensor([0, 37, 99, 60])


def images(batch=4, shape=(2, 3, 5)) -> torch.Tensor:
    return torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def network(x, t, labels=None):
    """Any function of x and t; smooth, with numbers of the size of its input."""
    shift = 0.0 if labels is None else labels.view(-1, 1, 1, 1).to(x.dtype)
    return 0.7 * x + 0.01 * t.view(-1, 1, 1, 1).to(x.dtype) + shift


def expected(x0, t, noise, schedule, prediction):
    """(mse, a bound of its float32 error) of `network`, by the formulas in float64."""
    x0, noise = x0.double(), noise.double()
    alpha = torch.from_numpy(schedule.alpha.copy())[t].view(-1, 1, 1, 1)
    sigma = torch.from_numpy(schedule.sigma.copy())[t].view(-1, 1, 1, 1)
    target = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]
    out = network(alpha * x0 + sigma * noise, torch.from_numpy(schedule.timesteps.copy())[t])
    # Each of the two carries at most 8 roundings of terms no larger than its summands, the mean log2(N) + 2.
    size = out.abs() + x0.abs() + noise.abs() + 0.01 * schedule.timesteps.max()
    bound = 2**-24 * (16 * (out - target).abs() * size + 8 * (out - target).square())
    return (out - target).square().flatten(1).mean(1), bound.flatten(1).mean(1)


def close(got, wanted, bound) -> bool:
    return bool(((got.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("given_noise", [True, False])
def test_mse_is_the_formula_in_float64(prediction, given_noise):
    x0 = images()
    noise = ops.normal(x0.shape[1:], 3, IDS, 7, domain=2)
    objective = Objective(COSINE, prediction)
    losses = objective(
        network, x0, TIMES, noise=noise if given_noise else None, seed=3, sample_ids=IDS, draw=7
    )
    wanted, bound = expected(x0, TIMES, noise, COSINE, prediction)
    assert close(losses.mse, wanted, bound)
    assert torch.equal(losses.total, losses.mse)
    assert losses.vlb is None


def test_the_comparison_sees_a_wrong_target():
    x0, noise = images(), torch.randn(4, 2, 3, 5)
    right, bound = expected(x0, TIMES, noise, COSINE, "v")
    wrong, _ = expected(x0, TIMES, noise * (1 + 1e-4), COSINE, "v")
    assert close(right.float(), right, bound)
    assert not close(wrong, right, bound)


def test_a_network_that_knows_the_answer_has_no_loss():
    x0 = images()
    noise = torch.randn_like(x0)
    for prediction, answer in (("eps", noise), ("x0", x0)):
        losses = Objective(COSINE, prediction)(lambda x, t, a=answer: a, x0, TIMES, noise=noise)
        assert losses.mse.tolist() == [0.0] * 4


def test_the_network_sees_the_original_times_its_condition_and_float32():
    respaced = COSINE.respace([3, 50, 90])
    seen = {}

    def model(x, t, **cond):
        seen.update(x=x, t=t, **cond)
        return SimpleNamespace(sample=x)

    labels = torch.tensor([1, 0, -1])
    Objective(respaced)(model, images(3), torch.tensor([2, 0, 1]), cond={"labels": labels})
    assert seen["t"].tolist() == [90, 3, 50]
    assert seen["labels"] is labels
    assert seen["x"].dtype == torch.float32


def test_min_snr_weights_are_hang_s_and_one_loss_for_every_prediction():
    snr = (COSINE.alpha / COSINE.sigma) ** 2
    weight = {p: Objective(COSINE, p, loss="min_snr").weights() for p in ("eps", "x0", "v")}
    least = np.minimum(snr, 5.0)
    assert (snr > 5).any()
    assert (snr < 5).any()
    for got, wanted in (
        (weight["x0"], least),
        (weight["eps"], least / snr),
        (weight["v"], least / (snr + 1)),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)
    # an error d of x0 is an error (alpha/sigma) d of eps and d/sigma of v
    np.testing.assert_allclose(weight["eps"] * snr, weight["x0"], rtol=1e-12)
    np.testing.assert_allclose(weight["v"] / COSINE.sigma**2, weight["x0"], rtol=1e-12)


def test_min_snr_weighs_every_sample_by_its_time():
    x0, noise = images(), torch.randn(4, 2, 3, 5)
    simple = Objective(COSINE, "v")(network, x0, TIMES, noise=noise)
    weighted = Objective(COSINE, "v", loss="min_snr")
    losses = weighted(network, x0, TIMES, noise=noise)
    assert torch.equal(losses.mse, simple.mse)
    wanted = simple.mse * torch.from_numpy(weighted.weights())[TIMES].float()
    assert torch.equal(losses.total, wanted)


def test_pure_noise_at_the_end_is_trained_on_x0_and_v_without_a_nan():
    schedule = COSINE.rescale_zero_terminal_snr()
    for prediction in ("x0", "v"):
        for loss in ("simple", "min_snr"):
            objective = Objective(schedule, prediction, loss=loss)
            total = objective(network, images(), torch.full((4,), 99)).total
            assert total.isfinite().all()
            assert (total > 0).all() if loss == "simple" else (total == 0).all()
    with pytest.raises(ValueError, match=r"`prediction` must be 'x0' or 'v' .* got 'eps'"):
        Objective(schedule, "eps")


def test_the_gradient_is_that_of_the_mean_square():
    x0, noise = images(), torch.randn(4, 2, 3, 5)
    gain = torch.tensor(0.5, requires_grad=True)
    Objective(COSINE, "eps")(lambda x, t: gain * x, x0, TIMES, noise=noise).total.mean().backward()
    alpha, sigma = (torch.from_numpy(a.copy())[TIMES].view(-1, 1, 1, 1) for a in (COSINE.alpha, COSINE.sigma))
    x_t = alpha * x0.double() + sigma * noise.double()
    terms = 2 * (0.5 * x_t - noise.double()) * x_t
    # 16 roundings of each term's parts, and the sum of 120 terms
    assert (
        abs(gain.grad.item() - terms.mean().item()) <= 32 * 2**-24 * (x_t.square() + noise**2).mean().item()
    )


def test_a_sample_s_loss_does_not_depend_on_its_batch():
    x0, objective = images(), Objective(COSINE, "v")
    together = objective(network, x0, seed=11, sample_ids=IDS, draw=5)
    for i in range(4):
        alone = objective(network, x0[i : i + 1], seed=11, sample_ids=IDS[i : i + 1], draw=5)
        assert torch.equal(alone.mse, together.mse[i : i + 1])


def drawn_times(objective, seed=0, ids=None, draw=0, batch=64) -> torch.Tensor:
    seen = []

    def model(x, t):
        seen.append(t)
        return x

    ids = torch.arange(batch) if ids is None else ids
    objective(model, torch.zeros(len(ids), 1), seed=seed, sample_ids=ids, draw=draw)
    return seen[0]


def test_times_are_a_function_of_seed_sample_and_step():
    objective = Objective(COSINE)
    t = drawn_times(objective, 3, draw=9)
    assert torch.equal(t, drawn_times(objective, 3, draw=9))
    assert torch.equal(t.flip(0), drawn_times(objective, 3, torch.arange(64).flip(0), 9))
    assert torch.equal(t, drawn_times(objective, torch.full((64,), 3), draw=torch.tensor(9)))
    for other in (drawn_times(objective, 4, draw=9), drawn_times(objective, 3, draw=10)):
        assert (t != other).any()


def test_times_are_uniform_over_the_whole_chain():
    objective = Objective(NoiseSchedule.cosine(20))
    counts = sum(
        torch.bincount(drawn_times(objective, draw=d, batch=1000), minlength=20) for d in range(40)
    ).double()
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    # 19 degrees of freedom: mean 19, standard deviation 6.2; five of them above
    assert len(counts) == 20
    assert chi2 < 19 + 5 * 6.2


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_trains(seed):
    losses = Objective(COSINE)(network, images(), seed=seed)
    assert losses.total.isfinite().all()
    assert not torch.equal(losses.total, Objective(COSINE)(network, images()).total)


def test_objectives_are_values():
    assert Objective(COSINE, "v") == Objective(NoiseSchedule.cosine(100), "v")
    assert Objective(COSINE, "v") != Objective(COSINE, "eps")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective(COSINE).prediction = "v"
    config = Objective(COSINE, "x0", "fixed_large", "min_snr").to_config()
    again = NoiseSchedule.from_config(config.pop("schedule"))
    assert again == COSINE
    assert config == {
        "prediction": "x0",
        "variance": "fixed_large",
        "loss": "min_snr",
        "vlb_weight": None,
    }


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"schedule": 1000}, TypeError, "`schedule` must be a NoiseSchedule, got int"),
        ({"prediction": "noise"}, ValueError, "`prediction` must be one of eps, x0, v, got 'noise'"),
        ({"variance": "small"}, ValueError, "`variance` must be one of fixed_small, fixed_large"),
        ({"variance": "learned_range"}, ValueError, "`variance` .* would never train a learned one"),
        ({"loss": "hybrid"}, ValueError, "`variance` must be learned_range .* got 'fixed_small'"),
        ({"loss": "l1"}, ValueError, "`loss` must be one of simple, min_snr, hybrid, vlb, got 'l1'"),
        ({"loss": "vlb", "vlb_weight": 1.0}, ValueError, "`vlb_weight` must be None for the loss 'vlb'"),
        (
            {"loss": "hybrid", "variance": "learned", "vlb_weight": -1},
            ValueError,
            "`vlb_weight` must be a finite number of at least 0",
        ),
        ({"vlb_weight": 0.1}, ValueError, "`vlb_weight` must be None for the loss 'simple'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        Objective(**{"schedule": COSINE, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": images().half()}, TypeError, "`x0` must be a float32 tensor .* got torch.float16"),
        ({"x0": np.zeros((4, 2, 3, 5))}, TypeError, "`x0` must be a float32 tensor .* got ndarray"),
        ({"t": TIMES[:3]}, ValueError, r"`t` must be \[4\] int64 on cpu.* got \(3,\)"),
        ({"t": TIMES.int()}, ValueError, r"`t` must be \[4\] int64 on cpu.* got .*int32"),
        ({"t": 3}, TypeError, r"`t` must be \[4\] int64 .* got int"),
        ({"t": torch.tensor([0, 1, 2, 100])}, ValueError, r"`t` must lie in 0\.\.99, got 0\.\.100"),
        ({"t": torch.tensor([0, -1, 2, 3])}, ValueError, r"`t` must lie in 0\.\.99, got -1\.\.3"),
        ({"sample_ids": IDS[:2]}, ValueError, r"`sample_ids` must be \[4\] int64"),
        ({"noise": torch.zeros(4, 2, 3, 4)}, ValueError, "`noise`"),
        (
            {"model": lambda x, t: torch.cat([x, x], 1)},
            ValueError,
            "`model` .* channels of a learned variance",
        ),
        ({"model": lambda x, t: x[:, :1]}, ValueError, "`model` must return .* differ in channels"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    arguments = {"model": network, "x0": images(), **options}
    with pytest.raises(error, match=message):
        Objective(COSINE)(**arguments)


def test_a_learned_variance_needs_its_channels():
    objective = Objective(COSINE, variance="learned_range", loss="hybrid")
    with pytest.raises(
        ValueError, match=r"`model` must return the shape \(4, 4, 3, 5\), got \(4, 2, 3, 5\).*twice"
    ):
        objective(network, images())
