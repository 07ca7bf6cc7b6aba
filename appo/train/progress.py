"""A progress bar with the three numbers that matter: accuracy, entropy and seconds per step."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Metrics that are shown as totals, once there is one.
COUNTED = {"records/broken": "broken records", "updates/nonfinite": "updates not finite"}

Show = Callable[[int, dict[str, float]], None]


@contextmanager
def training_progress(total: int, done: int, *, enabled: bool = True) -> Iterator[Show]:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn(
            "accuracy {task.fields[accuracy]}  entropy {task.fields[entropy]}  {task.fields[seconds]} s/step"
            "{task.fields[more]}"
        ),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("train", total=total, completed=done, accuracy="-", entropy="-", seconds="-", more="")

        counts = dict.fromkeys(COUNTED, 0.0)  # since the run was started or went on

        def show(step: int, metrics: dict[str, float]) -> None:
            for name in counts:
                counts[name] += metrics.get(name, 0.0)
            progress.update(
                task,
                completed=step,
                accuracy=f"{metrics['accuracy']:.2f}",
                entropy=f"{metrics.get('entropy', math.nan):.2f}",
                seconds=f"{metrics['time/step']:.1f}",
                more="".join(f"  {COUNTED[name]} {count:.0f}" for name, count in counts.items() if count),
            )

        yield show
