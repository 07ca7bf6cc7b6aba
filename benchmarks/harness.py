"""One way to measure: check first, then time everybody in turns in one run, then measure memory.

A `Case` is one piece of work (operator, shape, dtype) and its entries: ours by backend, peers (other packages and plain
torch, that do the same), and a lower bound: the matrix products that ours does, alone (what needs fewer of them can
beat it). Entries take turns, so that a machine that slows down slows all of them; a ratio is the median over rounds of
the ratio within a round.
"""

import csv
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from appo_kernels.testing import peak_extra_bytes
from benchmarks.timers import WallClock

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "flash-attn",
    "cut-cross-entropy",
    "prefix-grouper",
    "numpy",
)


@dataclass
class Entry:
    """name: as in the table. role: "ours", "peer" or "bound". run: the work; its result is returned, so
    that memory counts it. before: called untimed before each run."""

    name: str
    role: str
    run: Callable[[], object]
    before: Callable[[], object] = lambda: None


@dataclass
class Case:
    """verify: raises when an entry is wrong. skipped: name -> why it does not take part."""

    op: str
    shape: str
    dtype: str
    work: str
    device: str
    verify: Callable[[], object]
    entries: list[Entry]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.op}, {self.shape}, {self.dtype}"


@dataclass
class Row:
    """Times in seconds: median and quartiles over rounds. ratio: to the bound; to_ours: to our own time. commit: of the
    code that was measured."""

    op: str
    shape: str
    dtype: str
    work: str
    name: str
    role: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: float | None
    to_ours: float | None
    extra_bytes: int
    commit: str = field(default_factory=lambda: commit())


def measure(case: Case, *, seconds: float = 20.0, least: int = 3, most: int = 25) -> list[Row]:
    """Verify, then rounds until ``seconds`` are over (at least ``least``, at most ``most``), then memory."""
    case.verify()
    times: dict[str, list[float]] = {entry.name: [] for entry in case.entries}
    for entry in case.entries:  # compilation, first touch of memory
        timed(entry, case.device)
    start = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - start > seconds:
            break
        for entry in in_turn(case.entries, number):
            times[entry.name].append(timed(entry, case.device))
    return rows_of(case, times, {c.name: memory(c, case.device) for c in case.entries})


def in_turn(entries: Sequence[Entry], number: int) -> Sequence[Entry]:
    """Every other round backwards: who comes behind whom costs a few percent of a long run."""
    return entries[::-1] if number % 2 else entries


def rows_of(case: Case, times: dict[str, list[float]], extra: dict[str, int]) -> list[Row]:
    bound = next((c.name for c in case.entries if c.role == "bound"), None)
    ours = next((c.name for c in case.entries if c.role == "ours"), None)
    return [
        Row(
            case.op, case.shape, case.dtype, case.work, entry.name, entry.role,
            *spread(times[entry.name]),
            rounds=len(times[entry.name]),
            ratio=paired_ratio(times, entry.name, bound),
            to_ours=paired_ratio(times, entry.name, ours),
            extra_bytes=extra[entry.name],
        )
        for entry in case.entries
    ]  # fmt: skip


def measure_large(case: Case, check: Callable[[dict[str, object]], object], *, rounds: int) -> list[Row]:
    """For work of half a minute a run: memory is measured, and results compared by ``check``, in a round that touches
    everything for the first time; ``rounds`` timed ones follow."""
    extra, results = {}, {}
    for entry in case.entries:

        def run(entry: Entry = entry) -> object:
            results[entry.name] = entry.run()
            return results[entry.name]

        extra[entry.name] = memory(replace(entry, run=run), case.device)
    check(results)
    results.clear()
    times: dict[str, list[float]] = {entry.name: [] for entry in case.entries}
    for number in range(rounds):
        for entry in in_turn(case.entries, number):
            times[entry.name].append(timed(entry, case.device))
    return rows_of(case, times, extra)


def timed(entry: Entry, device: str) -> float:
    entry.before()
    return WallClock(device)(entry.run)


def memory(entry: Entry, device: str) -> int:
    """Peak beyond what was there, the result included. Memory freed before goes back to the system first: pages that
    the allocator keeps would be used again unseen."""
    entry.before()
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)
    return peak_extra_bytes(entry.run, device)


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return statistics.median(times), low, high


def paired_ratio(times: dict[str, list[float]], name: str, base: str | None) -> float | None:
    if base is None:
        return None
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def environment(device: str, threads: int) -> dict[str, Any]:
    """Hardware, versions and commit, without which a time means nothing."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return {
        "device": device,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **gpu,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def commit() -> str:
    """The commit, with "+" when the package or the benchmarks have changes that are not in it."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", "appo", "appo_kernels", "csrc", "benchmarks/*.py"
    )
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def save(name: str, rows: Sequence[Any], *, device: str, **more: Any) -> Path:
    """results/<name>.json with the environment, and results/<name>.csv; rows are dataclasses or dictionaries.

    Rows of other commits, which `resumed` gave, keep the environment that the file had for them, as "earlier".
    """
    RESULTS.mkdir(exist_ok=True)
    plain = [row if isinstance(row, dict) else asdict(row) for row in rows]
    now, old = environment(device, torch.get_num_threads()), load(name)
    others = {row["commit"] for row in plain if "commit" in row} - {now["commit"]}
    known = [*old.get("earlier", ()), old["environment"]] if old else []
    earlier = [each for each in known if each["commit"] in others]
    content = {"environment": now, **({"earlier": earlier} if earlier else {}), **more, "rows": plain}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    write_csv(path.with_suffix(".csv"), plain)
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A column for every key of any row; empty where a row has none."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def merged(old: Sequence[dict[str, Any]], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """``rows``, and of the ``old`` ones those of other cases before them."""
    done = {(row.op, row.shape, row.dtype) for row in rows}
    return [row for row in old if (row["op"], row["shape"], row["dtype"]) not in done] + [vars(row) for row in rows]


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def resumed(name: str) -> dict[str, Any] | None:
    """The content that `load` gives, to which rows are added: each with the commit that it was measured at."""
    content = load(name)
    for row in content["rows"] if content else ():
        row.setdefault("commit", content["environment"]["commit"])
    return content


def table(rows: Sequence[Row]) -> str:
    lines = [
        f"{'':36s} {'median':>10s} {'quartiles':>19s} {'x bound':>8s} {'x ours':>7s} {'extra memory':>13s}",
    ]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        to_ours = "" if row.to_ours is None else f"{row.to_ours:.2f}"
        quartiles = f"{1e3 * row.low:.1f} - {1e3 * row.high:.1f}"
        lines.append(
            f"  {row.name:34s} {1e3 * row.median:7.1f} ms {quartiles:>19s} {ratio:>8s} {to_ours:>7s} "
            f"{row.extra_bytes / 2**20:9.0f} MiB"
        )
    return "\n".join(lines)


def own_backends(
    op: str, device: str, dtype: torch.dtype, head_dim: int = 0, needs_grad: bool = False
) -> tuple[list[str], dict[str, str]]:
    """Backends of ours that can be timed here, and for each other one "ours, NAME" -> why not.

    On a CPU the kernels are only emulated, for tests.
    """
    from appo_kernels import dispatch

    problem = dispatch.Problem(op, torch.device(device), dtype, head_dim, needs_grad)
    usable, skipped = [], {}
    for backend in dispatch.MODULES:
        reason = dispatch.why_not(problem, backend)
        if reason is None and backend != "torch" and device == "cpu":
            reason = "only emulated on a CPU"
        if reason is None:
            usable.append(backend)
        else:
            skipped[f"ours, {backend}"] = reason
    return usable, skipped
