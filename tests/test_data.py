"""Records: one of each published format loads; broken ones give an error that names file, record and field."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from appo.data.load import check_media, load_records
from appo.data.messages import prompt_messages
from appo.data.records import DataError, Record

VIDEO_R1 = {
    "problem_id": 17,
    "problem": "Which object did the person pick up first?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. The cup.", "B. The book.", "C. The phone."],
    "solution": "<answer>B</answer>",
    "path": "./CLEVRER/train/video_00017.mp4",
    "data_source": "CLEVRER",
}
PERCEPTION = VIDEO_R1 | {"problem_id": "p3", "duration": 23.5, "dataset_name": "Perception-test", "path": "v/3.mp4"}
OWN = VIDEO_R1 | {"time_spans": [[4.0, 5.0], [1.0, 1.5]], "duration": 8.0, "task": "flash colour"}
NUMERICAL = {key: VIDEO_R1[key] for key in VIDEO_R1 if key != "options"} | {
    "problem_type": "numerical",
    "data_type": "image",
    "solution": "<answer>3.5</answer>",
}
SEED_TRAIN = {
    "sample_id": "EgoPlan_12",
    "question": "What should I do next?",
    "answer": "open the fridge",
    "negative_answers": ["close the drawer", "wash the cup", "open the fridge", "cut the onion", "turn on the tap"],
    "task_goal": "cook pasta",
    "task_progress_metadata": [{"narration_text": "take the pan", "start_frame": 3, "stop_frame": 9}],
    "video_source": "EpicKitchens",
    "video_basename": "P01_01_3_9.mp4",
    "current_observation_basename": "P01_01_9.png",
    "duration": 12.0,
    "dataset_name": "seed_bench_r1",
}
SEED_EVAL = {key: SEED_TRAIN[key] for key in SEED_TRAIN if key not in ("answer", "negative_answers")} | {
    "choice_a": "wash the cup",
    "choice_b": "cut the onion",
    "choice_c": "open the fridge",
    "choice_d": "close the drawer",
    "golden_choice_idx": "C",
}
NEXT_QA = {
    "qid": 6,
    "question": "why did the boy run",
    "video_path": "NExTVideo/1106/4010069381.mp4",
    "options": ["to play", "to catch the ball", "he fell", "to dance", "for the dog"],
    "answer": "2",
    "qtype": "CW",
    "duration": 41.2,
    "dataset_name": "nextqa",
}
NEXT_GQA = NEXT_QA | {"time_clues": [[13.8, 29.8], [2, 4.5]]}
NEXT_GQA_TAGGED = {
    "problem": "why did the boy run\nA. to play\nB. to catch the ball",
    "solution": "<answer>B</answer>",
    "video_path": "1106/4010069381.mp4",
    "time_clues": [[13.8, 29.8]],
    "dataset_name": "next-gqa",
}
GROUNDING = {
    "id": "g1",
    "video": "vid/9.mp4",
    "question": "When does the dog bark?",
    "options": ["(A) near the door", "(B) at the cat", "(C) never"],
    "duration": 30,
    "glue": [[8.4, 12.5]],
    "answer": "(C)",
}


def write(folder: Path, *records: Any, name: str = "records.json") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(list(records)))
    return path


def load_one(folder: Path, record: Any, **options: Any) -> Record:
    return load_records(write(folder, record), **options)[0]


def test_video_r1(tmp_path: Path) -> None:
    record = load_one(tmp_path, VIDEO_R1)
    assert (record.id, record.question, record.answer) == ("17", VIDEO_R1["problem"], "B")
    assert record.options == ("A. The cup.", "B. The book.", "C. The phone.")
    assert (record.kind, record.source, record.duration) == ("multiple choice", "CLEVRER", None)
    assert [(m.kind, m.path) for m in record.media] == [("video", tmp_path / "CLEVRER/train/video_00017.mp4")]
    assert not record.asks_time
    assert load_one(tmp_path, VIDEO_R1, data_root="/data").media[0].path == Path("/data/CLEVRER/train/video_00017.mp4")


# Each problem type of Video-R1 without options, and what it is here.
@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("numerical", "numerical"),
        ("OCR", "ocr"),
        ("free-form", "free-form"),
        ("regression", "regression"),
        ("math",) * 2,
    ],
)
def test_video_r1_kinds_without_options(tmp_path: Path, written: str, kind: str) -> None:
    record = load_one(tmp_path, NUMERICAL | {"problem_type": written})
    assert (record.kind, record.answer, record.options, record.media[0].kind) == (kind, "3.5", (), "image")


def test_perception_test(tmp_path: Path) -> None:
    record = load_one(tmp_path, PERCEPTION)
    assert (record.id, record.duration, record.answer) == ("p3", 23.5, "B")
    assert load_one(tmp_path, {k: PERCEPTION[k] for k in PERCEPTION if k != "data_source"}).source == "Perception-test"


def test_own_fields_on_video_r1(tmp_path: Path) -> None:
    record = load_one(tmp_path, OWN)
    assert record.time_spans == ((1.0, 1.5), (4.0, 5.0))
    assert (record.duration, record.meta["task"], record.asks_time) == (8.0, "flash colour", False)
    assert load_one(tmp_path, OWN | {"grounding": True}).asks_time


def test_seed_bench_training_form(tmp_path: Path) -> None:
    record = load_one(tmp_path, SEED_TRAIN)
    texts = [option[3:] for option in record.options]
    assert [option[:3] for option in record.options] == ["A. ", "B. ", "C. ", "D. "]
    assert texts["ABCD".index(record.answer)] == "open the fridge"
    assert len(set(texts)) == 4
    assert set(texts) <= {*SEED_TRAIN["negative_answers"]}
    assert [(m.kind, m.path.name) for m in record.media] == [("video", "P01_01_3_9.mp4"), ("image", "P01_01_9.png")]
    assert (record.duration, record.meta["task_goal"], record.source) == (12.0, "cook pasta", "SEED-Bench-R1")


def test_seed_bench_options_depend_on_seed_and_id_alone(tmp_path: Path) -> None:
    others = [SEED_TRAIN | {"sample_id": str(i)} for i in range(30)]
    first = load_records(write(tmp_path, *others, SEED_TRAIN))
    assert first[-1].options == load_one(tmp_path, SEED_TRAIN).options
    assert {record.answer for record in first} == set("ABCD")
    second = load_records(write(tmp_path, *others, SEED_TRAIN), seed=1)
    assert [r.options for r in first] != [r.options for r in second]


def test_seed_bench_media_in_a_folder_per_source(tmp_path: Path) -> None:
    (tmp_path / "EpicKitchens").mkdir()
    record = load_one(tmp_path, SEED_TRAIN)
    assert {media.path.parent for media in record.media} == {tmp_path / "EpicKitchens"}


def test_seed_bench_evaluation_form(tmp_path: Path) -> None:
    for index in ("C", 2, "2", "c"):
        record = load_one(tmp_path, SEED_EVAL | {"golden_choice_idx": index})
        assert record.answer == "C"
        assert record.options == ("A. wash the cup", "B. cut the onion", "C. open the fridge", "D. close the drawer")


def test_next_qa(tmp_path: Path) -> None:
    record = load_one(tmp_path, NEXT_QA)
    assert (record.id, record.answer, record.options[2], record.meta["qtype"]) == ("6", "C", "C. he fell", "CW")
    assert (record.duration, record.time_spans, record.asks_time) == (41.2, (), False)
    assert load_one(tmp_path, NEXT_QA | {"answer": 0}).answer == "A"


def test_next_gqa(tmp_path: Path) -> None:
    record = load_one(tmp_path, NEXT_GQA)
    assert (record.time_spans, record.asks_time, record.source) == (((2.0, 4.5), (13.8, 29.8)), True, "NExT-GQA")


def test_next_gqa_with_problem_and_solution(tmp_path: Path) -> None:
    record = load_one(tmp_path, NEXT_GQA_TAGGED)
    assert (record.answer, record.kind, record.time_spans) == ("B", "multiple choice", ((13.8, 29.8),))
    assert record.question.startswith("why did the boy run")


def test_videochat_r1_grounding(tmp_path: Path) -> None:
    record = load_one(tmp_path, GROUNDING)
    assert (record.answer, record.options[0], record.duration) == ("C", "A. near the door", 30.0)
    assert (record.time_spans, record.asks_time) == (((8.4, 12.5),), True)


def test_jsonl_mixed_formats_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path, VIDEO_R1, NEXT_GQA, GROUNDING, name="mixed.jsonl")
    path.write_text(path.read_text().replace("\n", "\n\n") + "\n")
    records = load_records(path)
    assert [record.source for record in records] == ["CLEVRER", "NExT-GQA", "VideoChat-R1"]
    assert records == load_records(path, limit=10)
    assert [record.id for record in load_records(path, limit=2)] == ["17", "6"]


# What is broken, in which record, and the field that the message must name.
BROKEN = {
    "answer letter not among the options": (VIDEO_R1 | {"solution": "<answer>D</answer>"}, "solution"),
    "no answer tag": (VIDEO_R1 | {"solution": "B"}, "solution"),
    "two answer tags": (VIDEO_R1 | {"solution": "<answer>A</answer><answer>B</answer>"}, "solution"),
    "empty answer": (NUMERICAL | {"solution": "<answer> </answer>"}, "solution"),
    "no path": ({k: VIDEO_R1[k] for k in VIDEO_R1 if k != "path"}, "path"),
    "no question": (VIDEO_R1 | {"problem": "  "}, "problem"),
    "unknown problem type": (VIDEO_R1 | {"problem_type": "essay"}, "problem_type"),
    "problem type of another type": (VIDEO_R1 | {"problem_type": ["OCR"]}, "problem_type"),
    "unknown data type": (VIDEO_R1 | {"data_type": "audio"}, "data_type"),
    "options missing": ({k: VIDEO_R1[k] for k in VIDEO_R1 if k != "options"}, "options"),
    "options as text": (VIDEO_R1 | {"options": "A. x B. y"}, "options"),
    "letters out of order": (VIDEO_R1 | {"options": ["A. x", "C. y"]}, "options"),
    "one option": (VIDEO_R1 | {"options": ["A. x"]}, "options"),
    "id of another type": (VIDEO_R1 | {"problem_id": [1]}, "problem_id"),
    "negative duration": (PERCEPTION | {"duration": -1}, "duration"),
    "duration as text": (PERCEPTION | {"duration": "23 s"}, "duration"),
    "span that ends before it starts": (OWN | {"time_spans": [[5, 4]]}, "time_spans"),
    "span that is no pair": (OWN | {"time_spans": [5, 4]}, "time_spans"),
    "grounding without spans": (VIDEO_R1 | {"grounding": True}, "time_spans"),
    "too few negatives": (SEED_TRAIN | {"negative_answers": ["a", "b", "open the fridge"]}, "negative_answers"),
    "no video": ({k: SEED_TRAIN[k] for k in SEED_TRAIN if k != "video_basename"}, "video_basename"),
    "no image": (SEED_TRAIN | {"current_observation_basename": None}, "current_observation_basename"),
    "golden choice out of range": (SEED_EVAL | {"golden_choice_idx": 4}, "golden_choice_idx"),
    "choice missing": ({k: SEED_EVAL[k] for k in SEED_EVAL if k != "choice_d"}, "choice_d"),
    "answer index out of range": (NEXT_QA | {"answer": "5"}, "answer"),
    "answer index negative": (NEXT_QA | {"answer": -1}, "answer"),
    "answer a boolean": (NEXT_QA | {"answer": True}, "answer"),
    "time clues not numbers": (NEXT_GQA | {"time_clues": [["a", "b"]]}, "time_clues"),
    "solution is no letter": (NEXT_GQA_TAGGED | {"solution": "<answer>because</answer>"}, "solution"),
    "no glue": ({k: GROUNDING[k] for k in GROUNDING if k != "glue"}, "glue"),
    "empty glue": (GROUNDING | {"glue": []}, "glue"),
    "answer not an option": (GROUNDING | {"answer": "(D)"}, "answer"),
    "unknown format": ({"image_id": 3, "caption": "a dog"}, "question"),
}


@pytest.mark.parametrize(("broken", "named"), BROKEN.values(), ids=BROKEN)
def test_broken_records_name_file_record_and_field(tmp_path: Path, broken: dict, named: str) -> None:
    for name in ("broken.json", "broken.jsonl"):
        path = write(tmp_path, VIDEO_R1, broken, name=name)
        with pytest.raises(DataError) as caught:
            load_records(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: record 1")
        assert re.search(rf"field `{named}`: expected .+, got .+\.", message), message


def test_error_says_what_came(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"record 0 \(id 6\): field `answer`: expected an option's index, .* got '9'\."):
        load_one(tmp_path, NEXT_QA | {"answer": "9"})
    with pytest.raises(DataError, match="field `path`: expected text, got no such field"):
        load_one(tmp_path, {k: VIDEO_R1[k] for k in VIDEO_R1 if k != "path"})


# JSON that does not parse or holds no records, lines that are cut or empty, an unknown ending, a table without rows.
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "{", "expected JSON, got text that does not parse"),
        ("x.json", '{"a": 1}', "expected a list of records, got dict"),
        ("x.json", "[]", "expected at least one record, got none"),
        ("x.json", "[3]", "record 0: expected an object with fields, got int"),
        ("x.jsonl", '\n{"a": ', r"record 1 \(line 2\): expected JSON"),
        ("x.jsonl", "\n\n", "expected at least one record, got none"),
        ("x.txt", "a,b", r"expected a file that ends in .json, .jsonl, .* got '.txt'"),
        ("x.csv", "a,b", "expected at least one record, got none"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_records(path)
    assert str(caught.value).startswith(str(path))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\xff\xfe\xff"}')
    with pytest.raises(DataError, match="expected JSON"):
        load_records(path)


def test_missing_file_and_wrong_limit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.json: no such file"):
        load_records(tmp_path / "gone.json")
    with pytest.raises(DataError, match="`limit`"):
        load_records(write(tmp_path, VIDEO_R1), limit=0)


def test_missing_media_are_found_before_training(tmp_path: Path) -> None:
    path = write(tmp_path, VIDEO_R1, PERCEPTION, NEXT_QA)
    there = tmp_path / VIDEO_R1["path"]
    there.parent.mkdir(parents=True)
    there.touch()
    records = load_records(path)
    check_media(records[:1])
    with pytest.raises(DataError) as caught:
        check_media(records)
    message = str(caught.value)
    assert message.startswith(f"{path}: record 1 (id 'p3'): field `path`: expected a video file, got ")
    assert str(tmp_path / "v/3.mp4") in message
    assert "1 more media are missing" in message


def test_a_folder_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "v/3.mp4").mkdir(parents=True)
    with pytest.raises(DataError, match="field `path`"):
        check_media([load_one(tmp_path, PERCEPTION)])


def test_prompt_of_a_choice(tmp_path: Path) -> None:
    system, user = prompt_messages(load_one(tmp_path, VIDEO_R1))
    assert (system["role"], user["role"]) == ("system", "user")
    wanted = system["content"][0]["text"]
    assert all(tag in wanted for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    assert "<time>" not in wanted
    video, text = user["content"]
    assert video == {"type": "video", "video": str(tmp_path / "CLEVRER/train/video_00017.mp4")}
    assert text["text"].splitlines()[:4] == [VIDEO_R1["problem"], *VIDEO_R1["options"]]
    assert "letter" in text["text"].splitlines()[4]


def test_prompt_of_grounding_asks_for_time(tmp_path: Path) -> None:
    assert "<time>" in prompt_messages(load_one(tmp_path, GROUNDING))[0]["content"][0]["text"]


def test_prompt_has_every_medium_in_order(tmp_path: Path) -> None:
    content = prompt_messages(load_one(tmp_path, SEED_TRAIN))[1]["content"]
    assert [part["type"] for part in content] == ["video", "image", "text"]


def test_prompt_without_instructions(tmp_path: Path) -> None:
    (user,) = prompt_messages(load_one(tmp_path, VIDEO_R1), instructions=False)
    assert user["content"][-1]["text"] == "\n".join([VIDEO_R1["problem"], *VIDEO_R1["options"]])
