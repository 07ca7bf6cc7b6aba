"""The table of opcodes, filled by the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ptxsim.parser import Instruction
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine

# (machine, instruction, active threads) -> None
Handler = Callable[["Machine", Instruction, Array], None]

INTEGERS = frozenset(["u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64"])
BITS = frozenset(["b8", "b16", "b32", "b64"])
FLOATS = frozenset(["f16", "f32", "f64", "bf16", "f16x2", "bf16x2", "f32x2"])
# Handled by the scheduler: opcode -> modifiers it knows.
# Types, as modifiers. An opcode of ONE_TYPE that names two has another meaning: mixed precision, of its own handler.
TYPES = INTEGERS | BITS | FLOATS | {"pred", "tf32"}
ONE_TYPE = frozenset("add and fma ld mad max min mov mul neg abs not or selp shl shr st sub xor".split())  # noqa: SIM905
CONTROL = {"bra": {"uni"}, "ret": {"uni"}, "exit": set(), "bar": {"sync"}, "barrier": {"sync", "aligned", "cta"}}


@dataclass(frozen=True)
class Opcode:
    run: Handler
    modifiers: frozenset[str]


TABLE: dict[str, Opcode] = {}


def opcode(names: str, *modifiers: str | frozenset[str]) -> Callable[[Handler], Handler]:
    """Register a handler for the opcodes ``names`` with all modifiers (types included) that it understands."""
    allowed: set[str] = set()
    for each in modifiers:
        allowed |= set(each.split()) if isinstance(each, str) else each

    def register(handler: Handler) -> Handler:
        for name in names.split():
            if name in TABLE:
                raise ValueError(f"opcode {name} has two handlers")
            TABLE[name] = Opcode(handler, frozenset(allowed))
        return handler

    return register


def is_mixed(instruction: Instruction) -> bool:
    """Whether a sum of sm_100 takes 16-bit operands into float32, as add.rn.f32.bf16 d, a, c (PTX ISA, 9.7.5)."""
    mixed = instruction.modifiers[-2:-1] == ("f32",) and instruction.type in ("f16", "bf16")
    return mixed and instruction.opcode in ("add", "sub", "fma")


def check(instruction: Instruction) -> None:
    """Raise NotImplementedError for an opcode or a modifier that the simulator does not know."""
    name = instruction.opcode
    if name == "bar" and instruction.has("warp"):
        return
    if name in CONTROL:
        unknown = set(instruction.modifiers) - CONTROL[name]
    elif name in TABLE:
        unknown = set(instruction.modifiers) - TABLE[name].modifiers
    else:
        raise NotImplementedError(f"PTX opcode {name!r} in {instruction.text!r}")
    types = [modifier for modifier in instruction.modifiers if modifier in TYPES]
    if name in ONE_TYPE and len(types) > 1 and not is_mixed(instruction):
        raise NotImplementedError(f"PTX types {', '.join(types)} in {instruction.text!r}: expected one type")
    if unknown:
        raise NotImplementedError(f"PTX modifier {', '.join(sorted(unknown))} in {instruction.text!r}")
