"""Integer and floating-point arithmetic, comparison and selection.

Floating-point results are rounded from float64, which is exact for + - * of float32 up to a double rounding that can
move a result by its last bit in rare ties; the approximate functions are those of numpy, not the hardware's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.table import BITS, FLOATS, INTEGERS, is_mixed, opcode
from ptxsim.parser import Instruction, Pair
from ptxsim.values import SIGNED, UNSIGNED, Array, is_float, width

if TYPE_CHECKING:
    from ptxsim.machine import Machine

ROUNDING = "rn rz rm rp"


def flush(values: Array) -> Array:
    """Subnormal float32 values become zeros of their sign (.ftz)."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)


def result_type(ins: Instruction) -> str:
    """The type before the last one in the mixed precision of sm_100 (add.rn.f32.bf16 d, a, c), else the last."""
    return "f32" if is_mixed(ins) else ins.type


def sources(machine: Machine, ins: Instruction, count: int) -> list[Array]:
    values = [machine.read(operand, ins.type) for operand in ins.operands[1 : 1 + count]]
    if (mixed := result_type(ins)) != ins.type:  # add.f32.bf16 and fma.f32.bf16: what is added is float32
        values[-1] = machine.read(ins.operands[count], mixed)
    return [flush(value) for value in values] if ins.has("ftz") and ins.type in ("f32", "f32x2") else values


def round_to(exact: Array, ins: Instruction, type: str) -> Array:
    """A float64 result as ``type``, rounded as the instruction says."""
    if type == "f64":
        return exact
    if type in ("bf16", "bf16x2"):
        result = exact  # rounded once, when it is encoded
    else:
        target = np.float16 if type in ("f16", "f16x2") else np.float32
        result = exact.astype(target)
        infinity = target(np.inf)
        if ins.has("rz"):
            over = np.abs(result) > np.abs(exact)
            result = np.where(over, np.nextafter(result, target(0)), result)
        elif ins.has("rm"):
            result = np.where(result > exact, np.nextafter(result, -infinity), result)
        elif ins.has("rp"):
            result = np.where(result < exact, np.nextafter(result, infinity), result)
    if ins.has("ftz") and type in ("f32", "f32x2"):
        result = flush(result)
    if ins.has("sat"):
        result = np.clip(np.where(np.isnan(result), 0, result), 0, 1).astype(result.dtype)
    if ins.has("relu"):
        result = np.where(result < 0, 0, result).astype(result.dtype)
    return result


def _store(machine: Machine, ins: Instruction, active: Array, result: Array) -> None:
    type = result_type(ins)
    machine.write(ins.operands[0], round_to(result, ins, type) if is_float(type) else result, type, active)


@opcode("add sub mul", INTEGERS, FLOATS, ROUNDING, "ftz sat lo hi wide")
def basic(machine: Machine, ins: Instruction, active: Array) -> None:
    if ins.has("lo", "hi", "wide"):
        return _write_product(machine, ins, active, None)
    a, b = sources(machine, ins, 2)
    if is_float(ins.type):
        a, b = a.astype(np.float64), b.astype(np.float64)
    elif ins.has("sat"):
        raise NotImplementedError("saturating integer arithmetic")
    _store(machine, ins, active, a + b if ins.opcode == "add" else a - b if ins.opcode == "sub" else a * b)


