"""One change of one kernel's source, and how a balanced choice of them is made."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Characters ``start`` to ``stop`` of ``source``, the text of ``file``, become ``replacement``."""

    file: str  # relative to the root of the tree
    function: str
    operator: str  # the kind of the change
    start: int
    stop: int
    replacement: str
    source: str

    @property
    def mutated(self) -> str:
        return self.source[: self.start] + self.replacement + self.source[self.stop :]

    @property
    def line(self) -> int:
        """Its line, from 1."""
        return self.source.count("\n", 0, self.start) + 1

    @functools.cached_property
    def change(self) -> str:
        """The lines that change, before and after; no two mutants of a function that differ share it."""
        first = self.source.rfind("\n", 0, self.start) + 1
        last = self.source.find("\n", self.stop)
        last = len(self.source) if last < 0 else last
        after = self.source[first : self.start] + self.replacement + self.source[self.stop : last]
        return f"{_one_line(self.source[first:last])} => {_one_line(after)}"

    @functools.cached_property
    def key(self) -> tuple[str, str, str]:
        """Its identity when lines move: file, function and change."""
        return self.file, self.function, self.change

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.operator}: {self.change}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def chosen(candidates: Iterable[Mutant], number: int, seed: int) -> list[Mutant]:
    """``number`` of the candidates, the same ones for the same seed: functions take turns, long ones more often, and so
    do operators; within them a hash decides. Candidates that change the same text in the same way count once."""
    by_key = {c.key: c for c in candidates}

    def drawn(candidate: Mutant) -> str:
        return hashlib.sha256(repr((seed, candidate.key)).encode()).hexdigest()

    left = sorted(by_key.values(), key=drawn)
    sizes = Counter(c.function for c in left)
    functions: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    picked = []
    while left and len(picked) < number:
        best = min(left, key=lambda c: (functions[c.function] / sizes[c.function] ** 0.5, operators[c.operator]))
        left.remove(best)
        functions[best.function] += 1
        operators[best.operator] += 1
        picked.append(best)
    return sorted(picked, key=lambda c: (c.file, c.start, c.replacement))
