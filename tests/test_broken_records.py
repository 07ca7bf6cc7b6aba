"""One thing wrong with a record of any shape: an error that names it, never a question without its video."""

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_formats import CASES

from appo.data.formats import parse_record
from appo.data.load import load_records
from appo.data.records import DataError

SHAPES = {name: raw for name, (raw, expected) in CASES.items() if expected[4]}
SHAPES |= {
    "Video-R1": {
        "problem_id": 2, "problem": "What is shown?", "data_type": "video", "problem_type": "multiple choice",
        "options": ["A. a cup", "B. a book"], "solution": "<answer>A</answer>", "path": "./a/1.mp4", "data_source": "x",
    },
    "SEED-Bench-R1": {
        "task_goal": "Mend it", "question": "What next?", "answer": "open it", "sample_id": "t1",
        "video_source": "epic",
        "negative_answers": ["close it", "take it", "wash it"], "video_basename": "1.mp4",
        "current_observation_basename": "1.png", "task_progress_metadata": [{"narration_text": "x"}],
    },
    "SEED-Bench-R1, validation": {
        "sample_id": 0, "question": "What next?", "choice_a": "a", "choice_b": "b", "choice_c": "c", "choice_d": "d",
        "golden_choice_idx": "A", "video_source": "epic", "video_basename": "1.mp4",
        "current_observation_basename": "1.png", "task_progress_metadata": [{"narration_text": "x"}],
    },
    "NExT-GQA": {
        "qid": "4_0", "question": "Why?", "video_path": "4.mp4", "dataset_name": "nextqa",
        "options": ["v", "w", "x", "y"],
        "answer": "0", "time_clues": [[3.5, 6.0]], "duration": 20.4,
    },
    "NExT-QA table": {
        "video": 4010069381, "question": "how do they play", "answer": 0, "qid": 6, "type": "CH", "a0": "roll",
        "a1": "tap", "a2": "strum", "a3": "hit", "a4": "pat",
    },
    "VideoChat-R1": {
        "id": "1", "video": "1.mp4", "question": "Why?", "options": ["(A) a cup", "(B) a book"], "answer": "(B)",
        "glue": [[1.0, 2.5]], "duration": 9.0,
    },
}  # fmt: skip
ABSENT = object()
# What a converter or a hand leaves in a field: nothing, null, another type, one level of lists too many.
WRONG = [ABSENT, None, 5, -1, 0.5, True, "", "  ", [], {}, {"a": 1}, [None], [1, 2], "\0x", "x" * 6000, "NEST"]


def parsed(raw: Any, folder: Path) -> Any:
    return parse_record(raw, file=folder / "r.json", index=0, root=folder, seed=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_field_can_break_so_that_a_record_loses_its_media(shape: str, tmp_path: Path) -> None:
    raw = SHAPES[shape]
    count = len(parsed(raw, tmp_path).media)
    for name in raw:
        for wrong in WRONG:
            broken = copy.deepcopy(raw)
            if wrong is ABSENT:
                del broken[name]
            else:
                broken[name] = [[raw[name]]] if wrong == "NEST" else wrong
            try:
                record = parsed(broken, tmp_path)
            except DataError as error:
                assert re.match(
                    rf"{re.escape(str(tmp_path))}/r.json: record 0( \(id .*\))?: field `\w+`: expected ", str(error)
                )
                continue
            given = {field for field, value in broken.items() if value != []}
            nothing_else = given <= {"question", "answer"}  # what is left is a whole record of text
            kept = len(record.media) == count or nothing_else or name == "task_progress_metadata"
            assert kept, f"{name} = {wrong!r}"


# Fields without which a record is another question: each as it is named in the error, missing and, in JSON, null.
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("Video-R1", "options"), ("Video-R1", "solution"), ("SEED-Bench-R1", "negative_answers"),
        ("NExT-QA table", "a2"),
        ("NExT-QA table", "answer"), ("VideoChat-R1", "glue"), ("VideoChat-R1", "options"), ("verl", "reward_model"),
        ("LongVideoBench", "correct_choice"), ("LongVideoBench table", "option0"), ("TempCompass", "video_id"),
        ("Perception Test raw", "answer_id"), ("Video-MME", "options"), ("VSI-Bench", "ground_truth"),
        ("VSI-Bench", "question"), ("MVBench", "video"), ("SEED-Bench-R1, validation", "golden_choice_idx"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(shape: str, name: str, tmp_path: Path) -> None:
    for broken in ({k: v for k, v in SHAPES[shape].items() if k != name}, SHAPES[shape] | {name: None}):
        with pytest.raises(DataError, match=f"field `{name}`: expected "):
            parsed(broken, tmp_path)


PLAIN = {"question": "What falls?", "answer": "a cup"}


# Media and options under names that are nearly known, null, nested, or told of by other fields alone.
@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"video_name": "v_1"}, "video_name"),
        ({"video_id": 1301}, "video_id"),
        ({"image_file": "a.png"}, "image_file"),
        ({"image_1": {"bytes": None, "path": "a.png"}}, "image_1"),
        ({"clip": "a.mp4"}, "clip"),
        ({"video": None}, "video"),
        ({"images": None}, "images"),
        ({"video": [["1.mp4"]]}, "video"),
        ({"time_spans": [[1, 2]]}, "video"),
        ({"duration": 4}, "video"),
        ({"video": "1.mp4", "audios": ["1.wav"]}, "audios"),
        ({"video": "1.mp4", "option": ["a cup", "a book"]}, "option"),
        ({"video": "1.mp4", "options": None, "answer": "B"}, "options"),
        ({"video": "1.mp4", "candidates": None}, "candidates"),
        ({"video": "1.mp4", "A": "a cup", "B": "a book", "D": "a pen"}, "C"),
        ({"dataset_name": 5}, "dataset_name"),
    ],
)
def test_what_would_be_passed_over_is_named(extra: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"field `{field}`: expected "):
        parsed(PLAIN | extra, tmp_path)


