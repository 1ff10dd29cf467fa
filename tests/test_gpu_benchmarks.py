"""`python -m benchmarks.gpu`: all of it runs, on a CPU under a clock that is told what to say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bench_ops, bench_step, gpu, record, report


class Clock:
    """Runs what it is given, and says that the n-th call of a turn took as long as its turn's number says."""

    def __init__(self) -> None:
        self.turns: list[int] = []

    def __call__(self, calls: Any) -> list[float]:
        for call in calls:
            call()
        self.turns.append(len(calls))
        return [1e-3 * (1 + len(self.turns) % 2)] * len(calls)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> gpu.Timer:
    """Small shapes, plain functions for compiled ones; the device is the CPU, its time made up."""
    monkeypatch.setattr(gpu, "SHAPES", ((2, 3, 8, 8), (1, 4, 4, 4)))
    monkeypatch.setattr(gpu, "KERNEL_SHAPES", gpu.SHAPES)
    monkeypatch.setattr(gpu, "COLD", 8 * 2 * 3 * 8 * 8)
    monkeypatch.setattr(bench_ops, "IMAGES", {"1x64x8x8": ((1, 64, 8, 8), 16)})
    monkeypatch.setattr(torch, "compile", lambda run, **options: run)
    return gpu.Timer("cpu", "made-up-device", Clock(), lambda: None)


def test_every_figure_is_measured_and_kept_as_the_other_benchmarks_keep_theirs(
    small: gpu.Timer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "compare", lambda *a, **k: record.compare(*a, **(k | {"least_seconds": 0})))
    order: list[tuple[str, ...]] = []
    check, made, timed = bench_step.check_step, bench_step.step_variants, gpu.compare
    monkeypatch.setattr(bench_step, "check_step", lambda *a: order.append(("check", *a)) or check(*a))
    monkeypatch.setattr(bench_step, "step_variants", lambda *a, **k: order.append(("make",)) or made(*a, **k))
    monkeypatch.setattr(gpu, "compare", lambda *a, **k: order.append(("time",)) or timed(*a, **k))
    paths = gpu.measure(small, tmp_path, rounds=1)
    steps = [("check", "ddpm", "cpu"), *[("make",), ("time",)] * 2, ("check", "ddim", "cpu")]
    assert order[: len(steps)] == steps  # what is made together would be compiled together
    assert {path.parent.name for path in paths} == {"made-up-device"}
    assert len(set(paths)) == len(paths)
    groups = report.results(tmp_path)
    assert set(groups) == set(report.ON_A_GPU)
    kernels = [result for result, _ in groups["gpukernels"]]
    names = {k.name.split(",")[0] for k in kernels}
    assert names == {
        "reverse_step", "q_sample", "denoising_loss", "vlb_terms", "normal", "group_norm_silu",
        "group_norm_silu gradient",
    }  # fmt: skip
    assert len(kernels) == len(names) * 2 * 2
    operators = [result for result, _ in groups["gpuops"]]
    assert {"diffusers", "fastdiff", "torch", "torch.compile"} == set(operators[0].times)
    assert all(any(label.startswith("torch.compile") for label in result.times) for result in operators)
    assert all("fastdiff" in result.speed_ups for result in operators)
    assert "reverse_step, 2x3x8x8 bfloat16: " in capsys.readouterr().out


TRAFFIC = gpu.traffic((2, 3, 8, 8), torch.float32)


def test_a_kernels_speed_is_the_copys_time_by_its_own(small: gpu.Timer) -> None:
    figures = gpu.kernel_figures(small, (2, 3, 8, 8), torch.float32)
    # of each kernel a turn that warms up, then its own and the copy's in turn
    buffers = [figure.about["buffers"] for figure in figures]
    assert buffers == [max(2, math.ceil(gpu.COLD / moved)) for moved in TRAFFIC.values()]
    assert small.seconds.turns == [count for count in buffers for _ in range(1 + 2 * gpu.ROUNDS)]
    step = figures[0]
    own = step.about["microseconds"] / 1e6
    assert step.about["GB/s"] == pytest.approx(16 * 384 / own / 1e9)
    assert step.value == pytest.approx(100 * step.about["GB/s"] / step.about["GB/s of the copy"])
    assert step.value in (50.0, 200.0)


def test_bytes_are_the_least_that_the_machine_code_is_held_to() -> None:
    """Of the specialisations that kernels/inspect.py reads."""
    pytest.importorskip("triton", reason="needs Triton")
    from fastdiff.kernels._specialisations import IN_USE

    least = {f"{s.kernel} {s.variant}": s.least for s in IN_USE}
    variants = {
        "reverse_step": {2: "K=0 bf16", 4: "K=0 fp32"},
        "q_sample": {2: "bf16"},
        "denoising_loss": {2: "bf16 eps"},
        "vlb_terms": {2: "bf16 learned, both paths"},
        "normal": {4: "fp32"},
        "group_norm_silu": {2: "once bf16", 4: "once fp32"},
    }
    shape = (2, 3, 8, 8)
    for dtype in gpu.DTYPES:
        assert gpu.traffic(shape, dtype).keys() == gpu.kernels(shape, dtype, "cpu").keys()
        for name, moved in gpu.traffic(shape, dtype).items():
            elements = 2 * 128 * 2 * 2 if name.startswith("group_norm") else 2 * 3 * 8 * 8
            if variant := variants.get(name, {}).get(dtype.itemsize):
                assert moved == least[f"{name} {variant}"] * elements


