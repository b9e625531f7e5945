#!/usr/bin/env python3
"""Tests ptx2cpp.py: every case is a kernel of hand-written PTX whose translation must give the listed bits.

    test_ptx2cpp.py OUT.cpp      writes a program that runs the cases

What the translator must refuse is checked here.
"""

import struct
import sys
from pathlib import Path

from ptx2cpp import translate

MASK64 = (1 << 64) - 1


def f32(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


def f64(x):
    return struct.unpack("<Q", struct.pack("<d", x))[0]


def f16(x):
    return struct.unpack("<H", struct.pack("<e", x))[0]


def bf16(x):
    return f32(x) >> 16  # of numbers that bfloat16 has


NAN = float("nan")
INF = float("inf")

# PTX, inputs a, b, c, and the result. Inputs are there as %h1..3 (16 bits), %r1..3, %f1..3 (32), %rd1..3, %fd1..3 (64)
# and %p1..3 (the lowest bit); the result is the register numbered 0.
CASES = [
    # Integers
    ("mul.hi.s32 %r0, %r1, %r2;", -3, 1 << 30, 0, 0xFFFFFFFF),
    ("mul.hi.u64 %rd0, %rd1, %rd2;", MASK64, MASK64, 0, MASK64 - 1),
    ("mul.wide.s16 %r0, %h1, %h2;", -300, 300, 0, -90000 & 0xFFFFFFFF),
    ("mul.wide.u32 %rd0, %r1, %r2;", 0xFFFFFFFF, 0xFFFFFFFF, 0, 0xFFFFFFFE00000001),
    ("mad.wide.s32 %rd0, %r1, %r2, %rd3;", -5, 7, 30, -5 & MASK64),
    ("mad.lo.s32 %r0, %r1, %r2, %r3;", 1 << 30, 4, 9, 9),
    ("mad.hi.u32 %r0, %r1, %r2, %r3;", 1 << 31, 6, 1, 4),
    ("mul.lo.s16 %h0, %h1, %h2;", 0xFFFF, 0xFFFF, 0, 1),
    ("div.s32 %r0, %r1, %r2;", 1 << 31, -1, 0, 1 << 31),
    ("div.u32 %r0, %r1, %r2;", 7, 0, 0, 0xFFFFFFFF),
    ("rem.s64 %rd0, %rd1, %rd2;", -7, 3, 0, MASK64),
    ("abs.s32 %r0, %r1;", -9, 0, 0, 9),
    ("min.s32 %r0, %r1, %r2;", -1, 1, 0, 0xFFFFFFFF),
    ("min.u32 %r0, %r1, %r2;", -1, 1, 0, 1),
    ("shl.b32 %r0, %r1, %r2;", 1, 32, 0, 0),
    ("shr.s32 %r0, %r1, %r2;", -8, 40, 0, 0xFFFFFFFF),
    ("shr.u64 %rd0, %rd1, 4;", 0xABCD, 0, 0, 0xABC),
    ("shf.l.wrap.b32 %r0, %r1, %r2, %r3;", 0xF0000000, 1, 36, 0x1F),
    ("shf.r.clamp.b32 %r0, %r1, %r2, %r3;", 1, 7, 99, 7),
    ("clz.b32 %r0, %r1;", 1, 0, 0, 31),
    ("clz.b64 %r0, %rd1;", 0, 0, 0, 64),
    ("popc.b64 %r0, %rd1;", -1, 0, 0, 64),
    ("brev.b32 %r0, %r1;", 2, 0, 0, 0x40000000),
    ("bfind.s32 %r0, %r1;", -2, 0, 0, 0),
    ("bfind.shiftamt.u32 %r0, %r1;", 1, 0, 0, 31),
    ("bfe.u32 %r0, %r1, 8, 12;", 0x12345678, 0, 0, 0x456),
    ("bfe.s32 %r0, %r1, 4, 4;", 0x80, 0, 0, 0xFFFFFFF8),
    ("bfi.b32 %r0, %r1, %r2, 8, 4;", 0xABC, 0xFFFFFFFF, 0, 0xFFFFFCFF),
    ("lop3.b32 %r0, %r1, %r2, %r3, 0xE2;", 0xF0F0, 0xCCCC, 0xAAAA, (0xF0F0 & 0xCCCC) | (0xAAAA & ~0xCCCC)),
    ("prmt.b32 %r0, %r1, %r2, 0x7610;", 0x33221100, 0x77665544, 0, 0x77661100),
    ("prmt.b32 %r0, %r1, %r2, 0x000B;", 0x80000000, 0, 0, 0x000000FF),
    ("selp.b32 %r0, %r1, %r2, %p3;", 5, 6, 0, 6),
    ("slct.u32.s32 %r0, %r1, %r2, %r3;", 5, 6, -1, 6),
    ("neg.s16 %h0, %h1;", 1, 0, 0, 0xFFFF),
    ("cnot.b32 %r0, %r1;", 0, 0, 0, 1),
    # Floats
    ("fma.rn.f32 %f0, %f1, %f2, %f3;", f32(1 + 2**-23), f32(1 - 2**-23), f32(-1), f32(-(2**-46))),
    ("min.f32 %f0, %f1, %f2;", f32(NAN), f32(2), 0, f32(2)),
    ("min.NaN.f32 %f0, %f1, %f2;", f32(NAN), f32(2), 0, f32(NAN)),
    ("max.f64 %fd0, %fd1, %fd2;", f64(-0.0), f64(0.0), 0, f64(0.0)),
    ("copysign.f32 %f0, %f1, %f2;", f32(-1), f32(3), 0, f32(-3)),
    ("abs.f64 %fd0, %fd1;", f64(-3), 0, 0, f64(3)),
    ("rcp.approx.f32 %f0, %f1;", f32(4), 0, 0, f32(0.25)),
    ("rsqrt.approx.ftz.f64 %fd0, %fd1;", f64(16), 0, 0, f64(0.25)),
    ("testp.subnormal.f32 %p0, %f1;", 1, 0, 0, 1),
    ("add.f32 %r0, %r1, 0f3F800000;", f32(1), 0, 0, f32(2)),
    ("mov.b32 %r0, 0fBF800000;", 0, 0, 0, f32(-1)),
    ("mov.f64 %fd0, 0dC000000000000000;", 0, 0, 0, f64(-2)),
    # 16-bit floats: half of an ulp of 1 (2^-11, 2^-8) is a tie and goes to the even neighbour
    ("add.f16 %h0, %h1, %h2;", f16(1), f16(2**-11), 0, f16(1)),
    ("add.rn.bf16 %h0, %h1, %h2;", bf16(1 + 2**-7), bf16(2**-8), 0, bf16(1 + 2**-6)),
    ("fma.rn.bf16x2 %r0, %r1, %r2, %r3;", bf16(3) << 16 | bf16(2), bf16(5) << 16 | bf16(7), bf16(1), 0x4170_4170),
    ("mul.f16x2 %r0, %r1, %r2;", f16(3) << 16 | f16(2), f16(5) << 16 | f16(7), 0, f16(15) << 16 | f16(14)),
    ("neg.bf16 %h0, %h1;", bf16(1), 0, 0, bf16(-1)),
    ("max.bf16x2 %r0, %r1, %r2;", bf16(3) << 16 | bf16(2), bf16(5), 0, bf16(3) << 16 | bf16(5)),
    ("setp.gt.f16 %p0, %h1, %h2;", f16(2), f16(1), 0, 1),
    # Conversions
    ("cvt.rn.f16.f32 %h0, %f1;", f32(1 + 2**-11), 0, 0, f16(1)),
    ("cvt.rn.bf16.f32 %h0, %f1;", f32(1 + 2**-8 + 2**-20), 0, 0, bf16(1 + 2**-7)),
    ("cvt.rn.bf16x2.f32 %r0, %f1, %f2;", f32(1), f32(2), 0, bf16(1) << 16 | bf16(2)),
    ("cvt.rn.f16x2.f32 %r0, %f1, %f2;", f32(1), f32(2), 0, f16(1) << 16 | f16(2)),
    ("cvt.f32.bf16 %f0, %h1;", bf16(-3), 0, 0, f32(-3)),
    ("cvt.f64.f16 %fd0, %h1;", f16(0.5), 0, 0, f64(0.5)),
    ("cvt.rn.f16.s32 %h0, %r1;", -2, 0, 0, f16(-2)),
    ("cvt.rna.tf32.f32 %r0, %f1;", f32(1 + 2**-11), 0, 0, f32(1 + 2**-10)),
    ("cvt.rzi.s32.f32 %r0, %f1;", f32(-1.9), 0, 0, 0xFFFFFFFF),
    ("cvt.rni.s32.f32 %r0, %f1;", f32(2.5), 0, 0, 2),
    ("cvt.rmi.s64.f64 %rd0, %fd1;", f64(-1.1), 0, 0, -2 & MASK64),
    ("cvt.rzi.u32.f32 %r0, %f1;", f32(-5), 0, 0, 0),
    ("cvt.rzi.s32.f64 %r0, %fd1;", f64(1e20), 0, 0, 0x7FFFFFFF),
    ("cvt.rzi.s32.f32 %r0, %f1;", f32(NAN), 0, 0, 0),
    ("cvt.rmi.f32.f32 %f0, %f1;", f32(-1.5), 0, 0, f32(-2)),
    ("cvt.sat.f32.f32 %f0, %f1;", f32(3), 0, 0, f32(1)),
    ("cvt.rn.f32.u64 %f0, %rd1;", MASK64, 0, 0, f32(2.0**64)),
    ("cvt.s64.s8 %rd0, %r1;", 0x180, 0, 0, -128 & MASK64),
    ("cvt.u16.u32 %h0, %r1;", 0x12345, 0, 0, 0x2345),
    ("cvt.sat.s8.s32 %r0, %r1;", 300, 0, 0, 127),
    # Predicates
    ("setp.lt.and.s32 %p0|%p4, %r1, %r2, %p3; selp.b32 %r0, 1, 0, %p4;", 5, 1, 1, 1),
    ("setp.ltu.f32 %p0, %f1, %f2;", f32(NAN), f32(1), 0, 1),
    ("setp.neu.f64 %p0, %fd1, %fd2;", f64(NAN), f64(NAN), 0, 1),
    ("setp.ne.f32 %p0, %f1, %f2;", f32(NAN), f32(1), 0, 0),
    ("setp.nan.f32 %p0, %f1, %f2;", f32(NAN), f32(1), 0, 1),
    ("setp.hi.u32 %p0, %r1, %r2;", -1, 1, 0, 1),
    ("or.pred %p0, %p1, !%p2;", 0, 0, 0, 1),
    ("@!%p1 mov.u32 %r0, 7;", 0, 0, 0, 7),
    # Moves and memory
    ("mov.b64 {%r4, %r0}, %rd1;", 0x1234567800000009, 0, 0, 0x12345678),
    ("mov.b32 %r0, {%h1, %h2};", 0x1111, 0x2222, 0, 0x22221111),
    ("mov.b64 %rd0, {%h1, %h2, %h3, %h1};", 1, 2, 3, 0x0001_0003_0002_0001),
    ("mov.b128 %q1, {%rd1, %rd2}; mov.b128 {_, %rd0}, %q1;", 1, 2, 0, 2),
    ("st.shared.v2.b32 [tile+8], {%r1, %r2}; ld.shared.u8 %r0, [tile+13];", 1, 0xABCD, 0, 0xAB),
    ("st.shared.u16 [dynamic], %h1; ld.shared.s16 %r0, [dynamic];", 0x8000, 0, 0, 0xFFFF8000),
    ("mov.u64 %rd4, tile; cvta.shared.u64 %rd4, %rd4; st.u32 [%rd4+4], %r1; ld.shared.u32 %r0, [tile+4];", 8, 0, 0, 8),
    ("st.local.v4.u32 [depot], {%r1, %r2, %r3, %r1}; ld.local.u64 %rd0, [depot+8];", 1, 2, 3, 0x1_0000_0003),
    ("mov.u64 %rd4, squares; ld.const.u32 %r0, [%rd4+8];", 0, 0, 0, 4),
    ("st.shared.u32 [tile], %r1; atom.shared.cas.b32 %r4, [tile], 5, 6; ld.shared.u32 %r0, [tile];", 5, 0, 0, 6),
    ("st.shared.u32 [tile], 7; atom.shared.inc.u32 %r4, [tile], 7; ld.shared.u32 %r0, [tile];", 0, 0, 0, 0),
    ("st.shared.u32 [tile], %r1; red.shared.max.s32 [tile], %r2; ld.shared.u32 %r0, [tile];", -4, 3, 0, 3),
    # Control, warps
    ("t: .branchtargets L0, L1; brx.idx %r1, t; L0: mov.u32 %r0, 10; bra.uni E; L1: mov.u32 %r0, 11; E:", 1, 0, 0, 11),
    ("{ .reg .b32 %r0; mov.u32 %r0, 3; } { .reg .b32 t; mov.b32 t, 4; mov.b32 %r0, t; }", 0, 0, 0, 4),
    ("shfl.sync.idx.b32 %r0|%p4, %r1, 0, 0x1f, -1;", 77, 0, 0, 77),
    ("vote.sync.ballot.b32 %r0, %p1, -1;", 1, 0, 0, 1),
    ("match.any.sync.b32 %r0, %r1, -1;", 9, 0, 0, 1),
    ("redux.sync.add.s32 %r0, %r1, -1;", 9, 0, 0, 9),
    ("bar.red.popc.u32 %r0, 0, %p1;", 1, 0, 0, 1),
    ("mov.u32 %r0, %ntid.x;", 0, 0, 0, 1),
]  # fmt: skip

REFUSED = [
    "add.rz.f32 %f0, %f1, %f2;",
    "add.sat.f32 %f0, %f1, %f2;",
    "atom.global.add.f32 %f0, [%rd1], %f1;",
    "red.shared.add.noftz.f16 [tile], %h1;",
    "bar.sync 1;",
    "bar.sync 0, 64;",
    "cvt.rz.f32.f64 %f0, %fd1;",
    "call.uni (%r0), function, (%r1);",
    "ld.acquire.gpu.global.u32 %r0, [%rd1];",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r0, %r4}, [%r1];",
    "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r0, %r4}, {%r1, %r2}, {%r3}, {%r0, %r4};",
    "shfl.sync.idx.b32 %r0|%p4, %r1, 0, 0x1f, -1; selp.b32 %r0, 1, 0, %p4;",
    "mov.u32 %r0, %clock;",
    "add.s32 %r0, %r1, %unheard;",
]

