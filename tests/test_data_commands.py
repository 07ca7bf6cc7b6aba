"""appo data check and convert: what they find, print and return."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from appo.cli import app
from appo.data.check import check_file
from appo.data.load import check_media, load_records
from appo.data.records import DataError
from appo.tasks import make_task


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"), seed=1, sizes={"train": 3}, workers=1)["train"]


def run(*arguments: Any) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_file_without_fault(clips: Path) -> None:
    code, output = run("check", clips)
    assert code == 0
    for text in ("records      3 (multiple choice 3)", "videos 3; 3 decoded", "4.0 to 4.0 s", "Prompt of ", "answer: "):
        assert text in output, output
    assert "<video " in output and "system: You watch" in output


def test_everything_that_is_wrong_is_counted_and_named(clips: Path, tmp_path: Path) -> None:
    good = json.loads(clips.read_text())
    for row in good:
        os.link(clips.parent / row["path"], tmp_path / Path(row["path"]).name)
        row["path"] = Path(row["path"]).name
    whole = (tmp_path / good[0]["path"]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((10, 3000, 3), np.uint8)).save(tmp_path / "thin.png")
    image = {"data_type": "image", "problem_type": "numerical", "problem": "?", "solution": "<answer>1</answer>"}
    lines = [
        json.dumps(good[0]),
        "{broken",
        json.dumps(good[1] | {"problem_id": good[0]["problem_id"]}),
        json.dumps(good[2] | {"solution": "<answer>Z</answer>"}),
        json.dumps(good[2] | {"path": "gone.mp4"}),
        json.dumps(good[2] | {"path": "cut.mp4", "problem_id": "cut"}),
        json.dumps(image | {"path": "thin.png"}),
        json.dumps({"question": "what?", "answer": "\\frac{", "kind": "math"}),
        json.dumps(good[2] | {"time_spans": [[90, 95]], "duration": None, "problem_id": "beyond"}),
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    found = check_file(path)
    counts = {"broken": 3, "truths": 1, "missing": 1, "undecodable": 2, "equal ids": 1}
    assert dict(found.counts) == counts and found.records == 7 and not found.clean
    for problem, words in (
        ("broken", "record 1 (line 2)"), ("broken", "field `solution`"), ("broken", "spans within the clip of 4 s"),
        ("truths", "math-verify reads no"), ("missing", "gone.mp4"), ("undecodable", "cut.mp4"),
        ("undecodable", "thin.png"), ("equal ids", "of records 0, 2"),
    ):  # fmt: skip
        assert any(words in message for message in found.messages[problem]), (problem, words, found.messages)
    code, output = run("check", path, "--show", 1)
    assert code == 1 and "broken       3 records that cannot be read" in output and "and 2 more" in output
    code, output = run("check", path, "--decode", 0)
    assert code == 1 and "0 decoded" in output and "undecodable  0" in output


def test_a_clip_of_several_records_is_decoded_once(clips: Path) -> None:
    rows = json.loads(clips.read_text())
    path = clips.with_name("repeated.json")
    path.write_text(json.dumps([rows[0] | {"problem_id": i, "time_spans": [[0, i + 1]]} for i in range(6)]))
    found = check_file(path)
    assert (found.decoded, len(found.seconds), found.counts) == (1, 1, {"broken": 1})


def test_a_sample_is_decoded(clips: Path) -> None:
    assert check_file(clips, decode=2).decoded == 2
    assert check_file(clips, decode=2, seed=3).decoded == 2
    phases = []
    check_file(clips, decode=1, show=lambda *seen: phases.append(seen))
    assert phases == [("records", 1, None), ("records", 2, None), ("records", 3, None), ("media", 1, 1)]


def test_files_that_cannot_be_checked(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"question": "a", "answer": "b"}, ')
    code, output = run("check", tmp_path / "x.json")
    assert code == 1 and "expected JSON" in output
    code, _ = run("check", tmp_path / "gone.json")
    assert code not in (0, None)
    for path in (tmp_path / "gone.json", tmp_path / ("x" * 5000), tmp_path / "a\0b"):
        with pytest.raises(DataError, match=r"(?s)^(?!.*docs/data.md\)\.\.)"):
            check_file(path)
    (tmp_path / "empty.jsonl").write_text("")
    assert run("check", tmp_path / "empty.jsonl")[0] == 1


def test_convert_writes_what_loads_and_spares_what_is_there(clips: Path, tmp_path: Path) -> None:
    output = tmp_path / "ours.jsonl"
    code, text = run("convert", clips, output)
    assert code == 0 and "3 records" in text and f"data_root={clips.parent}" in text
    assert run("check", output, "--data-root", clips.parent)[0] == 0
    before = output.read_bytes()
    assert run("convert", clips, output)[0] not in (0, None)
    assert output.read_bytes() == before
    assert run("convert", clips, output, "--force")[0] == 0
    assert run("convert", output, output, "--force")[0] not in (0, None)
    assert [path.name for path in tmp_path.iterdir()] == ["ours.jsonl"]


def test_the_same_of_many_records_is_said_once(tmp_path: Path) -> None:
    rows = [{"text": f"words {number}", "label": number} for number in range(20)] + [
        {"question": "?", "answer": 1.5e999}
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    code, output = run("check", path)
    assert code == 1 and output.count("expected a record of a known format") == 1, output
    assert "and 19 more of the same: records 1, 2, 3, 4, 5, 6, 7, 8, ..." in output
    assert "Infinity" in output, output


def test_a_data_root_that_is_not_there_is_the_error(clips: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "check", str(clips), "--data-root", str(tmp_path / "gone")])
    assert result.exit_code == 1 and f"appo: `data_root`: no such folder: {tmp_path / 'gone'}" in result.output
    with pytest.raises(DataError, match="`data_root`: no such folder"):
        check_media(load_records(clips, data_root=tmp_path / "gone"))
