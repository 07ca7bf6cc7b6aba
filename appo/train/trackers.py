"""Services that keep the numbers and rollouts of runs (`trackers`), through accelerate's."""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers

from appo.config import APPOConfig, ConfigError

logger = logging.getLogger("appo")

IDS = ".trackers.json"  # in the run folder
# Services that name runs themselves -> the id that a tracker's run was given.
GIVEN: dict[str, Callable[[Any], str]] = {
    "mlflow": lambda tracker: str(tracker.tracker.info.run_id),
    "aim": lambda tracker: str(tracker.tracker.hash),
    "clearml": lambda tracker: str(tracker.tracker.id),
}
Table = tuple[list[str], list[list[Any]]]  # names of columns, rows


def check_trackers(config: APPOConfig) -> None:
    """Raise ConfigError for a tracker whose package is not there; before anything is loaded."""
    there = [str(name) for name in get_available_trackers()]
    for name in config.trackers:
        if name not in there:
            raise ConfigError(f"`trackers`: {name} cannot be imported. Install it, or take it out of the settings.")


def start_trackers(accelerator: Accelerator, config: APPOConfig, output: Path, step: int) -> list[GeneralTracker]:
    """The trackers of a run that goes on after ``step``, in the main process; none in the others.

    A run is called as its folder is, in the project ``config.project``. One that goes on is the same run there, by ids
    in the run folder: ours where a service takes one, else the one that it gave.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return []
    kept = output / IDS
    ids: dict[str, str] = {}
    if step and kept.is_file():
        ids = json.loads(kept.read_text(encoding="utf-8"))
    before = _known_to_mlflow(ids) if "mlflow" in config.trackers else None
    ids.setdefault("run", uuid.uuid4().hex)
    accelerator.init_trackers(config.project, init_kwargs=_arguments(output, ids))
    settings = {
        name: value if isinstance(value, (int, float)) else str(value) for name, value in config.public().items()
    }
    for tracker in accelerator.trackers:
        if tracker.name == "clearml" and "clearml" in ids:
            tracker.tracker.set_initial_iteration(0)  # steps are counted from the start of the run, not of the process
        if tracker.name in GIVEN and (given := GIVEN[tracker.name](tracker)):
            ids[tracker.name] = given
        # MLflow refuses another value of a setting that it has.
        stored = before if before is not None and tracker.name == "mlflow" else ()
        tracker.store_init_configuration({name: value for name, value in settings.items() if name not in stored})
    kept.write_text(json.dumps(ids), encoding="utf-8")
    return list(accelerator.trackers)


def _arguments(output: Path, ids: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What each service is started with: the name of the run, and the id of one that goes on."""
    name, run = output.name, ids["run"]
    return {
        "wandb": {"name": name, "id": run[:16], "resume": "allow", "dir": str(output)},
        "trackio": {"name": f"{name}-{run[:4]}", "resume": "allow"},
        "swanlab": {"experiment_name": name, "id": run[:16], "resume": "allow", "logdir": str(output / "swanlab")},
        "comet_ml": {"experiment_key": run, "mode": "get_or_create"},
        "mlflow": {"run_name": name} | ({"run_id": ids["mlflow"]} if "mlflow" in ids else {}),
        "aim": {"run_hash": ids["aim"]} if "aim" in ids else {},
        "clearml": {"task_name": name} | ({"continue_last_task": ids["clearml"]} if "clearml" in ids else {}),
    }


def _known_to_mlflow(ids: dict[str, str]) -> set[str] | None:
    """Names of the settings that MLflow has of the run that goes on; None, and its id forgotten, where it has no such
    run, as with another tracking URI."""
    if "mlflow" not in ids:
        return None
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        found = MlflowClient().get_run(ids["mlflow"])
    except MlflowException as error:
        logger.warning("MLflow has no run %s to go on with (%s): it gets another", ids.pop("mlflow"), error)
        return None
    return set(found.data.params)


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
