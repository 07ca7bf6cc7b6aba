"""mbarrier: init, inval and the polls for a parity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptxsim.instructions.memory import addresses
from ptxsim.instructions.table import opcode
from ptxsim.parser import Instruction
from ptxsim.values import Array

if TYPE_CHECKING:
    from ptxsim.machine import Machine


@opcode("mbarrier", "init inval try_wait test_wait parity shared cta b64")
def mbarrier(machine: Machine, ins: Instruction, active: Array) -> None:
    threads = np.flatnonzero(active)
    if ins.has("init"):
        counts = machine.read(ins.operands[1], "u32")[threads]
        return machine.phases.init(threads, addresses(machine, ins.operands[0])[threads], counts)
    if ins.has("inval"):
        return machine.phases.invalidate(threads, addresses(machine, ins.operands[0])[threads])
    if not ins.has("parity"):
        raise NotImplementedError("mbarrier.try_wait with a state")
    address, parity = addresses(machine, ins.operands[1]), machine.read(ins.operands[2], "u32")
    machine.write(ins.operands[0], machine.phases.poll(active, address, parity), "pred", active)
