"""bits/dim: exact for Gaussian data, the papers' terms, unbiased when strided, lower after training."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chains import one_thread
from kernel_cases import assert_same_bits
from test_objective_bound import by_the_papers

import fastdiff as fd
from fastdiff import ops
from fastdiff.likelihood import mean_interval, strata
from fastdiff.train import Objective, TrainConfig, Trainer, load_data

_one_thread = pytest.fixture(autouse=True)(one_thread)
MEAN, STD = 0.05, 0.1
LINEAR, COSINE = fd.NoiseSchedule.linear(200), fd.NoiseSchedule.cosine(50)


class Gaussian:
    """The exact network of data N(MEAN, STD^2): E[x0 | x_t], and the variance of the true reverse kernel."""

    def __init__(self, schedule: fd.NoiseSchedule, prediction: str, learned: bool) -> None:
        self.schedule, self.prediction, self.learned = schedule, prediction, learned

    def left(self) -> np.ndarray:
        """Var[x0 | x_t] at every time."""
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        return (STD * sigma) ** 2 / ((alpha * STD) ** 2 + sigma**2)

    def log_variance(self) -> np.ndarray:
        """ln Var[x_{t-1} | x_t] = ln (posterior variance + coef1^2 Var[x0 | x_t])."""
        return np.log(self.schedule.posterior_variance + self.schedule.posterior_mean_coef1**2 * self.left())

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = self.schedule
        alpha, sigma, log_variance = (
            torch.from_numpy(a.copy())[t].view(-1, 1) for a in (s.alpha, s.sigma, self.log_variance())
        )
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN)
        eps = (x - alpha * x0) / sigma
        out = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[self.prediction]
        return torch.cat([out, log_variance.expand_as(out)], 1) if self.learned else out


def quadrature(schedule: fd.NoiseSchedule, nodes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0 [n, 1], noise [T, n, 1] and weights [n] that integrate polynomials over the data and the noise."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    data, noise = (torch.from_numpy(a.ravel()) for a in np.meshgrid(points, points))
    weight = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    return MEAN + STD * data[:, None], noise[None, :, None].expand(len(schedule), -1, 1), weight


def closed_form(schedule: fd.NoiseSchedule, variance: str, network: Gaussian) -> dict[str, Any]:
    """The expectations of prior, terms (t > 0) and errors over Gaussian data."""
    bar = schedule.alpha_bar[-1]
    prior = 0.5 * (bar * (STD**2 + MEAN**2) - bar - math.log1p(-bar)) / math.log(2)
    small = schedule.posterior_log_variance_clipped
    log_variance = {
        "fixed_small": small,
        "fixed_large": np.log(schedule.betas),
        "learned": network.log_variance(),
    }[variance]
    square = schedule.posterior_mean_coef1**2 * network.left() * np.exp(-log_variance)
    kl = 0.5 * (log_variance - small + np.exp(small - log_variance) - 1 + square) / math.log(2)
    eps = (schedule.alpha / schedule.sigma) ** 2 * network.left()
    return {"prior": prior, "vlb": kl[1:], "x0_mse": network.left(), "mse": eps}


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_terms_of_gaussian_data_are_the_closed_form(schedule, prediction, variance):
    network = Gaussian(schedule, prediction, variance == "learned")
    x0, noise, weight = quadrature(schedule, 2)  # exact for squares
    got = fd.bits_per_dim(network, schedule, x0, prediction, variance, clip=False, noise=noise)
    wanted = closed_form(schedule, variance, network)
    np.testing.assert_allclose(weight @ got.prior, wanted["prior"], rtol=1e-12)
    # x0 from eps or v loses alpha_T's digits, 1e5 at the cosine's end; the exact variance costs next to 0
    np.testing.assert_allclose(weight @ got.vlb[:, 1:], wanted["vlb"], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(weight @ got.x0_mse, wanted["x0_mse"], rtol=1e-9)
    np.testing.assert_allclose(weight @ got.mse, wanted["mse"], rtol=1e-9)
    assert torch.equal(got.times, torch.arange(len(schedule)).expand(len(x0), -1))
    torch.testing.assert_close(got.total, got.prior + got.vlb.sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_bound_of_the_exact_reverse_chain_is_the_entropy_of_the_data(schedule):
    network = Gaussian(schedule, "x0", learned=True)
    x0, noise, weight = quadrature(schedule, 20)
    got = fd.bits_per_dim(network, schedule, x0, "x0", "learned", clip=False, noise=noise)
    bar = schedule.alpha_bar[-1]
    at_end = 0.5 * (bar * (MEAN**2 + STD**2 - 1) - math.log1p(-bar * (1 - STD**2)))  # KL(q(x_T), N(0, 1))
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(2 / 255)
    # of 7.3 bits: at t = 0 the tanh form of the CDF, and a bin of 0.8 standard deviations taken as a density
    total = float(weight @ got.total)
    assert abs(total - (entropy + at_end) / math.log(2)) < 0.02
    worse = fd.bits_per_dim(network, schedule, x0, "x0", "learned", clip=False, noise=1.1 * noise)
    assert float(weight @ worse.total) > total + 0.02


class Wavy(torch.nn.Module):
    """A network that is no function of Gaussian data, with a variance or without."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned, self.modes, self.batches = learned, [], []

    def forward(self, x: torch.Tensor, t: torch.Tensor, shift: Any = 0.0) -> torch.Tensor:
        self.modes.append(self.training)
        self.batches.append(len(x))
        shift = shift.view(-1, 1, 1, 1) if isinstance(shift, torch.Tensor) else shift
        mean = 0.7 * x + 0.1 * torch.sin(4 * x) + shift
        return torch.cat([mean, torch.tanh(x) - 2 * (t.view(-1, 1, 1, 1) > 3)], 1) if self.learned else mean


