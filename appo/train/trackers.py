"""Services that keep the numbers and rollouts of runs (`trackers`), through accelerate's."""

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from appo.config import APPOConfig, ConfigError

Table = tuple[list[str], list[list[Any]]]  # names of columns, rows


def check_trackers(config: APPOConfig) -> None:
    """Raise ConfigError for a tracker whose package is not there; before anything is loaded."""
    there = [str(name) for name in get_available_trackers()]
    for name in config.trackers:
        if name not in there:
            raise ConfigError(f"`trackers`: {name} cannot be imported. Install it, or take it out of the settings.")


def start_trackers(accelerator: Accelerator, config: APPOConfig, output: Path, step: int) -> list[GeneralTracker]:
    """The trackers of a run that goes on after ``step``, in the main process; none in the others.

    A run is called as its folder is, in the project ``config.project``. One that goes on is the same run there (with
    MLflow another of that name).
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return []
    kept = output / ".tracker-run"
    if step == 0 or not kept.is_file():
        kept.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    name, run = output.name, kept.read_text(encoding="utf-8").strip()
    accelerator.init_trackers(
        config.project,
        config={
            name: value if isinstance(value, (int, float)) else str(value) for name, value in config.public().items()
        },
        init_kwargs={
            "wandb": {"name": name, "id": run, "resume": "allow", "dir": str(output)},
            "trackio": {"name": f"{name}-{run[:4]}", "resume": "allow"},
            "swanlab": {"experiment_name": name, "id": run, "resume": "allow", "logdir": str(output / "swanlab")},
            "mlflow": {"run_name": name},
        },
    )
    return list(accelerator.trackers)


def log_numbers(trackers: Sequence[GeneralTracker], prefix: str, values: Mapping[str, float], step: int) -> None:
    for tracker in trackers:
        # MLflow's store of files has no place for a name that others begin with, such as "reward" of "reward/format".
        joint = "." if tracker.name == "mlflow" else "/"
        tracker.log({f"{prefix}/{name.replace('/', joint)}": value for name, value in values.items()}, step=step)


def log_table(trackers: Sequence[GeneralTracker], name: str, table: Table, step: int) -> None:
    """Hand a table to the trackers that show one; the others have the numbers alone."""
    columns, rows = table
    for tracker in trackers:
        if hasattr(tracker, "log_table"):
            tracker.log_table(name, columns=columns, data=rows, step=step)


def rollout_table(sample: Mapping[str, Any]) -> Table:
    """A line of samples.jsonl as a table with a row for each response."""
    columns = ["record", "question", "answer", "response", "reward", "accuracy", "tokens", "mean weight"]
    rows = []
    for one in sample["completions"]:
        weights = one["weights"] or [1.0] * len(one["tokens"])
        mean = sum(weights) / max(1, len(weights))
        about = [str(sample["id"]), sample["question"], str(sample["answer"]), one["text"]]
        rows.append([*about, one["reward"], one["accuracy"], len(one["tokens"]), mean])
    return columns, rows


def as_markdown(table: Table) -> str:
    """A table for TensorBoard."""
    columns, rows = table
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