def addresses(result: Any, least: int) -> list[int]:
    """Where a call's results of `least` bytes or more begin."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [a.data_ptr() for a in tensors if a.nbytes >= least]


class Watch(Clock):
    """Notes where each turn's large results lie, and holds none of them."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.written: list[list[int]] = []

    def __call__(self, calls: Any) -> list[float]:
        self.written.append([at for call in calls for at in addresses(call(), self.least)])
        self.turns.append(len(calls))
        return [1e-3] * len(calls)


def test_no_call_of_a_turn_writes_where_another_has(
    small: gpu.Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, dtype = (2, 3, 8, 8), torch.float32
    watch = Watch(least=min(TRAFFIC.values()) // 2)
    timer = gpu.Timer("cpu", "", watch, lambda: None)
    monkeypatch.setattr(gpu, "COLD", 8 * max(TRAFFIC.values()))
    gpu.kernel_figures(timer, shape, dtype)
    assert all(
        len(turn) == len(set(turn)) >= count for turn, count in zip(watch.written, watch.turns, strict=True)
    )
    # without what keeps a turn's results, memory is handed out again at once
    watch.written.clear()
    monkeypatch.setattr(gpu, "keeping", lambda call: call)
    gpu.kernel_figures(timer, shape, dtype)
    assert any(len(turn) > len(set(turn)) for turn in watch.written)


def test_buffers_turn_until_no_cache_holds_what_a_kernel_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = dict.fromkeys(TRAFFIC, lambda: None)
    monkeypatch.setattr(gpu, "kernels", lambda *arguments: idle)
    monkeypatch.setattr(gpu, "copy_of", lambda *arguments: idle["normal"])
    for shape in gpu.KERNEL_SHAPES:
        for dtype in gpu.DTYPES:
            figures = gpu.kernel_figures(gpu.Timer("cpu", "", Clock(), lambda: None), shape, dtype)
            for moved, figure in zip(gpu.traffic(shape, dtype).values(), figures, strict=True):
                assert figure.about["buffers"] * moved >= gpu.COLD


def test_a_kernel_moves_its_bytes_for_longer_than_its_launch_takes() -> None:
    """By an H100's published bandwidth, a few microseconds."""
    for shape in gpu.KERNEL_SHAPES:
        for dtype in gpu.DTYPES:
            assert min(gpu.traffic(shape, dtype).values()) / 3350e9 >= 5e-6


def test_baselines_are_compiled_for_constant_shapes() -> None:
    """Through all tasks, though one code object serves each solver's step."""
    seen: list[bool] = []

    def backend(graph: torch.fx.GraphModule, examples: Any) -> Any:
        seen.append(any(isinstance(a, torch.SymInt) for a in examples))
        return graph.forward

    def run(compile: Any) -> list[bool]:
        seen.clear()
        for n in (8, 9, 10):
            x = torch.randn(2, n)
            compile(bench_step.plain_step("ddim"), backend=backend)(x, x)
        return seen

    assert run(bench_step.compiled) == [False] * 3
    assert True in run(torch.compile)


class Recorded:
    """Stands for torch.cuda where events are recorded: the device's clock moves by what is queued."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        device = self

        class Event:
            def record(self) -> None:
                device.log.append("record")
                self.at = device.now

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        return Event()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.now += cycles / 1e9


def test_events_lie_around_each_call_and_the_queue_is_full_before_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Recorded()
    for name in ("Event", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def call(seconds: float) -> gpu.Call:
        def run() -> None:
            cuda.log.append("call")
            cuda.now += seconds

        return run

    assert gpu.event_seconds([call(1.0), call(0.25)]) == pytest.approx([1.0, 0.25])
    assert cuda.log == ["synchronize", "sleep", *["record", "call", "record"] * 2, "synchronize"]


def test_without_a_gpu_the_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch finds none here\n"


def test_a_gpus_figures_are_called_unmeasured_until_there_is_a_record(tmp_path: Path) -> None:
    text = "<!-- results: gpukernels -->\nold\n<!-- results: end -->\n"
    assert report.UNMEASURED in report.up_to_date(text, {})
    figure = record.Quantity("gpukernels", "normal, 1x3 float32", 91.0, "% of a copy")
    path = record.save(figure, tmp_path, "some-gpu")
    content = json.loads(path.read_text())
    content["machine"]["gpu"] = "Some GPU, driver 1, CUDA 2"
    path.write_text(json.dumps(content))
    shown = report.up_to_date(text, report.results(tmp_path))
    assert "91 % of a copy" in shown
    assert "Some GPU, driver 1, CUDA 2; " in shown
    assert report.UNMEASURED not in shown
