"""Rows of published benchmarks as they are downloaded.

Field names: doc-doc/NExT-QA and NExT-GQA (`datasets/nextgqa/README.md`), OpenGVLab/MVBench (`json/`),
nyu-visionx/VSI-Bench, lmms-lab/Video-MME, longvideobench/LongVideoBench (`lvb_val.json` and its Parquet form),
llyx97/TempCompass (`questions/`), lmms-lab/PerceptionTest_Val.
"""

import functools
import re
from pathlib import Path
from typing import Any

from appo.data import strict_json
from appo.data.fields import Fields, is_real
from appo.data.options import split_options
from appo.data.records import DataError, Record

VIDEO_FOLDERS = (".", "videos", "video", "data")
# Where OpenGVLab/MVBench keeps the videos of each task, named as its files in `json/`.
MVBENCH_FOLDERS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video",
    "action_prediction": "star/Charades_v1_480",
    "action_sequence": "star/Charades_v1_480",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}


def next_table(fields: Fields, seed: int) -> Record:
    """A row of NExT-QA's tables (video, answer an index) or of NExT-GQA's (video_id, answer a text).

    Beside the table are looked for: map_vid_vidorID.json, the folder and file of each video, and gsub_SPLIT.json, the
    spans of NExT-GQA. Four published questions have two equal options, of which the first is meant, as in the released
    loaders. Spans that begin tenths of a second before the video begin with it; ``location`` keeps them for scoring.
    """
    name = "video_id" if "video_id" in fields.raw else "video"
    video, question_id = fields.scalar(name), fields.id("qid")
    texts = tuple(fields.scalar(f"a{i}") for i in range(5))
    options = fields.lettered("a0", texts, distinct=False)
    given_as_text = name == "video_id"
    answer = (
        fields.letter("answer", fields.scalar("answer"), options)
        if given_as_text
        else fields.position("answer", len(options))
    )
    stem = fields.file.name.partition(".")[0]
    place = _beside(fields.file, "map_vid_vidorID.json").get(video, video)
    if not isinstance(place, (str, int)):
        names = fields.file.with_name("map_vid_vidorID.json")
        raise DataError(f"{names}: entry {video!r}: expected the name of a video, got {place!r:.200}.")
    spans_file = f"gsub_{stem}.json"
    known = _beside(fields.file, spans_file).get(video, {})
    located = known.get("location", {}) if isinstance(known, dict) else None
    if not isinstance(located, dict):
        expected = '{"duration": seconds, "location": {QID: [[start, end], ...]}}'
        raise DataError(
            f"{fields.file.with_name(spans_file)}: entry {video!r}: expected {expected}, got {known!r:.200}."
        )
    path = f"{place}.mp4"
    published = located.get(question_id)
    usable = [_from_beginning(span) for span in published] if isinstance(published, list) else published
    found = fields.of({name: path, "duration": known.get("duration"), "location": usable})
    spans = found.spans("location")
    meta: dict[str, Any] = {"qtype": fields.text("type")} if "type" in fields.raw else {}
    if usable != published:
        meta["location"] = published
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
    """video (a file or a folder of frames), question, candidates, answer (the text of one), start and end for some.

    The published files are named after their tasks, and so are the folders of videos.
    """
    options = fields.options("candidates")
    stem = fields.file.name.partition(".")[0]
    task = fields.text("task_type") if "task_type" in fields.raw else stem if stem in MVBENCH_FOLDERS else None
    own = MVBENCH_FOLDERS.get(stem)
    folders = VIDEO_FOLDERS if own is None else (*VIDEO_FOLDERS, own, f"video/{own}", f"videos/{own}")
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.letter("answer", fields.scalar("answer"), options),
        kind="multiple choice",
        options=options,
        media=(fields.media("video", "video", folders),),
        source="MVBench",
        meta={} if task is None else {"task": task},
    )


def vsi_bench(fields: Fields, seed: int) -> Record:
    """dataset, scene_name, question_type, question, ground_truth, options; the video is DATASET/SCENE_NAME.mp4."""
    options = fields.options("options") if fields.raw.get("options", []) != [] else ()
    truth = fields.scalar("ground_truth")
    scene = fields.scalar("scene_name")
    folder = fields.optional_text("dataset", default=".")
    path = fields.of({"scene_name": f"{folder}/{scene}.mp4"})
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
    path = fields.of({"videoID": fields.scalar("videoID") + ".mp4"})
    return fields.record(
        id_field="question_id",
        question=fields.text("question"),
        answer=fields.letter("answer", fields.text("answer"), options),
        kind="multiple choice",
        options=options,
        media=(path.media("video", "videoID", VIDEO_FOLDERS),),
        source="Video-MME",
        duration=None,
        meta=_kept(fields, {"task_type": "task", "duration": "length", "domain": "domain"}),
    )


