"""How machine code and listings are read: slow paths, units, widths, and whose memory an access is."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs Triton")

from fastdiff.kernels import _machine_code

SASS = """
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @P1  LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0030*/                   MUFU.RSQ R9, R8 ;
        /*0040*/             @!P0  BRA `(.L_x_1) ;
        /*0050*/                   MOV R10, 0x70 ;
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0070*/                   MOV R11, R12 ;
        /*0080*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0090*/                   FFMA R9, R9, R9, R8 ;
        /*00a0*/                   FFMA R9, R9, R9, R8 ;
.L_x_2:
        /*00b0*/                   STG.E desc[UR4][R2.64], R9 ;
        /*00c0*/                   EXIT ;
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*00d0*/                   FFMA R9, R9, R9, R8 ;
        /*00e0*/                   RET.REL.NODEC R10 `(kernel) ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3);
        /*0100*/                   NOP;
"""


def test_slow_paths_are_told_from_executed_ones() -> None:
    executed, slow = _machine_code._split(SASS.splitlines())
    ops = ["LDC", "LDG.E.128", "LDG.E.U16", "MUFU.RSQ", "BRA", "FFMA", "FFMA", "STG.E", "EXIT"]
    assert list(executed) == ops
    assert slow == 8
    code = _machine_code.Code(executed, slow, 0, 0, 0, 0)
    assert code.fused_outside_roots == 0
    assert code.accesses == {("load", 128): 1, ("load", 16): 1, ("store", 32): 1}
    assert code.pipes == {"memory": 4, "special": 1, "multiply-add": 2, "control": 2}


def test_a_call_of_the_kernels_own_code_is_executed() -> None:
    inner = SASS.replace("`($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath)", "`(.L_x_2)")
    executed, slow = _machine_code._split(inner.splitlines())
    assert "CALL.REL.NOINC" in executed
    assert slow == 4  # the function itself, which nothing calls


@pytest.mark.parametrize(
    ("op", "pipe", "bits"),
    [
        ("IMAD.WIDE.U32", "multiply-add", 32),
        ("I2FP.F32.U32", "integer and logic", 32),
        ("I2F.RP", "special", 32),
        ("UIADD3", "uniform", 32),
        ("LOP3.LUT", "integer and logic", 32),
        ("LDG.E.64", "memory", 64),
        ("global_load_dwordx4", "memory", 128),
        ("global_store_short", "memory", 16),
        ("v_mul_f32_e32", "multiply-add", 32),
        ("s_add_u32", "uniform", 32),
        ("s_waitcnt", "control", 32),
    ],
)
def test_instructions_are_sorted_by_unit_and_width(op: str, pipe: str, bits: int) -> None:
    assert (_machine_code._pipe(op), _machine_code._bits(op)) == (pipe, bits)


PTX = """
    ld.param.b64    %rd1, [kernel_param_0];
    ld.param.b64    %rd2, [kernel_param_1];
    ld.param.b32    %r1, [kernel_param_2];
    mad.wide.s32    %rd3, %r1, 4, %rd1;
    add.s64         %rd4, %rd3, 16;
    @%p1 ld.global.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
    @%p1 ld.global.L1::evict_last.v2.b32 { %r6, %r7 }, [ %rd3 + 0 ];
    add.s64         %rd5, %rd2, %rd6;
    st.global.b16 [ %rd5 + 2 ], { %rs1 };
"""


def test_accesses_belong_to_the_tensors_that_their_addresses_start_from() -> None:
    assert _machine_code.addressed(PTX) == {(0, 128): 1, (0, 64): 1, (1, 16): 1}
    assert _machine_code.wide_share(PTX, {0}) == pytest.approx(2 / 3)
    assert _machine_code.wide_share(PTX, {1}) == 0.0
    assert _machine_code.wide_share(PTX, ()) == 0.0


def test_bytes_of_a_branch_are_those_of_its_larger_way() -> None:
    load = "%{0} = tt.load %p, %m : tensor<64x!tt.ptr<f32>> loc(#loc)"
    text = f"""
  tt.func public @k(%x_ptr: !tt.ptr<f32> {{tt.divisibility = 16 : i32}} loc("x"), %n: i32) {{
    %p = tt.splat %x_ptr : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc)
    scf.if %0 {{
      {load.format("a")}
      "tt.reduce"(%a) <{{axis = 0 : i32}}> ({{
      }}) : (tensor<64xf32>) -> f32 loc(#loc)
    }} else {{
      {load.format("b")}
      tt.store %p, %b, %m : tensor<64x!tt.ptr<f32>> loc(#loc)
    }} loc(#loc)
    {load.format("c")}
  }} loc(#loc)"""
    assert _machine_code.tensor_bytes(text) == {0: (2 + 1) * 64 * 4}
