"""Dynamic thresholding: every backend finds the same factor, and it is the quantile's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from chains import SCHEDULE, SHAPE, sampler, smooth
from kernel_cases import OTHERS, SIZES, apply, assert_same_bits, columns, library, random_step

import fastdiff as fd
from fastdiff.clip import clip_from_config, clipped
from fastdiff.kernels import cpu, layout
from fastdiff.kernels.threshold import (
    BINS,
    PASSES,
    Threshold,
    threshold_eager,
    threshold_native,
    threshold_reference,
    threshold_triton,
)

QUANTILES = [0.0, 0.5, 0.995, 1.0]
INF = float("inf")


def operands(
    n: int = 63,
    batch: int = 5,
    quantile: float = 0.9,
    largest: float = INF,
    dtype: torch.dtype = torch.float32,
    **options: bool,
) -> Threshold:
    """Rows mixed and out of range, lanes in any order; what is to be written is NaN."""
    given = columns(5, x0_from_x=1.7, x0_from_out=-0.9, from_x0=0.3, from_state=0.4)
    table = layout.pack(**given, threshold=(quantile, largest), learned=options.get("learned", False))
    step = random_step(0, n, batch, table=table, dtype=dtype, seed=n, **options)
    kept = {name: getattr(step, name) for name in Threshold._fields if hasattr(step, name)}
    counts = torch.full((batch, PASSES + 1, BINS), -1, dtype=torch.int32)
    return Threshold(**kept | {"x0_scale": torch.full((batch,), float("nan")), "counts": counts})


def scale_with(backend: str, given: Threshold) -> torch.Tensor:
    """[B] the factors; NaN where a slot has none."""
    given = given._replace(x0_scale=torch.full_like(given.x0_scale, float("nan")))
    if backend == "eager":
        threshold_eager(given)
    elif backend == "native":
        threshold_native(library(), given)
    else:
        apply(backend, threshold_triton, given)
    return given.x0_scale


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("n", [*SIZES, 2])
def test_backends_find_the_same_factor_to_the_last_bit(backend: str, quantile: float, n: int) -> None:
    guided = n in (2, 63, 1823)
    given = operands(n, quantile=quantile, guided=guided, learned=guided, largest=2.5 if n == 63 else INF)
    assert_same_bits(scale_with(backend, given), scale_with("eager", given))


@pytest.mark.parametrize("quantile", QUANTILES)
@pytest.mark.parametrize("n", [*SIZES, 5000])
def test_the_factor_is_the_quantile_of_the_formula(quantile: float, n: int) -> None:
    given = operands(n, quantile=quantile, guided=True, largest=2.5 if n == 63 else INF)
    exact = given._replace(x0_scale=given.x0_scale.double())
    threshold_reference(exact)
    found = scale_with("eager", given)
    live = ~found.isnan()
    assert live.any()
    assert torch.equal(live, ~exact.x0_scale.isnan())
    # x0 takes five roundings of terms up to 8, and 1/s shrinks absolute errors
    assert (found[live] - exact.x0_scale[live]).abs().max() <= 5 * 8 * 2.0**-24


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_equal_and_extreme_values_are_ranked_right(backend: str) -> None:
    given = operands(8, batch=1, quantile=0.5)._replace(coef=operands(8, batch=1).coef.clone())
    given.row.zero_()
    given.coef[:, layout.X0_FROM_X], given.coef[:, layout.X0_FROM_OUT] = 1.0, 0.0
    cases = {
        (3.0, -3.0, 3.0, 3.0, -3.0, 3.0, 3.0, 3.0): 3.0,  # all alike
        (9.0, 1.0, -1.0, 1.0, 5.0, -5.0, 5.0, 7.0): 5.0,  # the two in the middle alike
        (0.0, -0.0, 1e-40, 2.0, 4.0, 3e38, -3e38, INF): 3.0,  # denormal, infinite
        (1.0, 2.0, 3.0, 4.0, 5.0, float("nan"), 6.0, 7.0): 4.5,  # a NaN lies above
        (INF, INF, INF, INF, 5.0, float("nan"), -INF, 7.0): INF,  # two infinities, whose difference is none
        (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8): 1.0,  # never below 1
    }
    for values, s in cases.items():
        given.x[0] = torch.tensor(values)
        assert_same_bits(scale_with(backend, given), 1.0 / torch.tensor([s]))


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
@pytest.mark.parametrize("quantile", [0.5, 1.0])
def test_a_rank_that_is_whole_looks_at_no_neighbour(backend: str, quantile: float) -> None:
    given = operands(5, batch=1, quantile=quantile)._replace(coef=operands(5, batch=1).coef.clone())
    given.row.zero_()
    given.coef[:, layout.X0_FROM_X], given.coef[:, layout.X0_FROM_OUT] = 1.0, 0.0
    for above in (INF, float("nan")):
        given.x[0] = torch.tensor([1.0, above, 3.0, above, 2.0])
        s = 3.0 if quantile == 0.5 else above
        assert_same_bits(scale_with(backend, given), 1.0 / torch.tensor([s]))
        clip = fd.DynamicThreshold(quantile)
        expected = 3.0 / s if quantile == 0.5 else 0.0 if above == INF else float("nan")
        assert np.array_equal(clipped(given.x.double(), clip)[0, 2], expected, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
def test_nothing_is_thresholded_without_harm(backend: str, batch: int, n: int) -> None:
    given = operands(7, batch=2)
    x, out = (torch.zeros(batch, n) for _ in range(2))
    small = {name: getattr(given, name)[:batch] for name in ("x0_scale", "counts", "row")}
    assert scale_with(backend, given._replace(x=x, out=out, **small)).isnan().all()


@pytest.mark.parametrize("backend", ["eager", "native", *OTHERS[2:]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_change_only_the_cast(backend: str, dtype: torch.dtype) -> None:
    half = operands(63, dtype=dtype)
    assert_same_bits(scale_with(backend, half), scale_with("eager", half._replace(out=half.out.float())))


def test_a_planted_neighbour_would_be_noticed() -> None:
    given = operands(256, quantile=0.5)
    there = scale_with("eager", given)
    moved = given._replace(plan=given.plan.clone())
    moved.plan[:, layout.QUANTILE] += 2**30 // 256
    assert not torch.equal(scale_with("eager", moved).nan_to_num(), there.nan_to_num())


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_clipped_x0_is_the_paper_s(kind) -> None:
    x0 = np.random.default_rng(0).normal(size=(3, 2, 5))
    clip = fd.DynamicThreshold(0.8, largest=1.2)
    got = np.asarray(clipped(kind(x0), clip))
    for mine, its in zip(got, x0, strict=True):
        s = min(max(np.quantile(np.abs(its), 0.8), 1.0), 1.2)
        assert np.allclose(mine, np.clip(its, -s, s) / s, rtol=1e-14, atol=0)
    assert np.abs(got).max() <= 1


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun"])
def test_a_chain_with_thresholds_is_its_table_s(solver: str) -> None:
    clip = fd.DynamicThreshold(0.7)
    chain = sampler(solver, steps=8, clip=clip)
    x_T = 3.0 * fd.ops.normal(SHAPE, 0, 4, 0, domain=0)
    noise = torch.randn(chain.table.num_rows, 4, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = chain.sample(4, x_T=x_T, noise=noise)
    expected = chain.table.evaluate(smooth, x_T.double(), noise.double())
    assert (x - expected).abs().max() <= 2e-5 * max(1.0, float(expected.abs().max()))
    plain = sampler(solver, steps=8).sample(4, x_T=x_T, noise=noise)
    assert (x - plain).abs().max() > 1e-2, "the threshold should have had an effect here"


@pytest.mark.parametrize("backend", ["native", "numpy", pytest.param("triton", marks=pytest.mark.interpret)])
def test_thresholds_mix_with_other_clips_in_one_batch(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slot is alone what it is among others, in all its bits."""
    if backend == "numpy":
        monkeypatch.setattr(cpu, "library", lambda wait=False: None)
    elif backend == "triton":
        monkeypatch.setenv("FASTDIFF_BACKEND", "triton")
    else:
        library()
    levels = fd.NoiseLevels.from_schedule(SCHEDULE, fd.space_timesteps(len(SCHEDULE), 4))
    clips = (fd.DynamicThreshold(0.6), None, (-1.0, 1.0), fd.DynamicThreshold(0.9, 1.5))
    solvers = ("ddpm", "ddim", "dpmpp_2m", "unipc")
    packs = [
        fd.compile_table(solver, levels, clip=clip).pack(registers=2)
        for solver, clip in zip(solvers, clips, strict=True)
    ]
    together = layout.join(packs)
    first = torch.tensor([0, 5, 10, 15], dtype=torch.int32)
    x = 2.0 * fd.ops.normal(SHAPE, 0, 4, 0, domain=0)
    alone = [x[i : i + 1].clone() for i in range(4)]
    registers = torch.zeros(2, *x.shape)
    own = [torch.zeros(2, 1, *SHAPE) for _ in range(4)]
    for row in range(4):
        t = together.coef[first.long() + row, layout.T]
        fd.ops.reverse_step(x, 2.0 * smooth(x, t), together, first + row, registers=registers)
        for i, (table, state, memory) in enumerate(zip(packs, alone, own, strict=True)):
            out = 2.0 * smooth(state, t[i : i + 1])
            fd.ops.reverse_step(state, out, table, table.start(1) + row, 0, [i], registers=memory)
    for i, state in enumerate(alone):
        assert_same_bits(x[i], state[0])
    plain = fd.compile_table("ddpm", levels, clip=(-1.0, 1.0)).pack(registers=2)
    fd.ops.reverse_step(alone[0], 9.0 * alone[0], packs[0], packs[0].start(1) + 2, registers=own[0])
    fd.ops.reverse_step(x[:1], 9.0 * x[:1], plain, plain.start(1) + 2, registers=own[0].clone())
    assert not torch.equal(alone[0], x[:1])