def pixels(batch: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 2, 3, 2), generator=g).to(dtype) / 127.5 - 1


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_every_term_is_the_papers_formula_to_1e_minus_10(prediction, variance):
    learned = variance == "learned_range"
    x0, noise = pixels(dtype=torch.float64), torch.randn(50, 3, 2, 3, 2, dtype=torch.float64)
    got = fd.bits_per_dim(Wavy(learned), COSINE, x0, prediction, variance, clip=False, noise=noise)
    objective = Objective(COSINE, prediction, variance, "vlb")
    for t in (0, 1, 17, 49):
        told = np.full(3, t)
        wanted = by_the_papers(objective, x0.numpy(), told, noise[t].numpy(), Wavy(learned))
        np.testing.assert_allclose(got.vlb[:, t], wanted["vlb"], rtol=1e-10)
        if prediction == "eps":  # without clipping eps is the network's own
            np.testing.assert_allclose(got.mse[:, t], wanted["mse"], rtol=1e-7)
    bar = COSINE.alpha_bar[-1]
    wanted = (bar * x0**2 - bar - math.log1p(-bar)).mean((1, 2, 3)) / (2 * math.log(2))
    np.testing.assert_allclose(got.prior, wanted, rtol=1e-12)


def test_a_clipped_x0_enters_the_terms_and_the_errors():
    x0, noise = pixels(), torch.randn(50, 3, 2, 3, 2)
    levels = torch.from_numpy(np.stack([COSINE.alpha, COSINE.sigma], 1)).float()
    got = fd.bits_per_dim(Wavy(), COSINE, x0, "v", noise=noise)
    half = fd.bits_per_dim(Wavy(), COSINE, x0, "v", noise=noise, clip=(-0.5, 0.5))
    free = fd.bits_per_dim(Wavy(), COSINE, x0, "v", noise=noise, clip=False)
    for t in (0, 30, 49):
        alpha, sigma = levels[t]
        x_t = alpha * x0 + sigma * noise[t]
        guess = alpha * x_t - sigma * Wavy()(x_t, torch.full((3,), t))
        for limit, result in ((1.0, got), (0.5, half), (9.0, free)):
            clipped = guess.clamp(-limit, limit)
            error = (clipped - x0).square().mean((1, 2, 3))
            torch.testing.assert_close(result.x0_mse[:, t], error, rtol=1e-4, atol=1e-6)
            eps = ((x_t - alpha * clipped) / sigma - noise[t]).square().mean((1, 2, 3))
            torch.testing.assert_close(result.mse[:, t], eps, rtol=1e-3, atol=1e-6)
    assert (got.total < free.total).all()


