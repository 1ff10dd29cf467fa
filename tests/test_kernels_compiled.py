"""The machine code of the kernels, compiled without a GPU: budgets, widths, addresses."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton")
import triton

from benchmarks import kernels as kernel_table
from benchmarks.sections import replaced
from fastdiff.kernels import _machine_code, _specialisations, inspect
from fastdiff.kernels._specialisations import IN_USE

NVIDIA = ("sm_80", "sm_90", "sm_100")
PINNED = triton.__version__.startswith("3.7.")
budget = pytest.mark.skipif(not PINNED, reason="budgets are asserted for Triton 3.7")
VARIANTS = {f"{s.kernel} {s.variant}": s for s in IN_USE}
BUDGETS = {  # executed instructions per element, registers
    "reverse_step K=0 bf16": (90, 64),
    "reverse_step K=0 fp32": (90, 64),
    "reverse_step K=0 bf16 preview": (90, 64),
    "reverse_step K=0 bf16 guided": (95, 64),
    "reverse_step K=0 bf16 learned": (120, 64),
    "reverse_step K=1 bf16": (105, 72),
    "reverse_step K=3 bf16": (156, 128),
    "reverse_step K=0 fp16": (90, 64),
    "q_sample bf16": (65, 64),
    "q_sample fp16": (65, 64),
    "q_sample bf16 eps": (75, 64),
    "q_sample fp32 v": (65, 64),
    "denoising_loss bf16 eps": (70, 64),
    "denoising_loss fp16 eps": (70, 64),
    "denoising_loss fp32 v": (80, 64),
    "denoising_loss bf16 eps mask fp32": (80, 64),
    "vlb_terms bf16 learned, both paths": (310, 64),  # of which a sample takes one
    "vlb_terms fp16 learned, both paths": (310, 80),
    "vlb_terms fp32 fixed, both paths": (250, 80),
    "normal fp32": (60, 64),
}

NORM_BUDGETS = {
    "group_norm_silu once bf16": (50, 64),
    "group_norm_silu once fp16": (50, 64),
    "group_norm_silu once fp32": (50, 64),
    "group_norm_silu once fp32 last": (55, 64),
    "group_norm_silu moments bf16": (35, 64),
    "group_norm_silu moments bf16 last": (60, 64),
    "group_norm_silu y bf16": (40, 64),
    "group_norm_silu y bf16 last": (50, 64),
    "group_norm_silu gradient once bf16": (60, 64),
    "group_norm_silu gradient once fp16": (60, 64),
    "group_norm_silu gradient sums bf16": (55, 64),
    "group_norm_silu gradient bf16": (50, 64),
    "group_norm_silu gradient bf16 last": (65, 96),
}

# what few use: no narrower than its operands allow, yet a mask's bytes move 8 at a time; the last number is
# the share of all bytes that 128-bit accesses move
RARE_BUDGETS = {
    "reverse_step K=0 bf16 known": (150, 72, 16 / 17),
    "threshold first count bf16": (90, 64, 1),
    "threshold last count bf16": (130, 64, 1),
    "threshold next above bf16": (70, 64, 1),
    "denoising_loss bf16 eps mask uint8": (80, 64, 4 / 5),
    "denoising_loss bf16 eps mask of pixels": (85, 64, 4 / 5),
    "denoising_loss bf16 eps mask of steps": (90, 64, 4 / 5),
}


@cache
def examined(name: str, target: str) -> inspect.Report:
    return inspect.examine(VARIANTS[name], target)


@budget
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", BUDGETS)
def test_kernel_stays_within_its_budget(name: str, target: str) -> None:
    got, (instructions, registers) = examined(name, target), BUDGETS[name]
    assert got.executed <= instructions
    assert got.registers <= registers
    assert (got.spills, got.stack) == (0, 0)


@pytest.mark.skipif(triton.__version__ != "3.7.1", reason="the table is of Triton 3.7.1")
def test_the_pages_table_is_what_the_machine_code_says() -> None:
    page = kernel_table.PAGE.read_text()
    found = kernel_table.table([examined(name, target) for name in VARIANTS for target in NVIDIA])
    assert f"Triton {triton.__version__}," in page
    assert replaced(page, "kernels", f"\n{found}\n\n") == page


@budget
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", BUDGETS)
def test_tensors_move_in_128_bit_accesses_and_no_byte_twice(name: str, target: str) -> None:
    got = examined(name, target)
    assert got.wide == 1.0
    assert got.traffic == got.least


@budget
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", RARE_BUDGETS)
def test_masks_and_thresholds_stay_within_their_budgets(name: str, target: str) -> None:
    got, (instructions, registers, wide) = examined(name, target), RARE_BUDGETS[name]
    assert got.executed <= instructions
    assert got.registers <= registers
    assert (got.spills, got.stack, got.fused) == (0, 0, 0)
    assert got.traffic == got.least
    assert got.wide == pytest.approx(wide)


@budget
@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", NORM_BUDGETS)
def test_group_norm_reads_x_once_or_twice_in_128_bit_accesses_without_spills(name: str, target: str) -> None:
    got, (instructions, registers) = examined(name, target), NORM_BUDGETS[name]
    assert got.executed <= instructions
    assert got.registers <= registers
    assert (got.spills, got.stack, got.slow) == (0, 0, 0)
    assert got.traffic == got.least
    assert got.wide == 1.0


ADVANCE = "advance int32"  # a gather of a few bytes for each slot: no width to hold


@budget
@pytest.mark.parametrize("target", NVIDIA)
def test_advance_moves_a_row_and_a_time_for_each_slot(target: str) -> None:
    got = examined(ADVANCE, target)
    assert got.executed <= 30
    assert got.registers <= 48
    assert (got.spills, got.stack, got.slow, got.fused) == (0, 0, 0, 0)
    assert got.traffic == got.least == 16


def test_every_specialisation_in_use_has_one_budget() -> None:
    assert sorted([*BUDGETS, *NORM_BUDGETS, *RARE_BUDGETS, ADVANCE]) == sorted(VARIANTS)


def test_launchers_of_chains_and_noise_allocate_nothing_on_dense_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(func.name())
            return func(*args, **(kwargs or {}))

    def noted(launcher: Callable[..., None]) -> Callable[..., None]:
        def run(*operands: Any, **named: Any) -> None:
            with Notes():
                launcher(*operands, **named)

        return run

    names = ("reverse_step", "q_sample", "normal", "advance", "denoising_loss")
    for name in (f"{name}_triton" for name in names):
        monkeypatch.setattr(_specialisations, name, noted(getattr(_specialisations, name)))
    for s in IN_USE:
        if s.kernel in names[:-1]:
            assert inspect.launches(s.launch)
            assert made == [], s
    inspect.launches(_specialisations.denoising_loss)
    assert any("empty" in name for name in made)  # a sum's parts are noticed


def test_group_norm_starts_two_programs_for_each_multiprocessor_at_batch_1() -> None:
    for n in (64 * 64, 128 * 128, 1000 * 1000):
        for last in (False, True):
            for backward in (False, True):
                run = partial(_specialisations.group_norm_silu, n, last=last, backward=backward, batch=1)
                found = [launch for launch in inspect.launches(run) if "x_ptr" in launch.arguments]
                assert len(found) == 2
                assert all(launch.grid[0] >= 2 * 132 for launch in found)


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("name", BUDGETS)
def test_exact_kernels_have_no_fused_multiply_add_outside_of_square_roots(name: str, target: str) -> None:
    assert examined(name, target).fused == 0


def test_fused_multiply_adds_are_noticed_where_they_are_allowed() -> None:
    (launch,) = inspect.launches(_specialisations.normal)
    allowed = dataclasses.replace(launch, options=launch.options | {"enable_fp_fusion": True})
    compiled = inspect.compile_for(allowed, "sm_90")
    assert inspect.read(compiled, allowed, "sm_90", VARIANTS["normal fp32"]).fused > 0


def test_accesses_that_are_not_wide_are_noticed() -> None:
    (launch,) = inspect.launches(lambda: _specialisations.normal(n=3 * 32 * 32 + 1))
    compiled = inspect.compile_for(launch, "sm_90")
    assert inspect.read(compiled, launch, "sm_90", VARIANTS["normal fp32"]).wide == 0.0


def test_wide_accesses_to_parameters_do_not_stand_for_narrow_ones_to_tensors() -> None:
    """Those to channels' parameters move more than x and y have together; a store of y made narrow shows."""
    name = "group_norm_silu y bf16 last"
    launch = inspect.launches(VARIANTS[name].launch)[VARIANTS[name].index]
    compiled = inspect.compile_for(launch, "sm_90")
    full, ptx = _machine_code.tensor_bytes(compiled.asm["ttir"]), compiled.asm["ptx"]
    assert [list(launch.arguments)[i] for i in sorted(full)] == ["y_ptr", "x_ptr"]
    narrow = ptx.replace("st.global.v4.b32", "st.global.b32")
    wide = sum(n for (i, bits), n in _machine_code.addressed(narrow).items() if bits == 128 and i not in full)
    assert wide > 2
    assert _machine_code.wide_share(ptx, full) == 1.0
    assert _machine_code.wide_share(narrow, full) == 16 / (16 + 4)