def test_guided_thresholds_and_previews_agree_with_the_formula() -> None:
    chain = fd.Sampler(smooth, SCHEDULE, solver="ddim", steps=4, shape=SHAPE, clip=fd.DynamicThreshold(0.6))
    seen: list[fd.Moment] = []
    given = dict(cond={"labels": torch.tensor([1.0, 2.0])}, uncond={"labels": 0.0}, guidance_scale=4.0)
    chain.sample(2, callback=lambda m: seen.append(dataclasses.replace(m, x0=m.x0.clone())), **given)
    first = chain.sample(2, trajectory=True, **given)[1][0]
    t = torch.full((2,), float(chain.table.t[0]))
    cond, uncond = smooth(first, t, torch.tensor([1.0, 2.0])), smooth(first, t, torch.zeros(2))
    out = uncond + 4.0 * (cond - uncond)
    x0 = float(chain.table.x0_from_x[0]) * first + float(chain.table.x0_from_out[0]) * out
    expected = clipped(x0.double(), chain.table.clip)
    # a rounding of x0, which stands above 100 here, is divided by s again
    assert (seen[0].x0 - expected).abs().max() <= 1e-5
    assert (seen[0].x0.abs().amax(dim=(1, 2, 3)) == 1).all()


def test_tables_with_thresholds_are_saved_and_read_back(tmp_path) -> None:
    levels = fd.NoiseLevels.from_schedule(SCHEDULE, [0, 10, 20])
    for clip in (fd.DynamicThreshold(0.99, 3.0), fd.DynamicThreshold()):
        table = fd.compile_table("ddim", levels, clip=clip)
        table.save(tmp_path / "t.safetensors")
        assert fd.SamplingTable.load(tmp_path / "t.safetensors") == table
        assert fd.SamplingTable.load(tmp_path / "t.safetensors").clip == clip


