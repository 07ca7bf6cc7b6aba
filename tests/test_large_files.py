"""Large files of records: found by brackets and line ends, checked by several processes once, read when asked for."""

import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_loading import CHOICE
from test_loading import write as write_json

from appo.data import all_records, arrow_rows, json_rows, load, span_rows, structure
from appo.data.load import check_media, load_records
from appo.data.records import DataError

# What a file of records may be: lines, a list, a table of columns.
CONTAINERS = ("r.jsonl", "r.json", "r.parquet")


@pytest.fixture(autouse=True)
def every_file_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (span_rows, arrow_rows):
        monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setenv("APPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def three_processes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Three processes check a file, whatever its size and the machine; the requests that they were sent."""
    sent: list[Any] = []
    ask = all_records.Worker.ask

    def counted(self: Any, request: Any, seconds: float) -> Any:
        sent.append(request)
        return ask(self, request, seconds)

    monkeypatch.setattr(all_records, "SMALLEST_PART", 1)
    monkeypatch.setattr(all_records, "_cores", lambda: 3)
    monkeypatch.setattr(all_records.Worker, "ask", counted)
    return sent


def write(folder: Path, *records: Any, name: str = "records.json") -> Path:
    if not name.endswith("parquet"):
        return write_json(folder, *records, name=name)
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(list(records)), folder / name)
    return folder / name


@pytest.mark.parametrize("name", CONTAINERS)
def test_the_first_record_that_is_broken_is_named_wherever_it_is(
    tmp_path: Path, three_processes: list[Any], name: str
) -> None:
    """Also where parts of the file behind it, that other processes check, have broken ones of their own."""
    records = [CHOICE | {"problem_id": str(i)} for i in range(100)]
    for broken in (0, 34, 99):
        spoiled = [r | {"solution": f"no tags {i}"} if i >= broken else r for i, r in enumerate(records)]
        path = write(tmp_path, *spoiled, name=name)
        for _ in range(2):  # a failure is not kept
            with pytest.raises(DataError, match=rf"{name}: record {broken} .*`solution`: .* got 'no tags {broken}'"):
                load_records(path)
    path = write(tmp_path, *records, name=name)
    assert [record.id for record in load_records(path)] == [str(i) for i in range(100)]
    assert len(three_processes) == 3 * 7  # 3 broken ones twice, and the right one


@pytest.mark.parametrize("name", CONTAINERS)
def test_media_are_looked_for_by_several_processes(tmp_path: Path, three_processes: list[Any], name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.mp4").write_bytes(b"x")
    gone = {20: "gone/20.mp4", 50: "gone/50.mp4"}
    path = write(tmp_path, *(CHOICE | {"path": gone.get(i, "a/1.mp4")} for i in range(90)), name=name)
    with pytest.raises(DataError, match=r"record 20 .*gone/20.mp4.*does not exist.* 1 more media are missing"):
        check_media(load_records(path))
    check_media(load_records(path)[60:])
    assert len(three_processes) == 3 * 3


def test_a_process_that_dies_is_done_without(
    tmp_path: Path, three_processes: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("appo.data.worker.START", "import os; os._exit(9)")
    path = write(tmp_path, *(CHOICE | {"problem_id": i} for i in range(40)), name="r.jsonl")
    with caplog.at_level(logging.WARNING):
        assert len(load_records(path)) == 40
    assert "without a process of their own" in caplog.text


HOSTILE = ["", '"', "\\", '\\"', "[{", "}]", '"}, {"', "é", "\u2028", "😀", "\n", ",", "\\\\", "x" * 300]


# Windows of a few bytes: every string, escape and bracket is cut somewhere; and of many.
@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_items_of_a_list_and_lines_are_those_that_json_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, ascii_only: bool
) -> None:
    chance = random.Random(chunk)
    monkeypatch.setattr(structure, "CHUNK", chunk)

    def value(depth: int) -> Any:
        text, kind = "".join(chance.choices(HOSTILE, k=3)), chance.randrange(4) if depth else 0
        if kind < 2:
            return chance.random() if kind else text
        return {text: value(depth - 1)} if kind == 2 else [value(depth - 1) for _ in range(3)]

    items = [{"a": value(2), "".join(chance.choices(HOSTILE, k=2)): value(3)} for _ in range(12)]
    for number, layout in enumerate(({}, {"indent": 2}, {"separators": (" ,\r\n\t", ":")})):
        path = tmp_path / f"{number}.json"
        text = json.dumps(items, ensure_ascii=ascii_only, **layout)  # type: ignore[arg-type]
        for before in (b"", b"\xef\xbb\xbf  \n" if chunk > 7 else b"\xef\xbb\xbf"):
            path.write_bytes(before + text.encode() + b"\n ")
            rows = json_rows.JSONRows(path, path)
            assert rows.find() and [rows.read(row) for row in range(len(rows))] == items
    path = tmp_path / "r.jsonl"
    path.write_text("\ufeff\n \n" + "\n\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items) + "\r\n")
    found, read = (json_rows.LineRows(path, path) for _ in range(2))
    assert found.find() and [found.read(row) for row in range(len(found))] == items
    assert list(found.indices) == [index for index, _ in read.scan()]
    assert (found.starts, found.sizes) == (read.starts, read.sizes)


# What is no list of objects or lists and nothing else: the reader that decodes from the start says what is wrong.
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "[{}", "[{} {}]", "[{},,{}]", "[{},]", "[,{}]", "[{}, 1]", "[null]", "[{}] x", "[{}]]", '[{"}]',
     '[{"a": "\\"}]', "[{}, ']", "x[{}]", '{"data": [{}]}', "{}\n{}", "[{}]\x00", "[{}}", "[{]}"],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_other_files_are_left_to_the_reader_that_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int
) -> None:
    monkeypatch.setattr(structure, "CHUNK", chunk)
    path = tmp_path / "r.json"
    path.write_text(text)
    rows = json_rows.JSONRows(path, path)
    if rows.find():  # brackets that close, of another kind: the item itself does not parse
        assert text == "[{]}"
    with pytest.raises(DataError, match=r"r\.json: (record 0|expected)"):
        load_records(path)


