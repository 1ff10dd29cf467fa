"""How a sampling table's row lies in memory: the one source for the host that packs it and the kernels.

A packed table is two tensors. `coef` [rows + 1, width(K)] float32 holds the row's numbers, `plan`
[rows + 1, 4] int32 what they mean for memory: which operands the row reads, which it writes. The last row is
the *idle row*: x' = x, nothing read, nothing written.

    coef: T, C_IN, C_IN_NEXT, X0_FROM_X, X0_FROM_OUT, CLIP_LO, CLIP_HI, LOG_VAR_MIN, LOG_VAR_MAX, LARGEST,
        KNOWN_ALPHA, KNOWN_SIGMA, FREE_RATIO, FREE_STD, then for each output j = 0..K
          from_state[j, 0..K], from_x0[j], from_out[j], from_noise[j]
    plan: DRAW (the noise's `draw`), READS and WRITES (bits below), QUANTILE (in units of 2^-30)

LARGEST and QUANTILE belong to dynamic thresholding (threshold.py), KNOWN_* and FREE_* to a row after which a
part of the image is known (reverse_step.py).

The bits follow from the coefficients: a coefficient 0 is a term that is not there, so what only it would
need is not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

T, C_IN, C_IN_NEXT, X0_FROM_X, X0_FROM_OUT, CLIP_LO, CLIP_HI, LOG_VAR_MIN, LOG_VAR_MAX = range(9)
LARGEST, KNOWN_ALPHA, KNOWN_SIGMA, FREE_RATIO, FREE_STD, HEAD = range(9, 15)
DRAW, READS, WRITES, QUANTILE, PLAN_WIDTH = range(5)
QUANTILE_BITS, QUANTILE_UNIT = 30, 2.0**-30

MAX_REGISTERS = 7
# bits 0..7 of READS: state k is read; bits 0..7 of WRITES: state j changes
READS_OUT, READS_X0, READS_NOISE, READS_LEARNED, READS_CLIP = 1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12
READS_THRESHOLD, READS_KNOWN, READS_KNOWN_NOISE = 1 << 13, 1 << 14, 1 << 15
WRITES_U, WRITES_X0 = 1 << 8, 1 << 9  # WRITES_X0: the row is no idle one, so that it has a preview


def width(registers: int) -> int:
    """Columns of `coef` for K registers: 14 + (K+1) (K+4)."""
    return HEAD + (registers + 1) * (registers + 4)


@dataclass(frozen=True, eq=False)
class PackedTable:
    """A sampling table as the kernels read it.

    Attributes:
        coef: [rows + 1, width(registers)] float32; the last row is the idle row.
        plan: [rows + 1, 4] int32 on the same device.
        registers: K, the number of state-sized registers besides x.
        learned: whether the network's output holds a variance behind its prediction.
        threshold: whether rows clip x0 by its own quantile, for which a step needs `x0_scale`.
    """

    coef: torch.Tensor
    plan: torch.Tensor
    registers: int
    learned: bool = False
    threshold: bool = False

    @property
    def num_rows(self) -> int:
        """Rows that call the network; also the index of the idle row."""
        return self.coef.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.coef.device

    def start(self, batch: int) -> torch.Tensor:
        """[batch] int32 row indices on the table's device, all at row 0."""
        return torch.zeros(batch, dtype=torch.int32, device=self.device)

    def to(self, device: Any) -> PackedTable:
        """The same table on another device."""
        return replace(self, coef=self.coef.to(device), plan=self.plan.to(device))


def join(tables: Sequence[PackedTable]) -> PackedTable:
    """Several packed tables of one K behind each other: one launch serves slots at rows of any of them.

    Table i begins at the sum of the lengths, idle rows included, of those before it.
    """
    coef, plan = (torch.cat([getattr(table, name) for table in tables]) for name in ("coef", "plan"))
    flags = (any(getattr(table, name) for table in tables) for name in ("learned", "threshold"))
    return PackedTable(coef, plan, tables[0].registers, *flags)