def long_video_bench(fields: Fields, seed: int) -> Record:
    """video_path, question, candidates (or option0 to option4), correct_choice (an index), duration."""
    if "candidates" in fields.raw:
        options = fields.options("candidates")
    else:
        given = [i for i in range(5) if fields.raw.get(f"option{i}", "N/A") not in ("N/A", "")]
        names = [f"option{i}" for i in range(given[-1] + 1 if given else 1)]  # none between two of them is missing
        options = fields.lettered("option0", tuple(fields.scalar(name) for name in names))
    name = "video_path" if "video_path" in fields.raw else "video_id"
    path = fields if name == "video_path" else fields.of({name: fields.scalar(name) + ".mp4"})
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.position("correct_choice", len(options)),
        kind="multiple choice",
        options=options,
        media=(path.media("video", name, VIDEO_FOLDERS),),
        source="LongVideoBench",
        meta=_kept(fields, {"question_category": "task", "duration_group": "length"}),
    )


def temp_compass(fields: Fields, seed: int) -> Record:
    """video_id, question, answer, dim; options stand in the question ("A. ...", "Caption A: ..."), or the answer is
    yes or no. Without any (caption generation) the answer is a text."""
    asked, answer = fields.text("question"), fields.text("answer")
    question, texts = split_options(asked)
    form = "multi-choice" if texts else "captioning"
    if not texts and (captions := _captions(asked)):
        form, (question, texts) = "caption_matching", captions
        answer = answer.partition(": ")[2] or answer
    options = fields.lettered("question", texts) if texts else ()
    if not options and re.fullmatch(r"(?:yes|no)\.?", answer, re.IGNORECASE):
        form, options = "yes_no", ("A. yes", "B. no")
    path = fields.of({"video_id": fields.scalar("video_id") + ".mp4"})
    return fields.record(
        id_field="id",
        question=question,
        answer=fields.letter("answer", answer, options) if options else answer,
        kind="multiple choice" if options else "free-form",
        options=options,
        media=(path.media("video", "video_id", VIDEO_FOLDERS),),
        source="TempCompass",
        meta={"task": fields.text("dim"), "form": form, "asked": asked},
    )


def perception_test(fields: Fields, seed: int) -> Record:
    """video_name, question, options, answer_id (an index), area, reasoning, question_id."""
    options = fields.options("options")
    path = fields.of({"video_name": fields.scalar("video_name") + ".mp4"})
    number = fields.raw.get("question_id", fields.raw.get("id", fields.index))
    return fields.record(
        id_field="question_id" if "question_id" in fields.raw else "id",
        id=f"{fields.scalar('video_name')}_{number}",
        question=fields.text("question"),
        answer=fields.position("answer_id", len(options)),
        kind="multiple choice",
        options=options,
        media=(path.media("video", "video_name", VIDEO_FOLDERS),),
        source="Perception Test",
        meta=_kept(fields, {"area": "task", "reasoning": "reasoning"}),
    )


def _from_beginning(span: Any) -> Any:
    """A span that begins up to half a second before the video as one that begins with it; others as they are."""
    early = isinstance(span, list) and len(span) == 2 and is_real(span[0]) and -0.5 <= span[0] < 0
    return [0.0, span[1]] if early else span


def _captions(asked: str) -> tuple[str, tuple[str, ...]] | None:
    """A question and the texts of the "Caption A: ...", "Sentence A: ..." or "Option 1: ..." lines below it."""
    first, *lines = asked.split("\n")
    found = [re.fullmatch(r"(?:Caption|Sentence|Option) [A-Z1-9]: (.+)", line.strip()) for line in lines]
    if len(found) < 2 or not all(found):
        return None
    return first, tuple(match[1] for match in found if match)


def _kept(fields: Fields, names: dict[str, str]) -> dict[str, str]:
    """Those of the fields ``names`` that a row has, as texts under the names that they are counted by."""
    return {kept: fields.scalar(name) for name, kept in names.items() if name in fields.raw}


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
