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
from mutations.results import Results, explained, report
from mutations.workbench import Workbench

LONGEST = 4.0  # tests of a mutant may take so many times what they take without a change
COMPILING = 60.0  # and so many seconds more


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutations", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which of all mutants are chosen (default: 0)")
    parser.add_argument("--number", type=int, default=suites.NUMBER, help="how many (default: %(default)s)")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    parser.add_argument("--minutes", type=float, help="begin no more after so many; the next call goes on")
    parser.add_argument("--limit", type=float, help="seconds for tests, in place of a multiple of what they take")
    parser.add_argument("--results", type=Path, default=suites.ROOT / "build" / "mutations" / "results.csv")
    parser.add_argument("--list", action="store_true", help="print the chosen mutants and run none")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the copy is removed
    planned = [m for m in suites.plan(arguments.number, arguments.seed) if arguments.only in m.file]
    if arguments.list:
        print(*planned, sep="\n")
        return 0
    results = Results(arguments.results)
    began = time.monotonic()
    missing = [m for m in planned if (known := results.of(m)) is None or known.result == "survived"]
    random.Random(arguments.seed).shuffle(missing)  # what a time limit leaves out is of every file
    missing.sort(key=lambda mutant: mutant.key in explained())  # and what takes longest and is known comes last
    with contextlib.ExitStack() as stack:
        for number, mutant in enumerate(missing, 1):
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"{len(missing) - number + 1} mutants are left for the next call")
                break
            if number == 1:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutations-"))
                bench = stack.enter_context(Workbench(Path(folder)))
            tests = suites.of(mutant.file)
            limits = [arguments.limit or COMPILING + LONGEST * results.usual(suite, bench) for suite in tests]
            outcome = bench.run(mutant, tests, limits)
            results.add(mutant, outcome)
            print(f"{number}/{len(missing)} {outcome.result} in {outcome.seconds:.0f} s: {mutant}", flush=True)
    text, good = report([(m, o) for m in planned if (o := results.of(m))], explained())
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
