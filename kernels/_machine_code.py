"""Reads compiled kernels: SASS and AMD assembly in basic blocks, slow paths told apart; what tensors move.

A correctly rounded square root is a short sequence, and a called function for the few operands (0,
infinities, denormals) where that fails. The call's block, the one it returns to and the function are a slow
path: they are counted, but not as executed. All else counts as executed once, branches not taken included.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

_INSTRUCTION = re.compile(r"^(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\b.*;$")
_WIDTH = re.compile(r"\.(128|64|U?S?16|U?S?8)\b")
# opcodes by the unit that executes them (NVIDIA's CUDA Binary Utilities, "Instruction Set Reference"; IMAD
# runs on the multiply-add unit)
_MULTIPLY_ADD = ("FMUL", "FADD", "FFMA", "IMAD", "HFMA2", "HMUL2", "HADD2")
_SPECIAL = ("MUFU", "I2F.", "F2I", "F2F")
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDL", "STL", "LDC", "ATOM", "RED.")
_CONTROL = ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "BAR", "NOP", "WARPSYNC", "DEPBAR", "ACQBULK")


@dataclass(frozen=True)
class Code:
    """What one program's machine code holds.

    Attributes:
        executed: opcodes in order, of every block outside of slow paths.
        slow: how many instructions slow paths hold.
        registers, stack, shared: per thread, bytes per thread, bytes per program.
        spills: instructions that touch local memory.
    """

    executed: tuple[str, ...]
    slow: int
    registers: int
    stack: int
    shared: int
    spills: int

    @property
    def pipes(self) -> Counter[str]:
        """Executed instructions by the unit that runs them."""
        return Counter(map(_pipe, self.executed))

    @property
    def fused_outside_roots(self) -> int:
        """Fused multiply-adds beyond the two that every square root's expansion has."""
        return self._count("FFMA") - 2 * self._count("MUFU.RSQ")

    @property
    def barriers(self) -> int:
        return self._count("BAR")

    @property
    def accesses(self) -> Counter[tuple[str, int]]:
        """Executed accesses to global memory, ("load" or "store", bits)."""
        kinds = (
            ("load", ("LDG", "global_load", "buffer_load")),
            ("store", ("STG", "global_store", "buffer_store")),
        )
        return Counter(
            (kind, _bits(op)) for op in self.executed for kind, starts in kinds if op.startswith(starts)
        )

    def _count(self, start: str) -> int:
        return sum(op.startswith(start) for op in self.executed)


def nvidia(cubin: bytes) -> Code:
    """The code of a cubin, by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        text = _output(tools / "nvdisasm", "-c", path)
        usage = _output(tools / "cuobjdump", "-res-usage", path)
    used = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    executed, slow = _split(text.splitlines())
    local = sum(op.startswith(("LDL", "STL")) for op in executed)
    return Code(executed, slow, used["REG"], used["STACK"] + used["LOCAL"], used["SHARED"], local)


def amd(assembly: str) -> Code:
    """The code of a kernel in AMD's assembly; its square roots have no slow path."""
    fields = dict(re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE))
    executed = tuple(
        m[1] for line in assembly.splitlines() if (m := re.match(r"\t((?:[vs]|ds|global|buffer)_\w+)", line))
    )
    spills = int(fields["vgpr_spill_count"]) + int(fields["sgpr_spill_count"])
    stack, shared = int(fields["private_segment_fixed_size"]), int(fields["group_segment_fixed_size"])
    return Code(executed, 0, int(fields["vgpr_count"]), stack, shared, spills)


