# ruff: noqa: E501 (one record a line)
"""Records as other people write them: one of each published shape, and what is wrong with broken ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from appo.data.convert import convert_file
from appo.data.load import load_records
from appo.data.records import DataError

EASY_R1 = {"problem": "<video>\nHow many cups?", "answer": "3", "videos": ["v.mp4"]}
EASY_R1_IMAGE = {"problem": "<image>Find x.", "answer": "\\frac{1}{2}", "images": [{"bytes": None, "path": "1.png"}]}
VERL = {
    "data_source": "geo3k",
    "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "<image>Which?\nA. cup\nB. book"}],
    "images": ["1.png"],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "B"},
    "extra_info": {"split": "train", "index": 7},
}
SWIFT = {
    "messages": [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": "<video>What happens?"},
        {"role": "assistant", "content": "A cup falls."},
    ],
    "videos": ["v.mp4"],
}
SWIFT_PARTS = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "video", "video": "v.mp4"}, {"type": "text", "text": "How long, in seconds?"}],
        }
    ],
    "solution": "<answer> 12.5 </answer>",
}
TRL = {
    "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "images": ["1.png"],
    "solution": "a red cup",
}
TRL_TEXT = {"prompt": "What is 1 + 1?", "answer": 2}
LLAVA = {
    "id": "l1",
    "video": "v.mp4",
    "conversations": [
        {"from": "human", "value": "<video>\nWhich?\nA. a cup\nB. a book\nAnswer with the letter."},
        {"from": "gpt", "value": "B"},
    ],
}
MVBENCH = {"video": "v.mp4", "question": "What?", "candidates": ["a cup", "a book", "a pen"], "answer": "a book"}
MVBENCH_PART = MVBENCH | {"start": 3.5, "end": 9.0, "accurate_start": 4.0, "accurate_end": 8.0}
VSI = {
    "id": 4,
    "dataset": "arkitscenes",
    "scene_name": "41069025",
    "question_type": "object_counting",
    "question": "How many tables are there?",
    "ground_truth": "4",
    "options": None,
    "pruned": False,
}
VSI_CHOICE = VSI | {"question_type": "route_planning", "options": ["A. left", "B. right"], "ground_truth": "B"}
VIDEO_MME = {
    "video_id": "001",
    "duration": "short",
    "domain": "Knowledge",
    "url": "https://www.youtube.com/watch?v=x",
    "videoID": "fFjv93ACGo8",
    "question_id": "001-1",
    "task_type": "Counting Problem",
    "question": "What is shown?",
    "options": ["A. Apples.", "B. Candles.", "C. Berries.", "D. The three."],
    "answer": "C",
}
LONG = {
    "video_id": "86CxyhFV9MI",
    "question": "Which?",
    "candidates": ["one", "two", "three"],
    "correct_choice": 1,
    "position": [854],
    "id": "86CxyhFV9MI_0",
    "video_path": "86CxyhFV9MI.mp4",
    "duration_group": 600,
    "question_category": "TOS",
    "duration": 190.16,
}
LONG_TABLE = {k: LONG[k] for k in LONG if k not in ("candidates", "video_path")} | {
    "option0": "one",
    "option1": "two",
    "option2": "N/A",
}
TEMP_CHOICE = {"video_id": "1005", "dim": "action", "question": "What?\nA. running\nB. sitting", "answer": "B. sitting"}
TEMP_YES = {"video_id": "1005", "dim": "speed", "question": "Is it faster?", "answer": "yes"}
TEMP_CAPTION = {
    "video_id": "1005",
    "dim": "order",
    "question": "Which sentence better captures the essence of the video?\nSentence A: It opens.\nSentence B: It shuts.",
    "answer": "Sentence B: It shuts.",
}
PERCEPTION = {
    "video_name": "video_10",
    "question": "How many cups?",
    "question_id": "3",
    "options": ["one", "two", "none"],
    "answer_id": "1",
    "area": "memory",
    "reasoning": "descriptive",
    "tag": ["counting"],
}
PLAIN = {"question": "What is 2 + 2?", "answer": 4}
IMAGES = {"question": "Compare <image> and <image>.", "answer": "the same", "images": ["1.png", "2.png"]}
FRAMES = {"question": "What?", "answer": "a cup", "frames": ["f/1.jpg", "f/2.jpg"], "fps": 2}
FRAME_LISTS = {"question": "What?", "answer": "a cup", "videos": [["f/1.jpg", "f/2.jpg"], ["g/1.jpg", "g/2.jpg"]]}
SEGMENT = {"question": "What?", "answer": "B", "options": ["x", "y"], "video": "v.mp4", "start": 2, "end": 5.5}
TEXT_R1 = {
    "problem_id": 1,
    "problem": "1+1?",
    "data_type": "text",
    "problem_type": "numerical",
    "solution": "<answer>2</answer>",
}

# Every foreign format with each of its variants, and the record that is expected of it.
CASES: dict[str, tuple[dict[str, Any], tuple[str, str, str, tuple[str, ...], list[tuple[str, str]]]]] = {
    "EasyR1": (EASY_R1, ("How many cups?", "3", "numerical", (), [("video", "v.mp4")])),
    "EasyR1 image": (EASY_R1_IMAGE, ("Find x.", "\\frac{1}{2}", "math", (), [("image", "1.png")])),
    "verl": (VERL, ("Which?", "B", "multiple choice", ("A. cup", "B. book"), [("image", "1.png")])),
    "ms-swift": (SWIFT, ("What happens?", "A cup falls.", "free-form", (), [("video", "v.mp4")])),
    "ms-swift parts": (SWIFT_PARTS, ("How long, in seconds?", "12.5", "numerical", (), [("video", "v.mp4")])),
    "TRL": (TRL, ("What is it?", "a red cup", "free-form", (), [("image", "1.png")])),
    "TRL text": (TRL_TEXT, ("What is 1 + 1?", "2", "numerical", (), [])),
    "LLaVA": (LLAVA, ("Which?", "B", "multiple choice", ("A. a cup", "B. a book"), [("video", "v.mp4")])),
    "MVBench": (MVBENCH, ("What?", "B", "multiple choice", ("A. a cup", "B. a book", "C. a pen"), [("video", "v.mp4")])),
    "VSI-Bench": (VSI, ("How many tables are there?", "4", "regression", (), [("video", "arkitscenes/41069025.mp4")])),
    "VSI-Bench choice": (VSI_CHOICE, (VSI["question"], "B", "multiple choice", ("A. left", "B. right"), [("video", "arkitscenes/41069025.mp4")])),
    "Video-MME": (VIDEO_MME, ("What is shown?", "C", "multiple choice", tuple(VIDEO_MME["options"]), [("video", "fFjv93ACGo8.mp4")])),
    "LongVideoBench": (LONG, ("Which?", "B", "multiple choice", ("A. one", "B. two", "C. three"), [("video", "86CxyhFV9MI.mp4")])),
    "LongVideoBench table": (LONG_TABLE, ("Which?", "B", "multiple choice", ("A. one", "B. two"), [("video", "86CxyhFV9MI.mp4")])),
    "TempCompass": (TEMP_CHOICE, ("What?", "B", "multiple choice", ("A. running", "B. sitting"), [("video", "1005.mp4")])),
    "TempCompass yes": (TEMP_YES, ("Is it faster?", "A", "multiple choice", ("A. yes", "B. no"), [("video", "1005.mp4")])),
    "TempCompass captions": (TEMP_CAPTION, ("Which sentence better captures the essence of the video?", "B", "multiple choice", ("A. It opens.", "B. It shuts."), [("video", "1005.mp4")])),
    "Perception Test raw": (PERCEPTION, ("How many cups?", "B", "multiple choice", ("A. one", "B. two", "C. none"), [("video", "video_10.mp4")])),
    "text": (PLAIN, ("What is 2 + 2?", "4", "numerical", (), [])),
    "Video-R1 text": (TEXT_R1, ("1+1?", "2", "numerical", (), [])),
    "images": (IMAGES, (IMAGES["question"], "the same", "free-form", (), [("image", "1.png"), ("image", "2.png")])),
    "frames": (FRAMES, ("What?", "a cup", "free-form", (), [("video", "f")])),
    "lists of frames": (FRAME_LISTS, ("What?", "a cup", "free-form", (), [("video", "f"), ("video", "g")])),
    "segment": (SEGMENT, ("What?", "B", "multiple choice", ("A. x", "B. y"), [("video", "v.mp4")])),
}  # fmt: skip


def load(folder: Path, *records: Any) -> Any:
    (folder / "records.json").write_text(json.dumps(records))
    return load_records(folder / "records.json")


@pytest.mark.parametrize(("raw", "expected"), CASES.values(), ids=CASES)
def test_foreign_records(tmp_path: Path, raw: dict, expected: tuple) -> None:
    (record,) = load(tmp_path, raw)
    media = [(medium.kind, medium.path.relative_to(tmp_path).as_posix()) for medium in record.media]
    assert (record.question, record.answer, record.kind, record.options, media) == expected


@pytest.mark.parametrize("raw", [case[0] for case in CASES.values()], ids=CASES)
def test_converted_records_say_the_same(tmp_path: Path, raw: dict) -> None:
    (record,) = load(tmp_path, raw)
    count, root = convert_file(tmp_path / "records.json", tmp_path / "ours.jsonl")
    assert (count, root) == (1, tmp_path)
    (again,) = load_records(tmp_path / "ours.jsonl")
    for name in ("id", "question", "answer", "kind", "options", "time_spans", "duration", "asks_time"):
        assert getattr(again, name) == getattr(record, name), name
    for mine, theirs in zip(again.media, record.media, strict=True):
        for name in ("kind", "path", "frames", "fps", "start", "end", "root"):
            assert getattr(mine, name) == getattr(theirs, name), name


def test_segments_and_rates(tmp_path: Path) -> None:
    part, frames, bench = load(tmp_path, SEGMENT, FRAMES, MVBENCH_PART)
    assert (part.media[0].start, part.media[0].end) == (2.0, 5.5)
    assert frames.media[0].fps == 2.0 and [path.name for path in frames.media[0].frames] == ["1.jpg", "2.jpg"]
    assert (bench.media[0].start, bench.media[0].end) == (3.5, 9.0)


def test_ids_and_groups(tmp_path: Path) -> None:
    records = load(tmp_path, VERL, LLAVA, VIDEO_MME, LONG, VSI, PLAIN)
    assert [record.id for record in records] == ["7", "l1", "001-1", "86CxyhFV9MI_0", "4", "5"]
    assert [record.meta.get("task") for record in records[2:5]] == ["Counting Problem", "TOS", "object_counting"]
    assert records[2].duration is None and records[3].duration == 190.16


NEXT_HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4\n"
GQA_HEADER = NEXT_HEADER.replace("video,", "video_id,")
ROW = "4010069381,369,640,480,why did the boy run,{},6,CW,to play,to catch,he fell,to dance,2\n"


def test_tables_of_next_qa_and_their_spans(tmp_path: Path) -> None:
    (tmp_path / "map_vid_vidorID.json").write_text('{"4010069381": "1106/4010069381"}')
    (tmp_path / "gsub_val.json").write_text(
        '{"4010069381": {"duration": 34, "location": {"6": [[1.2, 5.8]]}, "fps": 30}}'
    )
    (tmp_path / "train.csv").write_text(NEXT_HEADER + ROW.format(2))
    (tmp_path / "val.csv").write_text(GQA_HEADER + ROW.format("he fell"))
    plain, grounded = load_records(tmp_path / "train.csv")[0], load_records(tmp_path / "val.csv")[0]
    for record in (plain, grounded):
        assert (record.answer, record.id, record.meta["qtype"]) == ("C", "4010069381_6", "CW")
        assert record.media[0].path == tmp_path / "1106/4010069381.mp4"
    assert (plain.time_spans, plain.asks_time, plain.source) == ((), False, "NExT-QA")
    assert (grounded.time_spans, grounded.asks_time, grounded.duration) == (((1.2, 5.8),), True, 34.0)
    (tmp_path / "train.csv").write_text(NEXT_HEADER + ROW.format("he fell"))
    with pytest.raises(DataError, match="field `answer`: expected an option's index"):
        load_records(tmp_path / "train.csv")


def test_the_file_of_tempcompass_as_it_is_published(tmp_path: Path) -> None:
    rows = {"1005": {"action": [{"question": TEMP_CHOICE["question"], "answer": "B. sitting"}]}}
    (tmp_path / "multi-choice.json").write_text(json.dumps(rows))
    (record,) = load_records(tmp_path / "multi-choice.json")
    assert (record.answer, record.meta["task"], record.media[0].path.name) == ("B", "action", "1005.mp4")


def test_the_file_of_perception_test_as_it_is_published(tmp_path: Path) -> None:
    question = {"id": 4, "question": "How many cups?", "options": ["one", "two"], "answer_id": 1, "area": "memory"}
    videos = {"video_10": {"metadata": {"split": "valid"}, "object_tracking": [], "mc_question": [question]}}
    (tmp_path / "mc_question_valid.json").write_text(json.dumps(videos))
    (record,) = load_records(tmp_path / "mc_question_valid.json")
    assert (record.id, record.answer, record.meta["task"]) == ("video_10_4", "B", "memory")
    assert record.media[0].path.name == "video_10.mp4"


def test_a_published_file_of_mvbench_names_its_task_and_its_folder(tmp_path: Path) -> None:
    (tmp_path / "star/Charades_v1_480").mkdir(parents=True)
    (tmp_path / "star/Charades_v1_480/v.mp4").write_bytes(b"")
    (tmp_path / "tvqa/frames_fps3_hq/clip").mkdir(parents=True)
    for name, video in (("action_sequence", "v.mp4"), ("episodic_reasoning", "clip")):
        (tmp_path / f"{name}.json").write_text(json.dumps([MVBENCH | {"video": video}]))
        (record,) = load_records(tmp_path / f"{name}.json")
        assert record.meta["task"] == name and record.media[0].path.exists()


def test_seed_bench_shows_no_video_before_anything_has_happened(tmp_path: Path) -> None:
    row = {
        "sample_id": 1,
        "question": "What next?",
        "golden_choice_idx": "C",
        **{f"choice_{letter}": f"step {letter}" for letter in "abcd"},
        "video_source": "Ego4D",
        "video_basename": "v.mp4",
        "current_observation_basename": "v.png",
        "dataset_name": "seed_bench_r1",
    }
    kinds = []
    for done in ([], [{"start_frame": 1}]):
        (tmp_path / "validation_L1.jsonl").write_text(json.dumps(row | {"task_progress_metadata": done}))
        (record,) = load_records(tmp_path / "validation_L1.jsonl")
        kinds.append([medium.kind for medium in record.media])
    assert kinds == [["image"], ["video", "image"]]


def test_images_that_a_table_holds_itself(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [
        {"problem": "<image>What?", "answer": "a cup", "images": [{"bytes": bytes([i]) * 9, "path": None}]}
        for i in range(3)
    ]
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    records = load_records(tmp_path / "r.parquet")
    assert [record.media[0].data for record in records] == [bytes([i]) * 9 for i in range(3)]
    convert_file(tmp_path / "r.parquet", tmp_path / "r.jsonl")
    media = [record.media[0] for record in load_records(tmp_path / "r.jsonl")]
    assert [medium.path.read_bytes() for medium in media] == [bytes([i]) * 9 for i in range(3)]


# A record of each format with one field that is wrong.
BROKEN = {
    "EasyR1 without an answer": ({"problem": "x", "videos": ["v.mp4"]}, "answer"),
    "more marks than media": (EASY_R1 | {"problem": "<video><video> x"}, "problem"),
    "a mark without its medium": (EASY_R1 | {"problem": "<image> x"}, "problem"),
    "nothing but a mark": (EASY_R1 | {"problem": "<video>"}, "problem"),
    "videos a number": (EASY_R1 | {"videos": 3}, "videos"),
    "a video without a path": (EASY_R1 | {"videos": [{"a": 1}]}, "videos"),
    "images a list of numbers": (EASY_R1_IMAGE | {"images": [3]}, "images"),
    "verl without ground truth": (VERL | {"reward_model": {"style": "rule"}}, "reward_model"),
    "verl's reward model a text": (VERL | {"reward_model": "x"}, "reward_model"),
    "verl with another letter": (VERL | {"reward_model": {"ground_truth": "C"}, "prompt": "Which?\nA. x\nB. y", "kind": "multiple choice", "options": ["x", "y"]}, "reward_model"),
    "two rounds": (SWIFT | {"messages": SWIFT["messages"] * 2}, "messages"),
    "messages without roles": (SWIFT | {"messages": [{"text": "x"}]}, "messages"),
    "no messages": (SWIFT | {"messages": []}, "messages"),
    "a part of another type": (TRL | {"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "prompt"),
    "media named twice": (SWIFT_PARTS | {"videos": ["w.mp4"]}, "messages"),
    "LLaVA without an answer": (LLAVA | {"conversations": LLAVA["conversations"][:1]}, "conversations"),
    "LLaVA of two rounds": (LLAVA | {"conversations": LLAVA["conversations"] * 2}, "conversations"),
    "MVBench's answer no candidate": (MVBENCH | {"answer": "a dog"}, "answer"),
    "MVBench's segment": (MVBENCH_PART | {"end": 1}, "end"),
    "VSI's truth no number": (VSI | {"ground_truth": "some"}, "ground_truth"),
    "VSI's scene elsewhere": (VSI | {"scene_name": "../../x"}, "scene_name"),
    "Video-MME's options": (VIDEO_MME | {"options": ["A. x", "C. y"]}, "options"),
    "LongVideoBench's choice": (LONG | {"correct_choice": 3}, "correct_choice"),
    "Perception Test's answer": (PERCEPTION | {"answer_id": "3"}, "answer_id"),
    "Perception Test's video": (PERCEPTION | {"video_name": ""}, "video_name"),
    "TempCompass's caption": (TEMP_CAPTION | {"answer": "Sentence C: It is."}, "answer"),
    "TempCompass's answer": (TEMP_CHOICE | {"answer": "C. flying"}, "answer"),
    "no question": ({"question": " ", "answer": "x"}, "question"),
    "an answer that is an object": (PLAIN | {"answer": {"a": 1}}, "answer"),
    "a frame that is no path": (FRAMES | {"frames": ["f/1.jpg", 2]}, "frames"),
    "no frames": (FRAMES | {"frames": []}, "frames"),
    "a kind without options": (PLAIN | {"kind": "numerical", "options": ["3", "4"]}, "kind"),
    "a kind that there is not": (PLAIN | {"kind": "essay"}, "kind"),
    "ours with a medium of another kind": ({"id": "1", "kind": "math", "question": "x", "answer": "1", "media": [{"kind": "audio"}]}, "media"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "field"), BROKEN.values(), ids=BROKEN)
def test_broken_foreign_records_name_the_field(tmp_path: Path, raw: dict, field: str) -> None:
    with pytest.raises(DataError, match=rf"records.json: record 1 \(id .*\): field `{field}`: expected "):
        load(tmp_path, PLAIN, raw)


def test_an_unknown_shape_is_shown(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"got the fields \{image_id: 3, caption: 'a dog'\}\. Known are: .*LLaVA.*docs/data.md"
    ):
        load(tmp_path, {"image_id": 3, "caption": "a dog"})
