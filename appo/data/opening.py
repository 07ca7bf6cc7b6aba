"""A file of records opened: its rows, and how one of them becomes a record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from appo.data.fields import shown
from appo.data.formats import parse_record
from appo.data.records import DataError, Record
from appo.data.rows import Rows, open_rows


class Source(NamedTuple):
    """A file of records and how it is read; `appo.data.load.load_records` has the meaning of each."""

    path: Path
    data_root: Path | None = None
    seed: int = 0
    allow_outside: bool = False

    @property
    def root(self) -> Path:
        return self.path.parent if self.data_root is None else self.data_root

    def check_root(self) -> None:
        """Raise DataError for a data root that is not there; for those who open media next."""
        if not self.root.is_dir():
            raise DataError(f"`data_root`: no such folder: {self.root}. Paths start from the working directory.")


def open_records(source: Source) -> tuple[Rows, Callable[[Any, int], Record]]:
    """The rows of a file and how one of them becomes a record, for those who go through it themselves."""
    path = source.path
    try:
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise DataError(f"{shown(str(path))}: expected the path of a file of records: {error}.") from error
    if not exists:
        raise DataError(f"{path}: no such file. Pass the path of a .json or .jsonl file of records (docs/data.md).")
    try:
        rows = open_rows(path)
    except OSError as error:
        raise DataError(f"{path}: expected a file that can be read: {error}.") from error

    def parse(raw: Any, index: int) -> Record:
        if isinstance(raw, DataError):
            raise raw
        return parse_record(
            raw,
            file=path,
            index=index,
            root=source.root,
            seed=source.seed,
            allow_outside=source.allow_outside,
            text_only=rows.text,
            tabular=rows.tabular,
        )

    return rows, parse
