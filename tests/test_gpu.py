"""What only a GPU can show: captured chains replay, no launch synchronises, tensors of any device.

The kernels' own cases run on a GPU in their own tests (`cuda` among kernel_cases.OTHERS). What these tests do
runs here on the CPU as well, up to the capture, so that they are known to work before there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import assert_same_bits, random_table

from fastdiff import ops
from fastdiff.schedule import NoiseSchedule
from fastdiff.train.bound import vlb_coefficients

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPE, BATCH = (3, 8, 8), 4
TABLE = random_table(2, 0, rows=6)


class Chain:
    """Buffers of a chain whose network is out = u / 2, and one step of it: what a graph captures."""

    def __init__(self, device: str) -> None:
        self.table = TABLE.to(device)
        self.row = TABLE.start(BATCH).to(device)
        self.key = ops.noise_key([1, 2, 3, 4], BATCH, BATCH, device)
        self.x = ops.normal(SHAPE, *self.key, 0, domain=0)
        self.registers = torch.zeros(2, *self.x.shape, device=device)
        self.u = self.x.clone()
        self.out = torch.empty_like(self.x)
        self.t = torch.zeros(BATCH, device=device)

    def step(self) -> None:
        torch.mul(self.u, 0.5, out=self.out)
        rest = dict(registers=self.registers, u=self.u)
        ops.reverse_step(self.x, self.out, self.table, self.row, *self.key, **rest)
        ops.advance(self.row, self.table, self.t)

    def state(self) -> list[torch.Tensor]:
        return [self.x, self.registers, self.u, self.row, self.t]


def operators(device: str) -> dict[str, Callable[[], Any]]:
    """One call of every operator, forward and backward, on tensors that lie ready."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(device)

    chain = Chain(device)
    x0, x_t = normal(BATCH, *SHAPE), normal(BATCH, *SHAPE)
    levels = torch.tensor([[1.0, 0.0], [0.6, 0.8]], device=device)
    t = torch.tensor([0, 1, 1, 0], device=device)
    draw = torch.zeros_like(t)
    coef = vlb_coefficients(NoiseSchedule.linear(10), "eps", "learned_range").to(device)
    out = normal(BATCH, *SHAPE).requires_grad_()
    learned = normal(BATCH, 2 * SHAPE[0], *SHAPE[1:]).requires_grad_()
    features, weight = normal(BATCH, 8, 5, 3).requires_grad_(), normal(8).requires_grad_()
    large = normal(1, 8, 128, 128).requires_grad_()  # read twice

    mask = normal(BATCH, 1, *SHAPE[1:]) > 0

    def loss(**given: Any) -> Any:
        each = ops.denoising_loss(out, x0, levels, t, *chain.key, draw, target="v", **given)
        return torch.autograd.grad(each.sum(), out)

    return {
        "normal": lambda: ops.normal(SHAPE, *chain.key, draw),
        "q_sample": lambda: ops.q_sample(x0, levels, t, *chain.key, draw, target="v"),
        "denoising_loss": loss,
        "denoising_loss, masked": lambda: loss(mask=mask),
        "vlb_terms": lambda: torch.autograd.grad(ops.vlb_terms(x0, x_t, learned, coef, t).sum(), learned),
        "reverse_step and advance": chain.step,
        "group_norm_silu": lambda: torch.autograd.grad(
            ops.group_norm_silu(features, 4, weight).sum(), (features, weight)
        ),
        "group_norm_silu, in two passes": lambda: torch.autograd.grad(
            ops.group_norm_silu(large, 4, weight).sum(), (large, weight)
        ),
    }


@pytest.mark.parametrize("device", DEVICES)
def test_a_chain_on_any_device_has_the_bits_of_the_cpu(device: str) -> None:
    chain, expected = Chain(device), Chain("cpu")
    for _ in range(TABLE.num_rows + 1):  # the last step is idle
        chain.step()
        expected.step()
    for actual, wanted in zip(chain.state(), expected.state(), strict=True):
        assert_same_bits(actual.cpu(), wanted)
    assert (chain.row == TABLE.num_rows).all()


@pytest.mark.gpu
def test_replay_of_a_captured_step_is_the_eager_chain_without_an_allocation() -> None:
    captured, expected = Chain("cuda"), Chain("cpu")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels: not within a capture
        Chain("cuda").step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(TABLE.num_rows + 1):
        graph.replay()
        expected.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    for actual, wanted in zip(captured.state(), expected.state(), strict=True):
        assert_same_bits(actual.cpu(), wanted)


@pytest.mark.parametrize("name", operators("meta"))
@pytest.mark.parametrize("device", ["meta", DEVICES[1]])
def test_no_operator_reads_its_tensors_on_the_host(name: str, device: str) -> None:
    """A tensor without memory cannot be read; on a GPU, CUDA's own check covers the launches as well."""
    run = operators(device)[name]
    run()  # compiles
    if device == "meta":
        with pytest.raises(RuntimeError, match="meta"):
            torch.zeros(1, device=device).item()
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_tensor_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with torch.cuda.device(0):
        for name, run in operators("cuda:1").items():
            run()
            assert torch.cuda.current_device() == 0, name
        chain, expected = Chain("cuda:1"), Chain("cpu")
        chain.step()
        expected.step()
    assert_same_bits(chain.x.cpu(), expected.x)
