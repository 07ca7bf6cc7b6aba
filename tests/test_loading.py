"""Files of records: every container gives the same records, lazily; hostile text is refused by record and field."""

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from appo.data.load import check_media, load_records
from appo.data.records import DataError

CHOICE = {
    "problem_id": 17,
    "problem": "Which object did the person pick up first?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. The cup.", "B. The book."],
    "solution": "<answer>B</answer>",
    "path": "./a/1.mp4",
    "duration": 4.0,
}
NUMBER = CHOICE | {"problem_type": "numerical", "solution": "<answer>3.5</answer>", "problem_id": "n"}


def write(folder: Path, *records: Any, name: str = "records.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(list(records)))
    return path


def load_one(folder: Path, record: Any, **options: Any) -> Any:
    return load_records(write(folder, record), **options)[0]


def refused(folder: Path, text: str | bytes, name: str) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as caught:
        load_records(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "solution", "answer"),
    [
        # What is no letter is the text of an option, whatever letter it begins with.
        (["a cat", "a dog"], "A dog", "B"),
        (["a cat", "a dog"], "a cat.", "A"),
        (["because", "all of it"], "all of it", "B"),
        (["a cat", "a dog"], "B", "B"),
        (["a) cat", "b) dog"], "b", "B"),
        (["(A) cat", "(B) dog"], "(B) dog", "B"),
        (["A. never", "B. always"], "B always", "B"),
        (["1", "2", "3"], "2", "B"),
        (["E. coli", "S. aureus"], "S. aureus", "B"),
        (["A", "B", "C"], "B", "B"),  # they stand in the picture
        (["A.", "B."], "B", "B"),
        (["（A） cat", "（B） dog"], "B", "B"),
        (["A - cat", "B - dog"], "dog", "B"),
        (["[A] cat", "[B] dog"], "B", "B"),
        (["A cat", "B dog"], "B", "B"),
        (["A dog", "A cat"], "A cat", "B"),
        (["B dog", "A cat"], "B", None),
        (["B", "A"], "B", None),
        (["1. cat", "2. dog"], "2", None),
        (["A.", "B. dog"], "B", None),
        (["A. B", "B. C"], "B", None),  # B, or the text of A?
        (["B. y", "A. x"], "B", None),
        (["B. y", "C. z"], "B", None),
        (["a cat", "a dog"], "B. a cat", None),
        (["a cat", "a dog"], "A bird", None),
        (["a cat", "A  Cat."], "A", None),
        (["A. x", "y"], "A", None),
    ],
)
def test_a_label_is_the_option_that_it_names_or_an_error(
    tmp_path: Path, options: list, solution: str, answer: Any
) -> None:
    record = CHOICE | {"options": options, "solution": f"<answer>{solution}</answer>"}
    if answer is None:
        with pytest.raises(DataError, match=r"field `(options|solution)`: expected"):
            load_one(tmp_path, record)
    else:
        assert load_one(tmp_path, record).answer == answer


# No number, a unit, a float too large, infinity, a variable, two numbers, more digits than a float has.
@pytest.mark.parametrize("kind", ["numerical", "regression"])
@pytest.mark.parametrize("truth", ["NaN", "a lot", "25 m^2", "1e999", "inf", "x", "3 or 4", "9" * 400])
def test_truths_that_no_answer_can_equal_are_refused_at_load(tmp_path: Path, kind: str, truth: str) -> None:
    with pytest.raises(DataError, match="field `solution`: expected a finite number, got"):
        load_one(tmp_path, NUMBER | {"problem_type": kind, "solution": f"<answer>{truth}</answer>"})


def test_a_fraction_is_a_number_to_math_verify_and_not_to_regression(tmp_path: Path) -> None:
    assert load_one(tmp_path, NUMBER | {"solution": "<answer>1/2</answer>"}).answer == "1/2"
    with pytest.raises(DataError, match="solution"):
        load_one(tmp_path, NUMBER | {"problem_type": "regression", "solution": "<answer>1/2</answer>"})


