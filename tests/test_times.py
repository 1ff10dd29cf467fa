"""Samplers of training times: what they draw, what weights make of it, that they go on after a kill."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import one_thread
from training_runs import CONFIG, log, state, trainer

from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective, draws
from fastdiff.train.times import (
    NAMES,
    FixedTimes,
    LossAwareTimes,
    log_normal_times,
    times_of,
    uniform_times,
)

_one_thread = pytest.fixture(autouse=True)(one_thread)
IDS = np.arange(1000)


def drawn(sampler: FixedTimes | LossAwareTimes, steps: int = 40, seed: int = 0) -> np.ndarray:
    return np.concatenate([sampler.draw(seed, step, IDS)[0] for step in range(steps)])


def fits(t: np.ndarray, p: np.ndarray) -> bool:
    """Whether counts follow p: chi^2 within 5 standard deviations."""
    expected = len(t) * p
    counts = np.bincount(t, minlength=len(p))
    if counts[expected == 0].any():
        return False
    kept = expected > 0
    chi2 = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    free = kept.sum() - 1
    return bool(abs(chi2 - free) <= 5 * math.sqrt(2 * free))


@pytest.mark.parametrize("p", [[1, 2, 3, 4], [0, 5, 0, 1, 1], [0.1, 0.1, 0.8], [1]])
def test_times_are_drawn_with_the_given_probabilities(p):
    sampler = FixedTimes(p)
    wanted = np.array(p) / sum(p)
    np.testing.assert_allclose(sampler.probabilities(), wanted, rtol=1e-15)
    assert fits(drawn(sampler), wanted)
    assert sampler.draw(0, 0, IDS)[1] is None


def test_the_comparison_sees_another_distribution():
    assert not fits(drawn(FixedTimes([1, 2, 3, 4])), np.array([0.11, 0.19, 0.3, 0.4]))
    assert not fits(drawn(FixedTimes([1, 1])), np.array([1.0, 0.0]))


def test_uniform_times_are_those_that_training_always_drew():
    t, weight = uniform_times(50).draw(7, 3, IDS)
    assert (t == draws.times(7, 3, IDS, 50)).all()
    assert weight is None


def test_weights_give_the_uniform_expectation_back():
    loss, p = np.array([5.0, 1.0, 0.2, 7.0, 3.0]), np.array([0.5, 0.1, 0.05, 0.3, 0.05])
    sampler = FixedTimes(p, reweight=True)
    t, weight = sampler.draw(1, 0, np.arange(200_000))
    estimate = loss[t] * weight
    exact = float((p * (loss / (5 * p))).sum())
    assert exact == pytest.approx(loss.mean(), rel=1e-12)
    assert abs(estimate.mean() - loss.mean()) <= 5 * estimate.std() / math.sqrt(len(t))
    assert abs(loss[t].mean() - loss.mean()) > 50 * estimate.std() / math.sqrt(len(t))


def test_log_normal_times_are_the_nearest_to_a_normal():
    schedule = NoiseSchedule.linear(100)
    place = np.log(schedule.sigma_ve)
    normal = -1.2 + 1.2 * np.random.default_rng(0).standard_normal(40_000)
    nearest = np.abs(place[None] - normal[:, None]).argmin(1)
    assert fits(nearest, log_normal_times(schedule).probabilities())
    assert fits(drawn(log_normal_times(schedule)), log_normal_times(schedule).probabilities())
    cosine = NoiseSchedule.cosine(100)
    for mean in (-1.0, 0.5):
        p = log_normal_times(cosine, mean, std=0.3).probabilities()
        place = np.log(cosine.sigma_ve)
        average = float(p @ place)
        spread = math.sqrt(float(p @ (place - average) ** 2))
        assert (average, spread) == pytest.approx((mean, 0.3), abs=0.01)  # places there are 0.05 apart


def test_log_normal_times_reach_pure_noise():
    p = log_normal_times(NoiseSchedule.cosine(20).rescale_zero_terminal_snr(), mean=2.0).probabilities()
    assert np.isfinite(p).all()
    assert (p > 0).all()
    assert log_normal_times(NoiseSchedule.linear(1)).probabilities().tolist() == [1.0]


def warm(steps: int = 4, history: int = 3) -> tuple[LossAwareTimes, np.ndarray]:
    """Each time told 5 losses, of which the last 3 count."""
    sampler = LossAwareTimes(steps, history)
    losses = np.random.default_rng(0).random((5, steps)) * [1, 4, 9, 0.1]
    for row in losses:
        sampler.learn(np.arange(steps), row)
    return sampler, losses[-history:]


def test_loss_aware_times_follow_the_root_of_the_mean_square():
    sampler, last = warm()
    size = np.sqrt((last**2).mean(0))
    wanted = 0.999 * size / size.sum() + 0.001 / 4
    np.testing.assert_allclose(sampler.probabilities(), wanted, rtol=1e-14)
    assert fits(drawn(sampler), wanted)
    t, weight = sampler.draw(0, 0, IDS)
    np.testing.assert_allclose(weight, 1 / (4 * wanted[t]), rtol=1e-14)


def test_loss_aware_times_are_uniform_until_every_time_has_its_history():
    sampler = LossAwareTimes(3)
    assert sampler.probabilities().tolist() == [1 / 3] * 3
    for _ in range(10):
        sampler.learn(np.array([0, 1]), np.array([9.0, 1.0]))
    for _ in range(9):
        sampler.learn(np.array([2]), np.array([1.0]))
    assert not sampler.is_warm
    assert (sampler.draw(5, 2, IDS)[0] == draws.times(5, 2, IDS, 3)).all()
    assert sampler.draw(5, 2, IDS)[1] is None
    sampler.learn(np.array([2]), np.array([1.0]))
    assert sampler.is_warm
    assert sampler.probabilities().argmax() == 0


def test_one_batch_may_hold_a_time_several_times():
    together, apart = LossAwareTimes(2, history=2), LossAwareTimes(2, history=2)
    t, losses = np.array([0, 0, 1, 0, 1]), np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    together.learn(t, losses)
    for time, loss in zip(t, losses, strict=True):
        apart.learn(np.array([time]), np.array([loss]))
    size = np.sqrt([(4 + 16) / 2, (9 + 25) / 2])
    for sampler in (together, apart):
        np.testing.assert_allclose(sampler.probabilities(), 0.999 * size / size.sum() + 0.0005, rtol=1e-14)


def test_losses_of_0_leave_times_uniform():
    sampler = LossAwareTimes(3, history=1)
    sampler.learn(np.arange(3), np.zeros(3))
    assert sampler.probabilities().tolist() == [1 / 3] * 3


def test_a_sampler_put_back_draws_the_same_times():
    sampler, _ = warm()
    other = LossAwareTimes(4, 3)
    other.load_state_dict(sampler.state_dict())
    for each in (sampler, other):
        each.learn(np.array([1, 1, 2]), np.array([0.3, 8.0, 0.5]))
    assert (sampler.draw(1, 2, IDS)[0] == other.draw(1, 2, IDS)[0]).all()
    assert sampler.probabilities().tobytes() == other.probabilities().tobytes()
    before = sampler.state_dict()
    sampler.learn(np.array([0]), np.array([7.0]))
    assert (before["told"] != sampler.state_dict()["told"]).any()  # a copy
    with pytest.raises(ValueError, match=r"`state` must hold losses \[5, 3\], got \[4, 3\]"):
        LossAwareTimes(5, 3).load_state_dict(before)


def test_importance_sampling_lowers_the_variance_of_the_bound():
    """A network of constant error: L_t falls over decades in t, seldom seen by uniform times."""
    objective = Objective(NoiseSchedule.cosine(100), "eps", loss="vlb")
    x0 = torch.rand(512, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    sampler = LossAwareTimes(100)

    def totals(t: np.ndarray, step: int) -> np.ndarray:
        return objective(lambda x, _: 0.7 * x, x0, torch.from_numpy(t), draw=step).total.numpy()

    uniform = totals(draws.times(0, 999, np.arange(512), 100), 0)
    for step in range(10):
        every = np.arange(512) % 100
        sampler.learn(every, totals(every, step))
    t, weight = sampler.draw(0, 999, np.arange(512))
    estimate = totals(t, 50) * weight
    assert estimate.std() < 0.5 * uniform.std()
    whole = np.mean([totals(np.full(512, s), 60).mean() for s in range(100)])
    assert abs(estimate.mean() - whole) <= 5 * estimate.std() / math.sqrt(512)


def test_what_learns_says_so_and_what_does_not_keeps_nothing():
    fixed = FixedTimes([1, 2])
    fixed.learn(np.array([0]), np.array([1.0]))
    fixed.load_state_dict(fixed.state_dict())
    assert (fixed.learns, fixed.state_dict()) == (False, {})
    assert fixed.to_config() == {"name": "fixed", "probabilities": [1 / 3, 2 / 3], "reweight": False}
    assert LossAwareTimes(5).learns
    assert LossAwareTimes(5).to_config() == {"name": "loss_aware", "history": 10, "uniform": 0.001}


def test_a_run_goes_on_with_the_times_that_it_has_learnt(tmp_path):
    def go(folder: str, steps: int, **options) -> LossAwareTimes:
        times = LossAwareTimes(4, history=2)
        objective = Objective(NoiseSchedule.cosine(4), loss="vlb")
        config = replace(CONFIG, steps=steps)
        trainer(tmp_path / folder, config, objective=objective, times=times, **options).run(progress=False)
        return times

    assert go("straight", 12).is_warm
    assert go("run", 6).is_warm
    go("run", 12, resume=True)
    assert log(tmp_path / "run") == log(tmp_path / "straight")
    assert state(tmp_path / "run") == state(tmp_path / "straight")
    assert any(name.startswith("times/losses") for name in state(tmp_path / "run"))


def test_names_stand_for_samplers():
    schedule = NoiseSchedule.cosine(30)
    assert [times_of(name, schedule).to_config()["name"] for name in NAMES] == [
        "uniform",
        "loss_aware",
        "fixed",
    ]
    with pytest.raises(
        ValueError, match="`times` must be one of uniform, loss_aware, log_normal, got 'none'"
    ):
        times_of("none", schedule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedTimes([]), r"`probabilities` must be \[T\] finite"),
        (lambda: FixedTimes([0, 0]), "`probabilities` must be .* one above 0"),
        (lambda: FixedTimes([1, -1]), "`probabilities` .* at least 0"),
        (lambda: FixedTimes([1, math.nan]), "`probabilities` .* finite"),
        (lambda: FixedTimes([1, 0], reweight=True), "`probabilities` must all be above 0 .* got 0 at 1"),
        (lambda: LossAwareTimes(0), "`num_timesteps` must be at least 1"),
        (lambda: LossAwareTimes(5, 0), "`history` must be at least 1"),
        (lambda: LossAwareTimes(5, uniform=0), r"`uniform` must be in \(0, 1\]"),
        (lambda: log_normal_times(NoiseSchedule.cosine(9), std=0), "`std` above 0"),
        (lambda: LossAwareTimes(5).learn(np.zeros(2, int), np.zeros(3)), r"`t` and `losses` must be \[B\]"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