def addressed(ptx: str) -> Counter[tuple[int, int]]:
    """One thread's accesses to global memory as the compiler lists them: (the parameter's number, bits).

    An address is followed to the parameter that its arithmetic starts from; the assembler keeps the widths.
    """
    begins: dict[str, int] = {}
    found: Counter[tuple[int, int]] = Counter()
    for line in ptx.splitlines():
        if m := re.search(r"ld\.param\.[bu]64\s+(%\w+), \[\w+_param_(\d+)\]", line):
            begins[m[1]] = int(m[2])
        elif m := re.search(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s.*\[\s*(%\w+)", line):
            found[begins[m[3]], int(m[1] or 1) * int(m[2])] += 1
        elif m := re.search(r"\b(?:add|mad|mov|sub|selp)\.\S+\s+(%\w+), (.*);", line):
            begins.update((m[1], begins[a]) for a in re.findall(r"%\w+", m[2]) if a in begins)
    return found


def tensor_bytes(ttir: str) -> dict[int, int]:
    """Bytes that one program's loads and stores of its largest blocks move, by the parameter's number.

    Of a branch's two ways it takes one: the one with more accesses counts.
    """
    lines, _ = _region(iter(ttir.splitlines()))
    names = re.findall(r"(%\w+): (?:!tt\.ptr|i\d)", next(x for x in lines if "tt.func public" in x))
    begins = {name: i for i, name in enumerate(names)}
    found = []
    for line in lines:
        if m := re.search(r"(%\w+) = tt\.(?:addptr|splat|broadcast|expand_dims) (%\w+)", line):
            begins |= {m[1]: begins[m[2]]} if m[2] in begins else {}
        if m := re.search(r"tt\.(?:load|store) (%\w+).*?: tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>", line):
            found.append((begins[m[1]], prod(map(int, m[2].split("x")[:-1])), int(m[3]) // 8))
    largest = max((size for _, size, _ in found), default=0)
    moved: dict[int, int] = {}
    for parameter, size, width in found:
        if size == largest:
            moved[parameter] = moved.get(parameter, 0) + size * width
    return moved


def _region(lines: Iterator[str]) -> tuple[list[str], str]:
    """The lines of a listing up to the region's end, of each branch one way's, and the line that ends it."""
    kept: list[str] = []
    for line in lines:
        if line.lstrip().startswith("}"):
            return kept, line
        kept.append(line)
        if line.endswith("{"):
            way, end = _region(lines)
            if "} else {" in end:
                way = max(
                    way, _region(lines)[0], key=lambda x: sum("tt.load" in a or "tt.store" in a for a in x)
                )
            kept += way
    return kept, ""


def wide_share(ptx: str, full: Collection[int]) -> float:
    """The share of the bytes of the parameters `full` that accesses of 128 bits or more move."""
    bits = [(width, width * n) for (i, width), n in addressed(ptx).items() if i in full]
    return sum(n for width, n in bits if width >= 128) / max(1, sum(n for _, n in bits))


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _split(lines: Iterable[str]) -> tuple[tuple[str, ...], int]:
    """Executed opcodes, and the number of instructions in slow paths."""
    blocks: list[list[str]] = [[]]
    called = 0  # the first block of the functions that slow paths call
    slow: set[int] = set()
    for line in lines:
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if line.startswith("$__internal") and line.endswith(":") and not called:
            blocks.append([])
            called = len(blocks) - 1
        elif re.match(r"\.L_\w+:", line):
            blocks.append([])
        elif m := _INSTRUCTION.match(line):
            blocks[-1].append(m[1])
            if m[1].startswith("CALL") and "$__internal" in line:  # others call a part of the kernel itself
                slow |= {len(blocks) - 1, len(blocks)}
            if m[1].startswith(("BRA", "EXIT", "CALL", "RET")):
                blocks.append([])
    slow |= set(range(called, len(blocks)) if called else ())
    executed = (op for i, block in enumerate(blocks) if i not in slow for op in block)
    return tuple(op for op in executed if op != "NOP"), sum(len(blocks[i]) for i in slow)


def _pipe(op: str) -> str:
    for name, starts in (
        ("multiply-add", (*_MULTIPLY_ADD, "v_mul", "v_add_f", "v_sub_f", "v_fma", "v_mad", "v_pk")),
        ("special", (*_SPECIAL, "v_rsq", "v_rcp", "v_sqrt", "v_exp", "v_log")),
        ("memory", (*_MEMORY, "global", "buffer", "ds_")),
        ("control", (*_CONTROL, "s_branch", "s_cbranch", "s_waitcnt", "s_barrier", "s_endpgm", "s_nop")),
        ("uniform", ("U", "R2UR", "S2UR", "s_")),
    ):
        if op.startswith(starts):
            return name
    return "integer and logic"


def _bits(op: str) -> int:
    if found := re.search(r"dword(?:x(\d))?|(short)|(u?s?byte)", op):
        return 32 * int(found[1] or 1) if "dword" in found[0] else 16 if found[2] else 8
    width = _WIDTH.search(op)
    return int(width[1].strip("US")) if width else 32
