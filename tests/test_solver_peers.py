"""Our solvers against diffusers' schedulers: the same chain, number for number.

Their tables are rounded to float32; where that can be undone (`double`) the chains agree in float64.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from oracles import SCHEDULES, assert_close

from fastdiff.levels import NoiseLevels
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import compile_table
from fastdiff.table import SamplingTable

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # theirs, about NumPy 2

STEPS = 20
SCHEDULE = SCHEDULES["scaled_linear"]
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def network(x: torch.Tensor, call: int) -> torch.Tensor:
    """Non-linear, and another function at each call."""
    return torch.tanh(x + 0.1 * call) - 0.3 * torch.sin(2.0 * x) * (call % 3)


def their_chain(scheduler, x: torch.Tensor, noise: torch.Tensor, rows: int, monkeypatch, **kwargs):
    """x through `rows` calls of the scheduler's own step; the randomness of call k is noise[k]."""
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        drawn = iter(())
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kw: next(drawn))
    for call, t in enumerate(scheduler.timesteps[:rows]):
        drawn = iter((noise[call],))
        out = network(scheduler.scale_model_input(x, t), call)
        x = scheduler.step(out, t, x, **kwargs).prev_sample
    return x


def our_chain(table: SamplingTable, x: torch.Tensor, noise: torch.Tensor, rows: int) -> torch.Tensor:
    calls = iter(range(rows))
    return head(table, rows).evaluate(lambda u, t: network(u, next(calls)), x, noise)


def head(table: SamplingTable, rows: int) -> SamplingTable:
    """The first rows alone."""
    names = ("t", "c_in", "x0_from_x", "x0_from_out", "log_var_min", "log_var_max", "ends_step")
    names += ("from_state", "from_x0", "from_out", "from_noise")
    columns = {name: getattr(table, name)[:rows] for name in names}
    return dataclasses.replace(table, **columns, alpha=table.alpha[: rows + 1], sigma=table.sigma[: rows + 1])


def start(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(rows, 2, 5, generator=generator, dtype=torch.float64)


def double(scheduler) -> None:
    """Lift the scheduler's float32 tables, so that it computes in float64 from here on."""
    for name in ("sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    for name, values in (("betas", SCHEDULE.betas), ("alphas_cumprod", SCHEDULE.alpha_bar)):
        setattr(scheduler, name, torch.from_numpy(values.copy()))
    scheduler.alphas = 1.0 - scheduler.betas


F64, F32 = 1e-9, 1e-6  # relative; F32 where the other side rounds to float32 inside
HEUN = {"solver_type": "heun"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
IN_SIGMA_VE = [  # name, config, solver, options, x/alpha kept as the state?, tolerance
    ("EulerDiscrete", {}, "euler", {}, True, F32),
    ("EulerAncestralDiscrete", {}, "euler_ancestral", {}, True, F32),
    ("HeunDiscrete", {}, "heun", {}, True, F64),
    ("KDPM2Discrete", {}, "dpm_2", {}, True, F32),
    ("KDPM2AncestralDiscrete", {}, "dpm_2_ancestral", {}, True, F32),
    ("LMSDiscrete", {}, "lms", {}, True, F64),
    ("DPMSolverMultistep", {}, "dpmpp_2m", {}, False, F32),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}, "dpmpp_2m", {}, False, F32),
    ("DPMSolverMultistep", SDE, "dpmpp_2m_sde", {}, False, F32),
    ("DPMSolverMultistep", SDE | HEUN, "dpmpp_2m_sde", HEUN, False, F32),
    # With eta 0 only: their third-order SDE weighs d2 by (1 - e^-k - k)/k^2 - 1/2, which is -1 at k = 0.
    ("DPMSolverMultistep", HEUN | {"solver_order": 3}, "dpmpp_3m_sde", {"eta": 0.0}, False, F32),
    *(("UniPCMultistep", {"solver_order": n}, "unipc", {"order": n}, False, F64) for n in (1, 2, 3)),
    *(("DEISMultistep", {"solver_order": n}, "deis", {"order": n}, False, F64) for n in (1, 2, 3)),
]


@pytest.mark.parametrize(("name", "config", "solver", "options", "scaled", "tol"), IN_SIGMA_VE)
def test_solvers_over_sigmas_are_those_of_diffusers(
    name: str, config: dict, solver: str, options: dict, scaled: bool, tol: float, monkeypatch
) -> None:
    scheduler = getattr(diffusers, f"{name}Scheduler")(**BETAS, **config)
    scheduler.set_timesteps(STEPS)
    double(scheduler)
    sigmas = np.unique(scheduler.sigmas.numpy())[::-1]
    ends_clean = sigmas[-1] == 0  # DEIS ends above 0: its last step is left out
    levels = NoiseLevels.from_sigmas(sigmas if ends_clean else sigmas[:-1], SCHEDULE)
    table = compile_table(solver, levels, **options)
    rows = table.num_rows if ends_clean else table.num_rows - 1
    assert table.num_rows == len(scheduler.timesteps)
    x, noise = start(rows)
    scale = 1.0 / levels.alpha[0] if scaled else 1.0
    theirs = their_chain(scheduler, x * scale, noise, rows, monkeypatch)
    assert_close(our_chain(table, x, noise, rows), theirs, tol)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("HeunDiscreteScheduler", "heun"),
        ("KDPM2DiscreteScheduler", "dpm_2"),
        ("KDPM2AncestralDiscreteScheduler", "dpm_2_ancestral"),
    ],
)
def test_inner_stages_see_the_times_of_diffusers(name: str, solver: str) -> None:
    scheduler = getattr(diffusers, name)(**BETAS)
    scheduler.set_timesteps(STEPS)
    table = compile_table(
        solver, NoiseLevels.from_sigmas(np.unique(scheduler.sigmas.numpy())[::-1], SCHEDULE)
    )
    # log sigma in float32 is off by 1e-7 and grows by 1e-3 or more per step of t
    assert np.abs(table.t - scheduler.timesteps.double().numpy()).max() < 2e-3


