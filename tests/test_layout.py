"""A packed table: what stands where, and what a row's plan says is read and written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import columns, random_table

from fastdiff.kernels import layout
from fastdiff.kernels.layout import (
    READS_CLIP,
    READS_LEARNED,
    READS_NOISE,
    READS_OUT,
    READS_X0,
    WRITES_U,
    WRITES_X0,
    pack,
)


def plan_of(*, rows: int = 1, clip: tuple[float, float] | None = None, **values: float) -> tuple[int, int]:
    """READS and WRITES of the first row of a table of constants, without what every row has."""
    plan = pack(**columns(rows, **values), clip=clip).plan[0]
    assert int(plan[layout.WRITES]) & WRITES_X0
    return int(plan[layout.READS]), int(plan[layout.WRITES]) & ~WRITES_X0


@pytest.mark.parametrize("registers", [0, 1, 5, layout.MAX_REGISTERS])
def test_coefficients_stand_where_the_layout_says(registers: int) -> None:
    rng = np.random.default_rng(registers)
    k = registers
    given = columns(4, k)
    for name, column in given.items():
        given[name] = rng.normal(size=column.shape)
    table = pack(**given, clip=(-2, 3))
    assert table.coef.shape == (5, layout.width(k)) == (5, 14 + (k + 1) * (k + 4))
    assert (table.num_rows, table.registers, table.coef.dtype) == (4, k, torch.float32)
    names = ("t", "c_in", "c_in_next", "x0_from_x", "x0_from_out", "clip_lo", "clip_hi")
    for at, name in enumerate((*names, "log_var_min", "log_var_max")):
        if name in given:
            assert np.array_equal(table.coef[:4, at], given[name].astype(np.float32))
    assert np.array_equal(table.coef[:3, layout.C_IN_NEXT], given["c_in"][1:].astype(np.float32))
    assert table.coef[3, layout.C_IN_NEXT] == 0
    assert (table.coef[:, [layout.CLIP_LO, layout.CLIP_HI]] == torch.tensor([-2.0, 3.0])).all()
    body = table.coef[:4, layout.HEAD :].view(4, k + 1, k + 4)
    for name, at in (("from_x0", k + 1), ("from_out", k + 2), ("from_noise", k + 3)):
        assert np.array_equal(body[:, :, at], given[name].astype(np.float32))
    assert np.array_equal(body[:, :, : k + 1], given["from_state"].astype(np.float32))


def test_idle_row_is_the_identity_and_touches_nothing() -> None:
    table = random_table(3, 0)
    body = table.coef[-1, layout.HEAD :].view(4, 7)
    assert torch.equal(body, torch.eye(4, 7))
    assert table.plan[-1].tolist() == [0, 0, 0, 0]


def test_plan_reads_only_what_a_written_output_needs() -> None:
    assert plan_of(from_state=1.0) == (0, 0)
    assert plan_of(from_state=0.5) == (1, 1)
    assert plan_of(from_out=1.0) == (READS_OUT, 1)
    assert plan_of(from_noise=1.0) == (READS_NOISE, 1)
    assert plan_of(from_x0=1.0, x0_from_x=2.0) == (1 | READS_X0, 1)
    assert plan_of(from_x0=1.0, x0_from_out=2.0) == (READS_X0 | READS_OUT, 1)
    assert plan_of(from_x0=0.0, x0_from_out=2.0, from_state=0.5) == (1, 1)


def test_plan_reads_the_clip_with_x0_and_the_variance_with_noise() -> None:
    assert plan_of(from_x0=1.0, x0_from_x=2.0, clip=(-1, 1)) == (1 | READS_X0 | READS_CLIP, 1)
    assert plan_of(from_state=0.5, clip=(-1, 1)) == (1 | READS_CLIP, 1)  # of a preview, which needs no bit
    assert plan_of(from_noise=1.0, log_var_max=-1.0) == (READS_NOISE | READS_LEARNED, 1)
    assert plan_of(from_state=0.5, log_var_max=-1.0) == (1, 1)


def test_thresholding_is_a_quantile_a_largest_value_and_the_range_of_one() -> None:
    table = pack(**columns(2, from_x0=1.0, x0_from_x=2.0), threshold=(0.995, 4.0))
    assert table.threshold
    assert not pack(**columns(2)).threshold
    assert (table.plan[:2, layout.QUANTILE] == round(0.995 * 2**30)).all()
    assert (table.coef[:2, layout.LARGEST] == 4.0).all()
    assert (table.coef[:2, [layout.CLIP_LO, layout.CLIP_HI]] == torch.tensor([-1.0, 1.0])).all()
    assert (table.plan[:2, layout.READS] == 1 | READS_X0 | READS_CLIP | layout.READS_THRESHOLD).all()
    assert table.plan[-1].tolist() == [0, 0, 0, 0]
    assert table.to("meta").threshold
    assert layout.join([pack(**columns(2)), table]).threshold


def test_a_row_with_an_ending_writes_the_state_and_draws_only_for_what_is_noisy() -> None:
    endings = {0: (0.5, 0.5, 1.0, 0.0), 1: (1.0, 0.0, 1.0, 0.0)}
    table = pack(**columns(3, from_state=1.0), endings=endings)
    known, noisy = layout.READS_KNOWN, layout.READS_KNOWN_NOISE
    assert table.plan[:, layout.READS].tolist() == [1 | known | noisy, 1 | known, 0, 0]
    assert table.plan[:, layout.WRITES].tolist() == [*[1 | WRITES_U | WRITES_X0] * 2, WRITES_X0, 0]
    assert table.coef[0, layout.KNOWN_ALPHA : layout.HEAD].tolist() == [0.5, 0.5, 1.0, 0.0]


def test_plan_writes_the_next_input_where_a_row_follows() -> None:
    assert plan_of(rows=2, from_state=1.0) == (1, WRITES_U)  # x stays, yet feeds u
    assert plan_of(rows=1, from_state=1.0) == (0, 0)
    assert plan_of(rows=2, from_state=1.0, c_in=0.0) == (0, 0)


def test_register_that_keeps_its_value_is_neither_read_nor_written() -> None:
    given = columns(1, 2, from_x0=0.0)
    given["from_state"][0] = [[0.5, 0, 0], [0, 1, 0], [0.25, 0, 0]]
    plan = pack(**given).plan[0]
    assert int(plan[layout.READS]) == 0b001
    assert int(plan[layout.WRITES]) & ~WRITES_X0 == 0b101


def test_padding_adds_registers_that_stay_as_they_are() -> None:
    own, wide = random_table(1, 2), random_table(1, 2, pad_to=3)
    assert wide.registers == 3
    assert torch.equal(own.plan, wide.plan)
    body = wide.coef[:, layout.HEAD :].view(-1, 4, 7)
    assert torch.equal(body[:, 2:], torch.eye(4, 7)[2:].expand(len(body), 2, 7))


def test_draw_is_the_row_unless_given() -> None:
    given = columns(3)
    assert pack(**given).plan[:3, layout.DRAW].tolist() == [0, 1, 2]
    assert pack(**given, draw=np.array([7, 8, 9])).plan[:3, layout.DRAW].tolist() == [7, 8, 9]


@pytest.mark.parametrize(("own", "padded"), [(2, 1), (0, 8)])
def test_impossible_number_of_registers_is_refused(own: int, padded: int) -> None:
    with pytest.raises(ValueError, match=rf"`registers` must be in \[{own}, 7\], got {padded}"):
        pack(**columns(2, own), registers=padded)


@pytest.mark.parametrize("padded", [None, 8, 10])
def test_too_many_registers_are_refused_with_the_limit(padded: int | None) -> None:
    with pytest.raises(ValueError, match="must have at most 7 registers, got 10"):
        pack(**columns(12, 10), registers=padded)


def test_table_starts_every_slot_at_row_zero_and_moves_to_a_device() -> None:
    table = random_table(1, 0)
    assert table.start(3).tolist() == [0, 0, 0]
    assert table.start(3).dtype == torch.int32
    moved = table.to("meta")
    assert (moved.device.type, moved.coef.shape, moved.registers) == ("meta", table.coef.shape, 1)
