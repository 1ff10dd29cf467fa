"""The forward chain against hand-computed values, Bayes' rule and diffusers' own schedules."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from oracles import SCHEDULES, assert_close

from fastdiff.schedule import NoiseSchedule

ULP32 = 2.0**-24


def test_assert_close_catches_a_planted_error() -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        assert_close([1.0, 2.0], [1.0, 2.0 + 1e-9], 1e-12)
    with pytest.raises(AssertionError, match="is not"):
        assert_close([1.0], [1.0, 1.0], 1.0)
    with pytest.raises(AssertionError):
        assert_close([float("nan")], [1.0], 1.0)


def test_linear_of_four_steps_is_what_one_computes_by_hand() -> None:
    s = NoiseSchedule.linear(4, 0.1, 0.4)
    assert_close(s.betas, [0.1, 0.2, 0.3, 0.4], 1e-15)
    assert_close(s.alpha_bar, [0.9, 0.72, 0.504, 0.3024], 1e-15)
    assert_close(s.alpha[1], math.sqrt(0.72), 1e-15)
    assert_close(s.sigma[1], math.sqrt(0.28), 1e-15)
    assert_close(s.sigma_ve[1], math.sqrt(0.28 / 0.72), 1e-15)
    assert_close(s.lam[1], 0.5 * math.log(0.72 / 0.28), 1e-15)
    assert_close(s.posterior_variance[1], 0.2 * 0.1 / 0.28, 1e-15)
    assert_close(s.posterior_mean_coef1[1], math.sqrt(0.9) * 0.2 / 0.28, 1e-15)
    assert_close(s.posterior_mean_coef2[1], math.sqrt(0.8) * 0.1 / 0.28, 1e-15)
    assert s.timesteps.tolist() == [0, 1, 2, 3]
    assert len(s) == 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_is_bayes_rule(name: str) -> None:
    s = SCHEDULES[name]
    t = np.array([1, 2, 17, 500, 998])
    # Precisions add: the forward step x_t | x_{t-1} and the marginal x_{t-1} | x_0 are Gaussian in x_{t-1}.
    step, prior = s.betas[t], 1.0 - s.alpha_bar[t - 1]
    precision = (1.0 - step) / step + 1.0 / prior
    # 1 - alpha_bar keeps an absolute error of 1e-16, relative 1e-12 where it is 1e-4
    assert_close(s.posterior_variance[t] * precision, np.ones(5), 1e-11)
    assert_close(s.posterior_mean_coef1[t], s.alpha[t - 1] / prior / precision, 1e-11)
    assert_close(s.posterior_mean_coef2[t], np.sqrt(1.0 - step) / step / precision, 1e-11)


def test_posterior_keeps_the_data_at_time_zero() -> None:
    s = NoiseSchedule.linear(1000)
    assert_close([s.posterior_mean_coef1[0], s.posterior_mean_coef2[0]], [1.0, 0.0], 1e-12)
    assert s.posterior_variance[0] == 0.0


def test_clipped_log_variance_takes_index_one_at_zero_and_beta_where_there_is_one_step() -> None:
    s = NoiseSchedule.linear(10)
    log = s.posterior_log_variance_clipped
    assert log[0] == log[1] == math.log(s.posterior_variance[1])
    one = NoiseSchedule.from_betas([0.25])
    assert one.posterior_log_variance_clipped.tolist() == [math.log(0.25)]


def test_cosine_is_the_squared_cosine_until_its_cut() -> None:
    s = NoiseSchedule.cosine(1000)
    u = (np.arange(1, 1001) / 1000 + 0.008) / 1.008
    exact = np.cos(u * math.pi / 2) ** 2 / np.cos(0.008 / 1.008 * math.pi / 2) ** 2
    uncut = s.betas < 0.999
    assert uncut[:-1].all()
    assert_close(s.alpha_bar[uncut], exact[uncut], 1e-12)
    assert s.betas[-1] == 0.999


def test_sigmoid_is_symmetric_about_its_middle() -> None:
    s = NoiseSchedule.sigmoid(1000)
    # alpha_bar(u) + alpha_bar(1 - u) = 1 for start = -end; index i holds u = (i + 1) / 1000
    assert_close(s.alpha_bar[99] + s.alpha_bar[899], 1.0, 1e-12)
    assert_close(s.alpha_bar[499], 0.5, 1e-12)
    assert s.betas[-1] == 0.999


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (NoiseSchedule.linear(1000), dict(beta_schedule="linear")),
        (
            NoiseSchedule.scaled_linear(1000),
            dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        ),
        (NoiseSchedule.cosine(1000), dict(beta_schedule="squaredcos_cap_v2")),
    ],
)
def test_betas_and_alpha_bar_are_those_of_diffusers(ours: NoiseSchedule, theirs: dict[str, object]) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**theirs)
    # float32 on their side: one rounding of each beta, and one for each factor of a product of T
    assert_close(scheduler.betas.numpy(), ours.betas, 4 * ULP32)
    ratio = scheduler.alphas_cumprod.double().numpy() / ours.alpha_bar
    assert_close(ratio[:-1], np.ones(999), 2 * 1000 * ULP32)


def test_posterior_variance_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    s = NoiseSchedule.linear(1000)
    scheduler = diffusers.DDPMScheduler()
    for t in (1, 10, 500, 999):
        # float32 on their side: 1 - alpha_bar and 1 - alpha_bar/alpha_bar' lose what their size is below 1
        loss = (t + 2) * ULP32 / (1.0 - s.alpha_bar[t - 1]) + 2 * ULP32 / s.betas[t]
        assert_close(float(scheduler._get_variance(t)) / s.posterior_variance[t], 1.0, 2 * loss)


def test_zero_terminal_snr_is_lin_et_al_and_diffusers() -> None:
    s = NoiseSchedule.linear(1000)
    zero = s.rescale_zero_terminal_snr()
    assert zero.alpha_bar[-1] == 0.0
    assert zero.betas[-1] == 1.0
    assert zero.sigma_ve[-1] == math.inf
    assert zero.lam[-1] == -math.inf
    assert_close(zero.alpha[0], s.alpha[0], 1e-15)
    slope = zero.alpha[0] / (s.alpha[0] - s.alpha[-1])
    assert_close(zero.alpha, (s.alpha - s.alpha[-1]) * slope, 1e-15)
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.double().numpy()
    assert_close(theirs, zero.alpha_bar, 2 * 1000 * ULP32)


def test_respacing_takes_alpha_bar_and_keeps_the_original_times() -> None:
    s = NoiseSchedule.linear(1000)
    r = s.respace([0, 300, 999])
    assert r.alpha_bar.tolist() == s.alpha_bar[[0, 300, 999]].tolist()
    assert r.timesteps.tolist() == [0, 300, 999]
    assert_close(np.cumprod(1.0 - r.betas), r.alpha_bar, 1e-14)
    again = r.respace([1, 2])
    assert again.timesteps.tolist() == [300, 999]
    assert again.alpha_bar.tolist() == s.alpha_bar[[300, 999]].tolist()


def test_respacing_to_all_steps_changes_nothing_but_the_last_bits() -> None:
    s = NoiseSchedule.cosine(100)
    assert_close(s.respace(range(100)).betas, s.betas, 1e-14)


MADE = [
    NoiseSchedule.linear(7, 0.01, 0.3),
    NoiseSchedule.scaled_linear(np.int64(7)),
    NoiseSchedule.cosine(7, s=0.01),
    NoiseSchedule.sigmoid(7, -2.0, 2.5, 0.9),
    NoiseSchedule.from_betas([0.1, 0.2, 1.0]),
    NoiseSchedule.from_alpha_bar([0.9, 1 / 3, 0.1]),
    NoiseSchedule.linear(50).respace([3, 7, 49]),
    NoiseSchedule.linear(50).rescale_zero_terminal_snr().respace([3, 7, 49]),
    NoiseSchedule.linear(50).respace([3, 7, 49]).rescale_zero_terminal_snr(),
]


@pytest.mark.parametrize("schedule", MADE)
def test_config_survives_json_and_makes_the_same_schedule(schedule: NoiseSchedule) -> None:
    again = NoiseSchedule.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.to_config() == schedule.to_config()


def test_schedules_differ_when_their_numbers_do() -> None:
    assert len(set(MADE)) == len(MADE)
    assert NoiseSchedule.linear(7) != "linear"


def test_schedules_are_immutable_and_hold_no_array_of_the_caller() -> None:
    given = np.array([0.1, 0.2])
    s = NoiseSchedule.from_betas(given)
    given[0] = 0.9
    assert s.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        s.betas[0] = 0.5
    with pytest.raises(ValueError, match="read-only"):
        s.alpha[0] = 0.5
    with pytest.raises(AttributeError):
        s.betas = given
    s.to_config()["betas"].append(0.3)
    assert s.to_config()["betas"] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: NoiseSchedule.linear(0), ValueError, "`num_timesteps` must be at least 1, got 0"),
        (lambda: NoiseSchedule.linear(10.0), TypeError, "`num_timesteps` must be an integer, got 10.0"),
        (lambda: NoiseSchedule.linear(True), TypeError, "`num_timesteps` must be an integer"),
        (lambda: NoiseSchedule.linear(10, -0.1, 0.1), ValueError, r"beta in \(0, 1\)"),
        (lambda: NoiseSchedule.linear(10, float("nan"), 0.1), ValueError, "must be finite"),
        (lambda: NoiseSchedule.scaled_linear(10, -1e-4), ValueError, "`beta_start`"),
        (lambda: NoiseSchedule.cosine(10, max_beta=1.5), ValueError, "`max_beta`"),
        (lambda: NoiseSchedule.sigmoid(10, tau=0.0), ValueError, "`tau`"),
        (lambda: NoiseSchedule.from_betas([]), ValueError, "`betas` must be a non-empty list"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), ValueError, r"got shape \[1, 1\]"),
        (
            lambda: NoiseSchedule.from_betas([0.1, float("nan")]),
            ValueError,
            "`betas` must be finite, got nan",
        ),
        (
            lambda: NoiseSchedule.from_betas([0.1, float("inf")]),
            ValueError,
            "`betas` must be finite, got inf",
        ),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0, 0.1]), ValueError, r"beta\[1\] = 1.0"),
        (lambda: NoiseSchedule.from_betas([0.1, 0.0]), ValueError, r"beta\[1\] = 0.0"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.1]), ValueError, r"beta\[1\] = 1.1"),
        (lambda: NoiseSchedule.from_alpha_bar([0.9, 0.95]), ValueError, r"alpha_bar\[1\] = 0.95"),
        (lambda: NoiseSchedule.from_alpha_bar([0.9, 0.9]), ValueError, "fall strictly"),
        (lambda: NoiseSchedule.from_alpha_bar([1.0, 0.9]), ValueError, "start below 1"),
        (lambda: NoiseSchedule.from_alpha_bar([0.5, -0.1]), ValueError, "0 only as the last"),
        (lambda: NoiseSchedule.from_alpha_bar([0.5, float("nan")]), ValueError, "`alpha_bar` must be finite"),
        (lambda: NoiseSchedule.from_betas([0.5]).rescale_zero_terminal_snr(), ValueError, "at least 2"),
        (lambda: NoiseSchedule.linear(10).respace([]), ValueError, "non-empty"),
        (lambda: NoiseSchedule.linear(10).respace([1.0, 2.0]), TypeError, "`timesteps` must be integers"),
        (lambda: NoiseSchedule.linear(10).respace([3, 2]), ValueError, "strictly ascending"),
        (lambda: NoiseSchedule.linear(10).respace([2, 2]), ValueError, "strictly ascending"),
        (lambda: NoiseSchedule.linear(10).respace([0, 10]), ValueError, "0 <= t < 10, got 0..10"),
        (
            lambda: NoiseSchedule.from_config({"name": "quadratic"}),
            ValueError,
            "unknown schedule 'quadratic'",
        ),
        (
            lambda: NoiseSchedule.from_config({"name": "linear", "T": 3}),
            ValueError,
            "wrong arguments for 'linear'",
        ),
        (lambda: NoiseSchedule.from_config({"name": "respace"}), ValueError, "wrong arguments for 'respace'"),
        (lambda: NoiseSchedule.from_config({}), ValueError, "`config` must be a dict with a `name`"),
    ],
)
def test_bad_arguments_make_clear_errors(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()
