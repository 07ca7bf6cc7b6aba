"""Each family of PTX instructions against what the PTX ISA says, on 32 lanes."""

import numpy as np
import pytest

import ptxsim

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"
LANES = np.arange(32)


def kernel(body: str, registers: str, parameters: int) -> str:
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %p{i}, [p{i}];\n" for i in range(parameters))
    return f"{HEADER}.visible .entry k({names}) {{\n.reg .u64 %p<{parameters}>;\n{registers}\n{loads}{body}\nret;\n}}"


def apply(instructions: str, *inputs: np.ndarray, result: str = "b32", seed: int | None = None) -> np.ndarray:
    """Run ``instructions`` once per lane: %x0, %x1, ... hold ``inputs``, the result is left in %y."""
    types = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}
    width = ptxsim.values.width(result)
    registers = ".reg .pred %q<8>;\n.reg .b16 %h<8>;\n.reg .b32 %w<8>;\n.reg .b64 %d<8>;\n.reg .u64 %a<8>;\n"
    registers += f".reg .{result} %y;\n"
    body = "mov.u32 %w0, %tid.x;\n"
    for i, values in enumerate(inputs):
        size = values.dtype.itemsize
        registers += f".reg .{types[size]} %x{i};\n"
        body += f"mad.wide.u32 %a{i}, %w0, {size}, %p{i};\nld.global.{types[size]} %x{i}, [%a{i}];\n"
    n = len(inputs)
    body += f"{instructions}\nmad.wide.u32 %a{n}, %w0, {width // 8}, %p{n};\nst.global.b{width} [%a{n}], %y;"
    out = np.zeros(32, f"u{width // 8}")
    program = ptxsim.parse(kernel(body, registers, n + 1))
    ptxsim.launch(program, (1, 1, 1), (32, 1, 1), [*(np.ascontiguousarray(x) for x in inputs), out], seed=seed)
    return out


def floats(*shape: int, dtype: str = "f4") -> np.ndarray:
    values = np.random.default_rng(0).standard_normal(shape or (32,)) * 10
    return values.astype(dtype)


def ints(dtype: str = "i4") -> np.ndarray:
    info = np.iinfo(dtype)
    values = np.random.default_rng(0).integers(info.min, info.max, 32, dtype, endpoint=True)
    values[:6] = [0, 1, info.max, info.min, info.max - 1, 2]
    return values


A, B = ints(), ints()[::-1].copy()
X, Y = floats(), floats()[::-1].copy()

