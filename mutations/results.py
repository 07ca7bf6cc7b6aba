"""Results of each mutant, written after each, and the survivors that are explained."""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mutations.mutant import Mutant
from mutations.workbench import Outcome

SURVIVORS = Path(__file__).with_name("survivors.txt")
FIELDS = ("digest", "file", "function", "operator", "change", "result", "seconds", "told")


def digest(mutant: Mutant) -> str:
    """Of the whole changed file: a result holds for that text."""
    return hashlib.sha256(repr((mutant.file, mutant.mutated)).encode()).hexdigest()[:16]


class Results:
    """Results in a CSV file. What was caught is not run again while its file stays as it is; survivors are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Outcome] = {}
        if path.exists():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.known[row["digest"]] = Outcome(row["result"], float(row["seconds"]), row["told"])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file).writerow(FIELDS)

    def of(self, mutant: Mutant) -> Outcome | None:
        return self.known.get(digest(mutant))

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """At once; the last row of a mutant counts."""
        self.known[digest(mutant)] = outcome
        what = (mutant.file, mutant.function, mutant.operator, mutant.change)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow((digest(mutant), *what, outcome.result, f"{outcome.seconds:.1f}", outcome.told))


def explained(path: Path = SURVIVORS) -> dict[tuple[str, str, str], str]:
    """(file, function, change) of the survivors that are known to make no difference, or none that a test may ask for,
    and why. Three lines each: ``file function``, the change, the reason; then an empty one."""
    reasons = {}
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    for entry in filter(None, (part.strip() for part in text.split("\n\n"))):
        place, change, reason = entry.split("\n", 2)
        file, function = place.split()
        reasons[file, function, change.strip()] = " ".join(reason.split())
    return reasons


def report(outcomes: Iterable[tuple[Mutant, Outcome]], reasons: dict[tuple[str, str, str], str]) -> tuple[str, bool]:
    """A table by file and the survivors without a reason; whether there is none of these."""
    files: dict[str, list[int]] = {}
    open_survivors = []
    for mutant, outcome in outcomes:
        counts = files.setdefault(mutant.file, [0, 0, 0, 0])
        if outcome.result == "invalid":
            counts[3] += 1
            continue
        counts[0] += 1
        if outcome.result != "survived":
            counts[1] += 1
        elif mutant.key in reasons:
            counts[2] += 1
        else:
            open_survivors.append(mutant)
    total = [sum(column) for column in zip(*files.values(), strict=True)] or [0, 0, 0, 0]
    lines = [f"{'file':60} {'mutants':>8} {'caught':>7} {'explained':>10} {'do not compile':>15}"]
    for name, counts in [*sorted(files.items()), ("all", total)]:
        lines.append(f"{name:60} {counts[0]:8} {counts[1]:7} {counts[2]:10} {counts[3]:15}")
    if total[0]:
        left = max(1, total[0] - total[2])
        lines.append(f"caught: {total[1] / total[0]:.1%}; of those that make a difference: {total[1] / left:.1%}")
    lines += ["", *(f"survived: {mutant}" for mutant in open_survivors)]
    return "\n".join(lines).rstrip(), not open_survivors
