"""The sampling table: a whole sampler as numbers, one row for each evaluation of the network.

    u    = c_in x                                  the network's input, at time t
    x0   = clip(x0_from_x x + x0_from_out out)                                                    (clip.py)
    s'_j = sum_k from_state[j, k] s_k + from_x0[j] x0 + from_out[j] out + from_noise[j] f z,   j = 0..K

s = (x, r_1, ..., r_K): the sample and K registers, which start at 0; z ~ N(0, I); f is 1, or with a learned
variance exp((w log_var_max + (1 - w) log_var_min) / 2), w = (v + 1) / 2, v the second half of the network's
channels. Sums run from left to right. A coefficient 0 is a term that is not there: 0 * NaN never appears.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from dataclasses import replace as _replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fastdiff.clip import Clip, DynamicThreshold, clip_from_config, clip_of, clip_to_config, clipped
from fastdiff.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from fastdiff.kernels.layout import PackedTable

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_HEAD = ("t", "c_in", "x0_from_x", "x0_from_out", "log_var_min", "log_var_max")
_BODY = ("from_x0", "from_out", "from_noise")
_ENDS = ("alpha", "sigma")
_ARRAYS = (*_HEAD, "from_state", *_BODY, *_ENDS, "ends_step")
_FORMAT = "fastdiff sampling table 1"


@dataclass(frozen=True, eq=False, repr=False)
class SamplingTable:
    """A sampler compiled to rows of coefficients, in float64 and immutable; see the formulas of this module.

    Attributes:
        t, c_in: [rows] what the network is told, and the factor of its input.
        x0_from_x, x0_from_out: [rows] how x0 follows from x and the output.
        log_var_min, log_var_max: [rows] range of a learned variance; 0 and 0 where it is not learned.
        from_state: [rows, K+1, K+1]; from_x0, from_out, from_noise: [rows, K+1].
        alpha, sigma: [rows+1] the marginal of the sample entering each row, and of the result.
        ends_step: [rows] bool, False for the inner stages of a step.
        init_scale: x_T = init_scale * z.
        clip: range (lo, hi) of x0, a `DynamicThreshold`, or None.
        name: the solver's.
        learned: whether the network's output has 2C channels, the second half for its variance.
        exempt: moments that the self-check does not demand, of "mean" and "noise".
    Raises:
        ValueError: shapes that do not match, numbers that are not finite, a clip that is no range.
    """

    t: np.ndarray
    c_in: np.ndarray
    x0_from_x: np.ndarray
    x0_from_out: np.ndarray
    log_var_min: np.ndarray
    log_var_max: np.ndarray
    from_state: np.ndarray
    from_x0: np.ndarray
    from_out: np.ndarray
    from_noise: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    ends_step: np.ndarray
    init_scale: float
    clip: Clip = None
    name: str = "custom"
    learned: bool = False
    exempt: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = np.shape(self.from_state)
        if len(shape) != 3 or shape[0] < 1 or shape[1] != shape[2]:
            raise ValueError(f"`from_state` must be [rows, K+1, K+1] with rows >= 1, got shape {list(shape)}")
        wanted: dict[str, tuple[int, ...]] = dict.fromkeys((*_HEAD, "ends_step"), shape[:1])
        wanted |= dict.fromkeys(_BODY, shape[:2]) | dict.fromkeys(_ENDS, (shape[0] + 1,))
        for name in _ARRAYS:
            array = np.array(getattr(self, name), bool if name == "ends_step" else np.float64)
            if array.shape != wanted.get(name, shape):
                raise ValueError(f"`{name}` must be {list(wanted[name])}, got shape {list(array.shape)}")
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise ValueError(f"`{name}` must be finite, got {array[row]} in row {row}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if not 0 < self.init_scale < np.inf:
            raise ValueError(f"`init_scale` must be positive and finite, got {self.init_scale}")
        object.__setattr__(self, "clip", clip_of(self.clip))
        if not set(self.exempt) <= {"mean", "noise"}:
            raise ValueError(f"`exempt` may hold 'mean' and 'noise', got {self.exempt}")

    @property
    def num_rows(self) -> int:
        """How often the network is called."""
        return len(self.t)

    @property
    def registers(self) -> int:
        """K, the state-sized memories besides x."""
        return self.from_state.shape[1] - 1

    def with_clip(self, clip: Clip) -> SamplingTable:
        """The same table with another range of x0, or none."""
        return _replace(self, clip=clip)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance [rows+1] of x before each row and at the end, for data that is the constant 1.

        The network is taken to be exact, out = (1 - x0_from_x x) / x0_from_out; clip and learned variance are
        left out. A sampler that keeps the forward chain's marginals has mean alpha and variance sigma^2.

            m' = A~ m + from_x0 + c,   F' = [A~ F, from_noise],   c = from_out / x0_from_out
            A~ = from_state - x0_from_x c e0^T,   start m = alpha_0 e0, F = sigma_0 e0;   variance = |F_0|^2

        F is a square root of the covariance: it loses the last bits of its terms, not those of their squares.

        Raises:
            ValueError: a row that uses an output which its x0 does not depend on.
        """
        _, _, mean, std = self._propagate()
        return mean[:, 0], std[:, 0] ** 2

    def _propagate(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A~ [rows, K+1, K+1], from_x0 + c [rows, K+1], and the state's mean and std [rows+1, K+1]."""
        used = (self.from_out != 0).any(axis=1)
        if (used & (self.x0_from_out == 0)).any():
            row = int(np.argmax(used & (self.x0_from_out == 0)))
            raise ValueError(f"row {row} reads `out`, but its `x0_from_out` is 0, so no exact output exists")
        c = self.from_out / np.where(used, self.x0_from_out, 1.0)[:, None]
        matrix = self.from_state.copy()
        matrix[:, :, 0] -= self.x0_from_x[:, None] * c
        shift = self.from_x0 + c
        noisy: np.ndarray = (self.from_noise != 0).any(axis=1)
        size = self.registers + 1
        free, width = size + 1, size + 1 + min(16, int(noisy.sum()))  # columns: m, K+1 of F, room for noise
        states = np.zeros((self.num_rows + 1, size, width))
        states[0, 0, :2] = self.alpha[0], self.sigma[0]
        for row in range(self.num_rows):
            state = np.matmul(matrix[row], states[row], out=states[row + 1])
            state[:, 0] += shift[row]
            if noisy[row]:
                if free == width:  # K+1 columns hold the same covariance
                    state[:, 1 : size + 1] = np.linalg.qr(state[:, 1:].T)[1].T
                    state[:, size + 1 :] = 0.0
                    free = size + 1
                state[:, free] = self.from_noise[row]
                free += 1
        return matrix, shift, states[:, :, 0], np.linalg.norm(states[:, :, 1:], axis=2)

    def check(self, tol: float = 1e-12) -> None:
        """Check that every step lands on the marginal that it claims: mean alpha', variance sigma'^2.

        Args:
            tol: largest deviation, of the variance relative to max(1, sigma'^2). Where x was added up from
                terms above 1 (Heun's halves at a large sigma_ve, a polynomial through uneven steps) it is
                relative to them too: they leave their last bits behind. What is `exempt` is not checked.
        Raises:
            ValueError: the first row that misses, by how much.
        """
        matrix, shift, mean, std = self._propagate()
        goal = np.maximum(1.0, self.sigma)
        errors = {
            "mean": np.abs(mean[:, 0] - self.alpha),
            "noise": np.abs(std[:, 0] ** 2 - self.sigma**2) / goal**2,
        }
        demanded = [moment for moment in errors if moment not in self.exempt]
        if all((errors[moment][1:][self.ends_step] <= tol).all() for moment in demanded):
            return
        size = _sizes(matrix, np.abs(mean) + std, np.abs(shift))
        errors["mean"] /= np.maximum(1.0, size)
        errors["noise"] /= np.maximum(1.0, size / goal)
        for moment in demanded:
            missed = self.ends_step & ~(errors[moment][1:] <= tol)
            if missed.any():
                row = int(np.argmax(missed))
                raise ValueError(
                    f"table {self.name!r} misses the {moment} of its level in row {row} "
                    f"by {errors[moment][row + 1]:.3g} (allowed {tol:.3g}); "
                    f"correct the row, or add {moment!r} to `exempt` if the sampler is meant to"
                )

    def evaluate(
        self,
        model: Callable[[Array, Array], Array],
        x: Array,
        noise: Any = None,
        clip: Clip = None,
    ) -> Array:
        """Run the chain in float64 as the formulas stand: the reference of every other implementation.

        Args:
            model: (x_in, t[B]) -> out, of x_in's shape, or with 2C channels where the table says `learned`.
            x: [B, ...] NumPy array or tensor, the state entering row 0 (init_scale * z for a fresh sample).
            noise: noise[row] of x's shape, the z of that row; None where no row adds noise.
            clip: in place of the table's own.
        Returns:
            The sample, float64, of x's kind and shape.
        Raises:
            ValueError: noise is missing or of another shape, or the output's shape is not the table's.
        """
        limits = self.clip if clip is None else clip_of(clip)
        x = x.double() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)
        state = [x] + [_zeros(x)] * self.registers
        for row in range(self.num_rows):
            x = state[0]
            out = model(float(self.c_in[row]) * x, _full(x, self.t[row]))
            out = out.double() if isinstance(out, torch.Tensor) else np.asarray(out, np.float64)
            out, v = self._split(x, out)
            x0 = None
            if self.from_x0[row].any():
                x0 = _sum(x, (self.x0_from_x[row], x), (self.x0_from_out[row], out))
                x0 = clipped(x0, limits)
            z = self._noise(row, x, noise, v) if self.from_noise[row].any() else None
            state = [
                _sum(
                    x,
                    *zip(self.from_state[row, j], state, strict=True),
                    (self.from_x0[row, j], x0),
                    (self.from_out[row, j], out),
                    (self.from_noise[row, j], z),
                )
                for j in range(self.registers + 1)
            ]
        return state[0]

    def _split(self, x: Any, out: Any) -> tuple[Any, Any]:
        """The network's prediction and its variance channels."""
        wanted = tuple(x.shape)
        if self.learned:
            wanted = (wanted[0], 2 * wanted[1], *wanted[2:])
        if tuple(out.shape) != wanted:
            channels = "2C channels, as its variance is learned" if self.learned else "the input's shape"
            raise ValueError(f"`model` must return {channels}: {list(wanted)}, got {list(out.shape)}")
        return (out[:, : x.shape[1]], out[:, x.shape[1] :]) if self.learned else (out, None)

    def _noise(self, row: int, x: Any, noise: Any, v: Any) -> Any:
        """f z of one row."""
        if noise is None:
            raise ValueError(f"`noise` must hold z for every row, got None, but row {row} adds noise")
        z = noise[row]
        if tuple(z.shape) != tuple(x.shape):
            raise ValueError(f"`noise[{row}]` must have x's shape {list(x.shape)}, got {list(z.shape)}")
        z = z.double() if isinstance(z, torch.Tensor) else np.asarray(z, np.float64)
        low, high = float(self.log_var_min[row]), float(self.log_var_max[row])
        if v is None or low == high == 0.0:
            return z
        w = (v + 1.0) / 2.0
        half_log = 0.5 * (w * high + (1.0 - w) * low)
        return z * (half_log.exp() if isinstance(half_log, torch.Tensor) else np.exp(half_log))

    def pack(
        self,
        device: Any = None,
        registers: int | None = None,
        endings: Mapping[int, tuple[float, float, float, float]] | None = None,
    ) -> PackedTable:
        """The table as the kernels read it, rounded to float32 once; K is padded to `registers`.

        Args:
            endings: row -> what happens after it where a part of the image is known (fastdiff/editing.py).
        """
        from fastdiff.kernels import layout

        columns = {name: getattr(self, name) for name in (*_HEAD, "from_state", *_BODY)}
        clip, threshold = self.clip, None
        if isinstance(clip, DynamicThreshold):
            threshold, clip = (clip.quantile, clip.largest or np.inf), None
        return layout.pack(
            **columns,
            clip=clip,
            threshold=threshold,
            endings=endings,
            registers=registers,
            learned=self.learned,
            device=device,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to `path` (safetensors, JSON for what is no array), bit for bit and atomically."""
        tensors = {name: torch.tensor(getattr(self, name)) for name in _ARRAYS}
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}
        rest["clip"] = clip_to_config(self.clip)
        save_tensors(path, tensors, {"format": _FORMAT, "table": json.dumps(rest)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SamplingTable:
        """The table that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, a pickle, or holds something else than one table.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT or set(tensors) != set(_ARRAYS):
            raise ValueError(
                f"`path` must hold a sampling table ({_FORMAT!r}), got {os.fspath(path)!r} with format "
                f"{metadata.get('format')!r}, arrays missing {sorted(set(_ARRAYS) - set(tensors))}, "
                f"unknown {sorted(set(tensors) - set(_ARRAYS))}"
            )
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        try:
            rest = json.loads(metadata["table"])
            rest["clip"] = clip_from_config(rest["clip"])
            rest["exempt"] = tuple(rest["exempt"])
            return cls(**arrays, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`path` must hold a sampling table, got {os.fspath(path)!r}, damaged: {error}"
            ) from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingTable):
            return NotImplemented
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    def __hash__(self) -> int:
        return hash((self.name, self.num_rows, self.from_state.tobytes(), self.from_noise.tobytes()))

    def __repr__(self) -> str:
        rows, registers = self.num_rows, self.registers
        return f"SamplingTable({self.name!r}, rows={rows}, registers={registers}, clip={self.clip})"


def _sizes(matrix: np.ndarray, state: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """[rows+1] the largest term whose rounding x holds: of its own row, or passed on from an earlier one."""
    matrix = np.abs(matrix)
    terms = (matrix * state[:-1, None, :]).sum(axis=2) + shift
    sizes = [state[0]]
    for row in range(len(matrix)):
        sizes.append(np.maximum(terms[row], (matrix[row] * sizes[-1]).max(axis=1)))
    return np.array(sizes)[:, 0]


def _sum(like: Any, *terms: tuple[Any, Any]) -> Any:
    """sum of coefficient * value from left to right, without the terms whose coefficient is 0."""
    total = None
    for coef, value in terms:
        if coef != 0:
            total = float(coef) * value if total is None else total + float(coef) * value
    return _zeros(like) if total is None else total


def _zeros(like: Any) -> Any:
    return torch.zeros_like(like) if isinstance(like, torch.Tensor) else np.zeros_like(like)


def _full(x: Any, t: float) -> Any:
    """t for each sample of x, [B] float64."""
    return x.new_full((x.shape[0],), t) if isinstance(x, torch.Tensor) else np.full(x.shape[0], t)