def pack(
    *,
    t: np.ndarray,
    c_in: np.ndarray,
    x0_from_x: np.ndarray,
    x0_from_out: np.ndarray,
    log_var_min: np.ndarray,
    log_var_max: np.ndarray,
    from_state: np.ndarray,
    from_x0: np.ndarray,
    from_out: np.ndarray,
    from_noise: np.ndarray,
    clip: tuple[float, float] | None = None,
    threshold: tuple[float, float] | None = None,
    endings: Mapping[int, tuple[float, float, float, float]] | None = None,
    draw: np.ndarray | None = None,
    registers: int | None = None,
    learned: bool = False,
    device: Any = None,
) -> PackedTable:
    """Round a table's float64 columns to float32, once, add the idle row and derive each row's plan.

    Args:
        t, c_in, x0_from_x, x0_from_out, log_var_min, log_var_max: [rows].
        from_state: [rows, K+1, K+1]; from_x0, from_out, from_noise: [rows, K+1].
        clip: range of x0, or None.
        threshold: (quantile, largest) of dynamic thresholding, in place of `clip`.
        endings: row -> (KNOWN_ALPHA, KNOWN_SIGMA, FREE_RATIO, FREE_STD), what follows it where a part of the
            image is known.
        draw: [rows] the noise's `draw` of each row; the row's own index by default.
        registers: pad K up to this number, so that tables of different K share one launch.
        learned: whether the network gives a variance behind its prediction.
        device: where the tensors go.

    Raises:
        ValueError: more registers than a plan has bits for, or fewer than the table has.
    """
    rows, own = from_state.shape[0], from_state.shape[1] - 1
    k = own if registers is None else registers
    if own > MAX_REGISTERS:
        raise ValueError(
            f"a table that is packed must have at most {MAX_REGISTERS} registers, got {own}; its solver "
            "remembers too much: give it a lower order, or a shorter history"
        )
    if not own <= k <= MAX_REGISTERS:
        raise ValueError(f"`registers` must be in [{own}, {MAX_REGISTERS}], got {k}")
    coef = np.zeros((rows + 1, width(k)), np.float32)
    head = coef[:rows]
    head[:, T], head[:, C_IN], head[: rows - 1, C_IN_NEXT] = t, c_in, c_in[1:]
    head[:, X0_FROM_X], head[:, X0_FROM_OUT] = x0_from_x, x0_from_out
    head[:, LOG_VAR_MIN], head[:, LOG_VAR_MAX] = log_var_min, log_var_max
    if threshold is not None:
        clip = (-1.0, 1.0)
    coef[:, CLIP_LO], coef[:, CLIP_HI] = (-np.inf, np.inf) if clip is None else clip
    for row, ending in (endings or {}).items():
        coef[row, KNOWN_ALPHA:HEAD] = ending
    # outputs[row, j] = from_state[j, 0..K], from_x0[j], from_out[j], from_noise[j]; registers that
    # padding adds stay as they are
    outputs = np.zeros((rows + 1, k + 1, k + 4), np.float32)
    outputs[:, np.arange(k + 1), np.arange(k + 1)] = 1.0
    outputs[:rows, : own + 1, : own + 1] = from_state
    outputs[:rows, : own + 1, k + 1] = from_x0
    outputs[:rows, : own + 1, k + 2] = from_out
    outputs[:rows, : own + 1, k + 3] = from_noise
    coef[:, HEAD:] = outputs.reshape(rows + 1, -1)
    plan = np.zeros((rows + 1, PLAN_WIDTH), np.int32)
    plan[:rows, DRAW] = np.arange(rows) if draw is None else draw
    ended = np.isin(np.arange(rows + 1), list(endings or ()))
    plan[:, READS], plan[:, WRITES] = _plan(coef, outputs, ended)
    plan[:rows, WRITES] |= WRITES_X0
    if clip is not None:
        plan[:rows, READS] |= READS_CLIP
    if threshold is not None:
        plan[:rows, READS] |= READS_THRESHOLD
        plan[:rows, QUANTILE] = round(threshold[0] / QUANTILE_UNIT)
        coef[:rows, LARGEST] = threshold[1]
    coef_, plan_ = (torch.from_numpy(array).to(device) for array in (coef, plan))
    return PackedTable(coef_, plan_, k, learned, threshold is not None)


def _plan(coef: np.ndarray, outputs: np.ndarray, ended: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """READS and WRITES of each row, from what is not zero and what is not the identity.

    `ended` [rows + 1] are the rows after which a part of the image is known.
    """
    k = outputs.shape[1] - 1
    writes = np.zeros(len(coef), np.int32)
    reads = np.zeros(len(coef), np.int32)
    uses = np.zeros((len(coef), k + 4), bool)  # terms that some written output has
    for j in range(k + 1):
        identity = np.zeros(k + 4, np.float32)
        identity[j] = 1.0
        changed = (outputs[:, j] != identity).any(axis=1)
        writes |= changed.astype(np.int32) << j
        uses |= (outputs[:, j] != 0) & changed[:, None]
    feeds_u = coef[:, C_IN_NEXT] != 0
    writes |= np.where(feeds_u, np.int32(WRITES_U), np.int32(0)) | ended.astype(np.int32)
    # the next input is made of x', and so is the state with its known part
    uses[:, : k + 4] |= (feeds_u | ended)[:, None] & (outputs[:, 0] != 0)
    x0 = uses[:, k + 1]
    uses[:, 0] |= x0 & (coef[:, X0_FROM_X] != 0)
    out = uses[:, k + 2] | (x0 & (coef[:, X0_FROM_OUT] != 0))
    noise = uses[:, k + 3]
    learned = noise & ((coef[:, LOG_VAR_MIN] != 0) | (coef[:, LOG_VAR_MAX] != 0))
    for bit, used in (
        *((1 << s, uses[:, s]) for s in range(k + 1)),
        (READS_OUT, out),
        (READS_X0, x0),
        (READS_NOISE, noise),
        (READS_LEARNED, learned),
        (READS_KNOWN, ended),
        (READS_KNOWN_NOISE, ended & ((coef[:, KNOWN_SIGMA] != 0) | (coef[:, FREE_STD] != 0))),
    ):
        reads |= np.where(used, np.int32(bit), np.int32(0))
    return reads, writes