@pytest.mark.parametrize("name", ["reverse_step K=0 bf16 known", "group_norm_silu gradient bf16 last"])
def test_the_assembler_keeps_the_widths_of_the_listing_that_names_the_tensors(name: str) -> None:
    launch = inspect.launches(VARIANTS[name].launch)[VARIANTS[name].index]
    compiled = inspect.compile_for(launch, "sm_90")
    listed = _machine_code.addressed(compiled.asm["ptx"])
    executed = _machine_code.nvidia(compiled.asm["cubin"]).accesses
    wide = [sum(n for (_, bits), n in accesses.items() if bits == 128) for accesses in (listed, executed)]
    assert wide[0] == wide[1] > 0


def test_kernels_compile_for_amd_without_spills() -> None:
    got = examined("reverse_step K=0 bf16", "gfx942")
    assert (got.spills, got.stack) == (0, 0)
    assert got.traffic == got.least
    assert got.accesses["store 128"] > 0
    assert got.bounds == {}
    assert got.wide is None


@pytest.mark.parametrize("n", [3 * 32 * 32, 2**31 + 16])
def test_addresses_of_elements_have_64_bits(n: int) -> None:
    """Offsets of 32 bits lie within a block; what picks the block and the sample has 64."""
    every = partial(_specialisations.reverse_step, 3, guided=True, learned=True, known=True, preview=True)
    (launch,) = inspect.launches(partial(every, n=n))
    text = inspect.compile_for(launch, "sm_90").asm["ttir"]
    within_block = set(re.findall(r"(%\S+) = tt\.make_range", text))
    offsets = re.findall(r"tt\.addptr %\S+, (%\S+) : tensor<\d+x!tt\.ptr<\w+>>, tensor<\d+x(i\d+)>", text)
    assert offsets
    assert all(bits == "i64" or offset in within_block for offset, bits in offsets)
    scalars = re.findall(
        r"tt\.addptr %(?:x|reg|out|u|known|mask|preview)_ptr\S*, %\S+ : !tt\.ptr<\w+>, (i\d+)", text
    )
    assert scalars
    assert set(scalars) == {"i64"}


