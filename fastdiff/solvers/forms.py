"""The algebra in which solvers are written: linear forms of x, x0, out, z and registers.

A solver yields one `Row` for each evaluation of the network: the next x as a form, and what later rows want
to remember, each in a `Register` of its own. `assemble` drops what nobody reads, lets registers share a place
where they do not live at the same time, and writes the coefficients down as columns.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdiff.levels import Level


class Form:
    """A linear combination of symbols: forms add and subtract; numbers multiply and divide them."""

    __slots__ = ("terms",)
    __array_ufunc__ = None  # so that numpy_float * form comes here

    def __init__(self, terms: Mapping[Hashable, float]) -> None:
        self.terms = terms

    def __add__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for symbol, value in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) + value
        return Form(terms)

    def __sub__(self, other: Form) -> Form:
        terms = dict(self.terms)
        for symbol, value in other.terms.items():
            terms[symbol] = terms.get(symbol, 0.0) - value
        return Form(terms)

    def __mul__(self, factor: float) -> Form:
        return Form({symbol: value * factor for symbol, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Form:
        return Form({symbol: value / divisor for symbol, value in self.terms.items()})

    def __neg__(self) -> Form:
        return self * -1.0


class Register(Form):
    """Something remembered: assigned by one row's `save`, read by any later row."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__({self: 1.0})


X, X0, OUT, Z = (Form({name: 1.0}) for name in ("x", "x0", "out", "z"))
_AFTER_STATE = {"x0": 0, "out": 1, "z": 2}


@dataclass(slots=True)
class Row:
    """What one evaluation of the network leads to.

    Attributes:
        level: where the network is called; the marginal of the sample entering the row.
        x: the next sample, in terms of X, X0, OUT, Z and registers that earlier rows saved.
        save: register -> what it remembers from here on.
        ends_step: False for the inner stages of a step.
        log_var: (min, max) of a learned variance; (0, 0) where it is not learned.
        exempt: moments that the self-check must not demand from here on, of "mean" and "noise".
        init_scale: of the first row only, where x_T is not the level's own.
    """

    level: Level
    x: Form
    save: Mapping[Register, Form] = field(default_factory=dict)
    ends_step: bool = True
    log_var: tuple[float, float] = (0.0, 0.0)
    exempt: tuple[str, ...] = ()
    init_scale: float | None = None


def assemble(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The columns from_state, from_x0, from_out, from_noise of a list of rows.

    A place that nobody reads any more keeps its content (identity): it is neither read nor written.
    """
    places, saves = _allocate(rows)
    size = 1 + max((place for kept in saves for place in kept.values()), default=0)
    coefs = np.zeros((len(rows), size, size + 3))
    coefs[:, np.arange(size), np.arange(size)] = 1.0
    for row, kept, coef in zip(rows, saves, coefs, strict=True):
        _write(coef[0], row.x, places, size)
        for register, place in kept.items():
            _write(coef[place], row.save[register], places, size)
    return {
        "from_state": coefs[:, :, :size],
        **{name: coefs[:, :, size + i] for i, name in enumerate(("from_x0", "from_out", "from_noise"))},
    }


def _write(line: np.ndarray, form: Form, places: Mapping[Hashable, int], size: int) -> None:
    line[:] = 0.0
    for symbol, value in form.terms.items():
        if value != 0:
            line[size + _AFTER_STATE[symbol] if symbol in _AFTER_STATE else places[symbol]] = value


def _allocate(rows: Sequence[Row]) -> tuple[dict[Hashable, int], list[dict[Register, int]]]:
    """A place (1..K) for every register that is read, and the registers each row must write, by liveness."""
    live: set[Register] = set()
    read_here: list[set[Register]] = []
    kept: list[list[Register]] = []
    for row in reversed(rows):
        wanted = [register for register in row.save if register in live]
        live.difference_update(wanted)
        reads = {
            symbol
            for form in (row.x, *(row.save[register] for register in wanted))
            for symbol, value in form.terms.items()
            if value != 0 and isinstance(symbol, Register)
        }
        kept.append(wanted)
        read_here.append(reads - live)  # read here for the last time
        live |= reads
    if live:
        raise ValueError("the solver reads a register that no earlier row saves")
    places: dict[Hashable, int] = {"x": 0}
    free: list[int] = []
    saves: list[dict[Register, int]] = []
    for last_read, wanted in zip(reversed(read_here), reversed(kept), strict=True):
        # All reads of a row come before its writes, so a register may take the place of one that ends here.
        free = sorted({*free, *(places[register] for register in last_read)})
        chosen = {}
        for register in wanted:
            if register in places:
                raise ValueError("the solver saves one register in two rows; make a new one for each row")
            places[register] = free.pop(0) if free else len(set(places.values()))
            chosen[register] = places[register]
        saves.append(chosen)
    return places, saves
