"""What the tests of kernels share: operands, the backends that must agree, comparison, error bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from fastdiff.kernels import cpu, layout
from fastdiff.kernels._reverse_step_cpu import step_eager, step_native
from fastdiff.kernels.philox import DOMAIN_KNOWN, DOMAIN_STEP, normal_reference
from fastdiff.kernels.reverse_step import Step, reverse_step_triton

# the backends of every kernel besides the NumPy and torch one, which all must equal to the last bit
OTHERS = [
    "native",
    pytest.param("interpret", marks=pytest.mark.interpret),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
INTERPRET_AND_GPU = OTHERS[1:]
SIZES = [1, 63, 256, 1823]
_BITS = {4: torch.int32, 2: torch.int16, 8: torch.int64}


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, signs of zero included; a NaN equals any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    as_bits = _BITS[actual.element_size()]
    differ = (actual.view(as_bits) != expected.view(as_bits)) & ~actual.isnan()
    where = differ.nonzero()[:3].tolist()
    assert not where, f"{int(differ.sum())} elements differ, first at {where}"


def library() -> Any:
    """The compiled CPU kernels; without a compiler the test is skipped."""
    return cpu.library(wait=True) or pytest.skip("needs a C++ compiler")


def apply(backend: str, kernel: Callable[..., Any], *operands: Any) -> None:
    """Run a launcher on CPU tensors: as it is (the interpreter), or on a GPU and bring the results back."""
    if backend != "cuda":
        kernel(*operands)
        return
    moved = [_moved(operand) for operand in operands]
    kernel(*moved)
    for old, new in zip(_tensors(operands), _tensors(moved), strict=True):
        old.copy_(new)


def run_on(
    backend: str, by_torch: Callable[[Any], None], by_triton: Callable[[Any], None], operands: Any
) -> None:
    """A kernel's implementation by a named backend; `torch` means without the compiled loop."""
    if backend == "native":
        library()
        by_torch(operands)
    elif backend == "torch":
        with mock.patch.object(cpu, "library", return_value=None):
            by_torch(operands)
    else:
        apply(backend, by_triton, operands)


def assert_compiles_as_one_graph(step: Callable[[torch.Tensor], torch.Tensor], operand: torch.Tensor) -> None:
    """`step`'s number and its gradient have the same bits compiled, without a break in the graph."""
    torch._dynamo.reset()
    results = []
    for run_step in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = operand.clone().requires_grad_()
        loss = run_step(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for plain, compiled in zip(*results, strict=True):
        assert_same_bits(plain, compiled)


def _moved(operand: Any) -> Any:
    if isinstance(operand, torch.Tensor):
        return operand.cuda()
    return type(operand)(*map(_moved, operand)) if isinstance(operand, tuple) else operand


def _tensors(operands: Any) -> list[torch.Tensor]:
    if isinstance(operands, torch.Tensor):
        return [operands]
    return [t for o in operands for t in _tensors(o)] if isinstance(operands, list | tuple) else []


def step_with(backend: str, step: Step) -> None:
    """One reverse step, in place, by a named backend."""
    if backend == "native":
        step_native(library(), step)
    elif backend == "eager":
        step_eager(step)
    else:
        apply(backend, reverse_step_triton, step)


def clone(step: Step, **changes: Any) -> Step:
    """The same operands in memory of their own."""
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in step._asdict().items()}
    return Step(**(copies | changes))


def random_table(
    registers: int,
    seed: int,
    *,
    rows: int = 5,
    clip: tuple[float, float] | None = (-1.0, 1.0),
    learned: bool = False,
    pad_to: int | None = None,
    **options: Any,
) -> layout.PackedTable:
    """A table of random coefficients, a third of them 0; row 0 keeps x, row 1 keeps register 1.

    Args:
        **options: of `layout.pack`: threshold, endings.
    """
    rng = np.random.default_rng(seed)
    state = rng.normal(size=(rows, registers + 1, registers + 1))
    state[rng.random(state.shape) < 0.3] = 0
    parts = [rng.normal(size=(rows, registers + 1)) for _ in range(3)]
    for part in parts:
        part[rng.random(part.shape) < 0.4] = 0
        part[0, 0] = 0
        part[1, 1:2] = 0
    state[0, 0], state[0, 0, 0] = 0, 1
    if registers:
        state[1, 1], state[1, 1, 1] = 0, 1
    c_in, x0_from_x, x0_from_out, low, high = rng.normal(size=(5, rows))
    return layout.pack(
        t=np.arange(rows)[::-1] * 10.0,
        c_in=c_in,
        x0_from_x=x0_from_x,
        x0_from_out=x0_from_out,
        log_var_min=(low - 5) * learned,
        log_var_max=high * learned,
        from_state=state,
        from_x0=parts[0],
        from_out=parts[1],
        from_noise=parts[2],
        clip=clip,
        registers=pad_to,
        learned=learned,
        **options,
    )