@pytest.mark.parametrize("target", NVIDIA)
def test_the_scale_of_a_threshold_is_one_warp_without_spills(target: str) -> None:
    launch = inspect.launches(_specialisations.threshold)[-1]
    code = _machine_code.nvidia(inspect.compile_for(launch, target).asm["cubin"])
    assert (code.spills, code.stack) == (0, 0)
    assert len(code.executed) <= 1000


# the tensors of as many elements as there are, or of a number for each channel of each sample, which is as
# many where N = 1; others are indexed by sample, group or program
FULL = [
    "x", "y", "out", "u", "reg", "x0", "x_t", "target", "error", "grad",
    "grad_x", "grad_mean", "grad_v", "residual", "noise", "mask", "z", "scale", "shift", "sums",
]  # fmt: skip
LARGE = 2**31 + 16


def narrow_addresses(ttir: str) -> list[str]:
    """Additions to a full tensor's address of 32 bits that depend on which program it is."""
    from_program, pointers, wrong = set(), {f"%{name}_ptr" for name in FULL}, []
    for line in ttir.splitlines():
        if not (m := re.match(r"\s*(%\w+)(?::\d+)? = (\S+) (.*?)(?: loc\(|$)", line)):
            continue
        result, operation, rest = m.groups()
        operands = re.findall(r"%\w+", rest)
        if operation == "tt.addptr" and operands[0] in pointers and operands[1] in from_program:
            wrong += [] if rest.rstrip(">").endswith("i64") else [line.strip()]
        if operands and operands[0] in pointers and operation in ("tt.addptr", "tt.splat", "tt.broadcast"):
            pointers.add(result)
        if operation == "tt.get_program_id" or from_program & set(operands):
            from_program.add(result)
    return wrong