@opcode("fma", FLOATS, ROUNDING, "ftz sat relu")
def fma(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b, c = sources(machine, ins, 3)
    _store(machine, ins, active, a.astype(np.float64) * b + c)


@opcode("mad", INTEGERS, FLOATS, ROUNDING, "ftz sat lo hi wide")
def mad(machine: Machine, ins: Instruction, active: Array) -> None:
    if is_float(ins.type):
        return fma(machine, ins, active)
    wide = ins.type[0] + str(2 * width(ins.type)) if ins.has("wide") else ins.type
    _write_product(machine, ins, active, machine.read(ins.operands[3], wide))


def _write_product(machine: Machine, ins: Instruction, active: Array, addend: Array | None) -> None:
    type, bits = ins.type, width(ins.type)
    a, b = machine.read(ins.operands[1], type), machine.read(ins.operands[2], type)
    if ins.has("wide"):
        double = (UNSIGNED if type[0] == "u" else SIGNED)[2 * bits]
        result, type = a.astype(double) * b.astype(double), type[0] + str(2 * bits)
    elif ins.has("hi"):
        result = high_product(a, b, bits)
    else:
        result = a * b
    machine.write(ins.operands[0], result if addend is None else result + addend, type, active)


def high_product(a: Array, b: Array, bits: int) -> Array:
    if bits == 64:
        products = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        return np.array(products, object).astype(a.dtype)
    double = (UNSIGNED if a.dtype.kind == "u" else SIGNED)[2 * bits]
    return ((a.astype(double) * b.astype(double)) >> double(bits)).astype(a.dtype)


@opcode("div rem", INTEGERS, FLOATS, ROUNDING, "ftz full approx")
def divide(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b = sources(machine, ins, 2)
    if is_float(ins.type):
        return _store(machine, ins, active, a.astype(np.float64) / b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    if (active & (b == 0)).any():
        raise ZeroDivisionError("integer division by zero")
    quotient = a // safe  # floors; PTX truncates
    quotient = np.where((quotient < 0) & (quotient * safe != a), quotient + quotient.dtype.type(1), quotient)
    _store(machine, ins, active, quotient if ins.opcode == "div" else a - quotient * safe)


@opcode("min max", INTEGERS, FLOATS, "ftz NaN xorsign abs")
def extremum(machine: Machine, ins: Instruction, active: Array) -> None:
    if ins.has("xorsign", "abs"):
        raise NotImplementedError("min/max with xorsign.abs")
    values = sources(machine, ins, len(ins.operands) - 1)
    if ins.opcode == "min":
        function: np.ufunc = np.minimum if ins.has("NaN") else np.fmin
    else:
        function = np.maximum if ins.has("NaN") else np.fmax
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    machine.write(ins.operands[0], result, ins.type, active)


@opcode("neg abs", INTEGERS, FLOATS, "ftz")
def sign(machine: Machine, ins: Instruction, active: Array) -> None:
    (a,) = sources(machine, ins, 1)
    machine.write(ins.operands[0], -a if ins.opcode == "neg" else np.abs(a), ins.type, active)


@opcode("copysign", "f32 f64")
def copysign(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b = sources(machine, ins, 2)
    machine.write(ins.operands[0], np.copysign(b, a), ins.type, active)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@opcode("ex2 lg2 sin cos tanh sqrt rcp rsqrt", "f16 f32 f64 bf16 f16x2 bf16x2 approx ftz", ROUNDING)
def function(machine: Machine, ins: Instruction, active: Array) -> None:
    (a,) = sources(machine, ins, 1)
    _store(machine, ins, active, FUNCTIONS[ins.opcode](a.astype(np.float64)))


UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNORDERED = frozenset(["equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])


def compare(a: Array, b: Array, name: str, type: str) -> Array:
    if not is_float(type):
        return COMPARISONS[UNSIGNED_NAMES.get(name, name)](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return nan if name == "nan" else ~nan
    if name in UNORDERED:
        return COMPARISONS[name[:-1]](a, b) | nan
    return COMPARISONS[name](a, b) & ~nan


@opcode("setp", INTEGERS, BITS, "f16 bf16 f32 f64 ftz and or xor lo ls hi hs", frozenset(COMPARISONS), UNORDERED)
def setp(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b = sources(machine, ins, 2)
    result = compare(a, b, ins.modifiers[0], ins.type)
    opposite = ~result
    if ins.has("and", "or", "xor"):
        other = machine.read(ins.operands[3], "pred")
        combine = np.logical_and if ins.has("and") else np.logical_or if ins.has("or") else np.logical_xor
        result, opposite = combine(result, other), combine(opposite, other)
    target = ins.operands[0]
    if isinstance(target, Pair):
        machine.write(target.second, opposite, "pred", active)
        target = target.first
    machine.write(target, result, "pred", active)


@opcode("selp", INTEGERS, BITS, "f32 f64")
def selp(machine: Machine, ins: Instruction, active: Array) -> None:
    a, b = sources(machine, ins, 2)
    machine.write(ins.operands[0], np.where(machine.read(ins.operands[3], "pred"), a, b), ins.type, active)
