"""Editing: starting from an image, keeping a part of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from chains import HISTORY, SCHEDULE, SHAPE, normals, one_thread, sampler, smooth
from oracles import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff as fd
from fastdiff import editing
from fastdiff.kernels.philox import DOMAIN_KNOWN
from fastdiff.solvers import SOLVERS

LEFT = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(4, 4)  # a mask
PICTURE = torch.linspace(-0.9, 0.9, 32).view(SHAPE)
_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_chain_from_the_middle_is_a_whole_chain_from_there(solver: str) -> None:
    """Its first level is that of the step where it starts, and every step lands on its marginal."""
    full = sampler(solver, steps=10, clip=None)
    seen: list[float] = []

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t[0]))
        return smooth(x, t)

    full.model = spy
    table = full._edit(0.4, 1).table
    table.check()
    first = editing.steps_of(full.table)[-4][0]
    assert (table.alpha[0], table.sigma[0]) == (full.table.alpha[first], full.table.sigma[first])
    assert len(editing.steps_of(table)) == 4
    full.sample(1, init=PICTURE, strength=0.4)
    assert seen == table.t.astype(np.float32).tolist()
    assert seen[0] == full.table.t[first]


def test_cutting_a_history_would_have_been_noticed() -> None:
    """The check of the test above, on the table that it must never see."""
    table = sampler("dpmpp_2m", steps=10, clip=None).table
    assert editing.last_steps(table, 4) is None
    cut = {name: getattr(table, name)[6:] for name in (*editing._ROWS, "alpha", "sigma")}
    with pytest.raises(ValueError, match="misses the mean"):
        editing.replace(table, **cut).check()


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m", "unipc"])
def test_the_start_is_the_noised_image(solver: str) -> None:
    chain = sampler(solver, steps=10)
    x, states = chain.sample(3, seed=5, init=PICTURE, strength=0.5, trajectory=True)
    table = chain._edit(0.5, 1).table
    start = float(table.alpha[0]) * PICTURE + float(table.sigma[0]) * normals(3, 0, 0, seed=5)
    assert torch.equal(states[0], start)
    assert states.shape == (6, 3, *SHAPE)
    alone = fd.Sampler(smooth, table=table, shape=SHAPE).sample(3, seed=5, x_T=start)
    assert torch.equal(x, alone)
    reference = table.evaluate(
        smooth, start.double(), [normals(3, row, 1, seed=5) for row in range(table.num_rows)]
    )
    # from there on x0 multiplies float32's rounding by at most 12, in 5 steps of a smooth network
    assert (x - reference).abs().max() <= 12 * 5 * 2**-22


def test_strength_is_the_share_of_steps_that_run() -> None:
    chain = sampler("ddim", steps=50)
    for strength, steps in ((1.0, 50), (0.58, 29), (0.5, 25), (0.001, 1)):
        assert chain._edit(strength, 1).table.num_rows == steps


def test_a_little_strength_stays_near_the_image_and_full_strength_forgets_it() -> None:
    """On data of N(0, 1/4), whose exact network is known: the correlation with the image falls."""
    chain = fd.Sampler(gaussian_network(0.5), SCHEDULE, steps=20, shape=(1, 32, 32), clip=None)
    image = 0.5 * fd.ops.normal((1, 32, 32), 9, 1, 0)
    kept = []
    for strength in (0.1, 0.5, 1.0):
        x = chain.sample(1, init=image, strength=strength)
        kept.append(float(torch.corrcoef(torch.stack([x.flatten(), image.flatten()]))[0, 1]))
        assert abs(float(x.std()) / 0.5 - 1) < 0.15
        level = chain._edit(strength, 1).table
        signal = 0.5 * level.alpha[0]
        expected = signal / math.hypot(signal, level.sigma[0])  # DDIM is linear on Gaussian data
        assert abs(kept[-1] - expected) < 5 * (1 - expected**2) / 32  # five standard errors
    assert kept[0] > 0.9
    assert abs(kept[2]) < 0.1


def gaussian_network(std: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """eps = E[eps | x] for data N(0, std^2)."""
    alpha, sigma = (torch.tensor(a.copy()) for a in (SCHEDULE.alpha, SCHEDULE.sigma))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = (c[t.long()].to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for c in (alpha, sigma))
        return s * x / ((a * std) ** 2 + s**2)

    return network


@pytest.mark.parametrize("solver", SOLVERS)
def test_known_pixels_come_out_exact_and_the_others_as_without(solver: str) -> None:
    """The network here is elementwise, so what it makes of the other pixels must not change at all."""
    chain = sampler(solver)
    x, states = chain.sample(3, known=PICTURE, mask=LEFT, trajectory=True)
    plain, plain_states = chain.sample(3, trajectory=True)
    assert torch.equal(x[..., :2], PICTURE.expand_as(x)[..., :2])
    assert torch.equal(x[..., 2:], plain[..., 2:])
    assert torch.equal(states[..., 2:], plain_states[..., 2:])
    assert not torch.equal(states[1:, ..., :2], plain_states[1:, ..., :2])


@pytest.mark.parametrize("solver", ["ddpm", "heun", "dpmpp_2m"])
def test_known_pixels_have_the_marginal_of_their_level_and_noise_of_their_own(solver: str) -> None:
    chain = sampler(solver)
    states = chain.sample(2, seed=3, known=PICTURE, mask=LEFT, trajectory=True)[1]
    lasts = [last for _, last in editing.steps_of(chain.table)]
    for state, last in zip(states[1:], lasts, strict=True):
        alpha, sigma = float(chain.table.alpha[last + 1]), float(chain.table.sigma[last + 1])
        expected = alpha * PICTURE + sigma * normals(2, last, DOMAIN_KNOWN, seed=3)
        assert torch.equal(state[..., :2], expected[..., :2])


MASKS = [
    LEFT,
    LEFT.bool(),
    LEFT.expand(SHAPE),
    LEFT.expand(3, 1, 4, 4),
    LEFT.expand(3, *SHAPE).to(torch.uint8) * 255,
    LEFT.numpy(),
]


@pytest.mark.parametrize("mask", MASKS, ids=range(len(MASKS)))
def test_a_mask_may_have_any_of_its_shapes(mask: torch.Tensor) -> None:
    chain = sampler()
    assert torch.equal(
        chain.sample(3, known=PICTURE, mask=mask), chain.sample(3, known=PICTURE, mask=LEFT.bool())
    )


@pytest.mark.parametrize("resample", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inpainting_is_per_sample_guided_and_independent_of_the_batch(
    resample: int, dtype: torch.dtype
) -> None:
    chain = sampler("ddpm", dtype=dtype)
    known = torch.stack([PICTURE, -PICTURE, 0.5 * PICTURE])
    mask = torch.stack([LEFT, 1 - LEFT, torch.zeros(4, 4)])[:, None]
    labels = torch.tensor([1, 2, 3])
    scale = [1.0, 2.0, 0.5]
    together = chain.sample(
        3,
        seed=8,
        cond={"labels": labels},
        uncond={"labels": -1},
        guidance_scale=scale,
        known=known,
        mask=mask,
        resample=resample,
    )
    for i in range(3):
        alone = chain.sample(
            1,
            seed=8,
            sample_ids=[i],
            cond={"labels": labels[i]},
            uncond={"labels": -1},
            guidance_scale=scale[i],
            known=known[i],
            mask=mask[i],
            resample=resample,
        )
        assert torch.equal(alone[0], together[i])
    chosen = mask.bool().expand_as(known)
    assert torch.equal(together[chosen], known[chosen])


@pytest.mark.parametrize("guided", [False, True])
def test_the_network_sees_the_known_part(guided: bool) -> None:
    """Its input is made anew after an edit, in the network's dtype and in every lane."""
    inputs: list[torch.Tensor] = []

    def spy(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs.append(x.clone())
        return smooth(x, t, labels)

    levels = fd.NoiseLevels.karras(5, 0.02, 40.0)
    table = fd.compile_table("euler_ancestral", levels, prediction="edm")
    chain = fd.Sampler(spy, table=table, shape=SHAPE, dtype=torch.bfloat16)
    states = chain.sample(
        2, known=PICTURE, mask=LEFT, trajectory=True, cond={"labels": 1}, uncond={"labels": 0},
        guidance_scale=2.0 if guided else 1.0,
    )[1]  # fmt: skip
    for row, (state, u) in enumerate(zip(states[:-1], inputs, strict=True)):
        wanted = (float(table.c_in[row]) * state).to(torch.bfloat16)
        assert torch.equal(u, torch.cat([wanted, wanted]) if guided else wanted)


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - HISTORY))
def test_going_back_over_a_step_is_the_forward_chain(solver: str) -> None:
    table = sampler(solver, clip=None).table
    again, endings = editing.repeated(table, 3)
    steps = editing.steps_of(table)
    assert len(editing.steps_of(again)) == 3 * (len(steps) - 1) + 1
    back = [(row, ending) for row, ending in endings.items() if ending.ratio != 1.0]
    assert len(back) == 2 * (len(steps) - 1)
    for row, (alpha, sigma, ratio, std) in back:
        first = row + 1  # the next row is the step's first again, at its level
        before = next(r for r in range(first, again.num_rows) if endings.get(r, (0,) * 4)[2] == 1.0) + 1
        assert (again.alpha[first], again.sigma[first]) == (alpha, sigma)
        assert_close(ratio * again.alpha[before], alpha, 1e-14)
        assert_close(math.hypot(ratio * again.sigma[before], std), sigma, 1e-14)


