"""Reading what a training run left in its folder, finished or not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.constraints import ConfigError
from appo.yaml_files import read_yaml

LAST_STEP = 1 << 53  # larger ones have no place of their own on an axis
FILES = ("config.yaml", "metrics.jsonl", "eval.jsonl", "samples.jsonl")


class ReportError(ValueError):
    """A folder or file that cannot be reported on: the message names it, what was expected and what came."""


@dataclass(frozen=True)
class Run:
    """One run folder. metrics, evaluations, samples: one dictionary per line of the file, in the order of steps."""

    folder: Path
    label: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    @property
    def method(self) -> str:
        """The algorithm by its usual name: APPO, DAPO, VPPO, ...; of a rule FILE.py:NAME its name.

        Empty where the run has no settings.
        """
        if not self.config:
            return ""
        name = str(self.config.get("method", "appo"))
        if name != "grpo":
            return name.rpartition(":")[2] if ".py:" in name else name.upper()
        if self.config.get("attention_coef"):
            return "RAL"
        name = "DAPO" if self.config.get("dynamic_sampling") else "GRPO"
        share = self.config.get("entropy_share", 1.0)
        return name if share == 1 else f"{name}, {share:.0%} of tokens"

    @property
    def step(self) -> int:
        """The last finished step; 0 before the first."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def finished(self) -> bool:
        return self.max_steps is not None and self.step >= self.max_steps

    @property
    def max_steps(self) -> int | None:
        steps: Any = self.config.get("max_steps")
        return int(steps) if is_number(steps) else None

    def series(self, *names: str) -> tuple[list[int], list[float]]:
        """Steps and values of the first of ``names`` that the run logged; steps that lack it are left out."""
        for name in names:
            found = [(line["step"], line[name]) for line in self.metrics if is_number(line.get(name))]
            if found:
                steps, values = zip(*found, strict=True)
                return list(steps), list(values)
        return [], []

    @property
    def splits(self) -> list[str]:
        """The held-out splits, in the order in which they were first evaluated."""
        return list(dict.fromkeys(str(line.get("split", "")) for line in self.evaluations))

    def of_split(self, split: str) -> list[dict[str, Any]]:
        return [line for line in self.evaluations if str(line.get("split", "")) == split]

    def evaluation_series(self, name: str, split: str | None = None) -> tuple[list[int], list[float]]:
        """Steps and values of an evaluation on ``split``, or else on the split that was evaluated first."""
        lines = self.of_split(split if split is not None else self.splits[0]) if self.splits else []
        found = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, *names: str, window: int = 10) -> float | None:
        """Mean of the last ``window`` logged values; None where the run did not log it."""
        values = self.series(*names)[1][-window:]
        return sum(values) / len(values) if values else None


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Raises ReportError for no folders, a folder that is not a run, or a file that does not parse."""
    if not folders:
        raise ReportError("report: `runs`: expected at least one run folder, got none.")
    paths = [Path(folder) for folder in folders]
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _read_run(folder: Path, label: str) -> Run:
    if not folder.is_dir():
        raise ReportError(f"{folder}: expected a run folder, got no such folder. Pass the `output` of a training run.")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ReportError(
            f"{folder}: expected a run folder with {', '.join(FILES)}, got one with {inside}. "
            "Pass the `output` of a training run."
        )
    metrics, evaluations, samples = (_read_lines(folder / name) for name in FILES[1:])
    return Run(folder, label, _read_config(folder / "config.yaml"), metrics, evaluations, samples)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{path}: ")
        expected = "" if reason.startswith("expected") else "expected YAML, got text that does not parse: "
        raise ReportError(f"{path}: {expected}{reason}") from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that may not exist yet; a last line that is still being written is left out."""
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ReportError(f"{path}: cannot be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of more digits than Python reads
            if number == len(lines):
                break
            raise ReportError(f"{path}: line {number}: expected JSON, got text that does not parse: {error}") from error
        step = value.get("step") if isinstance(value, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= LAST_STEP:
            raise ReportError(f"{path}: line {number}: expected an object with a whole `step`, got {line[:80]!r}.")
        found.append(value)
    return found


def _labels(paths: list[Path]) -> list[str]:
    """The names of the folders, with as many parents as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while depth < max(map(len, parts)) and len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def is_number(value: Any) -> bool:
    """True for a JSON value that is a finite number, which can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