# One line for each opcode that compilers emit, with values that tell neighbours apart (signs, carries, out of range).
INTEGER = [
    ("add.s32 %y, %x0, %x1;", lambda a, b: a + b),
    ("sub.u32 %y, %x0, %x1;", lambda a, b: a - b),
    ("mul.lo.s32 %y, %x0, %x1;", lambda a, b: a * b),
    ("mul.hi.s32 %y, %x0, %x1;", lambda a, b: (a.astype("i8") * b >> 32).astype("i4")),
    ("mul.hi.u32 %y, %x0, %x1;", lambda a, b: (a.view("u4").astype("u8") * b.view("u4") >> np.uint64(32)).astype("u4")),
    ("mad.lo.s32 %y, %x0, %x1, %x0;", lambda a, b: a * b + a),
    ("min.s32 %y, %x0, %x1;", np.minimum),
    ("max.u32 %y, %x0, %x1;", lambda a, b: np.maximum(a.view("u4"), b.view("u4"))),
    ("and.b32 %y, %x0, %x1;", np.bitwise_and),
    ("or.b32 %y, %x0, %x1;", np.bitwise_or),
    ("xor.b32 %y, %x0, %x1;", np.bitwise_xor),
    ("not.b32 %y, %x0;", lambda a, b: ~a),
    ("neg.s32 %y, %x0;", lambda a, b: -a),
    ("lop3.b32 %y, %x0, %x1, %x0, 0x1e;", lambda a, b: a ^ (b | a)),
    ("shl.b32 %y, %x0, 5;", lambda a, b: a << 5),
    ("shl.b32 %y, %x0, 32;", lambda a, b: a * 0),
    ("shr.s32 %y, %x0, 40;", lambda a, b: a >> 31),
    ("shr.u32 %y, %x0, 7;", lambda a, b: a.view("u4") >> np.uint32(7)),
    ("shf.l.wrap.b32 %y, %x0, %x1, 8;", lambda a, b: (b << 8) | (a.view("u4") >> np.uint32(24)).view("i4")),
    ("shf.r.clamp.b32 %y, %x0, %x1, 32;", lambda a, b: b),
    ("bfe.u32 %y, %x0, 4, 8;", lambda a, b: a >> 4 & 255),
    ("bfe.s32 %y, %x0, 4, 8;", lambda a, b: (a >> 4 & 255).astype("u1").view("i1").astype("i4")),
    ("bfe.s32 %y, %x0, 28, 8;", lambda a, b: a >> 28),
    ("bfi.b32 %y, %x0, %x1, 8, 4;", lambda a, b: (b & ~0xF00) | (a & 15) << 8),
    ("prmt.b32 %y, %x0, %x1, 0x5410;", lambda a, b: (a & 0xFFFF) | b << 16),
    ("prmt.b32 %y, %x0, 0, 0xb000;", lambda a, b: (a & 255) * 0x010101 | (a >> 31) << 24),
    ("popc.b32 %y, %x0;", lambda a, b: np.array([bin(v).count("1") for v in a.view("u4")])),
    ("clz.b32 %y, %x0;", lambda a, b: np.array([32 - int(v).bit_length() for v in a.view("u4")])),
    ("brev.b32 %y, %x0;", lambda a, b: np.array([int(f"{v:032b}"[::-1], 2) for v in a.view("u4")], "u4")),
    ("setp.lt.s32 %q0, %x0, %x1; selp.b32 %y, 7, 9, %q0;", lambda a, b: np.where(a < b, 7, 9)),
    (
        "setp.lo.u32 %q0|%q1, %x0, %x1; selp.b32 %y, 7, 9, %q1;",
        lambda a, b: np.where(a.view("u4") < b.view("u4"), 9, 7),
    ),
    (
        "setp.gt.s32 %q0, %x0, 0; setp.ne.and.s32 %q1, %x1, 1, !%q0; selp.b32 %y, 1, 0, %q1;",
        lambda a, b: ((b != 1) & (a <= 0)).astype("i4"),
    ),
    (
        "mov.b32 {%h0, %h1}, %x0; mov.b32 %y, {%h1, %h0};",
        lambda a, b: a << 16 | (a.view("u4") >> np.uint32(16)).view("i4"),
    ),
    ("mov.b32 %y, 3; setp.eq.s32 %q0, %x0, 0; @%q0 mov.b32 %y, 4;", lambda a, b: np.where(a == 0, 4, 3)),
    ("mov.u32 %w1, %laneid; mov.b32 %y, %w1;", lambda a, b: LANES),
]


@pytest.mark.parametrize(
    ("text", "expected"), INTEGER, ids=[text.split()[0] + f"-{i}" for i, (text, _) in enumerate(INTEGER)]
)
def test_integer(text, expected):
    with np.errstate(over="ignore"):
        want = np.asarray(expected(A, B)).astype("i8").astype("u8").astype("u4")
    np.testing.assert_array_equal(apply(text, A, B), want)


