"""What compiled kernels cost, from machine code and the compiler's listings: no GPU is needed, none is asked.

    for row in report(): print(row)
    print(to_table(report(("sm_90",))))

Each kernel is compiled ahead of time, as its own launcher would have it compiled, for named targets. Bytes
come from Triton's intermediate code, the tensor that an access belongs to from PTX, all else from machine
code. The last column says what would bound it on real devices, from published peak rates: a model, not a
measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import _machine_code, _specialisations

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NOTE = (
    "From machine code and the compiler's own listings; "
    "what bounds a kernel is a model from published peak rates, not a measurement."
)


@dataclass(frozen=True)
class Device:
    """Published peaks of a GPU: multiprocessors, GHz, GB/s, multiply-adds a clock and multiprocessor."""

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    multiply_adds: int


# NVIDIA's datasheets of the SXM boards and the CUDA C++ Programming Guide, "Arithmetic Instructions"; each
# multiprocessor issues 128 lanes a clock, of which 64 integer operations and 16 special functions
DEVICES = (
    Device("A100", "sm_80", 108, 1.41, 2039, 64),
    Device("H100", "sm_90", 132, 1.755, 3350, 128),
    Device("H200", "sm_90", 132, 1.755, 4800, 128),
    Device("B200", "sm_100", 148, 1.85, 8000, 128),
)


@dataclass(frozen=True)
class Launch:
    """One launch as a launcher asked for it: the kernel, its arguments by name, its options, its grid."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a kernel costs on a target; instructions and bytes are per element.

    Attributes:
        executed: machine instructions outside of slow paths; slow: those in slow paths.
        pipes: the executed ones by the unit that runs them.
        fused: fused multiply-adds outside of square roots, in one thread's code; an exact kernel has none.
        accesses: executed accesses to global memory of one thread, "load 128" -> how many.
        wide: share of the full tensors' bytes that 128-bit accesses move; None where no listing says which
            tensor an access belongs to (AMD).
        traffic, least: bytes read and written, and the least that its operands allow.
        bounds: device -> what takes longest there, and how long against its memory traffic.
    """

    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    barriers: int
    executed: float
    slow: float
    pipes: dict[str, float]
    fused: int
    accesses: dict[str, int]
    wide: float | None
    traffic: float
    least: float
    bounds: dict[str, tuple[str, float]]


def report(targets: Sequence[str] = TARGETS, kernels: Sequence[str] | None = None) -> list[Report]:
    """Compile every specialisation in use for every target and read its machine code.

    Args:
        targets: of `TARGETS`, or any other that Triton compiles for.
        kernels: names of kernels; all by default.

    Raises:
        ValueError: an unknown kernel.
    """
    known = list(dict.fromkeys(s.kernel for s in _specialisations.IN_USE))
    if unknown := [name for name in kernels or () if name not in known]:
        raise ValueError(f"`kernels` must be of {known}, got {unknown[0]!r}")
    chosen = [s for s in _specialisations.IN_USE if kernels is None or s.kernel in kernels]
    return [examine(s, target) for s in chosen for target in targets]


def examine(s: _specialisations.Specialisation, target: str) -> Report:
    """One kernel on one target."""
    launch = launches(s.launch)[s.index]
    return read(compile_for(launch, target), launch, target, s)


def read(compiled: Any, launch: Launch, target: str, s: _specialisations.Specialisation) -> Report:
    """The report of compiled code."""
    is_amd = target.startswith("gfx")
    code = (
        _machine_code.amd(compiled.asm["amdgcn"]) if is_amd else _machine_code.nvidia(compiled.asm["cubin"])
    )
    elements = launch.arguments["BLOCK"]
    threads = compiled.metadata.num_warps * (64 if is_amd else 32)
    a_lane = threads / elements
    full = _machine_code.tensor_bytes(compiled.asm["ttir"])
    pipes = {name: count * a_lane for name, count in sorted(code.pipes.items())}
    executed, traffic = len(code.executed) * a_lane, sum(full.values()) / elements
    return Report(
        s.kernel, s.variant, target, code.registers, code.stack, code.spills, code.shared, code.barriers,
        executed, code.slow * a_lane, pipes, 0 if is_amd else code.fused_outside_roots,
        {f"{kind} {bits}": count for (kind, bits), count in sorted(code.accesses.items())},
        None if is_amd else _machine_code.wide_share(compiled.asm["ptx"], full), traffic, s.least,
        {d.name: _bound(d, executed, pipes, traffic) for d in DEVICES if d.target == target},
    )  # fmt: skip


def launches(run: Callable[[], Any]) -> list[Launch]:
    """What `run`, a call of launchers, would launch; nothing is launched."""
    with _recorded() as found:
        run()
    return found


@contextmanager
def _recorded() -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def record(self: Any, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        given = dict(zip(self.arg_names, values, strict=False)) | named
        options = {name: given.pop(name) for name in list(given) if name not in self.arg_names}
        found.append(Launch(self, given, options, grid))

    original = JITFunction.run
    JITFunction.run = record
    try:
        yield found
    finally:
        JITFunction.run = original


def compile_for(launch: Launch, target: str) -> Any:
    """Compile a launch ahead of time as Triton's JIT would specialise it, for "sm_90", "gfx942", ..."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constant = {p.name for p in launch.kernel.params if p.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        is_tensor = isinstance(value, torch.Tensor)
        if name in constant or value is None or (value == 1 if not is_tensor else False):
            signature[name], values[(i,)] = "constexpr", value
            continue
        signature[name] = f"*{_TYPES[value.dtype]}" if is_tensor else "i32" if abs(value) < 2**31 else "i64"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, values, attributes)
    options = dict(launch.options)
    if target.startswith("gfx"):  # the launchers halve the warps there, which have 64 lanes
        options["num_warps"] = max(1, options["num_warps"] // 2)
        hardware = GPUTarget("hip", target, 64)
    else:
        hardware = GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=hardware, options=options)


