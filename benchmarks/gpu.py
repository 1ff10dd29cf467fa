"""Everything that fastdiff would say of a GPU, measured in one command: `python -m benchmarks.gpu`.

Kernels: the device's time between events, the queue filled beforehand, every call reading and writing other
memory than those before it, so that the second-level cache is cold; in per cent of a copy of as many bytes,
measured likewise beside it. Operators against torch, torch.compile and diffusers: whole calls, host included,
with a synchronisation at both ends. Results are files as `record.py` writes them, in a folder named after the
GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import fastdiff as fd
from benchmarks import bench_ops, bench_step
from benchmarks.record import RESULTS, Comparison, Quantity, compare, save
from fastdiff.train.bound import vlb_coefficients

SHAPES = ((64, 3, 32, 32), (16, 4, 128, 128), (16, 3, 256, 256))  # of whole calls
# of kernels: each moves its bytes for 5 us or more at 3350 GB/s, an H100's, so that launches do not dominate
KERNEL_SHAPES = ((64, 4, 128, 128), (64, 3, 256, 256))
DTYPES = (torch.bfloat16, torch.float32)
COLD = 256 * 2**20  # bytes that a turn of a kernel's buffers moves at least: more than any cache of today
ROUNDS = 5
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timer:
    """How a device's time is read.

    Attributes:
        device: where tensors are made.
        name: of the folder of results.
        seconds: each call's time, the calls made one after the other.
        settle: waits until the device has nothing left to do.
    """

    device: str
    name: str
    seconds: Callable[[Sequence[Call]], list[float]]
    settle: Call


def cuda_timer() -> Timer:
    """Events on the current GPU."""
    words = "".join(c if c.isalnum() else " " for c in torch.cuda.get_device_name().lower()).split()
    return Timer("cuda", "-".join(words), event_seconds, torch.cuda.synchronize)


def event_seconds(calls: Sequence[Call]) -> list[float]:
    """Between events around each call; the device starts when all are queued: the host is not timed."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(calls))]
    torch.cuda.synchronize()
    torch.cuda._sleep(len(calls) * 10**6)  # about half a millisecond for a call that the host has to launch
    for i, call in enumerate(calls):
        marks[2 * i].record()
        call()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return [marks[2 * i].elapsed_time(marks[2 * i + 1]) / 1e3 for i in range(len(calls))]


