"""Records of a run: metrics, evaluations and samples as JSON lines, as TensorBoard events, and for trackers."""

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from torch import Tensor

from appo.process_memory import peak_resident_bytes
from appo.train.trackers import as_markdown, log_numbers, log_table, rollout_table

FILES = ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "heads.jsonl", "broken.jsonl")


class Meter:
    """Numbers of a step, over micro-batches and processes: weighted means, totals (over micro-batches), and maxima."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [sum of value x weight, sum of weights]
        self._maxima: dict[str, float] = {}

    def add(self, name: str, value: float | Tensor, weight: float = 1.0) -> None:
        """Enter a value into a mean; NaN, a number not known here (a reward that does not apply), is left out."""
        value = float(value)
        if weight > 0 and not math.isnan(value):
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] += value * weight
            entry[1] += weight

    def total(self, name: str, value: float) -> None:
        """Enter a value into the sum of this process; over processes it is a mean."""
        self._sums.setdefault(name, [0.0, 1.0])[0] += value

    def maximum(self, name: str, value: float | Tensor) -> None:
        self._maxima[name] = max(float(value), self._maxima.get(name, -math.inf))

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Enter the seconds that the body takes into a sum, the work it leaves to the device included."""
        waits = device.type == "cuda"
        if waits:
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if waits:
            torch.cuda.synchronize()
        self.total(name, time.perf_counter() - start)

    def means(self) -> dict[str, float]:
        """The numbers of this process."""
        return {name: total / weight for name, (total, weight) in self._sums.items()} | self._maxima

    def weighted(self) -> dict[str, tuple[float, float]]:
        """(mean, weight) of each mean of this process."""
        return {name: (total / weight, weight) for name, (total, weight) in self._sums.items()}

    def result(self, accelerator: Accelerator) -> dict[str, float]:
        """The numbers of all processes together; every process must call it."""
        if accelerator.num_processes == 1:
            return self.means()
        joined = Meter()
        for sums, maxima in gather_object([(self._sums, self._maxima)]):
            joined._join(sums, maxima)
        return joined.means()

    def take_over(self, other: "Meter") -> None:
        """Enter the numbers of another meter of this process."""
        self._join(other._sums, other._maxima)

    def _join(self, sums: dict[str, list[float]], maxima: dict[str, float]) -> None:
        for name, (total, weight) in sums.items():
            self.add(name, total / weight, weight)
        for name, value in maxima.items():
            self.maximum(name, value)


class RunLog:
    """Appends to the files of a run folder. Only the main process writes."""

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool,
        enabled: bool = True,
        resume_step: int = 0,
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        self.folder, self.enabled, self.trackers = Path(folder), enabled, trackers
        self._writer: Any = None
        if not enabled:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            _truncate(self.folder / name, resume_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=resume_step + 1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._write("metrics.jsonl", {"step": step} | values)
        self._scalars("train", step, values)

    def evaluation(self, step: int, split: str, values: dict[str, float]) -> None:
        self._write("eval.jsonl", {"step": step, "split": split} | values)
        self._scalars(f"eval/{split}", step, values)

    def sample(self, step: int, value: dict[str, Any]) -> None:
        self._write("samples.jsonl", {"step": step} | value)
        if self.trackers:
            log_table(self.trackers, "rollouts", rollout_table(value), step)
        if self._writer is not None:
            self._writer.add_text("rollouts", as_markdown(rollout_table(value)), step)

    def heads(self, step: int, value: dict[str, Any]) -> None:
        self._write("heads.jsonl", {"step": step} | value)

    def broken(self, step: int, records: Iterable[dict[str, Any]]) -> None:
        """Records that were skipped because their media cannot be read (`on_broken: skip`)."""
        for record in records:
            self._write("broken.jsonl", {"step": step} | record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for tracker in self.trackers:
            tracker.finish()

    def _write(self, name: str, value: dict[str, Any]) -> None:
        if self.enabled:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(value, ensure_ascii=False) + "\n")

    def _scalars(self, prefix: str, step: int, values: dict[str, float]) -> None:
        log_numbers(self.trackers, prefix, values, step)
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, step)
            self._writer.flush()


def _truncate(path: Path, step: int) -> None:
    """Drop the lines after ``step``, which a resumed run writes again (and a line cut short by a crash)."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            kept.append(line)
    partial = path.with_name("." + path.name)
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this process so far, in GiB: the allocator's on CUDA, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30
