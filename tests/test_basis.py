"""The importers' instruments: the tape that follows a state, the fewest registers, the Brownian path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_close

from fastdiff.adapters.basis import CHANNELS, WIDTH, Basis, Refused, Tape
from fastdiff.adapters.brownian import BrownianPath
from fastdiff.adapters.observable import reduce_registers
from fastdiff.adapters.recording import Numbers

SHAPE = (1, CHANNELS, 1, WIDTH)


def terms(tape: Tape, x: torch.Tensor) -> dict:
    """symbol -> coefficient of a state in the present epoch."""
    coords = tape.coordinates(x)
    return {s: float(c) for s, c in zip(tape.now.symbols, coords, strict=False) if c}


@pytest.fixture
def tape() -> Tape:
    return Tape("it")


@pytest.fixture
def x_and_out(tape) -> tuple[Basis, Basis]:
    x = tape.unit("x")
    return x, tape.evaluate(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda x, out: 2 * x - out / 4,
        lambda x, out: torch.lerp(x, out, 0.25) + (1.25 * x - 0.5 * out),
        lambda x, out: torch.stack([x, out, x]).transpose(0, 1).sum(1) - 1.25 * out,
        lambda x, out: torch.einsum(
            "k,kbchw->bchw", torch.tensor([2.0, -0.25]).double(), torch.stack([x, out])
        ),
        lambda x, out: torch.cat([2 * x, out], dim=1).chunk(2, dim=1)[0] - out * torch.tensor(0.25),
        lambda x, out: x.clone().mul_(2).sub_(out, alpha=0.25),
        lambda x, out: torch.zeros_like(x).add_(x).add_(x) + torch.addcmul(x - x, out, torch.tensor(-0.25)),
        lambda x, out: (
            (2 * x).float().to(torch.bfloat16).reshape(x.shape[0], -1, WIDTH).view(x.shape) - out / 4
        ),
        lambda x, out: torch.where(torch.tensor(True), 2 * x, out) - 0.25 * out + 0 * out,
    ],
)
def test_linear_code_is_followed_whatever_its_operations(change, tape, x_and_out):
    with tape:
        result = change(*x_and_out)
    assert terms(tape, result) == {"x": 2.0, "out": -0.25}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, out: x * out, "is not linear"),
        (lambda x, out: 1 / x, "`__rdiv__` is not linear|`reciprocal`"),
        (lambda x, out: out / x, "is not linear"),
        (lambda x, out: torch.maximum(x, out), "`maximum` is not linear"),
        (lambda x, out: torch.addcmul(x, x, out), "`addcmul` is not linear"),
        (lambda x, out: torch.nn.functional.threshold(x, -8.0, -8.0), "threshold` is not linear"),
        (lambda x, out: torch.nn.functional.threshold(x, -1e10, 0.0), "threshold` is not linear"),
        (lambda x, out: torch.nn.functional.hardshrink(x, 1e-9), "`hardshrink` is not linear"),
        (lambda x, out: torch.nn.functional.hardshrink(x, 1e9), "`hardshrink` is not linear"),
        (lambda x, out: torch.renorm(x, 2, 0, 1e3), "`renorm` is not linear"),
        (lambda x, out: x.max(), "`max` is not linear"),
        (lambda x, out: torch.clamp(x, -1, 1, out=torch.zeros(SHAPE).double()), "into a buffer"),
        (lambda x, out: torch.where(x > 0, x, out), "`gt` is not linear|`__gt__`"),
        (lambda x, out: x.add_(1.0), "adds a constant"),
        (lambda x, out: x.item(), "`item` reads the values"),
        (lambda x, out: bool(x), "`__bool__` reads the values"),
        (lambda x, out: x.numpy(), "`numpy` reads the values"),
        (lambda x, out: x.clamp(min=out), "bounds that depend on the state"),
        (lambda x, out: torch.add(x, out, out=torch.zeros(SHAPE).double()), "into a buffer"),
        (lambda x, out: x @ torch.eye(7).double(), "fails"),
        (lambda x, out: torch.bernoulli(x), "draws with `bernoulli`"),
        (lambda x, out: torch.randn(SHAPE, out=torch.zeros(SHAPE)), "draws into a buffer"),
        (lambda x, out: x.untyped_storage(), "`untyped_storage` is not linear"),
        (lambda x, out: torch.div(x, 2, rounding_mode="trunc"), "`div` is not linear"),
        (lambda x, out: out.clamp(min=6).clamp(max=-6), "which is no range"),
    ],
)
def test_code_that_is_not_linear_is_refused_by_the_operations_name(change, reason, tape, x_and_out):
    with (
        pytest.raises(
            Refused, match=f"it cannot be imported: after evaluation 0 of the network, .*({reason})"
        ),
        tape,
    ):
        change(*x_and_out)


def test_questions_about_shape_and_dtype_make_no_register(tape, x_and_out):
    x, out = x_and_out
    tape.evaluate(out)
    with tape:
        assert (x.shape, x.dim(), x.device.type, x.dtype) == (SHAPE, 4, "cpu", torch.float64)
        assert len(x) == x.size(0) == 1
        assert torch.ones_like(x).sum() == x.numel()
    assert tape.epochs[0].saved == {}


def test_a_tensor_that_is_read_later_is_a_register_and_the_network_input_is_none(tape, x_and_out):
    x, out = x_and_out
    with tape:
        kept, also_kept, unread = 3 * x, 3 * x, 5 * out
        next_x = x - out
        tape.evaluate(next_x)
        result = kept + also_kept + 2 * next_x
    assert unread.epoch == 0
    (register,) = tape.epochs[0].saved
    assert terms(tape, result) == {"x": 2.0, register: 2.0}
    assert tape.epochs[0].saved[register][:2].tolist() == [3.0, 0.0]
    with tape:
        tape.evaluate(result)
        tape.evaluate(result + next_x)
    assert [len(epoch.saved) for epoch in tape.epochs] == [1, 1, 0, 0]


def test_a_multiple_of_the_networks_input_is_no_register(tape, x_and_out):
    x, out = x_and_out
    with tape:
        next_x = x - 3 * out
        scaled = next_x / 7
        tape.evaluate(next_x)
        assert terms(tape, scaled) == {"x": pytest.approx(1 / 7, rel=1e-15)}
    assert tape.epochs[0].saved == {}


def test_each_draw_is_a_symbol_and_rounding_is_noted_but_not_done(tape, x_and_out):
    x, _ = x_and_out
    with tape:
        third = x / 3
        both = torch.randn_like(x) + 2 * torch.randn(SHAPE, dtype=torch.float64)
        assert not tape.rounds
        result = third.float() + both
    assert tape.rounds
    assert terms(tape, result) == {"x": 1 / 3, ("z", 0): 1.0, ("z", 1): 2.0}


def test_a_clamp_is_x0_once(tape, x_and_out):
    x, out = x_and_out
    with tape:
        once, again = (x - out).clamp(-1, 1), torch.clip(x - out, min=-1.0, max=torch.tensor(1.0))
        assert terms(tape, once + again) == {"x0": 2.0}
    assert tape.epochs[0].clipped == (1.0, -1.0, (-1.0, 1.0))
    with pytest.raises(Refused, match="something else than one x0"), tape:
        x.clamp(-1, 1)


BOUND = torch.tensor(6.0, dtype=torch.float64)


@pytest.mark.parametrize(
    "clamp",
    [
        lambda v: torch.minimum(torch.maximum(v, -BOUND), BOUND),
        lambda v: torch.maximum(-BOUND, torch.minimum(BOUND, v)),
        lambda v: torch.max(torch.min(v, other=BOUND), -BOUND),
        lambda v: v.fmin(BOUND).fmax(-BOUND),
        lambda v: v.clamp(min=-6).clamp(max=6.0),
        lambda v: v.clone().clamp_min_(-6).clamp_max_(max=6),
        lambda v: torch.clip(input=v, min=-6, max=6),
        lambda v: torch.nn.functional.hardtanh(v, -6, 6),
        lambda v: torch.nn.functional.hardtanh(v.clone(), -6.0, 6.0, inplace=True),
    ],
)
def test_a_clamp_is_read_however_it_is_written(clamp, tape, x_and_out):
    x, out = x_and_out
    with tape:
        result = clamp(x - 2 * out) + x
        assert terms(tape, result) == {"x0": 1.0, "x": 1.0}
        tape.evaluate(result)
    assert tape.epochs[0].clipped == (1.0, -2.0, (-6.0, 6.0))


def test_half_a_clamp_is_no_state(tape, x_and_out):
    x, out = x_and_out
    with tape:
        half = torch.maximum(x, -BOUND)
        with pytest.raises(Refused, match="one lower and one upper bound"):
            tape.evaluate(half + out)
        with pytest.raises(Refused, match="something else than one x0"):
            torch.minimum(half + out, BOUND)
        with pytest.raises(Refused, match="something else than one x0 to one range"):
            out.clamp(min=-1)
        tape.evaluate(out)
        with pytest.raises(Refused, match="one lower and one upper bound"):
            half + out


def test_a_draw_belongs_to_the_row_whose_state_it_enters(tape):
    """Whenever it was made, and whatever was made of it before; afterwards it is remembered like the rest."""
    x = tape.unit("x")
    with tape:
        first, second = torch.randn_like(x), 3 * torch.randn_like(x)
        out = tape.evaluate(x)
        made = 2 * first + second  # in a row that does not use it
        tape.evaluate(out - x)
        entered = made + out
        assert set(terms(tape, entered)) >= {("z", 0), ("z", 1)}
        tape.evaluate(entered)
        result = first - second
    assert [len(epoch.saved) for epoch in tape.epochs] == [1, 2, 0]  # out; then the two draws
    assert sorted(terms(tape, result).values()) == [-3.0, 1.0]


def test_the_variance_channels_are_a_number():
    tape = Tape("it", learned=0.5)
    out = tape.evaluate(tape.unit("x"))
    assert out.shape == (1, 2 * CHANNELS, 1, WIDTH)
    with tape:
        mean, v = out.split(CHANNELS, dim=1)
        result = mean + torch.exp(v) * torch.randn_like(mean)
    assert terms(tape, result) == {"out": 1.0, ("z", 0): math.exp(0.5)}


def test_too_many_kept_tensors_are_refused(tape, x_and_out):
    x, out = x_and_out
    with tape:
        kept = [x + out * n for n in range(1, WIDTH + 1)]
        tape.evaluate(out * 0.5)
        with pytest.raises(Refused, match="more than"):
            sum(kept)


def test_numbers_hands_out_the_normals_that_it_keeps():
    numbers = Numbers(seed=3)
    with numbers:
        first = torch.randn((2, 3), dtype=torch.float64)
        numbers.evaluate()
        second = torch.randn(2, 3)
        third = torch.randn_like(first)
    assert [len(draws) for draws in numbers.draws] == [1, 2]
    assert torch.equal(numbers.draws[0][0], first)
    assert torch.equal(numbers.draws[1][0], second.double())
    assert second.dtype == torch.float32
    assert torch.equal(numbers.draws[1][1], third)
    with Numbers(seed=3):
        assert torch.equal(torch.randn(2, 3, dtype=torch.float64), first)


def random_columns(generator: np.random.Generator, rows: int, registers: int) -> dict[str, np.ndarray]:
    """A sampler whose every second coefficient is 0."""
    size = registers + 1

    def drawn(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape) * (generator.random(shape) < 0.5)

    names = ("from_x0", "from_out", "from_noise")
    return {"from_state": drawn(rows, size, size), **{name: drawn(rows, size) for name in names}}


def states_of_x(columns: dict[str, np.ndarray], drives: np.ndarray) -> np.ndarray:
    """[rows] x after each row, for given x0, out and z; x starts at 1, registers at 0."""
    state = np.eye(columns["from_state"].shape[1])[0]
    result = []
    for row, (x0, out, z) in enumerate(drives):
        drive = columns["from_x0"][row] * x0 + columns["from_out"][row] * out + columns["from_noise"][row] * z
        state = columns["from_state"][row] @ state + drive
        result.append(state[0])
    return np.array(result)


def registers(columns: dict[str, np.ndarray]) -> int:
    return columns["from_state"].shape[1] - 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8), st.integers(0, 4))
def test_fewer_registers_make_the_same_chain(seed, rows, count):
    generator = np.random.default_rng(seed)
    columns = random_columns(generator, rows, count)
    drives = generator.standard_normal((rows, 3))
    reduced = reduce_registers(columns)
    assert registers(reduced) <= min(count, rows - 1)
    # 8 rows of sums of 8 terms, and a basis whose condition pivoting keeps below 2^4
    assert_close(states_of_x(reduced, drives), states_of_x(columns, drives), 1e-11)
    assert registers(reduce_registers(reduced)) == registers(reduced)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3), st.integers(1, 3))
def test_registers_that_add_nothing_are_found(seed, count, extra):
    """Combinations of registers stored beside them, in another basis, with dead ones: they go again."""
    generator = np.random.default_rng(seed)
    rows, size = 6, count + 1 + extra
    small = reduce_registers(random_columns(generator, rows, count))
    grown = {name: np.zeros((rows, *(size,) * (value.ndim - 1))) for name, value in small.items()}
    basis = np.eye(size)
    basis[1:, 1:] = np.linalg.qr(generator.standard_normal((size - 1, size - 1)))[0]
    k = registers(small) + 1
    for row in range(rows):
        grown["from_state"][row, :k, :k] = small["from_state"][row]
        grown["from_state"][row, k:] = generator.uniform(-0.3, 0.3, (size - k, size))
        grown["from_state"][row] = basis @ grown["from_state"][row] @ basis.T
        for name in ("from_x0", "from_out", "from_noise"):
            grown[name][row, :k] = small[name][row]
            grown[name][row, k:] = generator.standard_normal(size - k)
            grown[name][row] = basis @ grown[name][row]
    drives = generator.standard_normal((rows, 3))
    reduced = reduce_registers(grown)
    assert registers(reduced) == registers(small)
    assert_close(states_of_x(reduced, drives), states_of_x(small, drives), 1e-10)


def test_a_register_that_waits_is_not_touched():
    """r1 is saved in row 0 and read in row 3; r2 copies it about, which needs no register."""
    eye = np.tile(np.eye(3), (4, 1, 1))
    columns = {
        "from_state": eye,
        **{name: np.zeros((4, 3)) for name in ("from_x0", "from_out", "from_noise")},
    }
    columns["from_out"][0, 1] = 1.0
    columns["from_state"][1, 2] = [0.0, 1.0, 0.0]  # r2 = r1
    columns["from_state"][3, 0] = [1.0, 0.5, 0.5]
    reduced = reduce_registers(columns)
    assert registers(reduced) == 1
    assert np.array_equal(reduced["from_state"][1:3], np.tile(np.eye(2), (2, 1, 1)))
    assert reduced["from_state"][3, 0, 1] * reduced["from_out"][0, 1] == 1.0


class Units:
    """Draws e_0, e_1, ... in place of normals: products of what is made of them are covariances."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        return torch.eye(32, dtype=torch.float64)[self.count - 1]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=6))
def test_a_brownian_path_has_the_covariance_of_its_overlaps(pairs):
    units = Units()
    path = BrownianPath(units)
    pairs = [(a, b) for a, b in pairs if a != b]
    increments = [path(float(a), float(b)) for a, b in pairs]
    for (a, b), one in zip(pairs, increments, strict=True):
        for (c, d), other in zip(pairs, increments, strict=True):
            overlap = max(0, min(max(a, b), max(c, d)) - max(min(a, b), min(c, d)))
            sign = math.copysign(1, a - b) * math.copysign(1, c - d)
            wanted = sign * overlap / math.sqrt(abs(a - b) * abs(c - d))
            assert math.isclose(float(one @ other), wanted, abs_tol=1e-12)


def test_levels_that_float32_blurred_are_one_point():
    units = Units()
    path = BrownianPath(units)
    path(4.0, 2.0)
    path(2.0 * (1 + 1e-7), 1.0)
    assert units.count == 2
    with pytest.raises(ValueError, match="two different levels"):
        path(2.0, 2.0)
