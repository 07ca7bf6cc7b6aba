"""PTX text -> Program: instructions with parsed operands, labels, registers, parameters, shared memory layout."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property

from ptxsim.values import width


@dataclass(frozen=True)
class Register:
    name: str  # a key of Program.registers


@dataclass(frozen=True)
class Special:
    name: str  # without the leading %: "tid.x", "laneid"


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Symbol:
    name: str  # a label, a parameter or a shared array


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Negated:
    operand: "Operand"  # !%p, a predicate source


@dataclass(frozen=True)
class Pair:
    first: "Operand"  # %r|%p, two results
    second: "Operand"


Operand = Register | Special | Immediate | Symbol | Address | Vector | Negated | Pair


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "v4", "b32")
    operands: tuple[Operand, ...]
    guard: Operand | None  # the predicate of @%p, Negated for @!%p
    text: str

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    @cached_property
    def _modifier_set(self) -> frozenset[str]:
        return frozenset(self.modifiers)

    def has(self, *names: str) -> bool:
        """Whether any of ``names`` is among the modifiers."""
        return not self._modifier_set.isdisjoint(names)


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, int]] = field(default_factory=list)  # (name, bytes)
    registers: dict[str, str] = field(default_factory=dict)  # unique name -> type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # unique name -> index of the instruction that follows
    shared: dict[str, int] = field(default_factory=dict)  # array -> offset in the block's shared memory
    static_shared_bytes: int = 0  # dynamic shared memory starts here


SPECIALS = re.compile(
    r"%((tid|ntid|ctaid|nctaid)\.[xyz]|laneid|warpid|nwarpid|smid|clock|clock64|globaltimer|lanemask_\w+|envreg\d+)$"
)
NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+\.\d*(e[+-]?\d+)?|\d+U?)$")
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[bfsu](\d+)\s+([\w$.]+)(?:\[(\d*)\])?$")
# Directives without effect on what is computed.
IGNORED = {".loc", ".pragma", ".file", ".maxntid", ".reqntid", ".minnctapersm", ".maxnreg"}


def split(text: str) -> list[str]:
    """Split at the commas that are outside brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return parts + ([part.strip()] if part.strip() else [])


def parse(source: str, name: str | None = None) -> Program:
    """Parse one kernel of a PTX module: the one called ``name``, or the only one there is."""
    source = re.sub(r"/\*.*?\*/", " ", source, flags=re.S)
    source = re.sub(r"//[^\n]*", "", source)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", source, re.S))
    if name is not None:
        entries = [m for m in entries if m[1] == name]
    if len(entries) != 1:
        raise ValueError(f"expected one kernel{f' named {name}' if name else ''}, found {[m[1] for m in entries]}")
    entry = entries[0]
    program = Program(entry[1])
    for text in split(entry[2]):
        program.parameters.append(_parameter(text))
    for declaration in re.findall(r"\.shared\b[^;{}]*(?=;)", source[: entry.start()]):
        _declare_shared(program, declaration.strip())
    _Body(program).parse(_body(source, entry.end()))
    return program


def _parameter(text: str) -> tuple[str, int]:
    match = re.search(r"\.[busf](\d+)\s.*?([\w$]+)(?:\[(\d+)\])?$", text)
    if not match:
        raise ValueError(f"cannot parse the parameter {text!r}")
    return match[2], int(match[1]) // 8 * int(match[3] or 1)


def _body(source: str, start: int) -> str:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(source, start):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return source[start : brace.start()]
    raise ValueError("a kernel without a closing brace")


