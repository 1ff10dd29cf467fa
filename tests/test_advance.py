"""advance: every slot to its next row, and what the network reads with it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INTERPRET_AND_GPU, apply, assert_same_bits, random_table

from fastdiff.kernels import layout
from fastdiff.kernels.advance import Advance, advance_reference, advance_torch, advance_triton

BACKENDS = ["torch", *INTERPRET_AND_GPU]
CASES = [
    dict(batch=batch, last=last, lanes=lanes, lane_row=lane_row, dtype=dtype)
    for batch, last, lanes, lane_row, dtype in [
        (1, False, False, False, torch.float32),
        (63, False, False, True, torch.int64),
        (6, True, True, True, torch.float32),
        (1823, True, True, False, torch.int64),
        (6, False, True, False, torch.float16),
    ]
]


def operands(
    batch: int,
    last: bool = False,
    lanes: bool = False,
    lane_row: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Advance:
    table = random_table(1, 0)
    g = torch.Generator().manual_seed(batch)
    order = torch.randperm(2 * batch, generator=g).to(torch.int32)
    order[::5] = -1
    count = 2 * batch if lanes else batch
    return Advance(
        row=torch.randint(-1, table.num_rows + 2, (batch,), generator=g, dtype=torch.int32),
        coef=table.coef,
        t=torch.full((count,), 77, dtype=dtype),
        last=torch.randint(0, table.num_rows, (batch,), generator=g, dtype=torch.int32) if last else None,
        cond_lane=order[:batch].clone() if lanes else None,
        uncond_lane=order[batch:].clone() if lanes else None,
        lane_row=torch.full((count,), -9, dtype=torch.int32) if lane_row else None,
    )


def run(backend: str, a: Advance) -> None:
    if backend == "torch":
        advance_torch(a)
    else:
        apply(backend, advance_triton, a)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend_is_the_reference(backend: str, case: dict) -> None:
    a, expected = operands(**case), operands(**case)
    advance_reference(expected)
    run(backend, a)
    for name in ("row", "t", "lane_row"):
        if getattr(expected, name) is not None:
            assert_same_bits(getattr(a, name), getattr(expected, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch_is_no_error(backend: str) -> None:
    run(backend, operands(0, last=True, lanes=True, lane_row=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_chain_visits_every_row_once_and_stays_idle(backend: str) -> None:
    a = operands(2)._replace(row=torch.zeros(2, dtype=torch.int32))
    seen = []
    for _ in range(8):
        run(backend, a)
        seen.append((int(a.row[0]), float(a.t[0])))
    times = a.coef[:, layout.T].tolist()
    assert seen == [(row, times[row]) for row in (1, 2, 3, 4, 5, 5, 5, 5)]


def test_lanes_of_no_slot_keep_their_time() -> None:
    a = operands(3, lanes=True, lane_row=True)
    a.cond_lane.copy_(torch.tensor([5, -1, 0]))
    a.uncond_lane.copy_(torch.tensor([-1, 2, -1]))
    advance_torch(a)
    assert (a.t[[1, 3, 4]] == 77).all()
    assert (a.lane_row[[1, 3, 4]] == -9).all()
    assert (a.lane_row[[5, 2, 0]] == a.row).all()