def traffic(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """The least bytes that each kernel reads and writes."""
    numel, features, size = math.prod(shape), math.prod(features_of(shape)), dtype.itemsize
    return {
        "reverse_step": (8 + 2 * size) * numel,
        "q_sample": (4 + size) * numel,
        "denoising_loss": 2 * size * numel,
        "vlb_terms": (8 + 3 * size) * numel,
        "normal": 4 * numel,
        "group_norm_silu": 2 * size * features,
        "group_norm_silu gradient": 3 * size * features,
    }


def features_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What a network normalises, given images of `shape`: 128 channels at a quarter of the sides."""
    return shape[0], 128, *(max(1, side // 4) for side in shape[2:])


def kernels(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Each kernel on memory of its own; a call returns what it has written."""
    batch, numel = shape[0], math.prod(shape)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*dims: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(dims, generator=generator, device=device).to(dtype)

    x, x0, out = normal(*shape), normal(*shape), normal(*shape, dtype=dtype)
    learned = normal(batch, 2 * shape[1], *shape[2:], dtype=dtype)
    u = torch.empty_like(out)
    key = fd.ops.noise_key(0, batch, None, device)
    t, draw = torch.arange(batch, device=device) % 10, torch.zeros_like(key[0])
    levels = torch.stack([torch.linspace(1, 0, 10), torch.linspace(0, 1, 10)], 1).to(device)
    table = bench_step.table("ddpm").pack().to(device)
    row = torch.full((batch,), bench_step.ROW, dtype=torch.int32, device=device)
    coef = vlb_coefficients(fd.NoiseSchedule.linear(10), "eps", "learned_range").to(device)
    features, weight = normal(*features_of(shape), dtype=dtype), normal(128, dtype=dtype)
    norm = (features, None, weight, weight, None, None, 32, 1e-5, True)
    fused = torch.ops.fastdiff
    _, mean, rstd = fused.group_norm_silu(*norm)
    return {
        "reverse_step": lambda: (fd.ops.reverse_step(x, out, table, row, *key, u=u), u),
        "q_sample": lambda: fused.q_sample(x0, levels, t, *key, draw, 0, None, dtype),
        "denoising_loss": lambda: fused.denoising_loss(out, x0, levels, t, *key, draw, 1, None, None, True),
        "vlb_terms": lambda: fused.vlb_terms(x0, x, learned, coef, t, False, True),
        "normal": lambda: fused.normal(*key, draw, 1, numel // batch),
        "group_norm_silu": lambda: fused.group_norm_silu(*norm),
        "group_norm_silu gradient": lambda: fused.group_norm_silu_backward(features, mean, rstd, *norm),
    }


def keeping(call: Call) -> Call:
    """The call, its result kept until it is made again: those made meanwhile cannot write to that memory.

    An allocator would else hand the same block to each of them, which then lies in the cache.
    """
    kept: list[Any] = []

    def run() -> Any:
        kept.clear()
        kept.append(call())
        return kept[0]

    return run


def copy_of(moved: int, device: str) -> Call:
    """A copy that reads and writes `moved` bytes together."""
    source, target = (torch.zeros(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def kernel_figures(timer: Timer, shape: tuple[int, ...], dtype: torch.dtype) -> list[Quantity]:
    """Every kernel's speed at one shape, in per cent of a copy's."""
    counts = {name: max(2, math.ceil(COLD / moved)) for name, moved in traffic(shape, dtype).items()}
    turns = [kernels(shape, dtype, timer.device) for _ in range(max(counts.values()))]
    kind = str(dtype).removeprefix("torch.")
    figures = []
    for name, moved in traffic(shape, dtype).items():
        count = counts[name]
        calls = [keeping(turn[name]) for turn in turns[:count]]
        copies = [copy_of(moved, timer.device) for _ in range(count)]
        timer.seconds(calls)  # compiles, and warms up
        taken, copied = [], []
        for _ in range(ROUNDS):
            taken += timer.seconds(calls)
            copied += timer.seconds(copies)
        own, copy = statistics.median(taken), statistics.median(copied)
        about = {
            "shape": list(shape),
            "dtype": kind,
            "microseconds": 1e6 * own,
            "GB/s": moved / own / 1e9,
            "GB/s of the copy": moved / copy / 1e9,
            "buffers": count,
        }
        label = f"{name}, {words(shape)} {kind}"
        figures.append(Quantity("gpukernels", label, 100 * copy / own, "% of a copy", None, about))
    return figures


def operator_figures(timer: Timer, rounds: int = 15) -> Iterator[Comparison]:
    """Whole calls of operators against what they stand for, each task made when its turn comes.

    Raises:
        AssertionError: two variants of a task do not compute the same.
    """
    for name, make, baseline in _tasks(timer.device):
        yield compare("gpuops", name, make(), baseline, rounds=rounds, settle=timer.settle, device=timer.name)


def _tasks(device: str) -> Iterator[tuple[str, Callable[[], dict[str, Call]], str]]:
    """Each task's name, what makes its variants, and the one that the others are compared with."""
    for solver in ("ddpm", "ddim"):
        bench_step.check_step(solver, device)
        for shape in SHAPES:
            yield f"{solver} step, {words(shape)}", partial(_step, solver, shape, device), "diffusers"
    loss = partial(bench_ops.loss_variants, SHAPES[-1], device, peers=True)
    yield f"loss and gradient, {words(SHAPES[-1])}", loss, "mse_loss, noise stored"
    for image, layout, train in product(bench_ops.IMAGES, bench_ops.FORMATS, (False, True)):
        norm = partial(bench_ops.norm_variants, image, layout, train, device, torch.bfloat16, peers=True)
        what = "forward and gradient" if train else "forward"
        yield f"GroupNorm and SiLU, {image} {layout}, {what}", norm, "torch"


def _step(solver: str, shape: tuple[int, ...], device: str) -> dict[str, Call]:
    variants = bench_step.step_variants(solver, shape, device=device)
    variants.pop("fastdiff, no C++ compiler", None)
    return variants


def words(shape: tuple[int, ...]) -> str:
    """A shape as names of results have it: 16x3x256x256."""
    return "x".join(map(str, shape))


def measure(timer: Timer, folder: Path = RESULTS, rounds: int = 15) -> list[Path]:
    """Measure everything and write the results; says each as it comes."""
    paths = []
    for shape in KERNEL_SHAPES:
        for dtype in DTYPES:
            for figure in kernel_figures(timer, shape, dtype):
                print(f"{figure.name}: {figure.value:.3g} {figure.unit}", flush=True)
                paths.append(save(figure, folder, timer.name))
    for result in operator_figures(timer, rounds):
        print(f"{result.name}: {result.speed_ups}", flush=True)
        paths.append(save(result, folder, timer.name))
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each variant is timed")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none here", file=sys.stderr)
        return 1
    paths = measure(cuda_timer(), rounds=chosen.rounds)
    print(
        f"wrote {len(paths)} results into {paths[0].parent}; `python -m benchmarks.report` makes the tables"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
