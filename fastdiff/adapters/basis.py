"""Another project's sampler is read off by running its own code on a basis.

Every tensor that depends on the state is a `Basis`: its last axis holds coordinates instead of pixels. Code
that is linear in the state cannot tell the difference, and what comes out of it *is* the row. A `Tape`
watches every operation: it hands out the noise and the clipped x0 as new symbols, gives each tensor that
outlives an evaluation of the network a `Register` when it is read again, and refuses by name what is not
linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from fastdiff.adapters import operations as ops
from fastdiff.clip import Clip
from fastdiff.solvers.forms import Register

WIDTH = 48  # coordinates: x, out, x0, a few draws of noise, and the registers that one evaluation reads
CHANNELS = 3  # some samplers take `out[:, :3]` of a network with a learned variance
ORIGIN = WIDTH - 1  # nothing lies here: what is not 0 afterwards is a constant that was added
LEARNED = WIDTH - 2  # the network's variance channels
_STATE = (1, CHANNELS, 1, WIDTH)


class Refused(ValueError):
    """What another project's sampler does cannot be a table."""


class Basis(torch.Tensor):
    """A tensor whose last axis holds coordinates, over the symbols of the evaluation that made it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    epoch: int


_NESTS = frozenset((Basis, list, tuple, dict))  # what a tensor of the state is, or can be in


@dataclass
class Epoch:
    """What happens from one evaluation of the network to the next; coordinates are over `symbols`.

    Attributes:
        symbols: the coordinates' meaning: "x", "out", "x0", ("z", k) for the sampler's k-th draw, a
            `Register`, or "half", an x0 that is clipped to one side and waits for the other.
        x: [WIDTH] the network's next input (or the result), by its coordinates.
        saved: register -> coordinates of what it remembers from here on.
        clipped: (x0_from_x, x0_from_out, clip) of the x0 that was clipped, or None.
        half: the same of one that waits, with an infinite end.
    """

    symbols: list[Any] = field(default_factory=lambda: ["x", "out"])
    x: np.ndarray | None = None
    saved: dict[Register, np.ndarray] = field(default_factory=dict)
    clipped: tuple[float, float, Clip] | None = None
    half: tuple[float, float, tuple[float, float]] | None = None


class Tape(TorchFunctionMode):
    """Records a sampler that runs on a basis. As a context it watches one thread, until the block ends.

    Args:
        name: the sampler's, for messages.
        learned: the value in [-1, 1] that the network's variance channels are taken to have, or None where
            there are none.
    Attributes:
        epochs: one for each evaluation of the network.
        start: the epoch before the first evaluation.
        draws: how often noise was drawn.
        rounds: whether the code rounds the state to less than float64.
    """

    def __init__(self, name: str, learned: float | None = None) -> None:
        super().__init__()
        self.name = name
        self.learned = learned
        self.epochs: list[Epoch] = []
        self.start = Epoch()
        self.draws = 0
        self.rounds = False
        self._homes: dict[int, int] = {}  # the k-th draw -> the epoch at whose end it entered the state x
        self._registers: dict[tuple[int, bytes], Register] = {}
        self._fresh: dict[int, tuple[Basis, torch.Tensor]] = {}  # earlier epochs' tensors, read in this one

    @property
    def epoch(self) -> int:
        """Index of the evaluation that ran last; -1 before the first."""
        return len(self.epochs) - 1

    @property
    def now(self) -> Epoch:
        return self._epoch(self.epoch)

    def _epoch(self, index: int) -> Epoch:
        return self.epochs[index] if index >= 0 else self.start

    def unit(self, symbol: Any) -> Basis:
        """The state [1, C, 1, WIDTH] that is one symbol of this epoch."""
        with torch._C.DisableTorchFunction():
            coords = torch.zeros(_STATE, dtype=torch.float64)
            coords[..., self._slot(symbol)] = 1.0
            return self._basis(coords)

    def evaluate(self, x: Any) -> Basis:
        """The network is called for the state x, the symbol "x" from here on. Returns its output.

        With a learned variance there are 2C channels, of which the second half is no part of the state.
        """
        self.close(x)
        self.epochs.append(Epoch())
        self._fresh = {}
        if self.learned is None:
            return self.unit("out")
        with torch._C.DisableTorchFunction():
            coords = torch.zeros(1, 2 * CHANNELS, 1, WIDTH, dtype=torch.float64)
            coords[:, :CHANNELS, :, self._slot("out")] = 1.0
            coords[:, CHANNELS:, :, LEARNED] = 1.0
            return self._basis(coords)

    def clip(self, x0: Any, clip: Clip, name: str = "thresholding") -> Basis:
        """An x0 that the code clips, by the operation of this name, is a new symbol from here on.

        With one end infinite it is one that only a clip to the other side may use.
        """
        if not self.epochs:
            self.refuse(f"`{name}` clips the start of the chain, and a table clips x0 alone")
        coords = self.coordinates(x0)
        clipped, half = self.now.clipped, self.now.half
        if clipped and clipped[2] == clip and self._is(coords, "x0"):
            return self.unit("x0")
        if half and isinstance(clip, tuple) and self._is(coords, "half"):
            px, po, (low, high) = half
            clip = (max(low, clip[0]), min(high, clip[1]))
        elif not coords[2:].any():
            px, po = float(coords[0]), float(coords[1])
        else:
            self.refuse(f"`{name}` clips something else than one x0 made of x and the network's output")
        if isinstance(clip, tuple) and not clip[0] < clip[1]:
            self.refuse(f"`{name}` clips to {clip}, which is no range")
        whole = not isinstance(clip, tuple) or np.isfinite(clip).all()
        kept, symbol = ("clipped", "x0") if whole else ("half", "half")
        if getattr(self.now, kept) not in (None, (px, po, clip)):
            self.refuse(f"`{name}` clips something else than one x0 to one range")
        setattr(self.now, kept, (px, po, clip))
        return self.unit(symbol)

    def close(self, x: Any) -> None:
        """x ends this epoch: it goes into the network next, or is the result."""
        self.now.x = self.coordinates(x)
        self._require_both_bounds(self.now, self.now.x)
        for slot in np.flatnonzero(self.now.x[: len(self.now.symbols)]):
            symbol = self.now.symbols[slot]
            if isinstance(symbol, tuple):
                self._homes.setdefault(symbol[1], self.epoch)

    def coordinates(self, x: Any) -> np.ndarray:
        """[WIDTH] coordinates of a state in this epoch's basis."""
        if not isinstance(x, Basis):
            self.refuse("its state does not depend on the start, the network or the noise")
        with torch._C.DisableTorchFunction():
            lanes = self._current(x).reshape(-1, WIDTH).numpy()
        if not np.isfinite(lanes).all():
            self.refuse("a coefficient is not finite")
        if x.shape != _STATE or (lanes != lanes[0]).any():
            self.refuse("it treats the elements of a sample differently")
        return lanes[0].copy()

    def refuse(self, reason: str) -> NoReturn:
        """Raise the error that names the sampler, the evaluation and the reason."""
        where = f"after evaluation {self.epoch}" if self.epochs else "before the first evaluation"
        raise Refused(f"{self.name} cannot be imported: {where} of the network, {reason}")

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in ops.NORMAL:
            return self._draw(args, kwargs)
        if name in ops.OTHER_RANDOM:
            self.refuse(f"it draws with `{name}`; only `randn` and `randn_like` are known to be N(0, 1)")
        if not kwargs and _NESTS.isdisjoint(map(type, args)):
            return func(*args)  # most operations are on coefficients alone
        tainted = [leaf for leaf in ops.leaves((args, kwargs)) if isinstance(leaf, Basis)]
        if not tainted:
            return func(*args, **kwargs)
        if name in ops.CONSTANTS:
            constant = func(*args, **kwargs)  # a sum that starts at zeros becomes a part of the state
            return self._basis(constant.double()) if name == "zeros_like" else constant
        if name in ops.QUERIES or name == "__get__":
            answer = func(*ops.changed(args, Basis, _plain), **kwargs)
            if not isinstance(answer, torch.Tensor):
                return answer
        if name in ops.READS_VALUES:
            self.refuse(f"`{name}` reads the values of the state, on which its next operations may depend")
        bounds = ops.bounds(name, args, kwargs, Basis)
        if bounds is not None:
            inplace = ops.writes_in_place(name) or kwargs.get("inplace", False)
            return self._clip(name, *bounds, inplace)
        if name in ops.CASTS:
            return self._cast(func, args, kwargs)
        return self._apply(func, name, args, kwargs, tainted)

    def _apply(self, func: Any, name: str, args: Any, kwargs: Any, tainted: list[Basis]) -> Any:
        """An operation on the state: it must be linear, and is then done on the coordinates."""
        inplace = ops.writes_in_place(name)
        if "out" in kwargs or (inplace and not isinstance(args[0], Basis)):
            self.refuse(f"`{name}` writes the state into a buffer; only tensors made from it are followed")
        try:
            self._require_linear(func, name, args, kwargs, tainted)
            given, named = ops.changed((args, kwargs), Basis, self._current)
            if inplace:
                given = (given[0].clone(), *given[1:])
            result = func(*given, **named)
        except (TypeError, RuntimeError, IndexError) as error:
            self.refuse(f"`{name}` fails: {error}")
        if not inplace:
            return ops.changed(result, torch.Tensor, lambda tensor: self._result(name, tensor))
        self._require_sound(name, given[0])
        self._overwrite(args[0], given[0])
        return None if name == "__setitem__" else args[0]

    def _require_linear(self, func: Any, name: str, args: Any, kwargs: Any, tainted: list[Basis]) -> None:
        """Refuse an operation that is not linear; what is not known to be is tried on random numbers."""
        if name in ops.ADDITIVE:
            return
        is_plain = name in ops.SCALING and len(tainted) == 1 and not kwargs
        if is_plain and (isinstance(args[0], Basis) or "div" not in name):
            return
        if not ops.acts_linearly(func, name, args, kwargs, Basis):
            self.refuse(f"`{name}` is not linear in the state")

    def _result(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What an operation returned, as part of the basis."""
        self._require_sound(name, tensor)
        if self.learned is not None and bool((tensor[..., LEARNED] == 1).all()):
            return torch.full_like(tensor, self.learned)  # the variance channels alone: no part of the state
        return self._basis(tensor)

    def _require_sound(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_floating_point() or tensor.shape[-1:] != (WIDTH,):
            self.refuse(f"`{name}` mixes or compares the elements of the state")
        origin = tensor[..., ORIGIN]
        if bool((origin != 0).any()) and bool(torch.isfinite(origin).all()):
            self.refuse(f"`{name}` adds a constant to the state, or moves its elements")

    def _basis(self, coords: torch.Tensor) -> Basis:
        tensor = coords.as_subclass(Basis)
        tensor.epoch = self.epoch
        return tensor

    def _overwrite(self, tensor: Basis, coords: torch.Tensor) -> None:
        torch.Tensor.copy_(tensor, coords)
        tensor.epoch = self.epoch

    def _is(self, coords: np.ndarray, symbol: Any) -> bool:
        """Whether coordinates are those of one symbol of this epoch."""
        return np.flatnonzero(coords).tolist() == [self._slot(symbol)] and coords[self._slot(symbol)] == 1.0

    def _slot(self, symbol: Any) -> int:
        symbols = self.now.symbols
        if symbol not in symbols:
            if len(symbols) == LEARNED:
                self.refuse(f"it reads more than {LEARNED} draws, and tensors of earlier evaluations")
            symbols.append(symbol)
        return symbols.index(symbol)

    def _current(self, tensor: Basis) -> torch.Tensor:
        """A tensor in this epoch's basis: one of an earlier epoch is read from its registers."""
        if tensor.epoch == self.epoch:
            return _plain(tensor)
        known = self._fresh.get(id(tensor))
        if known is not None:
            return known[1]
        old = _plain(tensor).reshape(-1, WIDTH).numpy()
        lanes = np.stack([self._read(tensor.epoch, lane) for lane in old])
        fresh = torch.from_numpy(lanes).reshape(tensor.shape)
        self._fresh[id(tensor)] = (tensor, fresh)  # holding the tensor keeps its id its own
        return fresh

    def _read(self, epoch: int, coords: np.ndarray) -> np.ndarray:
        """What had these coordinates in an earlier epoch, in this one's basis."""
        then = self._epoch(epoch)
        self._require_both_bounds(then, coords)
        result, coords = self._read_draws(epoch, then.symbols, coords)
        if not coords.any():
            return result
        x = then.x
        assert x is not None
        factor = 1.0 if np.array_equal(coords, x) or not x.any() else float(coords @ x / (x @ x))
        if np.allclose(coords, factor * x, rtol=1e-14, atol=0.0):
            epoch, coords = epoch + 1, np.zeros(WIDTH)  # it went into the network: the next epoch's x
            coords[0] = factor
        elif epoch == -1:
            self.refuse(
                "it reads a state of before the first evaluation that never went into the network (such as x "
                "before noise was added to it), and registers start at 0; start it from what the network sees"
            )
        if epoch == self.epoch:
            return result + coords
        register = self._registers.setdefault((epoch, coords.tobytes()), Register())
        self.epochs[epoch].saved[register] = coords.copy()
        result[self._slot(register)] = 1.0
        return result

    def _read_draws(
        self, epoch: int, symbols: list[Any], coords: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The draws that did not enter the state in that epoch, and the coordinates without them.

        A draw belongs to the row in which it enters the state, whenever before that it was made.
        """
        result, rest = np.zeros(WIDTH), coords.copy()
        for slot in np.flatnonzero(coords[: len(symbols)]):
            symbol = symbols[slot]
            home = self._homes.get(symbol[1], self.epoch) if isinstance(symbol, tuple) else epoch
            if home == epoch:
                continue
            rest[slot] = 0.0
            if home == self.epoch:
                result[self._slot(symbol)] += coords[slot]
            else:
                unit = np.zeros(WIDTH)
                unit[self._epoch(home).symbols.index(symbol)] = 1.0
                result += coords[slot] * self._read(home, unit)
        return result, rest

    def _require_both_bounds(self, epoch: Epoch, coords: np.ndarray) -> None:
        if "half" in epoch.symbols and coords[epoch.symbols.index("half")]:
            self.refuse("it clips x0 to one bound, and a table's clip has one lower and one upper bound")

    def _draw(self, args: Any, kwargs: Any) -> Basis:
        if "out" in kwargs:
            self.refuse("it draws into a buffer (`out`), and only tensors that are returned are followed")
        shape, dtype = ops.shape_and_dtype(args, kwargs)
        if shape != _STATE:
            self.refuse(f"it draws noise of shape {list(shape)}, which is not the state's")
        self.rounds |= dtype != torch.float64
        self.draws += 1
        return self.unit(("z", self.draws - 1))

    def _cast(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A cast keeps its exact coordinates: the table is not to inherit somebody's rounding."""
        if not isinstance(args[0], Basis):
            return func(*ops.changed(args, Basis, _plain), **kwargs)
        coords = self._current(args[0])
        dtype = func(coords, *ops.changed(args[1:], Basis, _plain), **kwargs).dtype
        if not dtype.is_floating_point:
            self.refuse(f"the state is cast to {dtype}")
        self.rounds |= dtype != torch.float64
        return self._basis(coords.clone())

    def _clip(self, name: str, value: Any, low: Any, high: Any, inplace: bool) -> Basis:
        """Clipping makes a new symbol, x0."""
        if not isinstance(value, Basis) or isinstance(low, Basis) or isinstance(high, Basis):
            self.refuse(f"`{name}` clips to bounds that depend on the state")
        if any(torch.as_tensor(bound).numel() != 1 for bound in (low, high) if bound is not None):
            self.refuse(f"`{name}` has not one lower and one upper bound, and a table's clip is one range")
        clip = (-np.inf if low is None else float(low), np.inf if high is None else float(high))
        x0 = self.clip(value, clip, name)
        if not inplace:
            return x0
        self._overwrite(value, x0)
        return value


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)