def _declare_shared(program: Program, text: str) -> None:
    match = SHARED.match(text)
    if not match:
        raise ValueError(f"cannot parse the declaration {text!r}")
    alignment, size, name = int(match[1] or 16), int(match[2]) // 8, match[3]
    program.static_shared_bytes = -(-program.static_shared_bytes // alignment) * alignment
    program.shared[name] = program.static_shared_bytes
    if match[4] != "":  # `name[]` is the dynamic memory, behind all others
        program.static_shared_bytes += size * int(match[4] or 1)


class _Body:
    """Statements of a kernel's body, with a scope of register names and labels for each pair of braces.

    Inline assembly declares the same label in several scopes, and a branch may come before its label: branches are
    resolved when the scope of their label is known, at the end.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.scopes: list[dict[str, str]] = [{}]
        self.path: list[int] = []  # numbers of the open scopes, outermost first
        self.count = 0
        self.branches: list[tuple[int, tuple[int, ...]]] = []  # (instruction, its scope)

    def parse(self, text: str) -> None:
        # A statement ends at a semicolon; a brace opens or closes a scope unless it is inside a statement (a vector).
        statement = ""
        for line in text.splitlines():
            if line.split()[:1] and line.split()[0] in (".loc", ".file", ".pragma"):
                continue
            for character in line + "\n":
                if character == ";":
                    self.statement(" ".join(statement.split()))
                    statement = ""
                elif character in "{}" and not statement.strip():
                    self.scope(character)
                elif character == ":" and re.fullmatch(r"[\w$]+", statement.strip()):
                    name = self.label(statement.strip(), tuple(self.path))
                    if name in self.program.labels:
                        raise ValueError(f"two labels {statement.strip()!r} in one scope")
                    self.program.labels[name] = len(self.program.instructions)
                    statement = ""
                else:
                    statement += character
        if statement.strip():
            raise ValueError(f"unfinished statement {statement.strip()!r}")
        for index, path in self.branches:
            self.resolve(index, path)

    def label(self, name: str, path: tuple[int, ...]) -> str:
        return "@".join([name, *(str(number) for number in path[-1:])])

    def resolve(self, index: int, path: tuple[int, ...]) -> None:
        """Let a branch name the label of the innermost scope around it that has one."""
        branch = self.program.instructions[index]
        (target,) = branch.operands
        if not isinstance(target, Symbol):
            raise NotImplementedError(f"PTX branch {branch.text!r}")
        names = (self.label(target.name, path[:length]) for length in range(len(path), -1, -1))
        name = next((name for name in names if name in self.program.labels), None)
        if name is None:
            raise ValueError(f"no label {target.name!r} in reach of {branch.text!r}")
        self.program.instructions[index] = replace(branch, operands=(Symbol(name),))

    def scope(self, brace: str) -> None:
        if brace == "{":
            self.count += 1
            self.scopes.append({})
            self.path.append(self.count)
        else:
            self.scopes.pop()
            self.path.pop()

    def statement(self, text: str) -> None:
        if not text or text.split()[0] in IGNORED:
            return
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith(".shared"):
            _declare_shared(self.program, text)
        elif text.startswith("."):
            raise NotImplementedError(f"PTX directive {text!r}")
        else:
            self.instruction(text)

    def declare(self, text: str) -> None:
        match = re.match(r"\.reg\s*\.(\w+)\s+(.*)$", text)
        if not match:
            raise ValueError(f"cannot parse the declaration {text!r}")
        width(match[1])  # raises for a type that is not known
        for name in split(match[2]):
            many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                unique = each if len(self.scopes) == 1 else f"{each}@{self.path[-1]}"
                self.scopes[-1][each] = unique
                self.program.registers[unique] = match[1]

    def instruction(self, text: str) -> None:
        guard, rest = None, text
        if text[0] == "@":
            predicate, rest = text[1:].split(None, 1)
            guard = self.operand(predicate)
        opcode, _, arguments = rest.partition(" ")
        name, *modifiers = [part for part in re.split(r"\.|::", opcode) if part]
        operands = tuple(self.operand(part) for part in split(arguments))
        if name == "bra":
            self.branches.append((len(self.program.instructions), tuple(self.path)))
        self.program.instructions.append(Instruction(name, tuple(modifiers), operands, guard, text))

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name])
        return None

    def operand(self, text: str) -> Operand:
        if text[0] == "!":
            return Negated(self.operand(text[1:].strip()))
        if text[0] == "{":
            return Vector(tuple(self.operand(part) for part in split(text[1:-1])))
        if text[0] == "[":
            match = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            if not match:
                raise NotImplementedError(f"PTX address {text!r}")
            return Address(self.operand(match[1]), int(match[2], 0) if match[2] else 0)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first), self.operand(second))
        if (register := self.register(text)) is not None:
            return register
        if SPECIALS.match(text):
            return Special(text[1:])
        if NUMBER.match(text):
            return Immediate(text)
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise NotImplementedError(f"PTX operand {text!r}")