def test_repeated_steps_draw_fresh_noise() -> None:
    chain = sampler("ddpm", steps=2)
    seen: list[torch.Tensor] = []
    x = chain.sample(
        1,
        known=PICTURE,
        mask=torch.zeros(4, 4),
        resample=2,
        callback=lambda moment: seen.append(moment.x.clone()),
    )
    program, endings = chain._edit(None, 2), editing.repeated(chain.table, 2)[1]
    assert program.table.num_rows == 3
    state = chain.table.init_scale * normals(1, 0, 0)
    for row in range(3):
        state = rows(program.table, row, state, normals(1, row, 1))
        ending = endings[row]
        if ending.std:
            state = ending.ratio * state + ending.std * normals(1, row, DOMAIN_KNOWN)
        assert (seen[row] - state).abs().max() <= 158 * 2**-22
    assert torch.equal(seen[-1], x)


def rows(table: fd.SamplingTable, row: int, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """One row of a table without registers, as its formula stands."""
    out = smooth(x, torch.full((len(x),), table.t[row]))
    x0 = float(table.x0_from_x[row]) * x + float(table.x0_from_out[row]) * out
    x0 = x0.clamp(*table.clip)
    return (
        float(table.from_state[row, 0, 0]) * x
        + float(table.from_x0[row, 0]) * x0
        + float(table.from_noise[row, 0]) * z
    )


def test_resampling_brings_the_rest_into_harmony_with_the_known_part() -> None:
    """Two coordinates with correlation 0.9 and variance 1, the first known as 1: the other's mean is 0.9."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    alpha, sigma = (torch.tensor(a.copy()) for a in (SCHEDULE.alpha, SCHEDULE.sigma))

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, s = float(alpha[int(t[0])]), float(sigma[int(t[0])])
        return x @ (s * torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(2))).float()

    chain = fd.Sampler(network, SCHEDULE, solver="ddpm", steps=30, shape=(2,), clip=None)
    known, mask = torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    misses = []
    for resample in (1, 8):
        x = chain.sample(4000, known=known, mask=mask, resample=resample)
        assert (x[:, 0] == 1).all()
        misses.append(abs(float(x[:, 1].mean()) - 0.9))
    assert misses[1] < misses[0] / 4


class _NoSynchronisation(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name().split(".")[0] not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")
        return func(*args, **kwargs or {})


def test_an_edited_chain_never_reads_a_value_back() -> None:
    chain = sampler("ddpm")
    program = chain._edit(0.7, 2)
    key, ids = fd.ops.noise_key(0, 2, 2, "cpu")
    part = editing.known_part(PICTURE, LEFT, (2, *SHAPE), torch.device("cpu"))
    batch = chain._start(program, torch.zeros(2, *SHAPE), key, ids, {}, None, 1.0, part, True)
    with _NoSynchronisation():
        chain._run(program, batch, None, False, None, True)
        with pytest.raises(AssertionError):
            float(batch.x[0, 0, 0, 0])


BAD_CALLS = [
    (dict(init=PICTURE), "`strength` is missing"),
    (dict(strength=0.5), "`init` is missing"),
    (dict(init=PICTURE, strength=0.0), "`strength` must be in"),
    (dict(init=PICTURE, strength=1.5), "`strength` must be in"),
    (dict(init=PICTURE, strength=float("nan")), "`strength` must be in"),
    (dict(init=PICTURE, strength=0.5, x_T=torch.zeros(2, *SHAPE)), "`init` or `x_T`"),
    (dict(init=torch.zeros(3, *SHAPE), strength=0.5), "`init` must broadcast"),
    (dict(known=PICTURE), "`mask` is missing"),
    (dict(mask=LEFT), "`known` is missing"),
    (dict(known=PICTURE, mask=torch.zeros(5, 4)), "`mask` must broadcast"),
    (dict(known=torch.zeros(1, 2, *SHAPE), mask=LEFT), "`known` must broadcast"),
    (dict(known=PICTURE, mask=LEFT, resample=0), "`resample` must be"),
    (dict(known=PICTURE, mask=LEFT, resample=2.5), "`resample` must be"),
    (dict(resample=2), "`resample` needs"),
    (dict(known=PICTURE, mask=LEFT, resample=2, noise=torch.zeros(6, 2, *SHAPE)), "`noise` must be"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD_CALLS)
def test_a_bad_edit_is_refused_before_the_network_runs(arguments: dict, named: str) -> None:
    def never(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the network ran")

    chain = fd.Sampler(never, SCHEDULE, solver="ddpm", steps=6, shape=SHAPE)
    with pytest.raises(ValueError, match=named):
        chain.sample(2, **arguments)


@pytest.mark.parametrize("given", [dict(init=PICTURE, strength=0.5), dict(known=PICTURE, mask=LEFT)])
def test_a_chain_that_does_not_remove_noise_cannot_be_edited(given: dict) -> None:
    table = sampler("ddim").table
    flat = replace(table, alpha=np.ones(7), sigma=np.zeros(7), exempt=("mean", "noise"), name="flat")
    upward = replace(table, alpha=table.alpha[::-1], sigma=table.sigma[::-1], exempt=("mean", "noise"))
    for wrong, why in ((flat, "'flat' does not say how noisy"), (upward, "runs from clean to noisy")):
        argument = "strength" if "strength" in given else "known"
        with pytest.raises(ValueError, match=f"`{argument}` needs a chain that removes noise, but .*{why}"):
            fd.Sampler(smooth, table=wrong, shape=SHAPE).sample(1, **given)


def test_known_pixels_come_out_exact_from_a_chain_that_ends_a_little_noisy() -> None:
    levels = sampler("ddim").table
    alpha, sigma = levels.alpha.copy(), levels.sigma.copy()
    alpha[-1], sigma[-1] = 0.99, math.sqrt(1 - 0.99**2)
    noisy = replace(levels, alpha=alpha, sigma=sigma, exempt=("mean", "noise"))
    x = fd.Sampler(smooth, table=noisy, shape=SHAPE).sample(2, known=PICTURE, mask=LEFT)
    assert torch.equal(x[..., :2], PICTURE.expand_as(x)[..., :2])


@pytest.mark.parametrize("solver", sorted(HISTORY))
def test_a_history_cannot_be_resampled_or_cut(solver: str) -> None:
    chain = sampler(solver)
    with pytest.raises(ValueError, match="`resample` 2 goes back"):
        chain.sample(1, known=PICTURE, mask=LEFT, resample=2)
    own = fd.Sampler(smooth, table=chain.table, shape=SHAPE)
    with pytest.raises(ValueError, match=r"a table that starts there, compiled from levels\.last\(3\)"):
        own.sample(1, init=PICTURE, strength=0.5)
    own.sample(1, init=PICTURE, strength=1.0)


@pytest.mark.parametrize("solver", sorted(HISTORY))
def test_a_table_of_the_last_levels_is_the_cut_of_a_history(solver: str) -> None:
    """What the error above advises, which is all that a sampler with a schedule does."""
    chain = sampler(solver)
    levels = fd.NoiseLevels.from_schedule(SCHEDULE, fd.space_timesteps(1000, 6)).last(3)
    cut = fd.Sampler(smooth, table=fd.compile_table(solver, levels, clip=(-1, 1)), shape=SHAPE)
    wanted = chain.sample(2, seed=3, init=PICTURE, strength=0.5)
    assert torch.equal(cut.sample(2, seed=3, init=PICTURE, strength=1), wanted)
    for path in (fd.NoiseLevels.flow(6, shift=3.0), fd.NoiseLevels.karras(6, 0.02, 40.0)):
        table = fd.compile_table(solver, path.last(3), prediction="v")
        assert table.sigma[0] == path.sigma[3]
        assert (
            fd.Sampler(smooth, table=table, shape=SHAPE).sample(1, init=PICTURE, strength=1).isfinite().all()
        )
