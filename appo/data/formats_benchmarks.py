"""Rows of published benchmarks as they are downloaded.

Field names: doc-doc/NExT-QA and NExT-GQA (`datasets/nextgqa/README.md`), OpenGVLab/MVBench (`json/`),
nyu-visionx/VSI-Bench, lmms-lab/Video-MME, longvideobench/LongVideoBench (`lvb_val.json` and its Parquet form),
llyx97/TempCompass.
"""

import functools
import re
from pathlib import Path
from typing import Any

from appo.data import strict_json
from appo.data.fields import Fields
from appo.data.options import split_options
from appo.data.records import DataError, Record

VIDEO_FOLDERS = (".", "videos", "video", "data")


def next_table(fields: Fields, seed: int) -> Record:
    """A row of NExT-QA's tables (video, answer an index) or of NExT-GQA's (video_id, answer a text).

    Beside the table are looked for: map_vid_vidorID.json, the folder and file of each video, and gsub_SPLIT.json, the
    spans of NExT-GQA.
    """
    name = "video_id" if "video_id" in fields.raw else "video"
    video, question_id = fields.scalar(name), fields.id("qid")
    options = fields.lettered("a0", tuple(fields.scalar(f"a{i}") for i in range(5) if f"a{i}" in fields.raw))
    given_as_text = name == "video_id"
    answer = (
        fields.letter("answer", fields.scalar("answer"), options)
        if given_as_text
        else fields.position("answer", len(options))
    )
    stem = fields.file.name.partition(".")[0]
    place = _beside(fields.file, "map_vid_vidorID.json").get(video, video)
    known = _beside(fields.file, f"gsub_{stem}.json").get(video, {})
    path = f"{place}.mp4"
    spans = known.get("location", {}).get(question_id)
    found = Fields(fields.raw | {name: path, "duration": known.get("duration"), "location": spans}, *_where(fields))
    spans = found.spans("location")
    meta: dict[str, Any] = {"qtype": fields.text("type")} if "type" in fields.raw else {}
    return found.record(
        id_field="qid",
        id=f"{video}_{question_id}",
        question=fields.text("question"),
        answer=answer,
        kind="multiple choice",
        options=options,
        media=(found.media("video", name, (".", "NExTVideo", "videos")),),
        time_spans=spans,
        source="NExT-GQA" if given_as_text else "NExT-QA",
        meta=meta | ({"grounding": True} if spans else {}),
    )


def mv_bench(fields: Fields, seed: int) -> Record:
    """video (a file or a folder of frames), question, candidates, answer (the text of one), start and end for some."""
    options = fields.options("candidates")
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.letter("answer", fields.scalar("answer"), options),
        kind="multiple choice",
        options=options,
        media=(fields.media("video", "video", VIDEO_FOLDERS),),
        source="MVBench",
        meta={"task": fields.text("task_type")} if "task_type" in fields.raw else {},
    )


def vsi_bench(fields: Fields, seed: int) -> Record:
    """dataset, scene_name, question_type, question, ground_truth, options; the video is DATASET/SCENE_NAME.mp4."""
    options = fields.options("options") if fields.raw.get("options") else ()
    truth = fields.scalar("ground_truth")
    scene = fields.scalar("scene_name")
    folder = fields.optional_text("dataset", default=".")
    path = Fields(fields.raw | {"scene_name": f"{folder}/{scene}.mp4"}, *_where(fields))
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.letter("ground_truth", truth, options)
        if options
        else fields.truth("ground_truth", truth, "regression"),
        kind="multiple choice" if options else "regression",
        options=options,
        media=(path.media("video", "scene_name", VIDEO_FOLDERS),),
        source="VSI-Bench",
        meta={"task": fields.text("question_type")} if "question_type" in fields.raw else {},
    )


def video_mme(fields: Fields, seed: int) -> Record:
    """videoID, question_id, question, options, answer; duration is short, medium or long. The video is VIDEOID.mp4."""
    options = fields.options("options")
    path = Fields(fields.raw | {"videoID": fields.scalar("videoID") + ".mp4"}, *_where(fields))
    return fields.record(
        id_field="question_id",
        question=fields.text("question"),
        answer=fields.letter("answer", fields.text("answer"), options),
        kind="multiple choice",
        options=options,
        media=(path.media("video", "videoID", VIDEO_FOLDERS),),
        source="Video-MME",
        duration=None,
        meta={"task": fields.text("task_type")} if "task_type" in fields.raw else {},
    )


def long_video_bench(fields: Fields, seed: int) -> Record:
    """video_path, question, candidates (or option0 to option4), correct_choice (an index), duration."""
    if "candidates" in fields.raw:
        options = fields.options("candidates")
    else:
        names = [f"option{i}" for i in range(5) if fields.raw.get(f"option{i}", "N/A") not in ("N/A", "")]
        options = fields.lettered("option0", tuple(fields.scalar(name) for name in names))
    name = "video_path" if "video_path" in fields.raw else "video_id"
    path = (
        fields if name == "video_path" else Fields(fields.raw | {name: fields.scalar(name) + ".mp4"}, *_where(fields))
    )
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.position("correct_choice", len(options)),
        kind="multiple choice",
        options=options,
        media=(path.media("video", name, VIDEO_FOLDERS),),
        source="LongVideoBench",
        meta={"task": fields.text("question_category")} if "question_category" in fields.raw else {},
    )


def temp_compass(fields: Fields, seed: int) -> Record:
    """video_id, question, answer, dim; options stand in the question ("A. ..."), or the answer is yes or no."""
    question, texts = split_options(fields.text("question"))
    answer = fields.text("answer")
    options = fields.lettered("question", texts) if texts else ()
    if not options and re.fullmatch(r"(?:yes|no)\.?", answer, re.IGNORECASE):
        options = ("A. yes", "B. no")
    path = Fields(fields.raw | {"video_id": fields.scalar("video_id") + ".mp4"}, *_where(fields))
    return fields.record(
        id_field="id",
        question=question,
        answer=fields.letter("answer", answer, options) if options else answer,
        kind="multiple choice" if options else "free-form",
        options=options,
        media=(path.media("video", "video_id", VIDEO_FOLDERS),),
        source="TempCompass",
        meta={"task": fields.text("dim")},
    )


def _where(fields: Fields) -> tuple[Any, ...]:
    return fields.file, fields.index, fields.root, fields.allow_outside, fields.text_only


@functools.lru_cache(8)
def _beside(file: Path, name: str) -> dict[str, Any]:
    """An object in a JSON file beside ``file``; empty where there is none."""
    path = file.with_name(name)
    if not path.is_file():
        return {}
    try:
        found = strict_json.loads(path.read_bytes())
    except strict_json.JSONError as error:
        raise DataError(error.at(str(path))) from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected an object with an entry for each video, got {type(found).__name__}.")
    return found
