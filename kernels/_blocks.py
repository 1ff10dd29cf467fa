"""How the elementwise kernels cut B samples of N elements into programs, with 64-bit addresses throughout.

A program takes one block of neighbouring elements of one sample, 8 elements a thread: 128-bit accesses in
half precision, and `reverse_step` within 64 registers. Samples lie on the grid's first axis and blocks on the
other two, so that no program divides; those axes end at 65 535.
"""

from __future__ import annotations

from typing import Any

import torch

from ._triton import jit, tl

_PER_THREAD = 8
_LARGEST = 1024
_GRID_END = 65535


def cut(batch: int, n: int, *tensors: torch.Tensor | None) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Grid and options of a launch over `batch` samples of `n` elements that reads or writes `tensors`.

    WIDTH is how many neighbouring elements a thread holds: those of a 128-bit access to the narrowest tensor.
    `enable_fp_fusion=False` belongs to every exact kernel: a fused multiply-add rounds once, NumPy twice.
    """
    block = min(_LARGEST, max(32 * _PER_THREAD, 1 << max(n - 1, 0).bit_length()))
    blocks = -(-n // block)
    high = -(-blocks // _GRID_END)
    half = any(t is not None and t.element_size() == 2 for t in tensors)
    warp = 64 if torch.version.hip else 32
    options = dict(BLOCK=block, WIDTH=8 if half else 4, num_warps=max(1, block // (warp * _PER_THREAD)))
    return (batch, -(-blocks // high), high), options | dict(enable_fp_fusion=False)


@jit
def first_element(BLOCK: tl.constexpr):
    """The first element of its sample that this program takes, int64."""
    return (tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)).to(tl.int64) * BLOCK


@jit
def slot_row(slot, row_ptr, cond_ptr, num_rows, LANES: tl.constexpr):
    """The slot's row, the idle one where it is out of range or has no lane, and its lane of the network."""
    row = tl.load(row_ptr + slot)
    row = tl.where((row < 0) | (row > num_rows), num_rows, row)
    lane = slot
    if LANES:
        lane = tl.load(cond_ptr + slot).to(tl.int64)
        row = tl.where(lane < 0, num_rows, row)
    return row.to(tl.int64), lane
