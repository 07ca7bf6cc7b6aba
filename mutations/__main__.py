"""``python -m mutations``: plants the faults and prints the share that the tests notice. Interrupted, it goes on."""

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from mutations import suites
from mutations.results import Results, digest, explained, report
from mutations.workbench import Outcome, Workbench

LIMIT = 60.0  # CPU seconds of a test; the longest takes a sixth of it


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which of all mutants are chosen (default: 0)")
    parser.add_argument("--number", type=int, default=suites.NUMBER, help="how many (default: %(default)s)")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N parts, for several processes")
    parser.add_argument("--minutes", type=float, help="begin no more after so many; the next call goes on")
    parser.add_argument("--limit", type=float, default=LIMIT, help="CPU seconds of a test (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=suites.ROOT / "build" / "mutations" / "results.csv")
    parser.add_argument("--list", action="store_true", help="print the chosen mutants and run none")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copy is removed
    planned = [m for m in suites.plan(arguments.number, arguments.seed) if arguments.only in m.file]
    part, parts = map(int, arguments.part.split("/"))
    planned = planned[part - 1 :: parts]
    if arguments.list:
        print(*planned, sep="\n")
        return 0
    results = Results(arguments.results)
    began = time.monotonic()
    known, reasons = {m: results.of(m) for m in planned}, explained()
    missing = [m for m in planned if m.key not in reasons and ((o := known[m]) is None or o.result == "survived")]
    random.Random(arguments.seed).shuffle(missing)  # what a time limit leaves out is of every file
    with contextlib.ExitStack() as stack:
        used: set[suites.Suite] = set()
        for number, mutant in enumerate(missing, 1):
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"{len(missing) - number + 1} mutants are left for the next call")
                break
            if number == 1:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-"))
                bench = stack.enter_context(Workbench(Path(folder)))
            tests = suites.of(mutant.file)
            outcome = bench.run(mutant, tests, arguments.limit)
            results.add(mutant, outcome)
            used.update(tests)
            print(f"{number}/{len(missing)} {outcome.result} in {outcome.seconds:.0f} s: {mutant}", flush=True)
        if used:
            bench.check(used, arguments.limit)
    for mutant in planned:
        if mutant.key in reasons:
            results.known[digest(mutant)] = Outcome("survived", 0.0, "")
    text, good = report([(m, o) for m in planned if (o := results.of(m))], explained())
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
