"""Running backwards, and interpolating noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from chains import HISTORY, SHAPE, normals, one_thread, sampler, smooth
from oracles import SCHEDULES, assert_close

import fastdiff as fd
from fastdiff import editing
from fastdiff.solvers import SOLVERS

INVERTIBLE = {"ddim", "euler", "heun", "dpm_2"}
_one_thread = pytest.fixture(autouse=True)(one_thread)


def test_one_iteration_is_ddim_inversion_as_diffusers_does_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMInverseScheduler(
        1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(20)
    x = 0.8 * normals(2, 0, 2)
    theirs = x.double()
    for t in scheduler.timesteps:
        out = smooth(theirs, t.expand(2))
        theirs = scheduler.step(out, t, theirs).prev_sample
    table = editing.inverted(sampler("ddim", steps=20, spacing="leading", clip=None).table)
    assert table.t.tolist() == scheduler.timesteps.tolist()
    # diffusers keeps alpha_bar in float32
    assert_close(table.evaluate(smooth, x.double()), theirs, 1e-5)
    ours = sampler("ddim", steps=20, spacing="leading").invert(x)
    assert_close(ours, theirs, 1e-5)


def round_trip(solver: str, steps: int, iterations: int, schedule: str = "linear", **options) -> float:
    """Relative error of x after inversion and sampling, in float64."""
    levels = fd.NoiseLevels.from_schedule(SCHEDULES[schedule], fd.space_timesteps(1000, steps))
    table = fd.compile_table(solver, levels, **options)
    x = 0.8 * normals(2, 0, 2).double()
    back = editing.inverted(table, iterations).evaluate(smooth, x)
    return float((table.evaluate(smooth, back) - x).abs().max() / x.abs().max())


def test_the_round_trip_is_of_first_order_in_the_steps() -> None:
    errors = [round_trip("ddim", steps, 1) for steps in (50, 100, 200, 400)]
    orders = -np.diff(np.log2(errors))
    assert (np.abs(orders - 1.0) < 0.25).all(), (errors, orders)


@pytest.mark.parametrize("solver", sorted(INVERTIBLE))
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_iterations_converge_to_the_exact_inverse(solver: str, prediction: str) -> None:
    errors = [round_trip(solver, 50, n, prediction=prediction) for n in (1, 4, 40)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[2] < 1e-10


def test_a_start_without_signal_is_inverted_too() -> None:
    assert round_trip("ddim", 50, 40, "zero_snr", prediction="v") < 1e-10


def test_a_sampler_inverts_with_guidance_and_a_trajectory() -> None:
    chain = sampler("ddim", steps=40, clip=None)
    cond = {"cond": {"labels": torch.tensor([1, 2])}, "uncond": {"labels": 0}, "guidance_scale": 2.0}
    x = chain.sample(2, **cond)
    x_T, states = chain.invert(x, iterations=20, trajectory=True, **cond)
    assert states.shape == (41, 2, *SHAPE)
    assert torch.equal(states[0], x)
    # float32 through 40 steps whose first multiplies its rounding by 158
    assert (chain.sample(2, x_T=x_T, **cond) - x).abs().max() <= 40 * 158 * 2**-23
    assert (x_T - chain.table.init_scale * normals(2, 0, 0)).abs().max() < 0.05


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - INVERTIBLE))
def test_what_cannot_be_inverted_says_why(solver: str) -> None:
    why = "remembers earlier steps" if solver in HISTORY - {"dpmpp_2m_sde", "dpmpp_3m_sde"} else "adds noise"
    with pytest.raises(ValueError, match=f"{solver}.*{why}"):
        sampler(solver).invert(torch.zeros(1, *SHAPE))


@pytest.mark.parametrize(
    "levels", [fd.NoiseLevels.flow(1), fd.NoiseLevels.from_schedule(SCHEDULES["zero_snr"], [999])]
)
@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.filterwarnings("error")
def test_one_step_from_pure_noise_keeps_nothing_to_invert(solver: str, levels: fd.NoiseLevels) -> None:
    table = fd.compile_table(solver, levels, prediction="v")
    with pytest.raises(ValueError, match=f"{solver}.* keeps nothing of x; take more steps"):
        editing.inverted(table)


def test_slerp_runs_on_the_great_circle() -> None:
    a, b = normals(3, 0, 0), normals(3, 1, 0)
    assert torch.equal(fd.slerp(a, b, 0.0), a)
    assert torch.equal(fd.slerp(a, b, 1.0), b)
    path = fd.slerp(a[:1], b[:1], torch.linspace(0, 1, 9))
    lengths = path.flatten(1).norm(dim=1)
    low, high = sorted([float(a[0].norm()), float(b[0].norm())])
    assert (lengths > 0.9 * low).all()
    assert (lengths < 1.1 * high).all()
    unit = fd.slerp(torch.eye(2)[:1], torch.eye(2)[1:], torch.tensor([0.0, 1 / 3, 1.0]))
    assert_close(unit, [[1, 0], [math.cos(math.pi / 6), math.sin(math.pi / 6)], [0, 1]], 1e-6)


def test_slerp_is_per_sample_and_survives_parallel_ends() -> None:
    a, b = normals(3, 0, 0), normals(3, 1, 0)
    mixed = fd.slerp(a, b, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(mixed[1], fd.slerp(a[1:2], b[1:2], 0.5)[0])
    assert_close(fd.slerp(a, a, 0.3), a, 1e-6)
    assert_close(fd.slerp(a, 2 * a, 0.5), 1.5 * a, 1e-6)
    assert fd.slerp(a, -a, 0.5).isfinite().all()
    assert fd.slerp(a.bfloat16(), b.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        (dict(a=torch.zeros(2, 3), b=torch.zeros(2, 4)), ValueError, "one shape"),
        (dict(a=torch.zeros(2, 3), b=torch.zeros(3, 3)), ValueError, "one shape"),
        (dict(weight=torch.zeros(3)), ValueError, "weight"),
        (dict(weight=torch.zeros(2, 1)), ValueError, "weight"),
        (dict(a=torch.zeros(2, 3, dtype=torch.int64)), TypeError, "`a`"),
        (dict(b=[1.0]), TypeError, "`b`"),
    ],
)
def test_slerp_refuses_what_does_not_fit(arguments: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        fd.slerp(**{"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), "weight": 0.5, **arguments})


def test_an_inversion_refuses_what_does_not_fit() -> None:
    chain = sampler("ddim")
    with pytest.raises(ValueError, match="`x` must be"):
        chain.invert(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="`iterations`"):
        chain.invert(torch.zeros(1, *SHAPE), iterations=0)
