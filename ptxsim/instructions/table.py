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
FLOATS = frozenset(["f16", "f32", "f64", "bf16", "f16x2", "bf16x2"])
# Handled by the scheduler: opcode -> modifiers it knows.
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
    if unknown:
        raise NotImplementedError(f"PTX modifier {', '.join(sorted(unknown))} in {instruction.text!r}")
