"""python -m benchmarks [OPERATOR ...]: verify, time, measure memory, print one table, write results/operators-*

Every operator, shape and backend that can run here, beside its lower bound and its peers. `--list` shows the shapes.
"""

import argparse
import gc
import importlib
from pathlib import Path

import torch

from appo_kernels.closed_pipe import quiet_on_closed_pipe
from benchmarks import harness, plots
from benchmarks.shapes import DEFAULT_ATTENTION, DEFAULT_VOCABULARY

OPERATORS = {
    "frame_mass": "bench_frame_mass",
    "frame_attention": "bench_frame_attention",
    "group_attention": "bench_group_attention",
    "token_logprobs": "bench_token_logprobs",
    "group_divergence": "bench_group_divergence",
    "weighted_surrogate": "bench_weighted_surrogate",
    "logits_weighted_surrogate": "bench_logits_weighted_surrogate",
    "linear_weighted_surrogate": "bench_linear_weighted_surrogate",
}
# The cases in the picture, as `Case.op` names them.
PICTURED = (
    "frame_mass", "frame_attention", "linear_weighted_surrogate", "group_divergence kl", "token_logprobs fwd+bwd"
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", help=f"of {', '.join(OPERATORS)}; default: all")
    parser.add_argument("--shapes", nargs="*", help="names of shapes; default: the ones chosen in shapes.py")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each case, verification aside")
    parser.add_argument("--name", default=None, help="of the result files; default: operators-<device>; '-': none")
    parser.add_argument("--append", action="store_true", help="replace only the cases that run now in the result files")
    parser.add_argument("--list", action="store_true", help="print the shapes and stop")
    options = parser.parse_args()
    if unknown := set(options.operators) - set(OPERATORS):
        parser.error(f"no benchmark of {', '.join(sorted(unknown))}; there are {', '.join(OPERATORS)}")
    torch.set_num_threads(options.threads)
    name = options.name or f"operators-{options.device}"
    old = harness.resumed(name) if options.append else None
    rows, skipped = [], {}
    for operator in options.operators or OPERATORS:
        module = importlib.import_module(f"benchmarks.{OPERATORS[operator]}")
        known = module.SHAPES()
        chosen = [known[shape] for shape in options.shapes or module.DEFAULT if shape in known]
        shapes = [shape if options.device == "cuda" else shape.on_cpu() for shape in chosen]
        if options.list:
            print(operator, *(f"  {shape.name:22s} {shape.describe()}" for shape in shapes), sep="\n")
            continue
        for case in module.cases(shapes, options.device):
            if options.dtype in (None, case.dtype):
                print(f"\n{case.title}: {case.work}", flush=True)
                found = harness.measure(case, seconds=options.seconds)
                print(harness.table(found), flush=True)
                for entry, reason in case.skipped.items():
                    print(f"  {entry:34s} not run: {reason}")
                rows, skipped = rows + found, skipped | {case.title: case.skipped}
                if name != "-":
                    path = write(name, rows, skipped, old, options.device)
            del case
            gc.collect()
    if rows and name != "-":
        print(f"\nwritten: {path}")


def write(name: str, rows: list, skipped: dict, old: dict | None, device: str) -> Path:
    """After every case, so that what is measured is not lost when the rest is stopped."""
    old = old or {"rows": [], "skipped": {}}
    plain = harness.merged(old["rows"], rows)
    path = harness.save(name, plain, device=device, skipped=old["skipped"] | skipped)
    if shown := headline(plain, device):
        plots.contests(shown, path.with_suffix(".png"))
    return path


def headline(rows: list[dict], device: str) -> list[dict]:
    """One case of each operator: the first shape, in the dtype that the device is made for."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    shapes = (DEFAULT_ATTENTION[0], DEFAULT_VOCABULARY[0])
    chosen = [row for row in rows if row["op"] in PICTURED and row["shape"] in shapes and row["dtype"] == dtype]
    return sorted(chosen, key=lambda row: PICTURED.index(row["op"]))


if __name__ == "__main__":
    with quiet_on_closed_pipe():
        main()
