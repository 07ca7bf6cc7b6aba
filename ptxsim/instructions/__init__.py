"""Opcodes: a table from opcode to handler, and the check that an instruction is one that is known."""

from ptxsim.instructions import (  # noqa: F401  (they fill the table)
    arithmetic,
    bitwise,
    conversion,
    memory,
    phases,
    tensor,
    tensor_memory,
    warp,
    warpgroup,
)
from ptxsim.instructions.table import TABLE, check

__all__ = ["TABLE", "check"]