LEADING = [int(t) for t in range(0, 1000, 1000 // STEPS)]
LEARNED = dict(variance="learned_range")
OVER_STEPS = [  # name, config, solver, options, arguments of their step
    ("DDIMScheduler", {}, "ddim", {}, {}),
    ("DDIMScheduler", {}, "ddim", dict(eta=0.7), dict(eta=0.7)),
    ("DDPMScheduler", {}, "ddpm", {}, {}),
    ("DDPMScheduler", dict(variance_type="fixed_large"), "ddpm", dict(variance="fixed_large"), {}),
    ("PNDMScheduler", dict(skip_prk_steps=True), "plms", {}, {}),
]


@pytest.mark.parametrize(("name", "config", "solver", "options", "kwargs"), OVER_STEPS)
def test_solvers_over_steps_are_those_of_diffusers(
    name: str, config: dict, solver: str, options: dict, kwargs: dict, monkeypatch
) -> None:
    if name != "DDPMScheduler":
        config = config | dict(set_alpha_to_one=True)
    if name != "PNDMScheduler":
        config = config | dict(clip_sample=False)
    scheduler = getattr(diffusers, name)(**BETAS, **config)
    scheduler.set_timesteps(STEPS)
    double(scheduler)
    table = compile_table(solver, NoiseLevels.from_schedule(SCHEDULE, LEADING), **options)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    x, noise = start(table.num_rows)
    theirs = their_chain(scheduler, x, noise, table.num_rows, monkeypatch, **kwargs)
    assert_close(our_chain(table, x, noise, table.num_rows), theirs, F64)


def test_clipped_and_learned_ddpm_is_that_of_diffusers(monkeypatch) -> None:
    scheduler = diffusers.DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=True)
    scheduler.set_timesteps(STEPS)
    double(scheduler)
    levels = NoiseLevels.from_schedule(SCHEDULE, LEADING)
    table = compile_table("ddpm", levels, variance="learned_range", clip=(-1, 1))
    x, noise = start(STEPS)

    plain = network

    def with_variance(u: torch.Tensor, call: int) -> torch.Tensor:
        return torch.cat([plain(u, call), torch.cos(u)], 1)

    monkeypatch.setattr(sys.modules[__name__], "network", with_variance)
    theirs = their_chain(scheduler, x, noise, STEPS, monkeypatch)
    assert_close(our_chain(table, x, noise, STEPS), theirs, F64)


def test_lcm_with_boundary_scaling_is_that_of_diffusers(monkeypatch) -> None:
    scheduler = diffusers.LCMScheduler(**BETAS, clip_sample=False)
    scheduler.set_timesteps(4)
    double(scheduler)
    levels = NoiseLevels.from_schedule(SCHEDULE, scheduler.timesteps.tolist()[::-1])
    table = compile_table("lcm", levels, sigma_data=0.5)
    assert set(table.exempt) == {"mean", "noise"}
    x, noise = start(4)
    theirs = their_chain(scheduler, x, noise, 4, monkeypatch)
    assert_close(our_chain(table, x, noise, 4), theirs, F32)


@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler"])
def test_a_pure_noise_start_is_that_of_diffusers(kind: str, monkeypatch) -> None:
    scheduler = getattr(diffusers, kind)(
        **BETAS,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(STEPS)
    zero = NoiseSchedule.from_alpha_bar(scheduler.alphas_cumprod.double().numpy())
    scheduler.alphas_cumprod = torch.from_numpy(zero.alpha_bar.copy())
    levels = NoiseLevels.from_schedule(zero, scheduler.timesteps.tolist()[::-1])
    table = compile_table("ddpm" if kind == "DDPMScheduler" else "ddim", levels, prediction="v")
    assert table.alpha[0] == 0.0
    x, noise = start(STEPS)
    theirs = their_chain(scheduler, x, noise, STEPS, monkeypatch)
    assert_close(our_chain(table, x, noise, STEPS), theirs, F64)
