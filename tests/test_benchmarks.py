"""What the benchmarks show still holds, and their records and tables say what was measured."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import bench_chain, bench_memory, bench_noise, bench_ops, bench_step, record, report
from fastdiff import ops
from fastdiff.chain import Program
from fastdiff.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")


def speed_up(comparison: record.Comparison, variant: str = "fastdiff") -> float:
    return comparison.speed_ups[variant]


def test_a_large_ddpm_step_is_faster_than_diffusers():
    compiled_kernels()
    assert speed_up(bench_step.step_speed("ddpm", peers=False, rounds=9)) >= bench_step.NEEDED


def test_normals_without_a_compiler_take_at_most_ten_times_torch_randn():
    call = "bench_noise.normal_speed(9).speed_ups['fastdiff, no C++ compiler']"
    assert record.in_fresh_process(call, FASTDIFF_NATIVE="0") >= 1 / bench_noise.SLOWEST


def compiled_kernels():
    if cpu.library(wait=True) is None:
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def one_thread(monkeypatch):
    """One thread, and its own processor time for the clock: what else runs beside a test does not count."""
    compiled_kernels()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(record.time, "perf_counter", time.thread_time)
    yield
    torch.set_num_threads(before)


def test_normals_with_a_compiler_are_not_slower_than_torch_randn(one_thread):
    assert speed_up(bench_noise.normal_speed(9)) >= 1 / bench_noise.SLOWEST_COMPILED


@pytest.mark.parametrize("layout", bench_ops.FORMATS)
@pytest.mark.parametrize(("image", "least"), bench_ops.LEAST.items())
def test_group_norm_with_silu_is_not_slower_than_torch(image, least, layout, one_thread):
    assert speed_up(bench_ops.norm_speed(image, layout, rounds=9)) >= least


def test_loss_that_redraws_its_noise_is_not_slower_than_a_stored_one(one_thread):
    assert speed_up(bench_ops.loss_speed(9)) >= 1


@linux
def test_loss_that_redraws_its_noise_holds_no_noise():
    for redraw in (False, True):
        bench_ops.loss_held(redraw)
    assert bench_ops.loss_held(redraw=True) <= bench_ops.MOST_HELD
    assert bench_ops.loss_held(redraw=False) >= bench_ops.MOST_HELD


def test_noise_is_a_small_share_of_a_chain_without_a_compiler():
    assert bench_noise.uncompiled_share("digits", 25) <= bench_noise.LARGEST_SHARE


def test_the_share_of_noise_is_seen_where_it_is_large(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda wait=False: None)
    normal = ops.normal

    def draw_slowly(*args, **kwargs):
        time.sleep(0.2)
        return normal(*args, **kwargs)

    monkeypatch.setattr(ops, "normal", draw_slowly)
    assert bench_noise.noise_share("bare", 20) > 0.8


@linux
@pytest.mark.parametrize("case", bench_memory.CASES)
def test_a_chain_holds_at_most_three_states(case):
    bench_memory.states_held(steps=1)
    held = bench_memory.states_held(**bench_memory.CASES[case])
    assert held <= bench_memory.MOST + bench_memory.SCRATCH


@linux
def test_the_count_of_states_sees_one_that_is_kept():
    kept = []
    before = bench_memory.states_held()
    after = bench_memory.states_held(callback=lambda moment: kept.append(moment.x.clone()))
    # and the preview of x0 that a callback is given
    assert after - before == pytest.approx(len(kept) + 1, abs=0.1)


def test_a_row_costs_little_beside_its_network():
    assert bench_chain.host_microseconds(rounds=5) <= bench_chain.MOST_HOST


def test_what_a_row_costs_on_the_host_is_seen(monkeypatch):
    check = Program._check_output

    def slowly(*args):
        end = time.thread_time() + 1e-4
        while time.thread_time() < end:
            pass
        check(*args)

    monkeypatch.setattr(Program, "_check_output", slowly)
    assert bench_chain.host_microseconds(rounds=1) > 100


@pytest.mark.slow
def test_a_row_costs_the_same_in_a_long_chain():
    assert bench_chain.row_growth() <= bench_chain.MOST_GROWTH


@linux
def test_a_long_chain_takes_the_memory_of_a_short_one():
    # in a process of its own: what other tests gave back to the allocator comes and goes
    assert record.in_fresh_process("bench_chain.memory_growth()") <= bench_chain.MOST_MEMORY


def test_the_products_of_a_network_are_all_found():
    layers = [
        torch.nn.Conv2d(2, 3, 3),
        torch.nn.Flatten(),
        torch.nn.Linear(12, 4),
        torch.nn.Linear(4, 4, False),
    ]
    network = torch.nn.Sequential(*layers)
    calls = bench_chain.products(lambda x, t: network(x), (1, 2, 4, 4))
    assert len(calls) == 3
    expected = network(torch.zeros(1, 2, 4, 4))
    torch.testing.assert_close(calls[-1](), expected, rtol=0, atol=0)
    assert len(bench_chain.products(lambda x, t: x * 2, (1, 2, 4, 4))) == 0


@pytest.mark.parametrize("solver", bench_chain.SOLVERS)
def test_the_chains_that_are_compared_are_the_same(solver):
    assert bench_chain.difference("mlp", 3, solver, steps=10) <= bench_chain.SAME
    for network in ("policy", "action"):
        assert bench_chain.difference(network, 1, solver, steps=4) <= bench_chain.SAME


def test_the_steps_that_are_compared_are_the_same(monkeypatch):
    bench_step.check_step("ddpm")
    bench_step.check_step("ddim")
    monkeypatch.setattr(bench_step, "ROW", bench_step.ROW + 1)
    table = bench_step.table
    monkeypatch.setattr(bench_step, "table", lambda solver: table("ddim" if solver == "ddpm" else "ddpm"))
    with pytest.raises(AssertionError):
        bench_step.check_step("ddpm")


def test_plain_torch_does_the_same_step():
    x, out = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    ours = x.clone()
    row = torch.full((2,), bench_step.ROW, dtype=torch.int32)
    bench_step.fd.ops.reverse_step(ours, out, bench_step.table("ddim").pack(), row)
    # four products and three sums of values up to 4
    torch.testing.assert_close(bench_step.plain_step("ddim")(x, out), ours, rtol=0, atol=7 * 4 * 2**-24)


def test_interleaving_finds_the_slower_variant_and_by_how_much():
    def wait(seconds: float) -> Callable[[], None]:
        return lambda: time.sleep(seconds)

    variants = {"slow": wait(0.02), "fast": wait(0.005), "same": wait(0.02)}
    found = record.compare("group", "name", variants, "slow", rounds=5, least_seconds=0)
    assert found.speed_ups["fast"] == pytest.approx(4, rel=0.5)
    assert found.speed_ups["same"] == pytest.approx(1, rel=0.3)
    assert found.times["slow"].p20 <= found.times["slow"].median <= found.times["slow"].p80
    assert found.times["slow"].n == 5
    with pytest.raises(ValueError, match="`baseline` must be one of slow, fast, same, got 'none'"):
        record.compare("group", "name", variants, "none")


def test_percentiles_are_those_of_the_sorted_timings():
    times = record.times_of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (times.p20, times.median, times.p80, times.n) == (2.0, 3.5, 5.0, 6)


@pytest.fixture
def comparison() -> record.Comparison:
    times = {name: record.Times(s, s / 2, 2 * s, 9) for name, s in [("fastdiff", 0.001), ("theirs", 0.002)]}
    ratios = {"fastdiff": 2.0}
    return record.Comparison("step", "ddpm, large", times, "theirs", ratios, {"shape": [1, 2]}, "a test")


@pytest.fixture
def quantity() -> record.Quantity:
    return record.Quantity("step", "states held", 2.5, "states", 3)


def test_results_come_back_from_their_files_with_the_machine(tmp_path, comparison, quantity):
    path = record.save(comparison, tmp_path)
    assert path == tmp_path / "cpu" / "step-ddpm-large.json"
    again, machine = record.load(path)
    assert again == comparison
    assert machine["torch"] == torch.__version__
    assert machine["threads"] == torch.get_num_threads()
    assert record.load(record.save(quantity, tmp_path))[0] == quantity
    path.write_text(json.dumps({"kind": "Comparison"}))
    with pytest.raises(ValueError, match=r"`path` must be a result .*step-ddpm-large\.json"):
        record.load(path)


def test_a_table_shows_every_variant_and_calls_ties_and_losses_so(tmp_path, comparison, quantity):
    record.save(replace(comparison, speed_ups={"fastdiff": 0.8}), tmp_path)
    record.save(quantity, tmp_path)
    table = report.table(report.results(tmp_path)["step"])
    assert "| ddpm, large | theirs | 2 (1 to 4) | baseline |" in table
    assert "|  | fastdiff | 1 (0.5 to 2) | 0.80x (loss) |" in table
    assert "| states held | 2.5 states | 3 |" in table
    assert table.count(f"torch {torch.__version__}") == 1, "one machine is named once"
    assert [report.verdict(r) for r in (2.0, 1.02, 0.98, 0.5)] == [
        "2.00x", "1.02x (tie)", "0.98x (tie)", "0.50x (loss)",
    ]  # fmt: skip


def test_a_document_gets_its_tables_between_the_markers(tmp_path, comparison):
    record.save(comparison, tmp_path)
    groups = report.results(tmp_path)
    text = "before\n<!-- results: step -->\nold\n<!-- results: end -->\nafter\n"
    new = report.up_to_date(text, groups)
    assert new.startswith("before\n<!-- results: step -->\n")
    assert new.endswith("<!-- results: end -->\nafter\n")
    assert "2.00x" in new
    assert "old" not in new
    assert report.up_to_date(new, groups) == new
    short = report.up_to_date(text.replace("step", "begin"), groups)
    assert "| step: ddpm, large | 2 (theirs) | 1 | 2.00x |" in short
    with pytest.raises(ValueError, match="`results: chain` must name one of begin, step"):
        report.up_to_date(text.replace("step", "chain"), groups)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("bench_*.py")), ids=lambda path: path.stem)
def test_every_benchmark_names_guards_that_exist(path):
    module = importlib.import_module(f"benchmarks.{path.stem}")
    assert any(name.startswith("bench_") for name in vars(module))
    for guard in [value for name, value in vars(module).items() if name.startswith("GUARD")]:
        file, _, test = guard.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text()


def test_the_documents_show_the_recorded_results():
    """`make bench` keeps them so."""
    groups = report.results()
    assert groups
    for document in report.DOCUMENTS:
        assert report.up_to_date(document.read_text(), groups) == document.read_text(), document