REGISTERS = {"h": "b16", "r": "b32", "f": "f32", "rd": "b64", "fd": "f64"}
MODULE = """
.const .align 4 .b32 squares[3] = {0, 1, 4};
.extern .shared .align 16 .b8 dynamic[];
"""


def kernel(number, code):
    result = next(name for name in (*REGISTERS, "p") if f"%{name}0" in code or name == "p")
    declare = "".join(f".reg .{type_} %{name}<8>;\n" for name, type_ in REGISTERS.items())
    load = "".join(
        f"ld.param.{type_} %{name}{i}, [in+{8 * i - 8}];\n" for name, type_ in REGISTERS.items() for i in (1, 2, 3)
    )
    bits = "".join(f"and.b32 %r7, %r{i}, 1;\nsetp.ne.s32 %p{i}, %r7, 0;\n" for i in (1, 2, 3))
    if result == "p":
        code, result, type_ = code + "\nselp.u32 %r0, 1, 0, %p0;", "r", "u32"
    else:
        type_ = "u" + REGISTERS[result][1:]
    return f"""
.visible .entry case{number}(.param .align 8 .b8 in[24], .param .u64 .ptr .align 1 out)
{{
.reg .pred %p<8>;
.reg .b128 %q<2>;
{declare}
.shared .align 4 .b8 tile[36];
.local .align 16 .b8 depot[16];
{load}
ld.param.u64 %rd7, [out];
{bits}
{code}
st.global.{type_} [%rd7], %{result}0;
}}
"""


