"""The constants of the C++ sources: what the Python modules define, written out for the compiler."""

from __future__ import annotations

from typing import Any


def constants() -> str:
    """The C++ of what the Python modules define, floats as exact hexadecimal literals."""
    from . import _philox_numpy, _vlb_cpu, exact, layout, philox

    names = {
        _philox_numpy: "ROUNDS MULTIPLIERS KEY_STEPS LOG COS SIN LOG_EXPONENT MANTISSA_BASE EXPONENT_MASK",
        philox: "DOMAIN_STEP DOMAIN_TRAIN DOMAIN_KNOWN",
        _vlb_cpu: "HALF_BIN HALF_BIN_SQUARED EDGE LEAST SLOPE CUBIC SIX_CUBIC",
        exact: "EXP EXP_LO EXP_HI LOG2E LN2_HI LN2_LO ROUNDER",
        layout: "DRAW READS WRITES QUANTILE PLAN_WIDTH HEAD C_IN_NEXT X0_FROM_X X0_FROM_OUT CLIP_LO CLIP_HI "
        "LOG_VAR_MIN LOG_VAR_MAX LARGEST KNOWN_ALPHA KNOWN_SIGMA FREE_RATIO FREE_STD MAX_REGISTERS READS_OUT "
        "READS_X0 READS_NOISE READS_LEARNED READS_CLIP READS_THRESHOLD READS_KNOWN READS_KNOWN_NOISE "
        "WRITES_U WRITES_X0 QUANTILE_BITS QUANTILE_UNIT",
    }
    lines = [_constant(name, getattr(m, name)) for m, listed in names.items() for name in listed.split()]
    columns = "X0_FROM_X X0_FROM_OUT CLIP_LO CLIP_HI MEAN_WEIGHT GAP_AT_MIN GAP_AT_MAX WIDTH"  # not layout's
    lines += [_constant(f"VLB_{name}", getattr(_vlb_cpu, name)) for name in columns.split()]
    return "#include <cstdint>\n" + "\n".join(lines) + "\n"


def _constant(name: str, value: Any) -> str:
    """One C++ definition of a number or of a tuple of numbers."""
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(values[0], float):
        kind, literals = "float", [v.hex() + "f" for v in values]
    elif max(values) < 2**31:
        kind, literals = "int", [str(v) for v in values]
    else:
        kind, literals = "unsigned", [f"{v}u" for v in values]
    if isinstance(value, tuple):
        return f"constexpr {kind} {name}[] = {{{', '.join(literals)}}};"
    return f"constexpr {kind} {name} = {literals[0]};"
