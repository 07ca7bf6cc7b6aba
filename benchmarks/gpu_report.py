"""Files of benchmarks.gpu: a CSV that grows case by case, its environment, a plot, a page."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from appo_kernels import backend_order
from benchmarks import harness, plots


@dataclass
class Row:
    gpu: str
    op: str
    shape: str
    dtype: str
    name: str
    role: str
    milliseconds: float  # on the GPU, the host far ahead of it
    host_milliseconds: float  # until the call returns
    runs: int
    to_bound: float | None  # times the time of the vendor's kernel
    tensor_fraction: float | None  # of the rate of a large matrix product
    scores: int = 0  # of attention, as backends are chosen by; 0: by no size

    @property
    def case(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.dtype


class Report:
    """The files of one GPU in a folder. Rows that are there already are read, so that a run goes on where it ended."""

    def __init__(self, folder: Path, gpu: str, *, device: str, again: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.stem = folder / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        self.gpu, self.architecture = gpu, backend_order.architecture(torch.device(device))
        self.environment = harness.environment(device, 1)
        self.rows: list[Row] = []
        self.left_out: dict[str, str] = {}  # case or entry -> why it has no time
        if not again and self.path("csv").is_file() and self._same_commit():
            with self.path("csv").open(newline="") as file:
                self.rows = [_parsed(record) for record in csv.DictReader(file)]
        self.path("json").write_text(json.dumps(self.environment, indent=1) + "\n")

    def path(self, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{ending}")

    def _same_commit(self) -> bool:
        file = self.path("json")
        return file.is_file() and json.loads(file.read_text()).get("commit") == self.environment["commit"]

    def has(self, case: tuple[str, str, str]) -> bool:
        return any(row.case == case for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Written at once: what comes after may fail, or be cut off."""
        self.rows += rows
        partial = self.path("csv.partial")
        harness.write_csv(partial, [asdict(row) for row in self.rows])
        partial.replace(self.path("csv"))
        self.path("md").write_text(self.page())

    def page(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.environment["versions"].items())
        lines = [
            f"# {self.gpu}", "",
            f"`python -m benchmarks.gpu`, commit {self.environment['commit']}, {self.environment['date']}; {versions}.",
            "Medians by CUDA events with the host ahead and the L2 cache flushed; beside them the time until the call",
            "returns, without checks of values.", "",
        ]  # fmt: skip
        for case in dict.fromkeys(row.case for row in self.rows):
            lines += [
                f"## {', '.join(case)}",
                "",
                "| | GPU ms | host ms | x bound | of tensor rate |",
                "|---|---|---|---|---|",
            ]
            for row in self.rows:
                if row.case == case:
                    ratio = "" if row.to_bound is None else f"{row.to_bound:.2f}"
                    share = "" if row.tensor_fraction is None else f"{100 * row.tensor_fraction:.0f}%"
                    lines.append(
                        f"| {row.name} | {row.milliseconds:.3f} | {row.host_milliseconds:.3f} | {ratio} | {share} |"
                    )
            lines.append("")
        if self.left_out:
            lines += ["## Not measured", "", *(f"- {name}: {why}" for name, why in self.left_out.items()), ""]
        return "\n".join(lines)

    def finish(self) -> list[Path]:
        """The files that there are; the plot only where matplotlib is installed, rules where backends were compared."""
        self.path("md").write_text(self.page())
        if rules := backend_rules(self.rows, self.architecture):
            backend_order.write(self.path("order.csv"), rules)
        if self.rows:
            try:
                plot(self.rows, self.path("png"), self.gpu)
            except ModuleNotFoundError as error:
                print(f"no plot: {error}")
        return [path for path in map(self.path, ("csv", "json", "md", "png", "order.csv")) if path.is_file()]


def _parsed(record: dict[str, str]) -> Row:
    numbers: dict[str, Any] = {
        name: None if record[name] == "" else float(record[name])
        for name in ("milliseconds", "host_milliseconds", "to_bound", "tensor_fraction")
    }
    return Row(**{**record, **numbers, "runs": int(record["runs"]), "scores": int(record["scores"])})


def backend_rules(rows: Sequence[Row], architecture: str) -> list[backend_order.Rule]:
    """The order of backends of the operators on attention that these measurements speak for.

    A call takes as long as the GPU or the host, whichever is longer; entries of one backend, with and without a
    given lse, are added up.
    """
    times: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        backend = row.name.removeprefix("ours, ").split(",")[0]
        if row.role == "ours" and row.scores and backend in backend_order.BACKENDS:
            sizes = times.setdefault((row.op, row.dtype), {}).setdefault(row.scores, {})
            sizes[backend] = sizes.get(backend, 0.0) + max(row.milliseconds, row.host_milliseconds)
    compared = {key: {size: of for size, of in sizes.items() if len(of) > 1} for key, sizes in times.items()}
    return [
        rule
        for (operator, dtype), sizes in compared.items()
        for rule in backend_order.measured(operator, dtype, architecture, sizes)
    ]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'':40s} {'GPU':>12s} {'host':>12s} {'x bound':>8s} {'of tensor rate':>15s}"]
    for row in rows:
        ratio = "" if row.to_bound is None else f"{row.to_bound:.2f}"
        fraction = "" if row.tensor_fraction is None else f"{100 * row.tensor_fraction:.0f}%"
        lines.append(
            f"  {row.name:38s} {row.milliseconds:9.3f} ms {row.host_milliseconds:9.3f} ms {ratio:>8s} {fraction:>15s}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, name: str) -> None:
    """Horizontal bars of the time of each entry, one panel per case."""
    pyplot = plots.pyplot()
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 0.8 + 2.2 * len(cases)), squeeze=False)
    for panel, key in zip(panels[:, 0], cases, strict=True):
        chosen = [row for row in rows if row.case == key][::-1]
        panel.barh(
            [r.name for r in chosen], [r.milliseconds for r in chosen], color=[plots.COLOURS[r.role] for r in chosen]
        )
        panel.set_title(", ".join(key), fontsize=9, loc="left")
        panel.set_xlabel("milliseconds", fontsize=8)
        panel.tick_params(labelsize=8)
    figure.suptitle(name)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
