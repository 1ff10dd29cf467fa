"""denoising_loss under a mask of any shape: the mean over what it leaves, whatever stands beneath."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import OTHERS, assert_compiles_as_one_graph, assert_same_bits
from loss_cases import operands, run
from torch.library import opcheck

from fastdiff import _dispatch, ops
from fastdiff.capture import explain_capture
from fastdiff.kernels.denoising_loss import Loss, denoising_loss_reference
from fastdiff.schedule import NoiseSchedule
from fastdiff.train import Objective

BACKENDS = ["torch", *OTHERS]
SHAPE = (4, 3, 8, 16)
# of x0's shape or with dimensions of 1, which none but the last lies between others
SHAPES = [
    SHAPE, (4, 1, 8, 16), (4, 3, 1, 1), (4, 3, 8, 1), (4, 1, 8, 1), (1, 3, 8, 16), (8, 16), (16,), (8, 1),
    (4, 1, 1, 1), (1,), (4, 3, 1, 16),
]  # fmt: skip


def drawn(shape: tuple[int, ...], kind: str) -> torch.Tensor:
    """A mask: two thirds of ones, weights of which a third is 0, or a sample without any."""
    u = torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    if kind == "weights":
        return u * (u > 1 / 3)
    keep = u > 1 / 3
    if kind == "empty" and shape[0] == 4:
        keep[1] = False
    return keep


def masked(f: Loss, mask: torch.Tensor, shape: tuple[int, ...]) -> Loss:
    """The operands under a mask that broadcasts to `shape`, as the operator hands them on."""
    rows, inner = _dispatch._rows_of_mask(mask, torch.Size(shape))
    return f._replace(mask=rows, inner=inner, total=torch.full_like(f.loss, float("nan")))


def results(f: Loss) -> list[torch.Tensor]:
    return [f.loss, f.error, f.total]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("values", ["bool", "weights", "empty"])
@pytest.mark.parametrize("n", [1, 63, 256, 1823])
def test_loss_and_error_are_the_formula_up_to_rounding(backend: str, kind: int, values: str, n: int) -> None:
    f = operands(n, kind, weighted=True, given_noise=True)
    mask = drawn((4, n), values)
    f = masked(f, mask, (4, n))
    m = mask.double()
    whole = f._replace(error=f.error.double(), loss=f.loss.double(), mask=None, total=None)
    denoising_loss_reference(whole)
    error, count = m * whole.error, m.sum(1)
    loss = f.weight * (error * whole.error).sum(1) / count.clamp(min=1e-9)
    exact = f._replace(error=f.error.double(), loss=f.loss.double(), total=f.total.double())
    for each in (exact, f):
        run(backend, f) if each is f else denoising_loss_reference(each)
        size = f.out.abs() + f.x0.abs() + f.noise.abs()
        rounding = 4 * 2**-24 * m * (size + whole.error.abs())
        assert ((each.error - error).abs() <= rounding).all()
        # as without a mask, and the sums of a mask and of the squares round at most 64 times
        moved = f.weight * (2 * whole.error.abs() * rounding).sum(1) / count.clamp(min=1e-9)
        assert ((each.loss - loss).abs() <= moved + 140 * 2**-24 * loss).all()
        assert ((each.total - count).abs() <= 64 * 2**-24 * count).all()
    if values == "empty":
        assert f.loss[1] == 0
        assert (f.error[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", ["bool", "weights"])
def test_mask_of_any_shape_has_the_bits_of_the_whole_one(
    backend: str, shape: tuple[int, ...], values: str
) -> None:
    f = operands(3 * 8 * 16, 2)
    mask = drawn(shape, values)
    few = masked(f, mask, SHAPE)
    whole = masked(f._replace(loss=f.loss.clone(), error=f.error.clone()), mask.expand(SHAPE).clone(), SHAPE)
    for each in (few, whole):
        run(backend, each)
    if backend == "torch":  # which adds the mask's own numbers up, in float64
        torch.testing.assert_close(few.total, whole.total, rtol=2e-7, atol=0)
        torch.testing.assert_close(few.loss, whole.loss, rtol=4e-7, atol=0)
        assert_same_bits(few.error, whole.error)
        return
    for one, other in zip(results(few), results(whole), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("backend", ["native", *OTHERS[2:]])
@pytest.mark.parametrize("few", [(4, 700, 1), (4, 1, 7), (700, 7)], ids=str)
def test_repeated_mask_goes_on_from_block_to_block(backend: str, few: tuple[int, ...]) -> None:
    """Samples of several blocks, which begin within a repetition, and enough of them for threads."""
    shape, threads = (4, 700, 7), torch.get_num_threads()
    f, mask = operands(4900, 2), drawn(few, "weights")
    expected = masked(
        f._replace(loss=f.loss.clone(), error=f.error.clone()), mask.expand(shape).clone(), shape
    )
    run(backend, expected)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            each = masked(f._replace(loss=f.loss.clone(), error=f.error.clone()), mask, shape)
            run(backend, each)
            for one, other in zip(results(each), results(expected), strict=True):
                assert_same_bits(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_is_copied_only_around_a_dimension_of_1_between_others(shape: tuple[int, ...]) -> None:
    mask = drawn(shape, "bool")
    rows, inner = _dispatch._rows_of_mask(mask, torch.Size(SHAPE))
    i = torch.arange(3 * 8 * 16)
    expected = mask.expand(SHAPE).flatten(1)
    assert torch.equal(rows[:, i // inner % rows.shape[1]].bool(), expected)
    assert (rows.data_ptr() == mask.data_ptr()) == (shape != (4, 3, 1, 16))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", ["bool", "weights", "empty"])
@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 8, 16)], ids=str)
def test_what_stands_under_0_does_not_matter(backend: str, values: str, shape: tuple[int, ...]) -> None:
    f = operands(3 * 8 * 16, 2, given_noise=True)
    mask = drawn(shape, values)
    hidden = (mask.expand(SHAPE) == 0).flatten(1)
    clean = masked(f, mask, SHAPE)
    dirty = clean._replace(
        loss=f.loss.clone(), error=f.error.clone(), total=clean.total.clone(),
        **{name: getattr(f, name).masked_fill(hidden, float("nan")) for name in ("out", "x0", "noise")},
    )  # fmt: skip
    for each in (clean, dirty):
        run(backend, each)
    for one, other in zip(results(dirty), results(clean), strict=True):
        assert_same_bits(one, other)
    assert (dirty.error[hidden] == 0).all()
    assert dirty.loss.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_ones_is_no_mask(backend: str) -> None:
    f = operands(1823, 1, weighted=True)
    ones = masked(f._replace(loss=f.loss.clone(), error=f.error.clone()), torch.ones(4, 1823) > 0, (4, 1823))
    for each in (f, ones):
        run(backend, each)
    assert_same_bits(ones.error, f.error)
    assert ones.total.tolist() == [1823.0] * 4
    torch.testing.assert_close(ones.loss, f.loss, rtol=2**-22, atol=0)


@pytest.mark.parametrize("backend", ["native", *OTHERS[2:]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_only_the_casts(backend: str, dtype: torch.dtype) -> None:
    half = operands(63, 2)
    half = half._replace(out=half.out.to(dtype), error=half.error.to(dtype))
    half = masked(half, drawn((4, 63), "weights"), (4, 63))
    wide = half._replace(out=half.out.float(), error=half.error.float(), loss=half.loss.clone())
    run(backend, half)
    run(backend, wide)
    assert_same_bits(half.error, wide.error.to(dtype))
    assert_same_bits(half.loss, wide.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "n"), [(0, 5), (2, 0)])
def test_empty_operands_have_no_loss(backend: str, batch: int, n: int) -> None:
    f = masked(operands(n, batch=batch), torch.ones(batch, n) > 0, (batch, n))
    run(backend, f)
    assert f.loss.tolist() == f.total.tolist() == [0.0] * batch
    denoising_loss_reference(f)
    assert f.loss.tolist() == f.total.tolist() == [0.0] * batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0)], ids=str)
def test_operator_takes_nothing_under_a_mask(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x0, t = torch.zeros(shape, dtype=dtype), torch.zeros(shape[0], dtype=torch.int64)
    levels = torch.ones(1, 2, dtype=dtype)
    loss = ops.denoising_loss(x0, x0, levels, t, 1, None, 0, mask=torch.ones(shape) > 0)
    assert loss.tolist() == [0.0] * shape[0]


def test_mask_of_more_than_the_kernel_divides_is_of_full_size() -> None:
    shape = torch.Size((1, 2**16, 2**15))
    rows, inner = _dispatch._rows_of_mask(torch.empty(1, 2**16, 1, dtype=torch.bool, device="meta"), shape)
    assert (rows.shape, inner) == ((1, 2**31), 1)


def arguments(dtype: torch.dtype = torch.float32, learned: bool = False) -> dict[str, Any]:
    f = operands(3 * 8 * 16, 2, weighted=True)
    out = torch.cat([f.out, f.out], 1) if learned else f.out
    return dict(
        out=out.to(dtype).view(4, -1, 8, 16), x0=f.x0.to(dtype).view(SHAPE), t=f.t,
        alpha_sigma=f.alpha_sigma.to(dtype), seed=7, sample_ids=[5, 6, 9, 2], draw=11, target="v",
        weight=f.weight.to(dtype),
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("shape", [SHAPE, (4, 1, 8, 16), (8, 1)], ids=str)
@pytest.mark.parametrize("values", ["bool", "weights", "empty"])
def test_operator_is_the_masked_mean_and_its_gradient(
    learned: bool, shape: tuple[int, ...], values: str
) -> None:
    given, mask = arguments(learned=learned), drawn(shape, values)
    leaf = given.pop("out").clone().requires_grad_()
    key = {k: given[k] for k in ("alpha_sigma", "t", "seed", "sample_ids", "draw", "target")}
    _, goal = ops.q_sample(given["x0"], **key)
    loss = ops.denoising_loss(leaf, mask=mask, **given)
    m = mask.expand(SHAPE).float()
    square = (m * (leaf[:, :3] - goal).square()).flatten(1).sum(1)
    plain = given["weight"] * square / m.flatten(1).sum(1).clamp(min=1e-9)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    each = torch.tensor([1.0, 2.0, 0.5, 3.0])
    found, wanted = (torch.autograd.grad((a * each).sum(), leaf)[0] for a in (loss, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("values", ["bool", "weights", "empty"])
def test_gradient_in_float64_is_a_finite_difference(values: str) -> None:
    given = arguments(torch.float64)
    leaf, mask = given.pop("out")[:, :, :2, :2].clone().requires_grad_(), drawn((4, 1, 2, 2), values)
    given["x0"] = given["x0"][:, :, :2, :2].clone()
    mask = mask.double() if values == "weights" else mask
    assert torch.autograd.gradcheck(lambda out: ops.denoising_loss(out, mask=mask, **given), leaf)


@pytest.mark.parametrize("values", ["bool", "weights"])
def test_operator_passes_opcheck_and_compiles_as_one_graph(values: str) -> None:
    f, mask = operands(12, batch=3), drawn((3, 12), values)
    key = (f.alpha_sigma, f.t, f.seed, f.sample_id, f.draw)
    weight = mask.float().sum(1) / 2  # its gradient's factor is 1, as test_denoising_loss.py says
    for grad in (False, True):
        out = f.out.clone().requires_grad_(grad)
        opcheck(torch.ops.fastdiff.masked_denoising_loss, (out, f.x0, *key, 2, weight, None, grad, mask))

    def step(out: torch.Tensor) -> torch.Tensor:
        return ops.denoising_loss(out * 2, f.x0, *key, target="v", mask=mask).mean()

    assert_compiles_as_one_graph(step, f.out)


def test_mask_of_any_strides_gives_the_same_bits() -> None:
    given = arguments()
    for shape in (SHAPE, (4, 1, 8, 16)):
        mask = drawn(shape, "weights")
        apart = torch.stack([mask, mask + 1], -1)[..., 0]
        last = mask.to(memory_format=torch.channels_last)
        expected = ops.denoising_loss(mask=mask, **given)
        for other in (apart, last):
            assert_same_bits(ops.denoising_loss(mask=other, **given), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_is_never_read_by_the_host(shape: tuple[int, ...]) -> None:
    """So a step with one can be captured: its shape alone says how it is read."""
    rows, inner = _dispatch._rows_of_mask(torch.empty(shape, device="meta"), torch.Size(SHAPE))
    of_values, same = _dispatch._rows_of_mask(torch.ones(shape), torch.Size(SHAPE))
    assert (rows.shape, rows.stride(), inner) == (of_values.shape, of_values.stride(), same)
    given = arguments()
    mask = drawn(shape, "bool")

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in (("levels", given["alpha_sigma"]), ("mask", mask), ("ids", torch.arange(4))):
                self.register_buffer(name, value)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return ops.denoising_loss(x, x, self.levels, t, 7, self.ids, self.ids, mask=self.mask)

    assert explain_capture(Step(), (given["x0"], given["t"])).findings == ()


def call(**changes: Any) -> Callable[[], Any]:
    return lambda: ops.denoising_loss(**(arguments() | changes))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 3, 8, 15), torch.ones(4), torch.ones(2, 1, 8, 16), torch.ones(1, 4, 3, 8, 16),
        torch.ones(SHAPE).double(), torch.ones(SHAPE).long(),
    ],
)  # fmt: skip
def test_mask_that_does_not_belong_to_x0_is_named(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"`mask` must be bool or .* broadcast to \[4, 3, 8, 16\], got"):
        call(mask=mask)()
    with pytest.raises(TypeError, match="`mask` must be a tensor, got list"):
        call(mask=[1.0])()
    with pytest.raises(ValueError, match=r"`mask` must be on cpu, got .* on meta"):
        call(mask=torch.ones(SHAPE, device="meta"))()


@pytest.mark.parametrize("loss", ["simple", "min_snr"])
def test_objective_takes_its_mean_over_the_mask(loss: str) -> None:
    """Padded trajectories [B, T, A] with [B, T, 1]: those that end early count as much as the others."""
    schedule = NoiseSchedule.cosine(20)
    objective = Objective(schedule, "eps", loss=loss)
    g = torch.Generator().manual_seed(3)
    x0, t = torch.randn(4, 16, 7, generator=g), torch.tensor([0, 5, 11, 19])
    length = torch.tensor([16, 9, 1, 12])
    mask = (torch.arange(16) < length[:, None])[..., None]
    gain = torch.ones((), requires_grad=True)
    padded = torch.where(mask, x0, 0.0)
    noise = torch.randn(4, 16, 7, generator=g)
    found = objective(lambda x, _: gain * x, padded, t, noise=noise, mask=mask)
    for b, count in enumerate(length.tolist()):
        alone = objective(
            lambda x, _: gain * x, x0[b : b + 1, :count], t[b : b + 1], noise=noise[b : b + 1, :count]
        )
        torch.testing.assert_close(found.mse[b], alone.mse[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(found.total[b], alone.total[0], rtol=1e-6, atol=0)
        grads = [torch.autograd.grad(a, gain, retain_graph=True)[0] for a in (found.total[b], alone.total[0])]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_objective_refuses_a_mask_before_the_network_runs() -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the network has run")

    with pytest.raises(ValueError, match=r"`mask` must be bool .* `mask\[..., None\]`"):
        Objective(NoiseSchedule.cosine(20))(network, torch.zeros(2, 5, 3), mask=torch.ones(2, 5) > 0)


@pytest.mark.parametrize("loss", ["hybrid", "vlb"])
def test_objective_refuses_a_mask_of_the_bound(loss: str) -> None:
    objective = Objective(NoiseSchedule.cosine(20), "eps", "learned_range", loss)
    with pytest.raises(ValueError, match=f"`mask` must be None for the loss '{loss}'"):
        objective(lambda x, t: x, torch.zeros(2, 3), mask=torch.ones(2, 3) > 0)