def test_a_model_is_saved_with_its_threshold(tmp_path) -> None:
    net = fd.UNet(1, model_channels=8, channel_mult=(1,), num_res_blocks=1)
    clip = fd.DynamicThreshold(np.float32(0.5))
    settings = {"schedule": SCHEDULE.to_config(), "shape": [1, 4, 4], "clip": clip}
    net.save_pretrained(tmp_path / "net", diffusion=settings)
    assert fd.Sampler.from_pretrained(str(tmp_path / "net"), steps=2).table.clip == clip


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: fd.DynamicThreshold(1.5), "`quantile` must be in"),
        (lambda: fd.DynamicThreshold(math.nan), "`quantile` must be in"),
        (lambda: fd.DynamicThreshold(0.9, largest=0.5), "`largest` must be at least 1"),
        (lambda: fd.DynamicThreshold(0.9, largest=INF), "None for no limit, got inf"),
        (lambda: fd.DynamicThreshold("most"), "`quantile` must be a number, got 'most'"),
        (lambda: fd.DynamicThreshold(0.9, largest=[1]), r"`largest` must be a number, got \[1\]"),
        (lambda: sampler("ddim", clip="12"), "`clip` must be None, "),
        (lambda: clip_from_config({"q": 1}), "`clip` must hold a quantile and a largest value"),
        (lambda: sampler("ddim", clip="dynamic"), "`clip` must be None, "),
    ],
)
def test_bad_thresholds_are_refused(make, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()
