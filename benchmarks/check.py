"""The regression guard: python -m benchmarks.check, or make bench-check.

Runs a few cases again and compares ratios, never times, with the committed ones in results/operators-<device>.json: our
time to the bound's, and each peer's to ours. A ratio fails when it is worse than the committed one by more than the
noise: the larger of `--tolerance` and the spread of the two times within their runs, then and now; and when it is so a
second time.
"""

import argparse
import importlib
import sys
from collections.abc import Callable

import torch

from benchmarks import harness
from benchmarks.__main__ import OPERATORS

# The cases of which the project makes claims: operator, shape.
GUARDED = (
    ("frame_mass", "Qwen2.5-VL-7B/16x64"),
    ("frame_attention", "Qwen2.5-VL-7B/16x64"),
    ("token_logprobs", "Qwen2.5-VL-7B"),
    ("group_divergence", "Qwen2.5-VL-7B"),
    ("linear_weighted_surrogate", "Qwen2.5-VL-7B"),
)
Key = tuple[str, str, str, str]


def spread_of(row: dict) -> float:
    """Ratio of the quartiles."""
    return row["high"] / row["low"]


def worse(now: dict, then: dict, reference_now: dict, reference_then: dict, tolerance: float) -> tuple[float, float]:
    """By which factor the ratio to a reference row has grown, and the factor that noise explains."""
    grown = (now["median"] / reference_now["median"]) / (then["median"] / reference_then["median"])
    noise = max(spread_of(row) for row in (now, then, reference_now, reference_then))
    return grown, max(1 + tolerance, noise)


def compare(now: list[dict], then: list[dict], tolerance: float) -> list[str]:
    """A line for each of our rows, those that fail begin with FAIL."""
    before = {(row["op"], row["shape"], row["dtype"], row["name"]): row for row in then}
    lines = []
    for row in now:
        key = (row["op"], row["shape"], row["dtype"], row["name"])
        if row["role"] != "ours" or key not in before:
            continue
        others = [other for other in now if other["role"] != "ours" and (*key[:3], other["name"]) in before]
        for other in others:
            if (other["op"], other["shape"], other["dtype"]) != key[:3]:
                continue
            grown, allowed = worse(row, before[key], other, before[(*key[:3], other["name"])], tolerance)
            mark = "FAIL" if grown > allowed else "ok  "
            lines.append(f"{mark} {' '.join(key)} to {other['name']}: {grown:.2f} x what it was, {allowed:.2f} allowed")
    return lines


def confirmed(measured: Callable[[], list[str]]) -> list[str]:
    """The lines of ``measured``; where one fails all is measured again, and what fails both times has failed."""
    found = measured()
    if not any(line.startswith("FAIL") for line in found):
        return found
    return [second if first.startswith("FAIL") else first for first, second in zip(found, measured(), strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tolerance", type=float, default=0.3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, both on a GPU")
    options = parser.parse_args()
    if options.device == "cpu":  # half a minute for each run of eager attention in bf16
        options.dtype = options.dtype or "float32"
    torch.set_num_threads(options.threads)
    committed = harness.load(f"operators-{options.device}")
    if committed is None:
        sys.exit(f"bench-check: no results/operators-{options.device}.json to compare with. Run `make bench` first.")
    lines: list[str] = []
    for operator, name in GUARDED:
        module = importlib.import_module(f"benchmarks.{OPERATORS[operator]}")
        shape = module.SHAPES()[name]
        for case in module.cases([shape if options.device == "cuda" else shape.on_cpu()], options.device):
            if options.dtype not in (None, case.dtype):
                continue

            def measured(case: harness.Case = case) -> list[str]:
                rows = [vars(row) for row in harness.measure(case, seconds=options.seconds)]
                return compare(rows, committed["rows"], options.tolerance)

            found = confirmed(measured)
            print(*found, sep="\n", flush=True)
            lines += found
    if not lines:
        sys.exit("bench-check: the committed results have none of the guarded cases. Run `make bench` first.")
    return int(any(line.startswith("FAIL") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
