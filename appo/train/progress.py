"""A progress bar with the three numbers that matter: accuracy, entropy and seconds per step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[int, dict[str, float]], None]


@contextmanager
def training_progress(total: int, done: int, *, enabled: bool = True) -> Iterator[Show]:
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("accuracy {task.fields[accuracy]}  entropy {task.fields[entropy]}  {task.fields[seconds]} s/step"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not enabled) as progress:
        task = progress.add_task("train", total=total, completed=done, accuracy="-", entropy="-", seconds="-")

        def show(step: int, metrics: dict[str, float]) -> None:
            progress.update(
                task,
                completed=step,
                accuracy=f"{metrics['accuracy']:.2f}",
                entropy=f"{metrics['entropy']:.2f}",
                seconds=f"{metrics['time/step']:.1f}",
            )

        yield show