# what follows the rows of a table where a part of the image is known: noised on both sides, clean, noised
ENDINGS = {0: (0.7, 0.6, 0.9, 0.4), 2: (1.0, 0.0, 1.0, 0.0), 3: (0.4, 0.8, 0.5, 0.0), 4: (0.0, 1.0, 0.0, 1.0)}


def columns(rows: int, registers: int = 0, **values: float) -> dict[str, np.ndarray]:
    """Columns of a table: c_in 1, the constants given (from_state: that of x in x'), and 0 elsewhere."""
    heads = ("t", "c_in", "x0_from_x", "x0_from_out", "log_var_min", "log_var_max")
    shapes = dict.fromkeys(heads, (rows,)) | dict.fromkeys(
        ("from_x0", "from_out", "from_noise"), (rows, registers + 1)
    )
    values = {"c_in": 1.0} | values
    filled = {name: np.full(shape, values.get(name, 0.0)) for name, shape in shapes.items()}
    filled["from_state"] = np.zeros((rows, registers + 1, registers + 1))
    filled["from_state"][:, 0, 0] = values.get("from_state", 0.0)
    return filled


def random_step(
    registers: int = 0,
    n: int = 63,
    batch: int = 6,
    *,
    guided: bool = False,
    learned: bool = False,
    given_noise: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    table: layout.PackedTable | None = None,
    known: bool = False,
    threshold: bool = False,
    preview: bool = False,
) -> Step:
    """Operands with rows mixed and out of range, lanes in any order, slots idle or unguided, u poisoned."""
    if table is None:
        options = dict(endings=ENDINGS if known else None, threshold=(0.9, 2.0) if threshold else None)
        table = random_table(registers, seed, learned=learned, **options)
    g = torch.Generator().manual_seed(seed)
    lanes = 2 * batch if guided else batch

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    order = torch.randperm(lanes, generator=g).to(torch.int32)
    cond, uncond = (order[:batch].clone(), order[batch:].clone()) if guided else (None, None)
    if cond is not None and uncond is not None and batch > 2:
        uncond[::3] = -1
        cond[-1] = -1
    row = torch.randint(0, table.num_rows + 2, (batch,), generator=g, dtype=torch.int32)
    row[:1] = -1 if batch > 4 else 2
    x = normal(batch, n)
    x *= x.abs() > 0.2  # zeros of both signs: a sum must keep them
    return Step(
        x=x,
        registers=normal(registers, batch, n) if registers else None,
        out=normal(lanes, 2 * n if learned else n).to(dtype),
        u=torch.full((lanes, n), float("nan"), dtype=dtype),
        coef=table.coef,
        plan=table.plan,
        row=row,
        seed=torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        sample_id=torch.arange(batch) + 5,
        cond_lane=cond,
        uncond_lane=uncond,
        guidance_scale=2 * normal(batch) if guided else None,
        noise=normal(batch, n) if given_noise else None,
        known=normal(batch, n) if known else None,
        mask=(normal(batch, n) > 0).to(torch.uint8) if known else None,
        x0_scale=1 / (1 + normal(batch).abs()) if threshold else None,
        preview=torch.full((batch, n), float("nan")) if preview else None,
    )


@dataclass
class Rounded:
    """A float64 value and a bound of float32 arithmetic's error on the way there (running error analysis)."""

    value: torch.Tensor
    error: torch.Tensor

    @staticmethod
    def exact(value: torch.Tensor) -> Rounded:
        return Rounded(value.double(), torch.zeros_like(value, dtype=torch.float64))

    def _rounded(self) -> Rounded:
        return Rounded(self.value, self.error + 2.0**-24 * (self.value.abs() + self.error) + 2.0**-149)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.error + other.error)._rounded()

    def __sub__(self, other: Rounded) -> Rounded:
        return Rounded(self.value - other.value, self.error + other.error)._rounded()

    def __mul__(self, other: Rounded) -> Rounded:
        error = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return Rounded(self.value * other.value, error)._rounded()


