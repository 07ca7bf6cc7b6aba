"""What is known of each mutant, written after each, and the survivors that are explained."""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mutations.mutant import Mutant
from mutations.suites import Suite
from mutations.workbench import Outcome, Workbench

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
        self._write(digest(mutant), (mutant.file, mutant.function, mutant.operator, mutant.change), outcome)

    def _write(self, key: str, what: tuple[str, ...], outcome: Outcome) -> None:
        """At once; the last row of a key counts."""
        self.known[key] = outcome
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow((key, *what, outcome.result, f"{outcome.seconds:.1f}", outcome.told))

    def usual(self, suite: Suite, bench: Workbench) -> float:
        """Seconds that ``suite`` takes without a change, which it must pass; once for the sources as they are."""
        key = hashlib.sha256(repr((bench.state, suite)).encode()).hexdigest()[:16]
        if key not in self.known:
            bench.build(suite)
            outcome = bench.run(None, (suite,), (3600.0,))
            if outcome.result != "survived":
                raise RuntimeError(f"{suite} fails without a fault: {outcome.result}: {outcome.told}")
            self._write(key, ("", "", "", str(suite)), outcome)
        return self.known[key].seconds


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
