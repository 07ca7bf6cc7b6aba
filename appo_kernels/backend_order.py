"""The order in which "auto" asks backends, by operator, dtype, architecture and size: one table.

`TABLE` is what instruction counts say (docs/cuda.md); no GPU has been asked yet. A machine's own measurements stand
before it: `python -m benchmarks.gpu` writes them as <GPU>.order.csv, and the environment variable APPO_BACKEND_ORDER
names such a file, with the columns of `Rule`; backends of its ``order`` are separated by blanks, an empty
``most_scores`` is no limit. `python -m appo_kernels.doctor` prints the rules in the order in which they are tried.
"""

import csv
import functools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BACKENDS = ("cuda", "triton", "torch")
FILE = "APPO_BACKEND_ORDER"
COLUMNS = ("operator", "dtype", "architecture", "most_scores", "order")


@dataclass(frozen=True)
class Rule:
    """The first that fits a call gives its order; backends that it does not name come last."""

    operator: str  # as `appo_kernels.ops` has it, or *
    dtype: str  # bfloat16, ..., or *
    architecture: str  # 9.0, 9 for all 9.x, gpu, cpu, or *
    most_scores: float  # sequences x query heads x rows x keys of attention; inf: any, and where they are not known
    order: tuple[str, ...]

    def fits(self, operator: str, dtype: torch.dtype, architecture: str, scores: int) -> bool:
        places = ("*", architecture, architecture.split(".")[0], "cpu" if architecture == "cpu" else "gpu")
        return (
            self.operator in ("*", operator)
            and self.dtype in ("*", str(dtype).removeprefix("torch."))
            and self.architecture in places
            and (math.isinf(self.most_scores) or 0 < scores <= self.most_scores)
        )

    def __str__(self) -> str:
        most = "any size" if math.isinf(self.most_scores) else f"up to {self.most_scores:,.0f} scores"
        named = f"{self.operator:16s} {self.dtype:9s} {self.architecture:5s}"
        return f"{named} {most:32s} {', '.join(self.order)}"


# group_attention asks for no mass: the vendor's flash attention serves it. The kernels in csrc multiply with mma.sync;
# on 9.x and 10.x Triton has instructions of larger tiles, and its attention loops need fewer of them.
TABLE = (
    Rule("group_attention", "*", "gpu", math.inf, ("torch", "cuda", "triton")),
    Rule("frame_attention", "*", "9", math.inf, ("triton", "cuda", "torch")),
    Rule("frame_attention", "*", "10", math.inf, ("triton", "cuda", "torch")),
    Rule("frame_mass", "*", "9", math.inf, ("triton", "cuda", "torch")),
    Rule("frame_mass", "*", "10", math.inf, ("triton", "cuda", "torch")),
    Rule("*", "*", "*", math.inf, BACKENDS),
)


def architecture(device: torch.device) -> str:
    """The compute capability, "9.0"; "cpu" without one."""
    if device.type != "cuda":
        return "cpu"
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def rules() -> tuple[Rule, ...]:
    """Those of the file that APPO_BACKEND_ORDER names, then the table's."""
    path = os.environ.get(FILE)
    return (*read(Path(path)), *TABLE) if path else TABLE


def order(operator: str, dtype: torch.dtype, device: torch.device, scores: int = 0) -> tuple[str, ...]:
    """All backends, in the order in which they are asked. scores: of an attention call; 0 where not known."""
    place = architecture(device)
    rule = next(rule for rule in rules() if rule.fits(operator, dtype, place, scores))
    return (*rule.order, *(backend for backend in BACKENDS if backend not in rule.order))


@functools.lru_cache(maxsize=4)
def read(path: Path) -> tuple[Rule, ...]:
    """The rules of a file. Raises ValueError with the line of what is wrong."""
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(
                    f"{FILE}: {path}: expected the columns {','.join(COLUMNS)}, got {reader.fieldnames}. "
                    "python -m benchmarks.gpu writes such a file."
                )
            return tuple(_parsed(path, number, record) for number, record in enumerate(reader, 2))
    except OSError as error:
        raise ValueError(
            f"{FILE}: expected a file that can be read, got {path}: {error.strerror}. Unset it."
        ) from error


def _parsed(path: Path, number: int, record: dict[str, str]) -> Rule:
    names = tuple((record["order"] or "").split())
    if not names or len(set(names)) != len(names) or set(names) - set(BACKENDS):
        raise ValueError(
            f"{FILE}: {path}, line {number}: `order`: expected backends of {', '.join(BACKENDS)}, each once, "
            f"got {record['order']!r}."
        )
    try:
        most = float(record["most_scores"] or math.inf)
    except ValueError:
        most = 0.0
    if not most > 0.0:
        raise ValueError(
            f"{FILE}: {path}, line {number}: `most_scores`: expected a number above 0, or nothing for any size, "
            f"got {record['most_scores']!r}."
        )
    return Rule(record["operator"], record["dtype"], record["architecture"], most, names)


def write(path: Path, rules: Sequence[Rule]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for rule in rules:
            most = "" if math.isinf(rule.most_scores) else f"{rule.most_scores:.0f}"
            writer.writerow([rule.operator, rule.dtype, rule.architecture, most, " ".join(rule.order)])


def measured(operator: str, dtype: str, architecture: str, times: dict[int, dict[str, float]]) -> Iterator[Rule]:
    """Rules from times by size (scores) and backend, fastest first; a size's order holds half way to the next.

    Half way is the geometric mean of two neighbouring sizes whose orders differ; the last has no limit.
    """
    sizes = sorted(times)
    orders = [tuple(sorted(times[size], key=times[size].__getitem__)) for size in sizes]
    for i, (size, found) in enumerate(zip(sizes, orders, strict=True)):
        if i + 1 == len(sizes):
            yield Rule(operator, dtype, architecture, math.inf, found)
        elif orders[i + 1] != found:
            yield Rule(operator, dtype, architecture, math.sqrt(size * sizes[i + 1]), found)
