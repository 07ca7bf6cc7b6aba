"""The machine: registers of all threads of a grid, the warp scheduler, barriers, and `launch`."""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ptxsim import instructions
from ptxsim.asynchronous import Copies
from ptxsim.memory import GlobalMemory, Pointer, SharedMemory
from ptxsim.parser import Immediate, Instruction, Negated, Operand, Program, Register, Special, Symbol
from ptxsim.phases import Phases
from ptxsim.proxies import Proxies
from ptxsim.tensor_memory import TensorMemory
from ptxsim.values import UNSIGNED, Array, decode, dtype, encode, immediate, resize, width
from ptxsim.warpgroup import Products

RUNNING, CONVERGING, BARRIER, EXITED = range(4)
STEP_LIMIT = 20_000_000  # instructions after which a kernel is taken to be in an endless loop
GRID_LIMITS = (2**31 - 1, 65535, 65535)
BATCH_THREADS = 4096  # blocks run in batches of about so many threads: they fit the caches of a CPU


@dataclass
class Statistics:
    steps: int = 0  # instructions issued, one for all the warps that took it together
    opcodes: Counter[str] = field(default_factory=Counter)


def launch(
    program: Program,
    grid: Sequence[int],
    block: Sequence[int],
    arguments: Sequence[Array | Pointer | int | float],
    *,
    shared_bytes: int = 0,
    seed: int | None = None,
) -> Statistics:
    """Run ``program``; arrays among ``arguments`` are read and written in place.

    arguments: an array (or a Pointer into one) for a pointer, an int or a float for a value; parameters that are left
    over at the end are 0. shared_bytes: dynamic shared memory of a block. seed: draws a warp schedule; None runs all
    warps in lockstep, which is fastest and finds no race.
    """
    if len(arguments) > len(program.parameters):
        raise ValueError(f"{program.name} has {len(program.parameters)} parameters, got {len(arguments)} arguments")
    if any(size > limit for size, limit in zip(grid, GRID_LIMITS, strict=True)):
        raise ValueError(f"{program.name}: grid {tuple(grid)}, a GPU takes at most {GRID_LIMITS}")
    for instruction in program.instructions:
        instructions.check(instruction)
    pointers = [Pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    memory = GlobalMemory([p.array for p in pointers if isinstance(p, Pointer)])
    values = [memory.address(p) if isinstance(p, Pointer) else p for p in pointers]
    values += [0] * (len(program.parameters) - len(values))
    parameters = {
        name: _parameter_bytes(value, size) for (name, size), value in zip(program.parameters, values, strict=True)
    }
    random = None if seed is None else np.random.default_rng(seed)
    statistics, batch = Statistics(), max(1, BATCH_THREADS // int(np.prod(block)))
    blocks = np.arange(int(np.prod(grid)))
    if random is not None:
        random.shuffle(blocks)
    with np.errstate(all="ignore"):
        for start in range(0, blocks.size, batch):
            chosen = blocks[start : start + batch]
            Machine(program, grid, block, chosen, memory, parameters, shared_bytes, random, statistics).run()
    memory.copy_back()
    return statistics


class Machine:
    """Some blocks of a grid. Every array has one element per thread; a warp is 32 neighbours."""

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: Sequence[int],
        chosen: Array,  # linear indices of the blocks to run
        memory: GlobalMemory,
        parameters: dict[str, bytes],
        shared_bytes: int,
        random: np.random.Generator | None,
        statistics: Statistics,
    ) -> None:
        size, blocks = int(np.prod(block)), chosen.size
        if size % 32:
            raise NotImplementedError(f"a block of {size} threads: expected a multiple of 32")
        self.program, self.threads, self.blocks = program, size * blocks, blocks
        self.memory, self.parameters, self.random, self.statistics = memory, parameters, random, statistics
        thread = np.arange(self.threads)
        self.block, self.warp, inside = thread // size, thread // 32, thread % size
        place = chosen[self.block]
        self.specials = {"laneid": inside % 32, "warpid": inside // 32}
        for axis, letter in enumerate("xyz"):
            self.specials[f"tid.{letter}"] = inside // int(np.prod(block[:axis])) % block[axis]
            self.specials[f"ctaid.{letter}"] = place // int(np.prod(grid[:axis])) % grid[axis]
            self.specials[f"ntid.{letter}"] = np.full(self.threads, block[axis])
            self.specials[f"nctaid.{letter}"] = np.full(self.threads, grid[axis])
        self.registers: dict[str, Array] = {}
        self.shared = SharedMemory(blocks, program.static_shared_bytes + shared_bytes)
        self.copies = Copies(self)
        self.proxies = Proxies(self)
        self.products = Products(self)
        self.tensor_memory = TensorMemory(self)
        self.phases = Phases(self)
        self.constants: dict[tuple[str, str], Array] = {}
        self.pc = np.zeros(self.threads, np.int64)
        self.state = np.full(self.threads, RUNNING, np.int8)
        self.barrier = np.zeros((self.threads, 2), np.int64)  # (id, threads it waits for; 0: the whole block)
        self.leaders = set(program.labels.values())
        self.priority = np.zeros(self.threads // 32, np.int64)
        if random is not None:
            self._draw_priorities()

    # -- operands ------------------------------------------------------------------------------------------------------

    def read(self, operand: Operand, type: str) -> Array:
        """The operand's values in all threads, (threads,); packed types (threads, 2)."""
        if isinstance(operand, Register):
            return decode(self.bits(operand.name), type)
        if isinstance(operand, Negated):
            return ~self.read(operand.operand, type)
        if isinstance(operand, Special):
            if operand.name not in self.specials:
                raise NotImplementedError(f"PTX special register %{operand.name}")
            return self.specials[operand.name].astype(dtype(type))
        if isinstance(operand, Immediate):
            return self._constant(operand.text, type)
        if isinstance(operand, Symbol) and operand.name in self.program.shared:
            return np.full(self.threads, self.program.shared[operand.name], dtype(type))
        raise NotImplementedError(f"PTX operand {operand} read as {type}")

    def bits(self, name: str) -> Array:
        """A register's bits, unsigned (bool for a predicate); all ones before its first write."""
        if name not in self.registers:
            type = self.program.registers[name]
            self.registers[name] = (
                np.ones(self.threads, bool) if type == "pred" else ~np.zeros(self.threads, UNSIGNED[width(type)])
            )
        return self.registers[name]

    def _constant(self, text: str, type: str) -> Array:
        if (text, type) not in self.constants:
            self.constants[text, type] = np.broadcast_to(
                immediate(text, type), (self.threads, 2) if type.endswith("x2") else self.threads
            )
        return self.constants[text, type]

    def write(self, operand: Operand, values: Array, type: str, active: Array) -> None:
        if isinstance(operand, Symbol) and operand.name == "_":
            return
        if not isinstance(operand, Register):
            raise NotImplementedError(f"PTX destination {operand}")
        bits = resize(encode(values, type), self.program.registers[operand.name], type)
        if operand.name in self.products.written:
            self.products.wrote_register(operand.name, active)
        np.copyto(self.bits(operand.name), bits, where=active)

    def store_shared(self, threads: Array, addresses: Array, values: Array) -> None:
        """Store to the shared memory of each thread's block, (threads, count) values."""
        offsets = self.shared.store(self.block[threads], addresses, values)
        self.proxies.wrote(threads, offsets, values.itemsize * values.shape[1])
        self.phases.wrote(offsets, values.itemsize * values.shape[1])

    # -- scheduling ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while (active := self._pick()) is not None:
            self._run_block(active)
        self.products.finish()
        self.tensor_memory.finish()

    def _pick(self) -> Array | None:
        """The threads to go on with: in each block the warps of highest priority, of these the ones furthest behind."""
        if (self.state == CONVERGING).any():
            self._reconverge()
        ready = (self.state == RUNNING) & ~self.phases.waiting
        if not ready.any():
            if self.phases.ask_again():
                return self._pick()
            if (self.state == EXITED).all():
                return None
            raise RuntimeError(f"{self.program.name}: deadlock: {self._where()}")
        if self.random is not None:
            if self.random.random() < 0.2:
                self._draw_priorities()
            priority = np.where(ready, self.priority[self.warp], -2)
            highest = priority.reshape(self.blocks, -1).max(1)
            ready &= priority == highest[self.block]
        return ready & (self.pc == self.pc[ready].min())

    def _draw_priorities(self) -> None:
        """One warp ahead of the others of its block, or behind them, or all in a random order.

        The same in all blocks, which know nothing of each other: those in the same place then go on together.
        """
        assert self.random is not None
        warps = self.priority.size // self.blocks
        order = np.zeros(warps, np.int64)
        if (style := self.random.integers(3)) == 2:
            order = self.random.permutation(warps)
        else:
            order[self.random.integers(warps)] = 1 if style == 0 else -1
        self.priority = np.tile(order, self.blocks)

    def _run_block(self, active: Array) -> None:
        """Run straight-line code from the present pc of ``active`` until it ends for them."""
        pc = int(self.pc[active][0])
        alone = not (self.state == RUNNING)[~active].any()  # nobody to wait for at labels
        whole = self._whole_warps(active).all()
        while True:
            if pc >= len(self.program.instructions):
                raise RuntimeError(f"{self.program.name}: ran past the last instruction")
            instruction = self.program.instructions[pc]
            self._count(instruction)
            mask = active if instruction.guard is None else active & self.read(instruction.guard, "pred")
            if instruction.opcode == "bra":
                target = self.program.labels[instruction.operands[-1].name]  # type: ignore[union-attr]
                self.pc[active] = pc + 1
                self.pc[mask] = target
                self.phases.branched(mask & (target <= pc), active)
                return
            if instruction.opcode in ("ret", "exit"):
                self.state[mask] = EXITED
                self._release(set(self.barrier[self.state == BARRIER, 0].tolist()))
                active = active & ~mask
                if not active.any():
                    return
            elif instruction.opcode in ("bar", "barrier") and not instruction.has("warp"):
                self.pc[active] = pc + 1
                self._arrive(instruction, mask)
                return
            else:
                if not whole and instruction.has("sync"):
                    here = self._whole_warps(active)
                    self.pc[active & ~here] = pc
                    self.state[active & ~here] = CONVERGING
                    active, mask = active & here, mask & here
                    if not active.any():
                        return
                if mask is active or mask.any():
                    self._execute(instruction, mask)
            pc += 1
            if pc in self.leaders and not alone:
                self.pc[active] = pc
                return

    def _execute(self, instruction: Instruction, mask: Array) -> None:
        try:
            instructions.TABLE[instruction.opcode].run(self, instruction, mask)
        except Exception as error:
            raise type(error)(f"{self.program.name}: {instruction.text}: {error}") from error

    def _count(self, instruction: Instruction) -> None:
        self.statistics.steps += 1
        self.statistics.opcodes[instruction.opcode] += 1
        if self.statistics.steps > STEP_LIMIT:
            raise RuntimeError(f"{self.program.name}: more than {STEP_LIMIT} steps: {self._where()}")

    def _whole_warps(self, active: Array) -> Array:
        """For each active thread: are all threads of its warp that have not exited active? True for the others."""
        complete = (active | (self.state == EXITED)).reshape(-1, 32).all(1)
        return ~active | complete[self.warp]

    def _reconverge(self) -> None:
        """Let the warps go on whose threads have all reached the same warp-wide instruction."""
        waiting = (self.state == CONVERGING).reshape(-1, 32)
        gone = (self.state == EXITED).reshape(-1, 32)
        pc = self.pc.reshape(-1, 32)
        first = np.where(waiting, pc, np.iinfo(np.int64).max).min(1)
        together = waiting.any(1) & (gone | (waiting & (pc == first[:, None]))).all(1)
        self.state[together[self.warp] & (self.state == CONVERGING)] = RUNNING

    def _arrive(self, instruction: Instruction, mask: Array) -> None:
        """bar.sync id{, threads}."""
        if not instruction.has("sync"):
            raise NotImplementedError(f"PTX instruction {instruction.text!r}")
        for column, operand in enumerate(instruction.operands):
            self.barrier[mask, column] = self.read(operand, "u32")[mask]
        if len(instruction.operands) < 2:
            self.barrier[mask, 1] = 0
        self.state[mask] = BARRIER
        self._release(set(self.barrier[mask, 0].tolist()))

    def _release(self, names: set[int]) -> None:
        """Let the blocks go on in which all that a barrier waits for have arrived or exited."""
        alive = (self.state != EXITED).reshape(self.blocks, -1).sum(1)
        for name in names:
            here = ((self.state == BARRIER) & (self.barrier[:, 0] == name)).reshape(self.blocks, -1)
            wanted = np.where(here, self.barrier[:, 1].reshape(self.blocks, -1), 0).max(1)
            complete = here.sum(1) == np.where(wanted, wanted, alive)
            released = here & complete[:, None]
            self.state.reshape(self.blocks, -1)[released] = RUNNING
            self.proxies.barrier(released.reshape(-1))

    def _where(self) -> str:
        names = ["running", "waiting for their warp", "at a barrier"]
        places = []
        for state, name in enumerate(names):
            for pc in np.unique(self.pc[self.state == state]):
                count = int(((self.state == state) & (self.pc == pc)).sum())
                places.append(f"{count} threads {name} near instruction {pc}")
        return "; ".join(places)


def _parameter_bytes(value: int | float, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