def program(cases):
    code, unknown = translate(MODULE + "".join(kernel(i, case[0]) for i, case in enumerate(cases)))
    assert not unknown, f"not translated: {unknown}"
    rows = ",\n".join(
        f'    {{R"({text})", {{{", ".join(f"{value & MASK64}u" for value in values)}}}, {want}u}}'
        for text, *values, want in cases
    )
    return f"""{code}
#include "testing_cuda.h"

struct Case {{
  const char* text;
  uint64_t in[3], want;
}};
const Case cases[] = {{
{rows}
}};

int main() {{
  for (size_t i = 0; i < std::size(cases); ++i) {{
    const testing::Device<uint64_t> out(std::vector<uint64_t>{{0}});
    simt::Params params;
    params.add(cases[i].in);
    params.add(out.get());
    const auto* kernel = simt::find_translated(("case" + std::to_string(i)).c_str());
    CHECK(simt::launch_translated(*kernel, params, dim3(1), dim3(1), 16) == cudaSuccess, cases[i].text);
    CHECK(out.host()[0] == cases[i].want, cases[i].text, "got", std::hex, out.host()[0], "wanted", cases[i].want);
  }}
  CHECK(simt::n_errors == 0, simt::last_error());
  return testing::finish();
}}
"""


def main():
    for code in REFUSED:
        unknown = translate(MODULE + kernel(0, code))[1]
        assert unknown, f"translated, but should not be: {code}"
    Path(sys.argv[1]).write_text(program(CASES))


if __name__ == "__main__":
    main()
