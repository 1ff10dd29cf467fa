"""Operands of any strides: an operator's results do not depend on how what it reads lies in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, random_table

from fastdiff import ops
from fastdiff.kernels import _torch_ops

SHAPE = (3, 4, 5)


def spread(a: Any) -> Any:
    """The same numbers, each beside one that must not be read."""
    if not isinstance(a, torch.Tensor) or a.dim() == 0:
        return a
    apart = torch.stack([a, torch.full_like(a, 3)], -1)[..., 0]
    assert not apart.is_contiguous()
    return apart


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    g = torch.Generator().manual_seed(0)
    x0, out, noise = (torch.randn(4, *SHAPE, generator=g) for _ in range(3))
    levels, t = torch.rand(10, 2, generator=g), torch.tensor([2, 9, 0, 4])
    key = dict(seed=torch.tensor([1, -2, 3, 4]), sample_ids=torch.tensor([5, 0, 9, 2]), draw=torch.arange(4))
    common = dict(x0=x0, alpha_sigma=levels, t=t, **key)
    row = torch.tensor([1, 2, 0, 3], dtype=torch.int32)
    lanes = dict(last=row + 1, cond_lane=row, uncond_lane=row + 4)
    features = torch.randn(4, 8, 5, 3, generator=g)
    vectors = [torch.randn(8, generator=g), torch.randn(4, 8, generator=g)]

    def advance(**lane: Any) -> list[torch.Tensor]:
        here, times, lane_row = row.clone(), torch.zeros(8), torch.zeros(8, dtype=torch.int32)
        ops.advance(here, random_table(0, 0), times, lane_row=lane_row, **lane)
        return [here, times, lane_row]

    def norm(**given: Any) -> torch.Tensor:
        return ops.group_norm_silu(num_groups=4, **given)

    return {
        "normal": (lambda **k: ops.normal(SHAPE, **k), key),
        "q_sample": (lambda **k: ops.q_sample(target="v", **k), common),
        "q_sample, noise": (lambda **k: ops.q_sample(target="eps", **k), common | dict(noise=noise)),
        "denoising_loss": (
            lambda **k: ops.denoising_loss(target="v", **k),
            common | dict(out=out, weight=torch.rand(4, generator=g)),
        ),
        "advance": (advance, lanes),
        "group_norm_silu": (
            norm,
            dict(x=features, residual=features + 1, weight=vectors[0], scale=vectors[1], shift=vectors[1]),
        ),
    }


@pytest.mark.parametrize("name", cases())
def test_strides_change_no_bit(name: str) -> None:
    _torch_ops.operators(wait=True)
    run, given = cases()[name]
    expected = run(**given)
    actual = run(**{k: spread(a) for k, a in given.items()})
    if isinstance(expected, torch.Tensor):
        expected, actual = [expected], [actual]
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one, other)


def test_spreading_keeps_the_numbers_and_moves_them_apart() -> None:
    a = torch.arange(6.0).view(2, 3)
    assert torch.equal(spread(a), a)
    assert spread(a).stride() == (6, 2)
