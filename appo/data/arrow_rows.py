"""Rows of Parquet files and of folders that Hugging Face datasets wrote, mapped into memory. Needs pyarrow."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo.data.cache import cached
from appo.data.records import DataError


def is_arrow_folder(path: Path) -> bool:
    """Whether a folder holds what `ArrowRows` reads."""
    names = ("state.json", "dataset_dict.json", "dataset_info.json")
    return any((path / name).is_file() for name in names) or any(path.glob("*.parquet"))


class ArrowRows:
    """Rows of a .parquet or .arrow file, a folder of .parquet files, or a folder of `datasets.save_to_disk`.

    Parquet is written once as Arrow (see `appo.data.cache`), since a single row cannot be read out of it.
    """

    text = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.table = self._open()

    def _open(self) -> Any:
        pa = _pyarrow(self.path)
        try:
            return pa.concat_tables([_table(pa, part) for part in _parts(self.path)], promote_options="default")
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: expected Parquet or Arrow, got a file that does not read: {error}."
            ) from error

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def index(self, row: int) -> int:
        return row

    def read(self, row: int) -> Any:
        return self.table.slice(row, 1).to_pylist()[0]

    def scan(self) -> Iterator[tuple[int, Any]]:
        """Rows with True in place of the bytes of files: a file of images is gone through without reading them."""
        pa = _pyarrow(self.path)
        index = 0
        # A mapping of its own: pages that were gone through do not count as this process's memory afterwards.
        for batch in self._open().to_batches(max_chunksize=1000):
            light = {name: _without_bytes(pa, batch.column(name)) for name in batch.schema.names}
            for row in pa.table(light).to_pylist():
                yield index, row
                index += 1
        pa.default_memory_pool().release_unused()


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
        splits = json.loads((path / "dataset_dict.json").read_text()).get("splits", [])
        raise DataError(
            f"{path}: expected one split, got a folder of {', '.join(splits)}. Name one of them, {path / 'SPLIT'}."
        )
    if (path / "state.json").is_file():
        files = json.loads((path / "state.json").read_text()).get("_data_files", [])
        return [path / file["filename"] for file in files]
    return sorted(path.glob("*.parquet")) or sorted(path.glob("*.arrow"))


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

    file = pyarrow.parquet.ParquetFile(path)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, file.schema_arrow) as writer:
        for batch in file.iter_batches(batch_size=1000):
            writer.write_batch(batch)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise DataError(f"{path}: Parquet and Arrow need pyarrow. Install it with: pip install pyarrow") from error
    return pyarrow
