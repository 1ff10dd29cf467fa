"""The path of a chain: levels, their times, and the subsequences of a schedule."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracles import SCHEDULES, assert_close

from fastdiff.levels import NoiseLevels
from fastdiff.schedule import NoiseSchedule
from fastdiff.spacing import SPACINGS, space_timesteps

LINEAR = SCHEDULES["linear"]


def test_levels_of_a_schedule_run_from_noise_to_the_clean_end() -> None:
    lv = NoiseLevels.from_schedule(LINEAR, [0, 500, 999])
    assert lv.t.tolist() == [999.0, 500.0, 0.0, 0.0]
    assert lv.alpha.tolist() == [*LINEAR.alpha[[999, 500, 0]], 1.0]
    assert lv.sigma.tolist() == [*LINEAR.sigma[[999, 500, 0]], 0.0]
    assert len(lv) == 3
    assert lv.schedule is LINEAR


def test_levels_of_a_respaced_schedule_are_those_of_the_subsequence() -> None:
    kept = space_timesteps(1000, 13)
    a, b = NoiseLevels.from_schedule(LINEAR, kept), NoiseLevels.from_schedule(LINEAR.respace(kept))
    for name in ("t", "alpha", "sigma"):
        assert getattr(a, name).tolist() == getattr(b, name).tolist()


def test_sigmas_alone_are_variance_exploding_and_tell_the_network_sigma() -> None:
    lv = NoiseLevels.from_sigmas([80.0, 2.0, 0.1])
    assert lv.t.tolist() == lv.sigma.tolist() == [80.0, 2.0, 0.1, 0.0]
    assert lv.alpha.tolist() == [1.0] * 4
    assert NoiseLevels.from_sigmas([80.0, 2.0, 0.1, 0.0]).sigma.tolist() == lv.sigma.tolist()
    assert lv.at(0.7) == (0.7, 1.0, 0.7)


def test_sigmas_with_a_schedule_meet_its_own_steps() -> None:
    lv = NoiseLevels.from_sigmas(LINEAR.sigma_ve[[999, 500, 3]], LINEAR)
    own = NoiseLevels.from_schedule(LINEAR, [3, 500, 999])
    assert_close(lv.t, own.t, 1e-9)
    assert_close(lv.alpha, own.alpha, 1e-14)
    assert_close(lv.sigma, own.sigma, 1e-14)


def test_time_between_levels_is_linear_in_log_sigma_and_held_outside() -> None:
    lv = NoiseLevels.from_schedule(LINEAR, [0, 999])  # the schedule's steps count, not the chain's
    between = math.sqrt(LINEAR.sigma_ve[41] * LINEAR.sigma_ve[42])
    t, alpha, sigma = lv.at(between)
    assert_close(t, 41.5, 1e-9)
    assert_close([alpha**2 + sigma**2, sigma / alpha], [1.0, between], 1e-14)
    assert lv.at(LINEAR.sigma_ve[0] / 2).t == 0.0
    assert lv.at(LINEAR.sigma_ve[-1] * 2).t == 999.0
    assert lv.at(0.0) == (0.0, 1.0, 0.0)


def test_time_is_that_of_respaced_steps() -> None:
    r = LINEAR.respace([10, 20])
    between = math.sqrt(r.sigma_ve[0] * r.sigma_ve[1])
    assert_close(NoiseLevels.from_schedule(r).at(between).t, 15.0, 1e-9)


def test_zero_terminal_snr_starts_at_infinite_sigma_ve() -> None:
    zero = SCHEDULES["zero_snr"]
    lv = NoiseLevels.from_schedule(zero, [0, 999])
    assert (lv.t[0], lv.alpha[0], lv.sigma[0]) == (999.0, 0.0, 1.0)
    assert lv.levels[0].sigma_ve == math.inf
    assert lv.levels[0].lam == -math.inf
    assert lv.at(math.inf) == (999.0, 0.0, 1.0)
    assert lv.at(1e9).t == 998.0  # log sigma_ve has no line to infinity: held at the last finite step


def test_flow_levels_lie_on_the_line_and_shift() -> None:
    lv = NoiseLevels.flow(4, shift=3.0, time_scale=1000.0)
    s = np.array([1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = 3 * s / (1 + 2 * s)
    assert_close(lv.sigma, shifted, 1e-15)
    assert_close(lv.alpha, 1 - shifted, 1e-15)
    assert_close(lv.t, 1000 * shifted, 1e-15)
    assert_close(lv.at(3.0), (750.0, 0.25, 0.75), 1e-15)
    assert lv.at(math.inf) == (1000.0, 0.0, 1.0)


@given(st.integers(1, 60), st.floats(1e-3, 1e3))
@example(10, 0.05)  # sigma_0 was 1 - 2^-50: alpha_0 above 0, and coefficients of 1e15
@example(10, 0.1)  # sigma_0 was 1 + 2^-52: alpha_0 below 0
def test_any_shift_keeps_both_ends_of_a_flow_exact(n: int, shift: float) -> None:
    lv = NoiseLevels.flow(n, shift)
    assert (lv.t[0], lv.alpha[0], lv.sigma[0]) == (1.0, 0.0, 1.0)
    assert (lv.t[-1], lv.alpha[-1], lv.sigma[-1]) == (0.0, 1.0, 0.0)
    assert_close(lv.alpha + lv.sigma, np.ones(n + 1), 2.0**-52)


def test_karras_levels_are_equally_spaced_in_the_root() -> None:
    lv = NoiseLevels.karras(18, 0.002, 80.0)
    assert_close(
        np.diff(lv.sigma[:-1] ** (1 / 7)), np.full(17, (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17), 1e-12
    )
    assert_close(lv.sigma[[0, 17]], [80.0, 0.002], 1e-14)
    vp = NoiseLevels.karras(5, schedule=LINEAR)
    assert_close(vp.sigma_ve[[0, 4]], LINEAR.sigma_ve[[-1, 0]], 1e-12)
    assert_close(vp.t[[0, 4]], [999.0, 0.0], 1e-6)


def test_exponential_levels_are_equally_spaced_in_lam() -> None:
    lam = np.array([level.lam for level in NoiseLevels.exponential(9, 0.01, 50.0).levels[:-1]])
    assert_close(np.diff(lam), np.full(8, math.log(5000) / 8), 1e-13)


def test_polyexponential_levels_follow_their_power() -> None:
    sigma = NoiseLevels.polyexponential(3, 0.01, 1.0, rho=2.0).sigma
    assert_close(sigma, [1.0, 0.01**0.75, 0.01, 0.0], 1e-14)


def test_vp_levels_are_the_linear_schedule_in_the_limit() -> None:
    # alpha_bar(u) = exp(-beta_d u^2 / 2 - beta_min u) = 1 / (1 + sigma_ve^2) is the continuous form of
    # betas from beta_min/T to (beta_min + beta_d)/T; the discrete product differs in O(1/T).
    sigma = NoiseLevels.vp(2, eps_s=0.5).sigma
    assert_close(-2 * np.log(NoiseLevels.vp(2, eps_s=0.5, schedule=LINEAR).alpha[0]), 19.9 / 2 + 0.1, 1e-12)
    assert abs(math.log(sigma[1] / LINEAR.sigma_ve[499])) < 5e-3


def test_the_last_levels_are_the_end_of_the_path() -> None:
    path = NoiseLevels.from_schedule(LINEAR, space_timesteps(1000, 8))
    end = path.last(3)
    for name in ("t", "alpha", "sigma"):
        assert getattr(end, name).tolist() == getattr(path, name)[5:].tolist()
    assert (len(end), end.path, end.schedule) == (3, "vp", LINEAR)
    flow = NoiseLevels.flow(4, time_scale=1000.0)
    assert flow.last(2).at(1.0) == flow.at(1.0)
    assert flow.last(4).alpha.tolist() == flow.alpha.tolist()


def test_a_number_of_steps_may_be_numpys() -> None:
    path = NoiseLevels.flow(5)
    assert np.array_equal(path.last(np.uint8(3)).sigma, path.sigma[-4:])


@pytest.mark.parametrize("sigma_ve", [1e-9, 1.0, 1e6, 1e17])
def test_a_flows_level_keeps_its_signal_however_noisy(sigma_ve: float) -> None:
    level = NoiseLevels.flow(5).at(sigma_ve)
    assert level.sigma_ve == pytest.approx(sigma_ve, rel=1e-15)
    assert level.alpha + level.sigma == pytest.approx(1.0, rel=1e-15)


def test_levels_are_immutable() -> None:
    lv = NoiseLevels.flow(3)
    with pytest.raises(ValueError, match="read-only"):
        lv.t[0] = 3.0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_those_of_diffusers(spacing: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for cls in (diffusers.DDPMScheduler, diffusers.DDIMScheduler):
        scheduler = cls(timestep_spacing=spacing)
        for n in (1, 2, 3, 7, 10, 20, 49, 50, 100, 250, 333, 999, 1000):
            scheduler.set_timesteps(n)
            assert space_timesteps(1000, n, spacing) == scheduler.timesteps.tolist()[::-1]


def test_offset_moves_leading_times_as_in_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(50)
    assert space_timesteps(1000, 50, "leading", offset=1) == scheduler.timesteps.tolist()[::-1]


def test_trailing_times_come_from_integers() -> None:
    # T (n-i)/n = 187.5 exactly here; diffusers' float falls below it and its times become 186.
    assert space_timesteps(1000, 48, "trailing")[8] == 187
    assert len(space_timesteps(1000, 61, "trailing")) == 61  # diffusers makes 62, the last one -1


def test_sections_and_strides_are_those_of_improved_diffusion() -> None:
    times = space_timesteps(1000, "10,15,20")
    assert len(times) == 45
    assert times[:11] == [0, 37, 74, 111, 148, 185, 222, 259, 296, 333, 334]  # 1000 = 334 + 333 + 333
    assert times[24:26] == [666, 667]
    assert times[-1] == 999
    assert space_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    assert space_timesteps(1000, "50") == space_timesteps(1000, 50)
    assert space_timesteps(1000, 250)[:4] == [0, 4, 8, 12]


@given(st.integers(1, 300), st.data())
def test_every_spacing_makes_ascending_times_in_range(total: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, total))
    for spacing in SPACINGS:
        times = space_timesteps(total, n, spacing)
        assert len(times) == n
        assert times == sorted(set(times))
        assert times[0] >= 0
        assert times[-1] < total
        assert all(type(t) is int for t in times)
    assert space_timesteps(total, n, "trailing")[-1] == total - 1
    if n == 1:
        assert space_timesteps(total, 1) == [total - 1]
        return
    assert all(abs(t - Fraction(i * (total - 1), n - 1)) <= Fraction(1, 2) + Fraction(1, 10**9)
               for i, t in enumerate(space_timesteps(total, n)))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: space_timesteps(10, 11),
            ValueError,
            "`steps` must be at most the schedule's 10 timesteps, got 11",
        ),
        (lambda: space_timesteps(10, 0), ValueError, "`steps` must be at least 1, got 0"),
        (lambda: space_timesteps(10, 2.5), TypeError, "`steps` must be an integer"),
        (lambda: space_timesteps(10, 5, "quadratic"), ValueError, "`spacing` must be one of"),
        (lambda: space_timesteps(10, "ddim7"), ValueError, "no integer stride makes 7 steps of 10"),
        (lambda: space_timesteps(10, "3,x"), ValueError, "'3,x'"),
        (lambda: space_timesteps(10, ""), ValueError, "`steps` must be a number"),
        (lambda: space_timesteps(10, "8,1"), ValueError, "section 0 has only 5 of the 10"),
        (lambda: space_timesteps(10, "5", "leading"), ValueError, "needs spacing 'ddpm'"),
        (lambda: space_timesteps(10, 5, "trailing", offset=1), ValueError, "belongs to spacing 'leading'"),
        (lambda: space_timesteps(10, 10, "leading", offset=1), ValueError, "which makes 10"),
        (lambda: space_timesteps(10, 5, "leading", offset=-1), ValueError, "`offset` must be"),
        (lambda: NoiseLevels.from_schedule(LINEAR, [999, 0]), ValueError, "strictly ascending"),
        (
            lambda: NoiseLevels.from_schedule(LINEAR.respace([0, 500]), [0, 500]),
            ValueError,
            "respaced schedule",
        ),
        (lambda: NoiseLevels.from_sigmas([1.0, 2.0]), ValueError, "fall strictly"),
        (lambda: NoiseLevels.from_sigmas([1.0, float("nan")]), ValueError, "finite"),
        (lambda: NoiseLevels.from_sigmas([1.0, -1.0]), ValueError, "fall strictly"),
        (lambda: NoiseLevels.from_sigmas([]), ValueError, "non-empty"),
        (lambda: NoiseLevels.from_sigmas([0.0]), ValueError, "positive"),
        (lambda: NoiseLevels.karras(5), ValueError, "must be given where no `schedule`"),
        (lambda: NoiseLevels.karras(5, 2.0, 1.0), ValueError, "0 < sigma_min < sigma_max"),
        (lambda: NoiseLevels.karras(0, 0.1, 1.0), ValueError, "`n` must be at least 1"),
        (lambda: NoiseLevels.karras(3, 0.1, 1.0, rho=0.0), ValueError, "`rho`"),
        (lambda: NoiseLevels.vp(3, eps_s=2.0), ValueError, "`eps_s`"),
        (lambda: NoiseLevels.flow(3, shift=0.0), ValueError, "`shift`"),
        (lambda: NoiseLevels.flow(3, shift="3"), TypeError, "`shift` must be a number"),
        (lambda: NoiseLevels.flow(3, time_scale=-1.0), ValueError, "`time_scale` must be positive"),
        (lambda: NoiseLevels.flow(3).at(-1.0), ValueError, "`sigma_ve` must be >= 0"),
        (lambda: NoiseLevels.flow(3).last(0), ValueError, "`steps` must be at least 1"),
        (lambda: NoiseLevels.flow(3).last(4), ValueError, "`steps` must be at most the path's 3, got 4"),
        (lambda: NoiseLevels.flow(3).last(1.5), TypeError, "`steps` must be an integer"),
        (lambda: NoiseLevels([1.0], [1.0], [0.0]), ValueError, r"\[S\+1\] with S >= 1"),
        (lambda: NoiseLevels([1, 0], [1, 1], [1, 0.1]), ValueError, "must be the clean end"),
        (lambda: NoiseLevels([2, 1, 0], [0, 0, 1], [1, 1, 0]), ValueError, "must fall strictly"),
        (lambda: NoiseLevels([1, 0], [1, 1], [math.inf, 0]), ValueError, "`sigma` must be finite"),
        (lambda: NoiseLevels([1, 0], [1, 1], [1, 0], "cosine"), ValueError, "`path`"),
    ],
)
def test_bad_arguments_make_clear_errors(make: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_one_step_of_schedule_is_enough_for_a_path() -> None:
    lv = NoiseLevels.from_schedule(NoiseSchedule.from_betas([0.5]))
    assert lv.alpha.tolist() == [math.sqrt(0.5), 1.0]
