"""The fewest registers: what of a table's state the rest of the chain can still see, and nothing else.

Going backwards, W holds the linear functionals of the state that later rows need; before row r those are x
and W A. Only a basis of them has to be carried from row to row, so a sampler that kept a sample and a
derivative to add them up later needs one register for the sum.

The basis is chosen sparse, not orthonormal: the registers themselves where all of them are seen, else a
choice of the functionals. Registers that only wait stay as they are, which costs no traffic, and sizes (a
sample at sigma 80 beside an x0 of size 1) are not mixed, which keeps a float32 state accurate.
"""

from __future__ import annotations

import numpy as np

_RANK_TOL = 1e-11  # of functionals of length 1: rounding leaves about 1e-15
_CANCELLED = 32.0 * float(np.finfo(np.float64).eps)  # of the size of what was multiplied and added up


def reduce_registers(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same sampler with the fewest registers.

        W_r = [e0; basis of the register part of W_{r+1} A_r],   A'_r W_r = W_{r+1} A_r,   b'_r = W_{r+1} b_r

    Args:
        columns: from_state [rows, K+1, K+1], and from_x0, from_out, from_noise [rows, K+1].
    Returns:
        The same keys with K' <= K; x stays in place 0.
    Source: observability of linear time-varying systems (Kalman 1960); rows chosen by pivoted Gram-Schmidt.
    """
    matrices = columns["from_state"]
    drives = np.stack([columns[name] for name in ("from_x0", "from_out", "from_noise")], axis=2)
    seen = np.eye(1, matrices.shape[1])  # W after the last row: x
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # A', [b' c' d'], the last row first
    for matrix, drive in zip(matrices[::-1], drives[::-1], strict=True):
        pulled = seen @ matrix
        pulled[np.abs(pulled) <= _CANCELLED * np.linalg.norm(seen) * np.linalg.norm(matrix)] = 0.0
        basis, weights = _sparse_basis(pulled[:, 1:])
        steps.append((np.hstack([pulled[:, :1], weights]), seen @ drive))
        seen = np.zeros((1 + len(basis), matrices.shape[1]))
        seen[0, 0], seen[1:, 1:] = 1.0, basis
    return _laid_out(steps[::-1])


def _sparse_basis(functionals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A basis [k, n] of the row space of functionals [m, n], and weights [m, k] that make them of it."""
    used = np.flatnonzero(functionals.any(axis=0))
    chosen = _independent(functionals)
    if len(chosen) == len(used):
        return np.eye(functionals.shape[1])[used], functionals[:, used]
    basis = functionals[chosen]
    weights = np.linalg.lstsq(basis.T, functionals.T, rcond=None)[0].T
    weights[chosen] = np.eye(len(chosen))
    weights[~functionals.any(axis=1)] = 0.0
    return basis, weights


def _independent(rows: np.ndarray) -> list[int]:
    """Indices of rows that span all of them, by Gram-Schmidt with pivoting; registers' rows before x's."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    left = rows / np.where(length > 0, length, 1.0)
    chosen: list[int] = []
    while len(chosen) < min(rows.shape):
        norms = np.linalg.norm(left, axis=1)
        norms[0] *= 0.999  # on a tie a register that waits is kept as it is
        pivot = int(np.argmax(norms))
        if norms[pivot] <= _RANK_TOL:
            break
        chosen.append(pivot)
        direction = left[pivot] / np.linalg.norm(left[pivot])
        for _ in range(2):
            left = left - np.outer(left @ direction, direction)
        left[chosen] = 0.0
    return sorted(chosen)


def _laid_out(steps: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The columns, with a place for every register; one that only waits keeps its place, untouched."""
    size = max(1, *(matrix.shape[1] for matrix, _ in steps[1:])) if len(steps) > 1 else 1
    rows = len(steps)
    state = np.tile(np.eye(size), (rows, 1, 1))
    drives = np.zeros((rows, size, 3))
    after = [0]  # the places, after this row, of the functionals that later rows need
    for row in range(rows - 1, -1, -1):
        matrix, drive = steps[row]
        before = [0] * (matrix.shape[1] if row else 1)  # registers start at 0: row 0 reads none
        waits = np.hstack([matrix, drive])
        for column in range(1, len(before)):
            unit = np.eye(1, waits.shape[1], column)[0]
            before[column] = next((after[i] for i in range(1, len(after)) if (waits[i] == unit).all()), 0)
        free = [place for place in range(1, size) if place not in before]
        before = [0] + [place or free.pop(0) for place in before[1:]]
        state[row, after] = 0.0
        for i, place in enumerate(after):
            state[row, place, before] = matrix[i, : len(before)]
            drives[row, place] = drive[i]
        after = before
    names = ("from_x0", "from_out", "from_noise")
    return {"from_state": state, **{name: drives[:, :, i] for i, name in enumerate(names)}}
