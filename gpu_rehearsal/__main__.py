"""python -m gpu_rehearsal [PART OF A NAME] [--sites]: what every call costs on the pretended GPU.

The table is that of budgets.txt. With --sites also every synchronisation and upload with the lines that asked for it.
"""

import argparse

from gpu_rehearsal import budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", metavar="PART", help="of the names of the calls to make")
    parser.add_argument("--sites", action="store_true", help="print where synchronisations and uploads come from")
    options = parser.parse_args()
    print(budgets.header())
    for name, cost, recordings in budgets.measured(options.only):
        print(budgets.line(name, cost))
        if options.sites:
            print(recordings[0].report("  with checks of values"))


if __name__ == "__main__":
    main()