_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float64: "fp64",
}  # fmt: skip


def _bound(d: Device, executed: float, pipes: dict[str, float], traffic: float) -> tuple[str, float]:
    """What takes longest on a device, and that against the memory's time."""
    clocks = d.multiprocessors * d.clock
    times = {
        "memory": traffic / d.bandwidth,
        "issue": executed / (128 * clocks),
        "multiply-add": pipes.get("multiply-add", 0.0) / (d.multiply_adds * clocks),
        "integer and logic": pipes.get("integer and logic", 0.0) / (64 * clocks),
        "special": pipes.get("special", 0.0) / (16 * clocks),
    }
    slowest = max(times, key=lambda name: times[name])
    return slowest, times[slowest] / times["memory"] if traffic else float("inf")


_HEAD = (
    "kernel variant target regs stack spill shared instr slow FMA int special fused wide bytes least bound "
    "accesses"
)


def to_table(rows: Sequence[Report]) -> str:
    """The reports as text in columns; a thread's accesses to global memory as how many of which width."""
    lines: list[tuple[str, ...]] = [tuple(_HEAD.split())]
    for r in rows:
        pipes = (f"{r.pipes.get(p, 0.0):.1f}" for p in ("multiply-add", "integer and logic", "special"))
        bounds = ", ".join(f"{device} {what} {ratio:.2f}x" for device, (what, ratio) in r.bounds.items())
        accesses = ", ".join(f"{what} x{count}" for what, count in r.accesses.items())
        numbers = (r.registers, r.stack, r.spills, r.shared, f"{r.executed:.1f}", f"{r.slow:.1f}", *pipes)
        wide = "-" if r.wide is None else f"{100 * r.wide:.0f}%"
        ends = (r.fused, wide, f"{r.traffic:g}", f"{r.least:g}", bounds or "-", accesses)
        lines.append((r.kernel, r.variant, r.target, *map(str, numbers), *map(str, ends)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join((*text, NOTE))


def to_json(rows: Sequence[Report]) -> str:
    """The reports as JSON, with the note that they are a model."""
    return json.dumps({"note": NOTE, "kernels": [asdict(row) for row in rows]}, indent=2)
