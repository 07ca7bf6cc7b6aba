"""Rows of Parquet files and of folders that Hugging Face datasets wrote, mapped into memory. Needs pyarrow."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo.data.cache import cached
from appo.data.records import DataError
from appo.data.span_rows import LARGE

_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})(?:-[0-9a-f]+)?\.parquet")


def is_arrow_folder(path: Path) -> bool:
    """Whether a folder holds what `ArrowRows` reads."""
    names = ("state.json", "dataset_dict.json", "dataset_info.json")
    return any((path / name).is_file() for name in names) or any(path.glob("*.parquet"))


class ArrowRows:
    """Rows of a .parquet or .arrow file, a folder of .parquet files, or a folder of `datasets.save_to_disk`.

    Parquet is written once as Arrow (see `appo.data.cache`), since a single row cannot be read out of it.
    """

    text, tabular = False, True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = self._open()
        self.large = sum(part.stat().st_size for part in _parts(path)) > LARGE

    def _open(self) -> Any:
        pa = _pyarrow(self.path)
        tables, part = [], self.path
        try:
            for part in _parts(self.path):
                tables.append(_table(pa, part))
            part = self.path
            return pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{part}: expected Parquet or Arrow, got a file that does not read: {error}.") from error

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def index(self, row: int) -> int:
        return row

    def read(self, row: int) -> Any:
        return self._row(self.table.slice(row, 1), row)

    def find(self) -> bool:
        return True

    def places(self, begin: int, end: int) -> Any:
        return begin, end

    def fingerprint(self) -> str:
        return repr([(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in _parts(self.path)])

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Rows with True in place of the bytes of files: a file of images is gone through without reading them."""
        return self.scan_places((0, len(self)))

    def scan_places(self, places: Any) -> Iterator[tuple[int, Any]]:
        pa = _pyarrow(self.path)
        index, end = places
        # A mapping of its own: pages that were gone through do not count as this process's memory afterwards.
        for batch in self._open().slice(index, end - index).to_batches(max_chunksize=1000):
            light = {name: _without_bytes(pa, batch.column(name)) for name in batch.schema.names}
            yield from self._values(pa.table(light), index)
            index += batch.num_rows
        pa.default_memory_pool().release_unused()

    def _values(self, table: Any, first: int) -> Iterator[tuple[int, Any]]:
        try:
            yield from enumerate(table.to_pylist(), first)
        except _unreadable():
            for number in range(table.num_rows):
                yield first + number, self._row(table.slice(number, 1), first + number)

    def _row(self, table: Any, index: int) -> Any:
        """The only row of a table; a DataError where a value has no counterpart in Python."""
        values = {}
        for name in table.column_names:
            try:
                values[name] = table.column(name).to_pylist()[0]
            except _unreadable() as error:
                return DataError(f"{self.path}: record {index}: field `{name}`: expected text or a number: {error}.")
        return values


def _unreadable() -> tuple[type[Exception], ...]:
    """Errors that pyarrow raises for text that is not UTF-8, and for times that Python cannot hold."""
    import pyarrow

    return ValueError, OverflowError, pyarrow.ArrowException


def _without_bytes(pa: Any, column: Any) -> Any:
    """Binary values, alone, in structs and in lists, as whether there are any."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column.is_valid()
    if pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        children = [_without_bytes(pa, child) for child in column.flatten()]
        return pa.StructArray.from_arrays(children, names, mask=column.is_null())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        import pyarrow.compute as pc

        ends = pc.cumulative_sum(pc.list_value_length(column).fill_null(0).cast(pa.int32()))
        offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
        return pa.ListArray.from_arrays(offsets, _without_bytes(pa, column.flatten()))
    return column


def _parts(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = _described(path / "dataset_dict.json").get("splits", [])
        raise DataError(
            f"{path}: expected one split, got a folder of {', '.join(map(str, splits))}. Name one of them, "
            f"{path / 'SPLIT'}."
        )
    if (path / "state.json").is_file():
        files = _described(path / "state.json").get("_data_files")
        listed = files if isinstance(files, list) else []
        names = [str(file.get("filename") or ".") if isinstance(file, dict) else "." for file in listed]
        if not names or any(Path(name).name != name for name in names):
            raise DataError(f"{path / 'state.json'}: expected the names of files under _data_files, got {files!r}.")
        return [path / name for name in names]
    return _one_split(path, sorted(path.glob("*.parquet"))) or sorted(path.glob("*.arrow"))


def _described(path: Path) -> dict[str, Any]:
    """The object that a JSON file of `datasets` holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON that datasets' save_to_disk wrote: {error}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object that datasets' save_to_disk wrote, got {type(found).__name__}.")
    return found


def _one_split(folder: Path, parts: list[Path]) -> list[Path]:
    """``parts``, which must be all of one split where they are named as on the Hugging Face hub."""
    shards = [match for part in parts if (match := _SHARD.fullmatch(part.name))]
    splits = sorted({match["split"] for match in shards})
    if len(splits) > 1:
        raise DataError(
            f"{folder}: expected the files of one split, got {', '.join(splits)}. Name one of the files, or put those "
            "of a split into a folder of their own."
        )
    if shards and len(shards) != int(shards[0]["count"]):
        raise DataError(
            f"{folder}: expected {int(shards[0]['count'])} files {splits[0]}-*-of-{shards[0]['count']}*.parquet, got "
            f"{len(shards)}. Fetch the others too, or name one of them."
        )
    return parts


def _table(pa: Any, path: Path) -> Any:
    """The rows of one file, without reading them."""
    if path.suffix.lower() == ".parquet":
        path = cached(path, ".arrow", lambda target: _write_arrow(pa, path, target))
    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()


def _write_arrow(pa: Any, path: Path, target: Path) -> None:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # not a row group at a time
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, file.schema_arrow) as writer:
        for batch in file.iter_batches(batch_size=1000):
            writer.write_batch(batch)
    pa.default_memory_pool().release_unused()


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: Parquet and Arrow need pyarrow. Install it with: pip install pyarrow") from error
    return pyarrow