def step_bounds(s: Step, b: int) -> tuple[list[Rounded], Rounded, Rounded]:
    """The formula of reverse_step.py for slot b, with error bounds: the new state, the next input, x0."""
    a = s.coef[int(s.row[b])]
    n = s.x.shape[1]
    lane = b if s.cond_lane is None else int(s.cond_lane[b])
    uncond_lane = -1 if s.uncond_lane is None else int(s.uncond_lane[b])
    state = [s.x[b]] if s.registers is None else [s.x[b], *s.registers[:, b]]
    k = len(state) - 1
    values = [Rounded.exact(value) for value in state]
    out = Rounded.exact(s.out[lane, :n])
    if uncond_lane >= 0:
        assert s.guidance_scale is not None
        uncond = Rounded.exact(s.out[uncond_lane, :n])
        out = uncond + Rounded.exact(s.guidance_scale[b]) * (out - uncond)
    x0 = _dot(a[layout.X0_FROM_X : layout.X0_FROM_OUT + 1], [values[0], out])
    reads = int(s.plan[int(s.row[b]), layout.READS])
    if s.x0_scale is not None and reads & layout.READS_THRESHOLD:
        x0 = x0 * Rounded.exact(s.x0_scale[b])
    x0 = Rounded(x0.value.clamp(float(a[layout.CLIP_LO]), float(a[layout.CLIP_HI])), x0.error)
    z_hat = _drawn(s, b, DOMAIN_STEP) if s.noise is None else Rounded.exact(s.noise[b])
    low, high = a[layout.LOG_VAR_MIN], a[layout.LOG_VAR_MAX]
    if s.learned and (low != 0 or high != 0):
        half, one = Rounded.exact(torch.tensor(0.5)), Rounded.exact(torch.tensor(1.0))
        f = (Rounded.exact(s.out[lane, n:]) + one) * half
        y = (f * Rounded.exact(high) + (one - f) * Rounded.exact(low)) * half
        scale = y.value.exp()
        z_hat = Rounded(scale, scale * (torch.expm1(y.error) + 2e-7)) * z_hat
    terms = [*values, x0, out, z_hat]
    new = [_dot(a[layout.HEAD + j * (k + 4) :][: k + 4], terms) for j in range(k + 1)]
    if s.known is not None and s.mask is not None and reads & layout.READS_KNOWN:
        y = _drawn(s, b, DOMAIN_KNOWN)
        kept = _dot(a[layout.KNOWN_ALPHA : layout.KNOWN_SIGMA + 1], [Rounded.exact(s.known[b]), y])
        free = _dot(a[layout.FREE_RATIO : layout.FREE_STD + 1], [new[0], y])
        chosen = s.mask[b] != 0
        new[0] = Rounded(*(torch.where(chosen, p, q) for p, q in zip(_pair(kept), _pair(free), strict=True)))
    return new, Rounded.exact(a[layout.C_IN_NEXT]) * new[0], x0


def _pair(a: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
    return a.value, a.error


def _drawn(s: Step, b: int, domain: int) -> Rounded:
    """The normals of slot b in its row."""
    key = (s.seed[b : b + 1], s.sample_id[b : b + 1], s.plan[int(s.row[b]), layout.DRAW].reshape(1).long())
    z = normal_reference(torch.empty(1, s.x.shape[1], dtype=torch.float64), *key, domain)[0]
    return Rounded(z, 1e-6 * z.abs().clamp(min=1))


def _dot(coefficients: torch.Tensor, values: list[Rounded]) -> Rounded:
    total = Rounded.exact(torch.zeros_like(values[0].value))
    for a, value in zip(coefficients, values, strict=True):
        if a != 0:
            total = total + Rounded.exact(a) * value
    return total


OP_SHAPE = (3, 4, 5)
OP_TABLE, OP_TABLE_LEARNED = random_table(1, 0), random_table(1, 0, learned=True)


def op_arguments(batch: int = 2, lanes: int | None = None, learned: bool = False) -> dict[str, Any]:
    """Arguments of a valid `ops.reverse_step`."""
    g = torch.Generator().manual_seed(1)
    channels = OP_SHAPE[0] * (2 if learned else 1)
    lanes = batch if lanes is None else lanes
    return dict(
        x=torch.randn(batch, *OP_SHAPE, generator=g),
        out=torch.randn(lanes, channels, *OP_SHAPE[1:], generator=g),
        table=OP_TABLE_LEARNED if learned else OP_TABLE,
        row=OP_TABLE.start(batch) + 2,
        seed=7,
        registers=torch.randn(1, batch, *OP_SHAPE, generator=g),
        u=torch.zeros(lanes, *OP_SHAPE),
    )


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)
