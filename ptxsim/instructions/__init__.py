"""Opcodes: a table from opcode to handler, and the check that an instruction is one that is known."""

from ptxsim.instructions import arithmetic, bitwise, conversion, memory, tensor, warp, warpgroup  # noqa: F401  (they fill the table)
from ptxsim.instructions.table import TABLE, check

__all__ = ["TABLE", "check"]
