"""reverse_step: every backend gives the same bits, and those are the formula's up to float32 rounding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from kernel_cases import (
    ENDINGS,
    INTERPRET_AND_GPU,
    OTHERS,
    SIZES,
    Rounded,
    assert_same_bits,
    clone,
    columns,
    random_step,
    random_table,
    step_bounds,
    step_with,
)

from fastdiff.kernels import layout
from fastdiff.kernels.reverse_step import Step, reverse_step_reference, reverse_step_torch

CASES = [
    dict(registers=k, n=n, batch=b, guided=guided, learned=learned, given_noise=noise)
    for (k, (n, b)), (guided, learned, noise) in zip(
        product((0, 1, 3), zip(SIZES, (3, 6, 5, 7), strict=True)),
        list(product((False, True), repeat=3)) + list(product((True, False), repeat=3)),
        strict=False,
    )
]
# what only some rows of a batch have to do with: a known part, thresholds of their own; previews of all
CASES += [
    dict(known=True),
    dict(registers=1, n=1823, known=True, guided=True, learned=True),
    dict(n=256, threshold=True, guided=True),
    dict(registers=3, preview=True, learned=True),
    dict(registers=1, n=1, batch=7, known=True, threshold=True, preview=True, given_noise=True, guided=True),
]
WRITTEN = ("x", "registers", "u", "preview")


def case_id(case: dict) -> str:
    return "-".join(f"{k}{int(v)}" for k, v in case.items())


@pytest.fixture(params=enumerate(CASES), ids=lambda p: case_id(p[1]))
def step(request: pytest.FixtureRequest) -> Step:
    seed, case = request.param
    return random_step(seed=seed, **case)


def assert_same(actual: Step, expected: Step) -> None:
    for name in WRITTEN:
        if getattr(expected, name) is not None:
            assert_same_bits(getattr(actual, name), getattr(expected, name))


def test_same_bits_notices_one_flipped_bit_and_a_lost_nan() -> None:
    a = torch.tensor([1.0, float("nan"), 0.0])
    assert_same_bits(a, a.clone())
    for b in (
        torch.tensor([1.0 + 2**-23, float("nan"), 0.0]),
        torch.tensor([1.0, 2.0, 0.0]),
        torch.tensor([1.0, float("nan"), -0.0]),
    ):
        with pytest.raises(AssertionError):
            assert_same_bits(a, b)


def test_error_bounds_hold_a_rounded_sum_and_exclude_a_wrong_one() -> None:
    a, b = torch.tensor(1.0), torch.tensor(2.0**-25)
    total = Rounded.exact(a) + Rounded.exact(b)
    assert abs(float(a + b) - float(total.value)) <= float(total.error)
    assert abs(1.0 + 2.0**-20 - float(total.value)) > float(total.error)


@pytest.mark.parametrize("backend", OTHERS)
def test_backends_agree_to_the_last_bit(backend: str, step: Step) -> None:
    expected = clone(step)
    step_with("eager", expected)
    step_with(backend, step)
    assert_same(step, expected)


def test_float32_step_is_the_formula_up_to_rounding(step: Step) -> None:
    before = clone(step)
    step_with("eager", step)
    for b in range(step.x.shape[0]):
        lane = b if step.cond_lane is None else int(step.cond_lane[b])
        if not 0 <= step.row[b] < step.idle or lane < 0:
            continue
        new, first, x0 = step_bounds(before, b)
        state = [step.x[b]] if step.registers is None else [step.x[b], *step.registers[:, b]]
        for got, bound in zip(state, new, strict=True):
            assert ((got - bound.value).abs() <= bound.error).all()
        if int(step.plan[int(step.row[b]), layout.WRITES]) & layout.WRITES_U:
            assert ((step.u[lane] - first.value).abs() <= first.error).all()
        if step.preview is not None:
            assert ((step.preview[b] - x0.value).abs() <= x0.error).all()


def test_reference_is_the_formula_in_float64(step: Step) -> None:
    before = clone(step)
    wide = clone(step, x=step.x.double(), u=step.u.double())
    for name in ("registers", "preview"):
        if getattr(wide, name) is not None:
            wide = wide._replace(**{name: getattr(wide, name).double()})
    reverse_step_reference(wide)
    for b in range(step.x.shape[0]):
        lane = b if step.cond_lane is None else int(step.cond_lane[b])
        if 0 <= step.row[b] < step.idle and lane >= 0:
            new, _, x0 = step_bounds(before, b)
            assert torch.allclose(wide.x[b], new[0].value, rtol=1e-13, atol=1e-13)
            if wide.preview is not None:
                assert torch.allclose(wide.preview[b], x0.value, rtol=1e-13, atol=1e-13)
        else:
            assert_same_bits(wide.x[b], before.x[b].double())


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_single_slot_agree(backend: str, batch: int) -> None:
    step = random_step(1, n=5, batch=batch)
    expected = clone(step)
    step_with("eager", expected)
    step_with(backend, step)
    assert_same(step, expected)


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_idle_slots_full_of_nan_stay_untouched_and_do_not_spread(backend: str) -> None:
    step = random_step(3, n=63, batch=4, guided=True)
    step.row.copy_(torch.tensor([2, step.idle, step.idle + 7, -3]))
    step.cond_lane.copy_(torch.tensor([3, 1, 2, 0]))
    step.uncond_lane.copy_(torch.tensor([5, -1, 4, 6]))
    for tensor in (step.x, step.registers[0], step.registers[1], step.registers[2]):
        tensor[1:] = float("nan")
    step.out[[0, 1, 2, 4, 6]] = float("nan")
    step_with(backend, step)
    assert step.x[0].isfinite().all()
    assert step.registers[:, 0].isfinite().all()
    assert step.x[1:].isnan().all()
    assert step.u[[3, 5]].isfinite().all()
    assert step.u[[0, 1, 2, 4, 6, 7]].isnan().all()


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_slot_without_a_lane_is_idle(backend: str) -> None:
    step = random_step(1, n=63, batch=3, guided=True)
    step.row.fill_(2)
    step.cond_lane.copy_(torch.tensor([0, -1, 1]))
    before = clone(step)
    step_with(backend, step)
    assert_same_bits(step.x[1], before.x[1])
    assert_same_bits(step.registers[:, 1], before.registers[:, 1])
    assert not torch.equal(step.x[0], before.x[0])


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_zero_coefficient_does_not_read_so_nan_never_appears(backend: str) -> None:
    table = random_table(1, 3)
    row = layout.HEAD
    for j in range(2):  # from_state[j, 1], from_out[j], from_noise[j] = 0; x0 = 2x
        table.coef[2, row + j * 5 + 1] = table.coef[2, row + j * 5 + 3] = table.coef[2, row + j * 5 + 4] = 0
        table.coef[2, row + j * 5] = table.coef[2, row + j * 5 + 2] = 0.5
    table.coef[2, layout.X0_FROM_X], table.coef[2, layout.X0_FROM_OUT] = 2.0, 0.0
    table.plan[2, layout.READS] = 1 | layout.READS_X0 | layout.READS_CLIP
    table.plan[2, layout.WRITES] = 3 | layout.WRITES_U
    step = random_step(1, n=63, batch=2, given_noise=True, table=table)
    step.row.fill_(2)
    for unread in (step.registers, step.out, step.noise):
        unread.fill_(float("nan"))
    x = step.x.clone()
    step_with(backend, step)
    assert_same_bits(step.x, 0.5 * x + 0.5 * (2.0 * x).clamp(-1, 1))
    assert_same_bits(step.registers[0], step.x)
    assert_same_bits(step.u, table.coef[2, layout.C_IN_NEXT] * step.x)


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_idle_slots_keep_their_preview_and_read_no_image(backend: str) -> None:
    """Idle is a slot at the last row of its own table, which in a joined one is not the last of all."""
    table = random_table(1, 0, endings=ENDINGS, threshold=(0.9, 2.0))
    joined = layout.join([table, random_table(1, 1)])
    step = random_step(1, batch=3, known=True, threshold=True, preview=True, table=joined)
    step.row.copy_(torch.tensor([0, table.num_rows, 2]))
    for tensor in (step.x, step.registers[0], step.known):
        tensor[1] = float("nan")
    step.x0_scale[1] = float("nan")
    step.preview.fill_(7.0)
    step_with(backend, step)
    assert (step.preview[1] == 7.0).all()
    assert step.x[1].isnan().all()
    assert step.preview[[0, 2]].isfinite().all()
    assert (step.preview[[0, 2]] != 7.0).all()
    assert step.x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_a_preview_leaves_the_step_as_it_is(backend: str) -> None:
    step = random_step(3, learned=True)
    seen = clone(step)._replace(preview=torch.full_like(step.x, float("nan")))
    step_with(backend, step)
    step_with(backend, seen)
    for name in ("x", "registers", "u"):
        assert_same_bits(getattr(seen, name), getattr(step, name))


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_a_row_without_an_ending_reads_neither_image_nor_mask(backend: str) -> None:
    step = random_step(0, known=True)
    step.row.fill_(1)
    plain = clone(step)._replace(known=None, mask=None)
    step.known.fill_(float("nan"))
    step.mask.fill_(1)
    step_with(backend, step)
    step_with(backend, plain)
    assert_same_bits(step.x, plain.x)


@pytest.mark.filterwarnings("ignore:invalid value")  # NumPy, of the interpreter's 0 * NaN
@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_clip_keeps_nan_and_bounds_the_rest(backend: str) -> None:
    table = layout.pack(**columns(rows=1, x0_from_x=1.0, from_x0=1.0), clip=(-0.5, 0.25))
    step = random_step(0, n=6, batch=1, table=table)
    step.row.zero_()
    step.x[0] = torch.tensor([-2.0, -0.5, 0.1, 0.25, float("inf"), float("nan")])
    step_with(backend, step)
    assert_same_bits(step.x[0], torch.tensor([-0.5, -0.5, 0.1, 0.25, 0.25, float("nan")]))


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_sums_keep_the_sign_of_zero(backend: str) -> None:
    table = layout.pack(**columns(rows=1, x0_from_out=-1.0, from_x0=1.0))
    step = random_step(0, n=2, batch=1, table=table)
    step.row.zero_()
    step.out[0] = torch.tensor([0.0, -0.0])
    step_with(backend, step)
    assert_same_bits(step.x[0], torch.tensor([-0.0, 0.0]))


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_tables_of_different_k_share_a_launch(backend: str) -> None:
    wide = random_table(1, 5, pad_to=3)
    alone = random_step(1, seed=5)
    shared = clone(alone, coef=wide.coef, plan=wide.plan)
    others = torch.full((2, *alone.x.shape), float("nan"))
    shared = shared._replace(registers=torch.cat([shared.registers, others]))
    step_with("eager", alone)
    step_with(backend, shared)
    assert_same_bits(shared.x, alone.x)
    assert_same_bits(shared.u, alone.u)
    assert_same_bits(shared.registers[0], alone.registers[0])
    assert shared.registers[1:].isnan().all()


@pytest.mark.parametrize("backend", ["eager", *OTHERS])
def test_slots_do_not_depend_on_their_order(backend: str) -> None:
    step = random_step(1, n=63, batch=6, learned=True)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    moved = clone(step)._replace(
        **{k: getattr(step, k)[order] for k in ("x", "out", "u", "row", "seed", "sample_id")},
        registers=step.registers[:, order].clone(),
    )
    step_with(backend, step)
    step_with(backend, moved)
    assert_same_bits(moved.x, step.x[order])
    assert_same_bits(moved.u, step.u[order])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "native", *OTHERS[2:]])
def test_half_precision_networks_change_only_the_casts(backend: str, dtype: torch.dtype) -> None:
    half = random_step(1, n=63, learned=True, dtype=dtype)
    wide = clone(half, out=half.out.float(), u=half.u.float())
    step_with("eager", wide)
    step_with(backend, half)
    assert_same_bits(half.x, wide.x)
    assert_same_bits(half.u, wide.u.to(dtype))


@pytest.mark.interpret
def test_interpreter_reads_half_precision_output() -> None:
    half = random_step(0, n=63, dtype=torch.float16)
    wide = clone(half, out=half.out.float(), u=half.u.float())
    step_with("eager", wide)
    step_with("interpret", half)
    assert_same_bits(half.x, wide.x)


@pytest.mark.parametrize("backend", ["native", *INTERPRET_AND_GPU])
def test_without_u_the_state_is_the_same(backend: str) -> None:
    step = random_step(1, n=63)
    bare = clone(step)._replace(u=None)
    step_with("eager", step)
    step_with(backend, bare)
    assert_same_bits(bare.x, step.x)
    step_with("eager", bare)
    assert bare.u is None


def test_large_state_is_cut_into_parts_without_a_seam() -> None:
    step = random_step(1, n=3 * 65536 + 5, batch=2, learned=True)
    step.row.fill_(2)
    expected = clone(step)
    step_with("eager", expected)
    reverse_step_torch(step)
    assert_same(step, expected)
