"""What the public operators refuse: every broken contract by the argument's name, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import OP_SHAPE as SHAPE
from kernel_cases import OP_TABLE as TABLE
from kernel_cases import assert_same_bits, int32, random_table
from kernel_cases import op_arguments as operands

from fastdiff import ops


def change(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.reverse_step(**(operands() | changes))


def sampled(**changes: Any) -> Callable[[], Any]:
    given = dict(x0=torch.zeros(2, 3), alpha_sigma=torch.ones(4, 2), t=torch.zeros(2, dtype=torch.int64))
    return lambda: ops.q_sample(**(given | dict(seed=0, sample_ids=None, draw=0) | changes))


def advanced(**changes: Any) -> Callable[[], Any]:
    given = dict(row=TABLE.start(2), table=TABLE, t=torch.zeros(2))
    return lambda: ops.advance(**(given | changes))


ZEROS = torch.zeros(2, *SHAPE)
META = torch.device("meta")
REFUSED: list[tuple[str, Callable[[], Any]]] = [
    (r"`x` must be torch.float32 dense on cpu, got torch.float64", change(x=torch.zeros(2, *SHAPE).double())),
    (r"`x` must be .*dense.* got .* not dense", change(x=torch.zeros(2, 4, 5, 3).movedim(-1, 1))),
    (r"`table.coef` must be on cpu, got .* on meta; use `table.to", change(table=TABLE.to(META))),
    (
        r"`row` must be torch.int32 \[2\] on cpu, got torch.int64.*`table.start",
        change(row=torch.zeros(2).long()),
    ),
    (r"`row` must be torch.int32 \[2\]", change(row=TABLE.start(3))),
    (
        r"`out` must be \[lanes, 3, 4, 5\] .* got \[2, 3, 4, 4\]",
        change(out=torch.zeros(2, 3, 4, 4)),
    ),
    (r"`out` must be .* got \[2, 5, 4, 3\]", change(out=torch.zeros(2, 5, 4, 3))),
    (r"`out` must be .* torch.int64", change(out=torch.zeros(2, *SHAPE).long())),
    (r"`out` must be on cpu, got .* on meta", change(out=torch.zeros(2, *SHAPE, device=META))),
    (r"`registers` must be \[1, 2, \.\.\.\]", change(registers=None)),
    (r"`registers` must be torch.float32 \[1, 2, 3, 4, 5\]", change(registers=torch.zeros(2, 2, *SHAPE))),
    (r"`u` must be \[2, 3, 4, 5\] dense", change(u=torch.zeros(2, 3, 4, 4))),
    (r"`out` has 4 lanes for 2 slots; say with `cond_lane`", change(out=torch.zeros(4, *SHAPE), u=None)),
    (r"`uncond_lane` needs `cond_lane` and `guidance_scale`", change(uncond_lane=int32(0, 1))),
    (r"`cond_lane` must be torch.int32 \[2\]", change(cond_lane=int32(0))),
    (r"`guidance_scale` must be torch.float32 \[2\]", change(guidance_scale=torch.ones(2).double())),
    (r"`noise` must be torch.float32 \[2, 3, 4, 5\]", change(noise=torch.zeros(2, 60))),
    (r"`known` must be torch.float32 \[2, 3, 4, 5\]", change(known=torch.zeros(2, 60), mask=None)),
    (
        r"`x` must have less than 2\^31 elements a sample",
        lambda: ops.reverse_step(
            *[torch.empty(0, 2**31)] * 2, random_table(0, 0, threshold=(0.9, 2.0)), TABLE.start(0)
        ),
    ),
    (r"`known` and `mask` belong together", change(known=torch.zeros(2, *SHAPE))),
    (r"`mask` must be bool or uint8, got torch.float32", change(**dict.fromkeys(("known", "mask"), ZEROS))),
    (r"`preview` must be .*dense", change(preview=torch.zeros(2, 4, 5, 3).movedim(-1, 1))),
    (r"`seed` must fit 64 bits, got 18446744073709551616", change(seed=2**64)),
    (r"`seed` must be an int or \[2\] int64", change(seed=torch.zeros(3).long())),
    (r"`sample_ids` must be \[2\], got shape \(3,\)", change(sample_ids=[0, 1, 2])),
    (r"`sample_ids` must be in \[0, 2\^32\), got 4294967296", change(sample_ids=[0, 2**32])),
    (r"`target` must be one of .* got 'noise'", sampled(target="noise")),
    (r"`x0` must be torch.float32", sampled(x0=torch.zeros(2, 3).half())),
    (r"`alpha_sigma` must be torch.float32 \[any, 2\]", sampled(alpha_sigma=torch.ones(4, 3))),
    (r"`t` must be torch.int64 \[2\]", sampled(t=torch.zeros(3).long())),
    (r"`noise` must be torch.float32 \[2, 3\]", sampled(noise=torch.zeros(2))),
    (r"`draw` must be in \[0, 2\^32\), got -1", sampled(draw=-1)),
    (r"`row` must be torch.int32 \[any\] dense.*`table.start", advanced(row=torch.zeros(2))),
    (r"`table.coef` must be on cpu.*on meta", advanced(table=TABLE.to(META))),
    (r"`t` must be \[2\] or longer.*`cond_lane`", advanced(t=torch.zeros(1))),
    (r"`last` must be torch.int32 \[2\]", advanced(last=int32(1))),
    (r"`lane_row` must be torch.int32 \[2\]", advanced(lane_row=int32(1))),
    (r"`domain` must be in \[0, 2\^32\), got -1", lambda: ops.normal((2,), 0, 1, 0, domain=-1)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message[:40] for message, _ in REFUSED])
def test_argument_that_breaks_the_contract_is_named(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("seed", lambda: ops.normal((2,), 1.5, 1, 0)),
        ("sample_ids", lambda: ops.normal((2,), 1, [0.5], 0)),
        ("sample_ids", lambda: ops.normal((2,), 1, torch.tensor([0.5]), 0)),
        ("x", change(x=[1.0, 2.0])),
    ],
)
def test_argument_of_another_type_is_named(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=f"`{name}` must be"):
        call()


def test_refused_call_changes_nothing() -> None:
    given = operands()
    x, u, registers = (given[k].clone() for k in ("x", "u", "registers"))
    with pytest.raises(ValueError, match="`noise`"):
        ops.reverse_step(**given, noise=torch.zeros(1))
    for before, name in ((x, "x"), (u, "u"), (registers, "registers")):
        assert_same_bits(given[name], before)


@pytest.mark.parametrize("learned", [False, True])
def test_channels_that_do_not_fit_the_tables_variance_are_refused(learned: bool) -> None:
    given = operands(learned=learned)
    given["out"] = operands(learned=not learned)["out"]
    with pytest.raises(ValueError, match="learned"):
        ops.reverse_step(**given)


def test_seeds_are_one_for_all_or_one_for_each() -> None:
    each = ops.normal((3,), [5, 6], 2, 0)
    for b, seed in enumerate((5, 6)):
        assert torch.equal(each[b], ops.normal((3,), seed, [b], 0)[0])
    with pytest.raises(ValueError, match="seed"):
        ops.normal((3,), [5, 6, 7], 2, 0)


@pytest.mark.parametrize("ids", [[2**32], [-1], -3])
def test_ids_outside_of_32_bits_are_refused(ids: object) -> None:
    with pytest.raises(ValueError, match="sample_ids"):
        ops.normal((3,), 0, ids, 0)  # type: ignore[arg-type]


def test_a_number_of_samples_may_be_numpys() -> None:
    assert torch.equal(ops.normal((3,), 0, np.int64(2), 0), ops.normal((3,), 0, 2, 0))
