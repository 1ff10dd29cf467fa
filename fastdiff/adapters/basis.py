"""Another project's sampler is read off by running its own code on a basis.

Every tensor that depends on the state is a `Basis`: its last axis holds coordinates instead of pixels. Code
that is linear in the state cannot tell the difference, and what comes out of it *is* the row. A `Tape`
watches every operation: it hands out the noise and the clipped x0 as new symbols, gives each tensor that
outlives an evaluation of the network a `Register` when it is read again, and refuses by name what is not
linear. `Numbers` replays the same code on real numbers with noise that is known, to compare.
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
        symbols: the coordinates' meaning: "x", "out", "x0", ("z", k) for the k-th draw, or a `Register`.
        x: [WIDTH] the network's next input (or the result), by its coordinates.
        saved: register -> coordinates of what it remembers from here on.
        clipped: (x0_from_x, x0_from_out, clip) of the x0 that was clipped, or None.
        draws: how often noise was drawn.
    """

    symbols: list[Any] = field(default_factory=lambda: ["x", "out"])
    x: np.ndarray | None = None
    saved: dict[Register, np.ndarray] = field(default_factory=dict)
    clipped: tuple[float, float, Clip] | None = None
    draws: int = 0


class Tape(TorchFunctionMode):
    """Records a sampler that runs on a basis. As a context it watches one thread, until the block ends.

    Args:
        name: the sampler's, for messages.
        learned: the value in [-1, 1] that the network's variance channels are taken to have, or None where
            there are none.
    Attributes:
        epochs: one for each evaluation of the network.
        start: the epoch before the first evaluation.
        rounds: whether the code rounds the state to less than float64.
    """

    def __init__(self, name: str, learned: float | None = None) -> None:
        super().__init__()
        self.name = name
        self.learned = learned
        self.epochs: list[Epoch] = []
        self.start = Epoch()
        self.rounds = False
        self._registers: dict[tuple[int, bytes], Register] = {}
        self._fresh: dict[int, tuple[Basis, torch.Tensor]] = {}  # earlier epochs' tensors, read in this one

    @property
    def epoch(self) -> int:
        """Index of the evaluation that ran last; -1 before the first."""
        return len(self.epochs) - 1

    @property
    def now(self) -> Epoch:
        return self.epochs[-1] if self.epochs else self.start

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
        """An x0 that the code clips, by the operation of this name, is a new symbol from here on."""
        coords = self.coordinates(x0)
        clipped = (float(coords[0]), float(coords[1]), clip)
        if coords[2:].any() or self.now.clipped not in (None, clipped):
            self.refuse(f"`{name}` clips something else than one x0 made of x and the network's output")
        self.now.clipped = clipped
        return self.unit("x0")

    def close(self, x: Any) -> None:
        """x ends this epoch: it goes into the network next, or is the result."""
        self.now.x = self.coordinates(x)

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
        if name in ops.CLAMPS:
            return self._clip(name, args, kwargs)
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
        if name in ops.SCALING and len(tainted) == 1 and (isinstance(args[0], Basis) or "div" not in name):
            return
        generator = torch.Generator().manual_seed(0)

        def drawn() -> dict[int, torch.Tensor]:
            return {id(t): torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in tainted}

        def results(values: dict[int, torch.Tensor]) -> list[torch.Tensor]:
            given, named = ops.changed((args, kwargs), Basis, lambda tensor: values[id(tensor)].clone())
            result = func(*given, **named)
            kept = given[0] if ops.writes_in_place(name) else result
            return [leaf for leaf in ops.leaves(kept) if isinstance(leaf, torch.Tensor)]

        a, b = drawn(), drawn()
        both = results({key: 1.7 * a[key] - 0.6 * b[key] for key in a})
        for of_a, of_b, of_both in zip(results(a), results(b), both, strict=True):
            linear = of_both.is_floating_point() and torch.allclose(
                of_both, 1.7 * of_a - 0.6 * of_b, rtol=1e-9, atol=1e-9
            )
            if not linear:
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

    def _slot(self, symbol: Any) -> int:
        symbols = self.now.symbols
        if symbol not in symbols:
            if len(symbols) == LEARNED:
                self.refuse(f"it reads more than {LEARNED} tensors of earlier evaluations")
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
        result = np.zeros(WIDTH)
        if not coords.any():
            return result
        x = self.epochs[epoch].x if epoch >= 0 else self.start.x
        assert x is not None
        factor = 1.0 if epoch >= 0 else float(coords @ x / (x @ x))
        if np.allclose(coords, factor * x, rtol=0.0 if epoch >= 0 else 1e-14, atol=0.0):
            epoch, coords = epoch + 1, np.zeros(WIDTH)  # it went into the network: the next epoch's x
            coords[0] = factor
        elif epoch == -1:
            self.refuse(
                "it reads a state of before the first evaluation that never went into the network (such as x "
                "before noise was added to it), and registers start at 0"
            )
        if epoch == self.epoch:
            return coords
        register = self._registers.setdefault((epoch, coords.tobytes()), Register())
        self.epochs[epoch].saved[register] = coords.copy()
        result[self._slot(register)] = 1.0
        return result

    def _draw(self, args: Any, kwargs: Any) -> Basis:
        shape, dtype = ops.shape_and_dtype(args, kwargs)
        if shape != _STATE:
            self.refuse(f"it draws noise of shape {list(shape)}, which is not the state's")
        self.rounds |= dtype != torch.float64
        self.now.draws += 1
        return self.unit(("z", self.now.draws - 1))

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

    def _clip(self, name: str, args: Any, kwargs: Any) -> Basis:
        """Clipping makes a new symbol, x0."""
        low, high = (
            kwargs.get(key, args[i] if len(args) > i else None) for i, key in ((1, "min"), (2, "max"))
        )
        if not isinstance(args[0], Basis) or isinstance(low, Basis) or isinstance(high, Basis):
            self.refuse(f"`{name}` clips to bounds that depend on the state")
        if low is None or high is None or torch.as_tensor(low).numel() * torch.as_tensor(high).numel() != 1:
            self.refuse(f"`{name}` has not one lower and one upper bound, and a table's clip is one range")
        x0 = self.clip(args[0], (float(low), float(high)), name)
        if not ops.writes_in_place(name):
            return x0
        self._overwrite(args[0], x0)
        return args[0]


class Numbers(TorchFunctionMode):
    """Replays a sampler on real numbers: every normal it draws comes from here and is kept.

    Args:
        scale: of what is drawn; a linear sampler cannot tell.
    Attributes:
        draws: [evaluations + 1] lists of float64 normals, the first list of before the first evaluation.
    """

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.draws: list[list[torch.Tensor]] = [[]]
        self._scale = scale
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, shape: Any) -> torch.Tensor:
        """Float64 normals of scale 1 that do not count as a draw."""
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def evaluate(self) -> None:
        """The network is called: later draws belong to this evaluation."""
        self.draws.append([])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in ops.NORMAL:
            return func(*args, **kwargs)
        shape, dtype = ops.shape_and_dtype(args, kwargs)
        z = (self._scale * self.normal(shape)).to(dtype)
        self.draws[-1].append(z.double())
        return z


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor)
