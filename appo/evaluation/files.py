"""The records of a benchmark from a local copy of it."""

from pathlib import Path

from appo.constraints import ConfigError, suggestion
from appo.data.load import load_records
from appo.data.records import DataError, Record
from appo.evaluation.benchmark import Benchmark
from appo.evaluation.catalog import BENCHMARKS


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name. Raises ConfigError with the names there are."""
    if name not in BENCHMARKS:
        expected = f"expected one of {', '.join(BENCHMARKS)}"
        raise ConfigError(f"`benchmark`: {expected}, got {name!r}.{suggestion(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def read_benchmark(
    benchmark: Benchmark,
    data: str | Path,
    *,
    data_root: str | Path | None = None,
    limit: int | None = None,
    allow_outside: bool = False,
) -> list[Record]:
    """All records of the benchmark in ``data``, one of its files or the folder they are in, in the order of the files.

    data_root: the folder that media paths start from; ``data`` itself where that is a folder, else the file's. limit:
    the first so many of each file. Raises DataError where none of the benchmark's files are there, or records are not
    its own.
    """
    data = Path(data)
    files = _files(benchmark, data) if data.is_dir() else [data]
    root = data_root if data_root is not None else data if data.is_dir() else None
    records: list[Record] = []
    for file in files:
        records += load_records(file, data_root=root, limit=limit, allow_outside=allow_outside)
    benchmark.check(records)
    return records


def _files(benchmark: Benchmark, folder: Path) -> list[Path]:
    for line in benchmark.files:
        found = sorted({path for pattern in line.split() for path in folder.glob(pattern) if path.is_file()})
        if found:
            return found
    raise DataError(
        f"{folder}: expected the files of {benchmark.title}, {', or '.join(benchmark.files)}, got none of them. Pass "
        "the folder that holds them, or one file."
    )