def test_a_record_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (span_rows, json_rows):
        monkeypatch.setattr(module, "LARGEST", 1000)
    for name in ("r.jsonl", "r.json"):
        path = write(tmp_path, CHOICE, CHOICE | {"problem": "x" * 1000}, name=name)
        with pytest.raises(DataError, match="record 1: expected at most 1,000 bytes"):
            load_records(path)


def test_records_are_read_from_the_file_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("r.json", "r.jsonl"):
        path = write(
            tmp_path,
            *(CHOICE | {"problem_id": f"é{i}", "problem": "x" * (i * 37 % 4000 + 1)} for i in range(400)),
            name=name,
        )
        records = load_records(path)
        assert [record.id for record in records[::-7]] == [f"é{i}" for i in range(399, -1, -7)]
        assert records[3:5] == list(records)[3:5]
        path.write_text(path.read_text() + " ")
        with pytest.raises(DataError, match="one that has changed"):
            records[5]


def test_a_large_file_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    for name in CONTAINERS:
        path = write(tmp_path, *(CHOICE | {"problem_id": i // 2} for i in range(50)), name=name)
        first = list(load_records(path))
        with monkeypatch.context() as patch:
            patch.setattr(load, "check_all", None)
            caplog.clear()
            again = load_records(path)
            assert again == first and again[7:9] == first[7:9] and load_records(path, limit=3) == first[:3]
            assert "25 ids are given to more than one record" in caplog.text
            with pytest.raises(TypeError):
                load_records(path, data_root=tmp_path.parent)  # checked again: paths are judged by the root
        write(tmp_path, CHOICE | {"solution": "?"}, *(CHOICE for i in range(49)), name=name)
        for _ in range(2):
            with pytest.raises(DataError, match="record 0"):
                load_records(path)


@pytest.mark.parametrize("name", CONTAINERS)  # each has a way of its own to go through places
def test_a_file_that_one_process_checks_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "a").mkdir()
    for i in range(8):
        (tmp_path / f"a/{i}.mp4").touch()
    path = write(tmp_path, *(CHOICE | {"problem_id": str(i), "path": f"a/{i}.mp4"} for i in range(9)), name=name)
    monkeypatch.setattr(all_records, "open_records", None)
    records = load_records(path)
    assert records[:8].missing().count == records[2:5].missing().count == 0
    assert (records.missing().count, records[6:].missing().count) == (1, 1)
    # Looking through a part has not moved the places of the others.
    assert [record.id for record in records] == [str(i) for i in range(9)]


@pytest.mark.parametrize("name", CONTAINERS)  # each keeps what it has found in a way of its own
def test_what_is_known_of_a_large_file_is_not_written_again(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, CHOICE, CHOICE | {"problem_id": 18}, name=name)
    load_records(path)
    (kept,) = (tmp_path / "cache").rglob("*.npz")
    before = kept.stat()
    assert [record.id for record in load_records(path)] == ["17", "18"]
    assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("name", CONTAINERS)
def test_processes_that_load_a_large_file_together_check_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Threads in the place of processes: the lock is of a file either way."""
    path = write(tmp_path, *(CHOICE | {"problem_id": i} for i in range(50)), name=name)
    check, checks, start = load.check_all, [], threading.Barrier(4)

    def slowly(*arguments: Any) -> Any:
        checks.append(arguments)
        time.sleep(0.2)
        return check(*arguments)

    def read(_: int) -> Any:
        start.wait()
        return list(load_records(path))

    monkeypatch.setattr(load, "check_all", slowly)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(4)))
    assert len(checks) == 1 and all(records == found[0] for records in found) and len(found[0]) == 50


def test_a_list_inside_an_object_is_loaded_again(tmp_path: Path) -> None:
    """It has no places to keep: it is read whole each time."""
    path = tmp_path / "r.json"
    for count in (1, 5):
        path.write_text(json.dumps({"data": [CHOICE | {"problem_id": str(i)} for i in range(count)]}))
        for _ in range(2):
            assert [record.id for record in load_records(path)] == [str(i) for i in range(count)]
    check = load_records(path)
    with pytest.raises(DataError, match=r"does not exist.* 4 more media are missing"):
        check_media(check)


def test_lines_that_are_json_over_several_lines_are_refused_as_such(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps([CHOICE], indent=1))
    with pytest.raises(DataError, match=r"JSON over several lines\. Rename it to \.json"):
        load_records(path)