def test_integer_division_truncates():
    b = np.where(B == 0, 3, B)
    want = np.array(
        [int(abs(int(x)) // abs(int(y))) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(A, b, strict=True)]
    )
    np.testing.assert_array_equal(
        apply("div.s32 %y, %x0, %x1;", A, b).view("i4"), want.astype("i8").astype("u4").view("i4")
    )
    rest = A.astype("i8") - want * b
    np.testing.assert_array_equal(apply("rem.s32 %y, %x0, %x1;", A, b).view("i4"), rest)


def test_wide_results():
    np.testing.assert_array_equal(
        apply("mul.wide.s32 %y, %x0, %x1;", A, B, result="b64").view("i8"), A.astype("i8") * B
    )
    big = ints("i8")
    want = np.array([int(a) * int(a) >> 64 for a in big])
    np.testing.assert_array_equal(apply("mul.hi.s64 %y, %x0, %x0;", big, result="b64").view("i8"), want)
    np.testing.assert_array_equal(apply("cvt.s64.s32 %y, %x0;", A, result="b64").view("i8"), A)


FLOAT = [
    ("add.rn.f32 %y, %x0, %x1;", lambda a, b: a + b),
    ("sub.f32 %y, %x0, %x1;", lambda a, b: a - b),
    ("mul.f32 %y, %x0, %x1;", lambda a, b: a * b),
    ("fma.rn.f32 %y, %x0, %x1, %x0;", lambda a, b: (a.astype("f8") * b + a).astype("f4")),
    ("div.full.f32 %y, %x0, %x1;", lambda a, b: a / b),
    ("min.f32 %y, %x0, %x1;", np.minimum),
    ("max.f32 %y, %x0, 0fFFC00000;", lambda a, b: a),  # a NaN operand is ignored
    ("max.NaN.f32 %y, %x0, 0f7FC00000;", lambda a, b: a * np.nan),
    ("neg.f32 %y, %x0;", lambda a, b: -a),
    ("abs.f32 %y, %x0;", lambda a, b: np.abs(a)),
    ("copysign.f32 %y, %x0, %x1;", lambda a, b: np.copysign(b, a)),
    ("ex2.approx.ftz.f32 %y, %x0;", lambda a, b: np.exp2(a.astype("f8")).astype("f4")),
    ("abs.f32 %y, %x0; lg2.approx.f32 %y, %y;", lambda a, b: np.log2(np.abs(a).astype("f8")).astype("f4")),
    ("rcp.approx.f32 %y, %x0;", lambda a, b: (1 / a.astype("f8")).astype("f4")),
    ("mul.f32 %y, %x0, 0f00000001; add.ftz.f32 %y, %y, 0f00000000;", lambda a, b: a * 0),  # subnormals are flushed
    ("add.sat.f32 %y, %x0, %x1;", lambda a, b: np.clip(a + b, 0, 1)),
    ("cvt.rmi.f32.f32 %y, %x0;", lambda a, b: np.floor(a)),
    ("setp.gtu.f32 %q0, %x0, 0f7FC00000; selp.f32 %y, %x0, %x1, %q0;", lambda a, b: a),  # unordered is true
    ("setp.gt.f32 %q0, %x0, 0f7FC00000; selp.f32 %y, %x0, %x1, %q0;", lambda a, b: b),
]


@pytest.mark.parametrize(
    ("text", "expected"), FLOAT, ids=[text.split()[0] + f"-{i}" for i, (text, _) in enumerate(FLOAT)]
)
def test_float(text, expected):
    np.testing.assert_array_equal(apply(text, X, Y, result="f32").view("f4"), expected(X, Y).astype("f4"))


def test_directed_rounding():
    exact = X.astype("f8") + Y.astype("f8") * 1e-6
    tiny = (Y * np.float32(1e-6)).astype("f4")
    down, up = (apply(f"add.{mode}.f32 %y, %x0, %x1;", X, tiny, result="f32").view("f4") for mode in ("rm", "rp"))
    assert (down <= exact + 1e-12).all() and (up >= exact - 1e-12).all() and (down < up).any()


def test_conversions():
    x = np.concatenate([X[:26], np.array([0.5, 1.5, -2.5, np.nan, 1e20, -1e20], "f4")])
    rint = np.clip(np.nan_to_num(np.rint(x.astype("f8")), nan=0.0), -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(apply("cvt.rni.s32.f32 %y, %x0;", x).view("i4"), rint.astype("i4"))
    unsigned = np.clip(np.nan_to_num(np.trunc(x.astype("f8")), nan=0.0), 0, 255)
    np.testing.assert_array_equal(apply("cvt.rzi.u8.f32 %h0, %x0; cvt.u32.u16 %y, %h0;", x), unsigned.astype("u4"))
    np.testing.assert_array_equal(apply("cvt.rn.f32.s32 %y, %x0;", A, result="f32").view("f4"), A.astype("f4"))
    halves = apply("cvt.rn.f16x2.f32 %y, %x0, %x1;", X, Y).view("f2").reshape(32, 2)
    np.testing.assert_array_equal(halves, np.stack([Y, X], 1).astype("f2"))


def test_bf16_rounds_to_nearest_even():
    torch = pytest.importorskip("torch")
    x = np.concatenate([X[:28], np.array([1.00390625, 1.01171875, 3.4e38, np.inf], "f4")])  # two ties, an overflow
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view("u2")
    np.testing.assert_array_equal(apply("cvt.rn.bf16.f32 %y, %x0;", x, result="b16"), want)
    packed = apply("cvt.rn.bf16x2.f32 %y, %x0, %x1;", x, x[::-1].copy()).view("u2").reshape(32, 2)
    np.testing.assert_array_equal(packed, np.stack([want[::-1], want], 1))
    packed[[0, 1, -1, -2]] = 0x3F80  # without the infinities
    fma = apply("fma.rn.bf16x2 %y, %x0, %x1, %x0;", packed.view("u4")[:, 0].copy(), packed.view("u4")[::-1, 0].copy())
    a, b = (torch.from_numpy(v.copy().view("i2")).view(torch.bfloat16).double() for v in (packed, packed[::-1]))
    np.testing.assert_array_equal(
        fma.view("u2").reshape(32, 2), (a * b + a).bfloat16().view(torch.int16).numpy().view("u2")
    )


def test_tf32_keeps_ten_bits():
    bits = apply("cvt.rna.tf32.f32 %y, %x0;", X)
    assert not (bits & 0x1FFF).any()
    assert (np.abs(bits.view("f4") - X) <= np.abs(X) * 2.0**-11).all()


SHUFFLES = [
    ("bfly", 5, 31, LANES ^ 5),
    ("idx", 7, 31, np.full(32, 7)),
    ("down", 3, 31, np.where(LANES + 3 > 31, LANES, LANES + 3)),
    ("up", 3, 0, np.where(LANES < 3, LANES, LANES - 3)),
    ("bfly", 2, 0x1C03, LANES ^ 2),  # segments of four lanes
    ("idx", 1, 0x181F, LANES // 8 * 8 + 1),  # segments of eight lanes
]


@pytest.mark.parametrize(("mode", "amount", "control", "source"), SHUFFLES)
def test_shuffle(mode, amount, control, source):
    got = apply(f"shfl.sync.{mode}.b32 %y, %x0, {amount}, {control}, 0xffffffff;", A)
    np.testing.assert_array_equal(got.view("i4"), A[source])


def test_votes_and_reductions():
    assert (
        apply("setp.gt.s32 %q0, %x0, 0; vote.sync.ballot.b32 %y, %q0, -1;", A) == sum(1 << i for i in LANES if A[i] > 0)
    ).all()
    any_all = "setp.gt.s32 %q0, %x0, 0; vote.sync.any.pred %q1, %q0, -1; vote.sync.all.pred %q2, %q0, -1;"
    assert (apply(any_all + "selp.b32 %y, 1, 0, %q1;", A) == 1).all()
    assert (apply(any_all + "selp.b32 %y, 1, 0, %q2;", A) == 0).all()
    assert (apply("redux.sync.max.s32 %y, %x0, -1;", A).view("i4") == A.max()).all()
    assert (apply("redux.sync.add.s32 %y, %x0, -1;", A) == A.astype("i8").sum() % 2**32).all()


def test_vectors_and_shared_memory():
    body = """
    .shared .align 16 .b8 buffer[512];
    cvt.u32.u64 %w1, 0; mov.u32 %w1, buffer; shl.b32 %w2, %w0, 4; add.s32 %w2, %w1, %w2;
    st.shared.v4.b32 [%w2], {%x0, %x1, %x0, %x1}; bar.sync 0; ld.shared.v2.b32 {%w3, %y}, [%w2+8];"""
    body = body.replace("cvt.u32.u64 %w1, 0; ", "")
    np.testing.assert_array_equal(apply(body, A, B).view("i4"), B)


def test_reductions_to_global_memory():
    totals = np.zeros(1, "u4")
    text = kernel("mov.u32 %w0, %tid.x; red.global.add.u32 [%p0], %w0;", ".reg .b32 %w<2>;", 1)
    ptxsim.launch(ptxsim.parse(text), (3, 1, 1), (64, 1, 1), [totals])
    assert totals[0] == 3 * 64 * 63 // 2
    found = apply("atom.global.add.u32 %y, [%p1], 1;", np.zeros(32, "u4"))
    assert sorted(found[1:]) == list(range(1, 32))  # lane 0's own result overwrites the counter


FRAGMENTS = {
    # 16-bit A, row major: registers hold rows g, g + 8 of the left half of the inner dimension, then of the right half
    "bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
}


# Every element type: each has a layout of its own.
@pytest.mark.parametrize("type", FRAGMENTS)
def test_mma(type):
    """Fragments laid out by the tables of the PTX ISA, written down here independently of the simulator."""
    k = 8 if type == "tf32" else 16
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(-8, 9, shape).astype("f4") for shape in ((16, k), (k, 8), (16, 8)))  # exact in every type
    words_a, words_b = [], []
    for lane in range(32):
        g, t = divmod(lane, 4)
        if type == "tf32":
            values_a = [[a[g, t]], [a[g + 8, t]], [a[g, t + 4]], [a[g + 8, t + 4]]]
            values_b = [[b[t, g]], [b[t + 4, g]]]
        else:
            rows, columns = (g, g + 8, g, g + 8), (2 * t, 2 * t, 2 * t + 8, 2 * t + 8)
            values_a = [a[r, c : c + 2] for r, c in zip(rows, columns, strict=True)]
            values_b = [b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g]]
        words_a.append([_word(v, type) for v in values_a])
        words_b.append([_word(v, type) for v in values_b])
    g, t = LANES // 4, LANES % 4
    c_words = np.stack([c[g, 2 * t], c[g, 2 * t + 1], c[g + 8, 2 * t], c[g + 8, 2 * t + 1]], 1)
    out = np.zeros((32, 4), "f4")
    body = (
        """mov.u32 %w0, %tid.x; shl.b32 %w1, %w0, 4; shl.b32 %w2, %w0, 3;
    cvt.u64.u32 %d0, %w1; cvt.u64.u32 %d1, %w2;
    add.s64 %p0, %p0, %d0; add.s64 %p1, %p1, %d1; add.s64 %p2, %p2, %d0; add.s64 %p3, %p3, %d0;
    ld.global.v4.b32 {%a0, %a1, %a2, %a3}, [%p0]; ld.global.v2.b32 {%b0, %b1}, [%p1];
    ld.global.v4.f32 {%c0, %c1, %c2, %c3}, [%p2];
    """
        + FRAGMENTS[type]
        + """ {%c0, %c1, %c2, %c3}, {%a0, %a1, %a2, %a3}, {%b0, %b1}, {%c0, %c1, %c2, %c3};
    st.global.v4.f32 [%p3], {%c0, %c1, %c2, %c3};"""
    )
    registers = ".reg .b32 %a<4>, %b<2>, %w<3>;\n.reg .f32 %c<4>;\n.reg .b64 %d<2>;"
    program = ptxsim.parse(kernel(body, registers, 4))
    arrays = [np.array(words_a, "u4"), np.array(words_b, "u4"), np.ascontiguousarray(c_words), out]
    ptxsim.launch(program, (1, 1, 1), (32, 1, 1), arrays, seed=0)
    d = a @ b + c
    np.testing.assert_array_equal(
        out, np.stack([d[g, 2 * t], d[g, 2 * t + 1], d[g + 8, 2 * t], d[g + 8, 2 * t + 1]], 1)
    )


def _word(values, type):
    values = np.asarray(values, "f4")
    if type == "tf32":
        return int(values.view("u4")[0])
    halves = values.astype("f2").view("u2") if type == "f16" else (values.view("u4") >> 16).astype("u2")
    return int(halves[0]) | int(halves[1]) << 16


# Both orders of a matrix.
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    matrices = np.arange(4 * 64, dtype="u2").reshape(4, 8, 8)
    out = np.zeros((32, 4), "u4")
    body = f"""
    .shared .align 16 .b8 tile[512];
    mov.u32 %w0, %tid.x; shl.b32 %w1, %w0, 4; cvt.u64.u32 %d0, %w1; add.s64 %p0, %p0, %d0; add.s64 %p1, %p1, %d0;
    ld.global.v4.b32 {{%r0, %r1, %r2, %r3}}, [%p0]; mov.u32 %w2, tile; add.s32 %w2, %w2, %w1;
    st.shared.v4.b32 [%w2], {{%r0, %r1, %r2, %r3}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{".trans" if transposed else ""}.shared.b16 {{%r0, %r1, %r2, %r3}}, [%w2];
    st.global.v4.b32 [%p1], {{%r0, %r1, %r2, %r3}};"""
    program = ptxsim.parse(kernel(body, ".reg .b32 %w<3>, %r<4>;\n.reg .b64 %d<1>;", 2))
    ptxsim.launch(program, (1, 1, 1), (32, 1, 1), [matrices.reshape(-1), out])
    for lane in LANES:
        for matrix in range(4):
            rows = matrices[matrix].T if transposed else matrices[matrix]
            low, high = rows[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]
            assert out[lane, matrix] == int(low) | int(high) << 16