LINE = json.dumps(CHOICE)
# The field at fault, and a line with it.
HOSTILE = {
    "nested": ("problem", '{"problem": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested a little": ("time_spans", LINE[:-1] + ', "time_spans": ' + "[" * 300 + "]" * 300 + "}"),
    "digits": ("problem_id", LINE.replace("17", "1" * 5000)),
    "digits within a list": ("time_spans", LINE[:-1] + ', "time_spans": [[1, ' + "9" * 5000 + "]]}"),
    "huge number": ("duration", LINE.replace("4.0", "1" + "0" * 400)),
    "infinite": ("duration", LINE.replace("4.0", "1e999")),
    "NaN": ("duration", LINE.replace("4.0", "NaN")),
    "Infinity": ("duration", LINE.replace("4.0", "-Infinity")),
    "twice": ("problem", LINE[:-1] + ', "problem": "another?"}'),
    "surrogate": ("problem", LINE.replace("Which", "\\ud800")),
    "surrogate in a list": ("options", LINE.replace("The cup", "\\udfff")),
    "long path": ("path", LINE.replace("./a/1.mp4", "a/" * 2500 + "1.mp4")),
    "long name": ("path", LINE.replace("./a/1.mp4", "a" * 300 + ".mp4")),
    "NUL in a path": ("path", LINE.replace("./a/1.mp4", "a\\u0000.mp4")),
    "url": ("path", LINE.replace("./a/1.mp4", "https://host/1.mp4")),
    "parent": ("path", LINE.replace("./a/1.mp4", "../../../etc/passwd")),
    "hidden parent": ("path", LINE.replace("./a/1.mp4", "a/../../1.mp4")),
    "absolute": ("path", LINE.replace("./a/1.mp4", "/etc/passwd")),
    "file url": ("path", LINE.replace("./a/1.mp4", "file:///etc/passwd")),
    "span beyond": ("time_spans", LINE[:-1] + ', "time_spans": [[90, 95]]}'),
    "flat span": ("time_spans", LINE[:-1] + ', "time_spans": [1, 2]}'),
    "same options": ("options", LINE.replace("The book", "the  cup")),
    "source a list": ("data_source", LINE[:-1] + ', "data_source": [1]}'),
    "task an object": ("task", LINE[:-1] + ', "task": {"a": 1}}'),
    "seen a text": ("seen", LINE[:-1] + ', "seen": "red"}'),
    "many tags": ("solution", LINE.replace("<answer>B</answer>", "<answer>" * 12_500)),
    "end before start": ("end", LINE[:-1] + ', "start": 3, "end": 2}'),
    "start a text": ("start", LINE[:-1] + ', "start": "now"}'),
}


@pytest.mark.parametrize(("field", "line"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.timeout(60)
def test_hostile_records_name_file_record_and_field(tmp_path: Path, field: str, line: str) -> None:
    for name, text in (("x.jsonl", f"{LINE}\n{line}"), ("x.json", f"[{LINE}, {line}]")):
        message = refused(tmp_path, text, name)
        assert re.search(rf"record 1\b.*field `{field}`: expected ", message), message
        assert len(message) < 1500


WRONG = [None, True, -1, 0, 1.5, "", " ", [], {}, [None], [[]], {"a": None}, "x" * 100_000, [1, "a"], 10**30, [True]]


@pytest.mark.parametrize("field", [*CHOICE, "time_spans", "grounding", "task", "seen", "data_source", "start", "fps"])
def test_a_value_of_any_type_in_any_field_is_read_or_refused_by_name(tmp_path: Path, field: str) -> None:
    for value in WRONG:
        path = write(tmp_path, CHOICE | {field: value})
        try:
            record = load_records(path)[0]
        except DataError as error:
            assert str(error).startswith(f"{path}: record 0"), error
        else:
            hash(record.key)
            assert isinstance(record.question, str)


@pytest.mark.parametrize(
    "text", ["[" + LINE, "[" + LINE + LINE + "]", "[" + LINE + ",]", "[" + LINE + "] []", "{", "[{]"]
)
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    assert "expected JSON, got text that does not parse" in refused(tmp_path, text, "x.json")


def test_containers_give_the_same_records(tmp_path: Path) -> None:
    rows = [CHOICE, NUMBER, CHOICE | {"problem_id": "ü"}]
    expected = [(r.id, r.question, r.answer, r.options) for r in load_records(write(tmp_path, *rows))]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    files = {
        "lines.json": lines.encode(),
        "pretty.json": json.dumps(rows, indent=3).encode(),
        "bom.json": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode(),
        "crlf.jsonl": lines.replace("\n", "\r\n\r\n").encode(),
        "inside.json": json.dumps({"version": 1, "data": rows}).encode(),
        "packed.jsonl.gz": gzip.compress(lines.encode()),
        "packed.json.gz": gzip.compress(json.dumps(rows).encode()),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found = load_records(tmp_path / name)
        assert [(r.id, r.question, r.answer, r.options) for r in found] == expected, name
        assert [(r.id, r.question, r.answer, r.options) for r in reversed(found)] == expected[::-1], name


def test_parquet_and_folders_of_datasets(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [CHOICE | {"problem_id": str(i), "image": {"bytes": b"x" * i, "path": f"{i}.png"}} for i in range(1, 2500)]
    table = arrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    folder = tmp_path / "saved"
    folder.mkdir()
    with arrow.ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    for path in (tmp_path / "rows.parquet", folder):
        records = load_records(path, data_root=tmp_path)
        assert [len(records), records[1234].id, records[1234].answer] == [2499, "1235", "B"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"broken.parquet: expected Parquet"):
        load_records(tmp_path / "broken.parquet")


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        'id,question,answer,options,video,duration\n1,"Which,\nof these?",b,"[""a"", ""b""]",v.mp4,3.5\n'
        "2,How many?,3,,v.mp4,\n"
    )
    first, second = load_records(path)
    assert (first.question, first.options, first.answer, first.duration) == (
        "Which,\nof these?",
        ("A. a", "B. b"),
        "B",
        3.5,
    )
    assert (second.kind, second.answer, second.duration, second.id) == ("numerical", "3", None, "2")
    assert "expected 2 cells, as the header has, got 1" in refused(tmp_path, "question,answer\nx\n", "short.csv")
    assert "column names that differ" in refused(tmp_path, "a,a\n1,2\n", "twice.csv")


def test_equal_ids_are_reported_and_kept_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first, second, third = load_records(write(tmp_path, CHOICE, NUMBER, CHOICE))
    assert "1 ids are given to more than one record, such as '17' to records 0 and 2" in caplog.text
    assert len({first.key, second.key, third.key}) == 3
    caplog.clear()
    next_qa = {"qid": 6, "question": "why", "options": ["x", "y"], "answer": 0, "dataset_name": "nextqa"}
    load_records(write(tmp_path, next_qa | {"video_path": "1.mp4"}, next_qa | {"video_path": "2.mp4"}))
    assert not caplog.text


def test_broken_records_may_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, CHOICE, CHOICE | {"solution": "?"}, NUMBER)
    records = load_records(path, on_broken="skip")
    assert [record.meta["index"] for record in records] == [0, 2]
    assert "record 1" in caplog.text and "1 of 3 records cannot be used" in caplog.text


def test_media_stay_under_the_data_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        (folder / "1.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to(outside / "1.mp4")
    (root / "folder").symlink_to(outside)
    (root / "inner.mp4").symlink_to(root / "1.mp4")
    for path in ("link.mp4", "folder/1.mp4"):
        records = load_records(write(tmp_path, CHOICE | {"path": path}), data_root=root)
        with pytest.raises(DataError, match=r"field `path`: expected a file under .* a link that leaves it"):
            check_media(records)
        check_media(load_records(write(tmp_path, CHOICE | {"path": path}), data_root=root, allow_outside=True))
    for path in ("inner.mp4", "./1.mp4", "a/../1.mp4", str(root / "1.mp4")):
        (root / "a").mkdir(exist_ok=True)
        check_media(load_records(write(tmp_path, CHOICE | {"path": path}), data_root=root))
    record = CHOICE | {"path": str(outside / "1.mp4")}
    check_media(load_records(write(tmp_path, record), data_root=root, allow_outside=True))