def test_the_result_depends_on_seed_and_identity_alone():
    x0, ids = pixels(5), torch.tensor([9, 2, 40, 0, 7])
    whole = fd.bits_per_dim(Wavy(), COSINE, x0, seed=3, sample_ids=ids, times=9)
    for size in (1, 4, 1000):
        again = fd.bits_per_dim(Wavy(), COSINE, x0, seed=3, sample_ids=ids, times=9, batch_size=size)
        for name in ("total", "prior", "vlb", "mse", "x0_mse", "times"):
            assert torch.equal(getattr(again, name), getattr(whole, name))
    alone = fd.bits_per_dim(Wavy(), COSINE, x0[2:3], seed=3, sample_ids=ids[2:3], times=9)
    assert torch.equal(alone.vlb, whole.vlb[2:3])
    assert torch.equal(alone.times, whole.times[2:3])
    other = fd.bits_per_dim(Wavy(), COSINE, x0, seed=4, sample_ids=ids, times=9)
    assert (other.vlb != whole.vlb).any()
    assert (other.times != whole.times).any()


def test_drawn_noise_is_that_of_the_times():
    x0 = pixels()
    z = torch.stack([ops.normal(x0.shape[1:], 8, 3, t, domain=2) for t in range(50)])
    drawn, given = (fd.bits_per_dim(Wavy(), COSINE, x0, seed=8, noise=noise) for noise in (None, z))
    for name in ("vlb", "x0_mse"):
        assert_same_bits(getattr(drawn, name), getattr(given, name))


@pytest.mark.parametrize(("terms", "steps"), [(2, 2), (2, 1000), (7, 50), (100, 1000), (999, 1000), (50, 50)])
def test_strata_cut_the_chain_into_runs_that_grow(terms, steps):
    edges = strata(terms, steps)
    assert len(edges) == terms + 1
    assert (edges[0], edges[1], edges[-1]) == (0, 1, steps)
    lengths = np.diff(edges)
    assert (lengths >= 1).all()
    assert lengths.sum() == steps
    assert lengths[-1] == lengths.max()


def test_a_strided_estimate_is_unbiased_and_its_interval_holds_the_whole():
    """5 terms in place of 50: the mean over 4000 draws of one image within 4 standard errors of the bound."""
    x0 = pixels(1).expand(4000, -1, -1, -1)
    whole = fd.bits_per_dim(Wavy(), COSINE, x0[:1000], seed=1)
    part = fd.bits_per_dim(Wavy(), COSINE, x0, seed=2, times=5)
    assert part.vlb.shape == (4000, 5)
    assert part.counts.tolist() == np.diff(strata(5, 50)).tolist()
    for k in range(5):  # every time of a stratum is drawn as often
        low, high = strata(5, 50)[k : k + 2]
        seen = torch.bincount(part.times[:, k], minlength=50)[low:high].double()
        assert seen.sum() == 4000
        expected = 4000 / (high - low)
        assert ((seen - expected).abs() <= 5 * math.sqrt(expected)).all()
    errors = [float(r.total.std()) / math.sqrt(len(r.total)) for r in (whole, part)]
    assert abs(float(whole.total.mean() - part.total.mean())) <= 4 * math.hypot(*errors)
    # and a mean of the terms without their counts would be far away
    assert abs(float(whole.total.mean() - (part.prior + part.vlb.sum(1)).mean())) > 40 * math.hypot(*errors)


def test_times_of_ones_own_are_those_columns_of_the_whole():
    x0 = pixels()
    whole = fd.bits_per_dim(Wavy(), COSINE, x0, seed=5)
    some = fd.bits_per_dim(Wavy(), COSINE, x0, seed=5, times=[0, 4, 49])
    assert torch.equal(some.vlb, whole.vlb[:, [0, 4, 49]])
    assert some.counts.tolist() == [1, 1, 1]


def test_intervals_hold_the_mean_as_often_as_they_say():
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(1000):
        _, low, high = mean_interval(3 + 2 * torch.randn(50, generator=g), 0.9)
        inside += low <= 3 <= high
    # 900 +- 9.5, and some fewer as the standard deviation is an estimate
    assert 860 <= inside <= 930
    assert mean_interval(torch.tensor([2.0]))[0] == 2
    assert math.isnan(mean_interval(torch.tensor([2.0]))[1])