@pytest.mark.parametrize(
    "run",
    [
        partial(_specialisations.q_sample, "v", n=LARGE),
        partial(_specialisations.denoising_loss, "v", n=LARGE, mask=(torch.uint8, LARGE, 1)),
        partial(_specialisations.vlb_terms, n=LARGE),
        partial(_specialisations.normal, n=LARGE),
        partial(_specialisations.threshold, n=2**31 - 16),  # more it refuses
        partial(_specialisations.group_norm_silu, LARGE // 128, last=True),
        partial(_specialisations.group_norm_silu, LARGE // 128, backward=True),
        partial(_specialisations.group_norm_silu, 1, batch=LARGE // 128),
        partial(_specialisations.group_norm_silu, 1, backward=True, batch=LARGE // 128),
    ],
    ids=[
        "q_sample",
        "denoising_loss",
        "vlb_terms",
        "normal",
        "threshold",
        "group_norm_silu",
        "its gradient",
        "group_norm_silu at one position",
        "its gradient at one position",
    ],
)
def test_no_kernel_reaches_a_large_tensors_end_with_32_bits(run: Callable[[], None]) -> None:
    for launch in inspect.launches(run):
        text = inspect.compile_for(launch, "sm_90").asm["ttir"]
        named = set(re.findall(r"%(\w+)_ptr", text)) & set(FULL)
        assert named or launch.kernel.fn.__name__ in ("_combine_kernel", "_scale_kernel")
        assert narrow_addresses(text) == []


def test_a_narrow_address_is_noticed() -> None:
    text = """
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %start = arith.muli %pid, %c256 : i32 loc(#loc2)
    %at = tt.splat %start : i32 -> tensor<256xi32> loc(#loc3)
    %x = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<256x!tt.ptr<f32>> loc(#loc4)
    %x_0 = tt.addptr %x, %at : tensor<256x!tt.ptr<f32>>, tensor<256xi32> loc(#loc5)"""
    assert len(narrow_addresses(text)) == 1
    assert narrow_addresses(text.replace("tensor<256xi32>", "tensor<256xi64>")) == []


def test_launcher_fits_the_limits_of_the_grid() -> None:
    from fastdiff.kernels._blocks import cut

    for batch, n in ((1, 1), (3, 257), (70_000, 5), (1, 2**31 + 1), (2, 65536 * 1024 * 3)):
        (samples, low, high), options = cut(batch, n)
        assert samples == batch
        assert max(low, high) <= 65535
        assert low * high * options["BLOCK"] >= n
        assert options["BLOCK"] == 256 * options["num_warps"]


def test_bound_is_the_slowest_of_memory_issue_and_units() -> None:
    h100, h200 = (d for d in inspect.DEVICES if d.target == "sm_90")
    # 12 bytes take 106 issue slots of an H100's 132 x 4 schedulers at 1.755 GHz, and 74 of an H200's
    for device, slots in ((h100, 106.2), (h200, 74.1)):
        assert inspect._bound(device, slots - 1, {}, 12.0)[0] == "memory"
        what, ratio = inspect._bound(device, 2 * slots, {}, 12.0)
        assert what == "issue"
        assert ratio == pytest.approx(2, rel=1e-3)
    assert inspect._bound(h100, 80.0, {"special": 40.0}, 12.0)[0] == "special"


def test_report_prints_as_table_and_json_and_says_that_it_is_a_model() -> None:
    rows = [examined("reverse_step K=0 bf16", target) for target in ("sm_90", "gfx942")]
    table = inspect.to_table(rows).splitlines()
    assert table[0].split()[:4] == ["kernel", "variant", "target", "regs"]
    assert len(table) == 4
    assert "H100" in table[1]
    assert "H200" in table[1]
    assert table[0].split()[-1] == "accesses"
    assert f"load 128 x{rows[0].accesses['load 128']}" in table[1]
    assert table[-1] == inspect.NOTE
    assert "the compiler's own listings" in inspect.NOTE
    assert "not a measurement" in inspect.NOTE
    read = json.loads(inspect.to_json(rows))
    assert read["note"] == inspect.NOTE
    assert read["kernels"][0]["executed"] == rows[0].executed


def test_report_covers_the_kernels_that_are_asked_for() -> None:
    rows = inspect.report(("sm_90",), ["normal"])
    assert [(r.kernel, r.target) for r in rows] == [("normal", "sm_90")]
    with pytest.raises(ValueError, match=r"`kernels` must be of \['reverse_step', .*got 'typo'"):
        inspect.report(("sm_90",), ["typo"])


def test_recording_launches_nothing_and_restores_triton() -> None:
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    (launch,) = inspect.launches(_specialisations.q_sample)
    assert launch.arguments["x0_ptr"].device == torch.device("meta")
    assert launch.options["enable_fp_fusion"] is False
    assert JITFunction.run is before


@pytest.mark.slow
@pytest.mark.parametrize("target", inspect.TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_specialisation_compiles_everywhere_without_spills(name: str, target: str) -> None:
    got = examined(name, target)
    assert (got.spills, got.stack) == (0, 0)
    assert got.fused == 0 or not VARIANTS[name].exact