# A record of nothing but text, whatever a table's other rows have.
@pytest.mark.parametrize("extra", [{"images": []}, {"image_source": "x"}, {"video_count": 0}, {"level": 2}])
def test_text_alone_is_still_text(extra: dict[str, Any], tmp_path: Path) -> None:
    assert parsed(PLAIN | extra, tmp_path).media == ()


# By letter in an object, as Python writes a list, a field for each, and within the question.
@pytest.mark.parametrize(
    "extra",
    [
        {"options": {"A": "a cup", "B": "a book"}},
        {"options": "['a cup', 'a book']"},
        {"A": "a cup", "B": "a book"},
        {"question": "What falls?\nA. a cup\nB. a book\nPlease respond with only the letter of the correct answer."},
    ],
)
def test_options_however_they_are_written(extra: dict[str, Any], tmp_path: Path) -> None:
    record = parsed(PLAIN | {"video": "1.mp4", "answer": "B"} | extra, tmp_path)
    assert (record.question, record.options, record.answer) == ("What falls?", ("A. a cup", "B. a book"), "B")


def test_answers_behind_hashes(tmp_path: Path) -> None:
    chain = "She sold 48/2 = <<48/2=24>>24.\nIn all 72.\n#### 72"
    assert parsed({"question": "How many?", "answer": chain}, tmp_path).answer == "72"


LINE = json.dumps(PLAIN)
CSV = "question,answer\nWhat falls?,a cup\n"


# Compression that is cut or none; a list called lines; other encodings; other separators; a number that is none.
@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.json.gz", gzip.compress(f"[{LINE}]".encode(), mtime=0)[:-20], "does not unpack"),
        ("a.json.gz", LINE.encode(), "does not unpack"),
        ("a.jsonl", f"[\n{LINE}\n]".encode(), "Rename it to .json"),
        ("a.jsonl", LINE.encode("utf-16"), "record 0"),
        ("a.jsonl", LINE.encode() + b"\n" + LINE.encode().replace(b"cup", b"\xff"), "record 1 (line 2)"),
        ("a.csv", CSV.replace(",", ";").encode(), "';' in the header"),
        ("a.tsv", CSV.encode(), "',' in the header"),
        (
            "a.csv",
            CSV.replace("answer", "answer,video,duration").replace("cup", "cup,1.mp4,nan").encode(),
            "field `duration`",
        ),
        ("a.csv", CSV.encode("utf-16"), "UTF-8"),
    ],
)
def test_files_that_are_not_what_they_are_called(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_records(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and says in str(caught.value)


def test_a_table_may_have_null_where_a_row_has_no_video(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [PLAIN | {"video": None}, PLAIN | {"video": "1.mp4"}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [len(record.media) for record in load_records(tmp_path / "a.parquet")] == [0, 1]


def test_tables_that_do_not_hold_text_or_not_one_split(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    text = arrow.Array.from_buffers(arrow.string(), 1, arrow.array([b"\xff\xfe"]).buffers())
    parquet.write_table(arrow.table({"question": text, "answer": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="record 0: field `question`: expected text"):
        load_records(tmp_path / "a.parquet")
    for number, (names, says) in enumerate(
        [
            (("train-00000-of-00001", "test-00000-of-00001"), "files of one split, got test, train"),
            (("train-00000-of-00002",), "expected 2 files train-"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in names:
            parquet.write_table(arrow.Table.from_pylist([PLAIN]), folder / f"{name}.parquet")
        with pytest.raises(DataError, match=re.escape(says)):
            load_records(folder)


# No JSON, no object, no files; files without a name, and no objects.
@pytest.mark.parametrize("state", ["{", "[]", "{}", '{"_data_files": [{"name": "x"}]}', '{"_data_files": ["x"]}'])
def test_folders_of_datasets_that_are_damaged(state: str, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json: expected"):
        load_records(tmp_path)


# Files beside a NExT-GQA table, edited by hand.
@pytest.mark.parametrize(
    ("name", "content"),
    [("gsub_val.json", {"7": []}), ("gsub_val.json", {"7": {"location": []}}), ("map_vid_vidorID.json", {"7": ["x"]})],
)
def test_files_beside_a_table(name: str, content: Any, tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text("video_id,question,answer,qid,type,a0,a1,a2,a3,a4\n7,why,b,0,CW,a,b,c,d,e\n")
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{name}: entry '7': expected"):
        load_records(tmp_path / "val.csv")