def test_the_model_sees_its_condition_eval_mode_and_the_original_times():
    model = Wavy().train()
    respaced = COSINE.respace([3, 20, 49])
    x0, shift = pixels(4), torch.tensor([0.0, 0.1, 0.2, 0.3])
    seen: list[int] = []
    done = fd.bits_per_dim(model, respaced, x0, cond={"shift": shift}, batch_size=5, callback=seen.append)
    assert model.training
    assert model.modes == [False] * 3
    assert model.batches == seen == [5, 5, 2]
    each = [
        fd.bits_per_dim(
            Wavy(), respaced, x0[i : i + 1], cond={"shift": float(shift[i])}, sample_ids=torch.tensor([i])
        )
        for i in range(4)
    ]
    torch.testing.assert_close(done.vlb, torch.cat([e.vlb for e in each]), rtol=1e-6, atol=0)
    told = []
    fd.bits_per_dim(
        lambda x, t: (told.append(t.tolist()), SimpleNamespace(sample=0 * x))[1], respaced, x0[:1], "x0"
    )
    assert told == [[3], [20], [49]]


def test_a_model_that_fails_gets_its_mode_back():
    class Fails(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    model = Fails()
    with pytest.raises(RuntimeError, match="no"):
        fd.bits_per_dim(model, COSINE, pixels())
    assert model.training


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_a_chain_that_ends_in_pure_noise_has_a_prior_of_0(prediction):
    schedule = COSINE.rescale_zero_terminal_snr()
    got = fd.bits_per_dim(Wavy(), schedule, pixels(), prediction)
    assert got.prior.tolist() == [0.0] * 3
    assert got.mse[:, -1].tolist() == [0.0] * 3
    assert got.total.isfinite().all()


def test_results_are_values():
    got = fd.bits_per_dim(Wavy(), COSINE, pixels(), times=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.total = 0
    mean, low, high = got.interval()
    assert low < mean < high


def test_bits_per_dim_fall_under_training_on_digits(tmp_path):
    data = load_data("digits", holdout=0.2)
    x0 = data.held_out.all()[0][:64]
    torch.manual_seed(0)
    model = fd.UNet(1, model_channels=8, channel_mult=(1, 2), num_res_blocks=1, learned_variance=True)
    objective = Objective(fd.NoiseSchedule.cosine(50), "eps", "learned_range", "hybrid")

    def measured() -> float:
        result = fd.bits_per_dim(model, objective.schedule, x0, variance="learned_range", batch_size=256)
        return float(result.total.mean())

    before = measured()
    unlabelled = dataclasses.replace(data, labels=None, class_names=())
    config = TrainConfig(steps=80, batch_size=64, lr=4e-3, warmup=10, checkpoint_every=80)
    Trainer(model, objective, unlabelled, config, tmp_path / "run").run(progress=False)
    after = measured()
    assert after < before - 1  # 6.7 and 5.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"x0": pixels().half()}, TypeError, "`x0` must be a float32 .* got torch.float16"),
        ({"x0": pixels()[:0]}, TypeError, r"`x0` must be a float32 .* got \(0, 2, 3, 2\)"),
        ({"x0": 127 * pixels()}, ValueError, r"`x0` must lie in \[-1, 1\], got .*127.5"),
        ({"schedule": 1000}, TypeError, "`schedule` must be a NoiseSchedule"),
        ({"prediction": "flow"}, ValueError, "`prediction` must be one of eps, x0, v"),
        ({"variance": "big"}, ValueError, "`variance` must be one of"),
        (
            {"variance": "learned"},
            ValueError,
            r"`model` must return \[3, 4, 3, 2\], as the variance is learned",
        ),
        ({"model": Wavy(True)}, ValueError, r"`model` must return \[3, 2, 3, 2\], as the variance is fixed"),
        (
            {"noise": torch.zeros(3, 2, 3, 2)},
            ValueError,
            r"`noise` must be \[T, \*x0.shape\], \[50, 3, 2, 3, 2\]",
        ),
        ({"times": 51}, ValueError, "`times` must be a number from 2 to T = 50"),
        ({"times": 1}, ValueError, "`times` must be a number from 2 to T = 50"),
        ({"times": [3, 3]}, ValueError, r"`times` must rise within 0\.\.49"),
        ({"times": [0.5]}, TypeError, "`times` must be None, a number"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"seed": 2**64}, ValueError, "`seed` must fit 64 bits"),
        ({"clip": (1, -1)}, ValueError, r"`clip` must be \(lo, hi\) with lo < hi"),
        ({"clip": 1.0}, ValueError, r"`clip` must be None, \(lo, hi\)"),
        ({"clip": fd.DynamicThreshold()}, ValueError, "`clip` must be True, False or a range"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fd.bits_per_dim(**{"model": Wavy(), "schedule": COSINE, "x0": pixels(), **options})
