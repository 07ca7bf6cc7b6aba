"""The record formats: a table of how each is recognised and read. docs/data.md lists them with examples."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.data import formats_benchmarks, formats_chat, formats_plain
from appo.data.fields import Fields, shown
from appo.data.options import LETTERS, split_options
from appo.data.overlooked import MEDIA_FIELDS
from appo.data.records import KINDS, MEDIA_KINDS, DataError, Media, Record

QUESTION_FIELDS = ("question", "problem", "prompt", "messages", "conversations")
VIDEO_R1_KINDS = {kind: kind for kind in KINDS} | {"OCR": "ocr"}
SEED_NEGATIVES = 3  # wrong options drawn for a SEED-Bench-R1 training record


@dataclass(frozen=True)
class Format:
    """One way of writing records: ``told_by`` says in words what ``recognises`` looks for in a record's fields."""

    name: str
    told_by: str
    recognises: Callable[[dict[str, Any]], bool]
    parse: Callable[[Fields, int], Record]


def parse_record(
    raw: Any,
    *,
    file: Path,
    index: int,
    root: Path,
    seed: int,
    allow_outside: bool = False,
    text_only: bool = False,
    tabular: bool = False,
) -> Record:
    """One decoded object as a Record; raises DataError naming file, record and field.

    tabular: every record has every field, so that null says nothing.
    """
    if not isinstance(raw, dict):
        raise DataError(f"{file}: record {index}: expected an object with fields, got {type(raw).__name__}.")
    present, nulls = raw, frozenset[str]()
    if None in raw.values():
        present = {name: value for name, value in raw.items() if value is not None}
        nulls = frozenset() if tabular else frozenset(raw.keys() - present.keys())
    fields = Fields(present, file, index, root, allow_outside, text_only, nulls)
    return recognise(fields).parse(fields, seed)


def recognise(fields: Fields) -> Format:
    """The format of a record. Raises DataError with the record's fields and values, and the formats there are."""
    name = fields.raw.get("dataset_name")
    if name is not None and not isinstance(name, str):
        fields.fail("dataset_name", "text", name)
    key = (*fields.raw, name)
    known = _recognised.get(key)
    if known is None:
        known = next((known for known in FORMATS if known.recognises(fields.raw)), None)
        if known is not None and len(_recognised) < 1000:
            _recognised[key] = known
    if known is not None:
        return known
    looks = ", ".join(f"{name}: {shown(value)[:60]}" for name, value in list(fields.raw.items())[:12])
    known_formats = "; ".join(f"{known.name} ({known.told_by})" for known in FORMATS)
    raise DataError(
        f"{fields.file}: record {fields.index}: field `question`: expected a record of a known format, which has "
        f"one of the fields {', '.join(QUESTION_FIELDS)}, got the fields {{{looks}}}. Known are: {known_formats}. "
        "Rename the fields to those of one, for example question, answer, options, video (docs/data.md)."
    )


def _video_r1(fields: Fields, seed: int) -> Record:
    kind = VIDEO_R1_KINDS[fields.choice("problem_type", tuple(VIDEO_R1_KINDS))]
    # Other kinds have an empty list in the published files; a filled one is not shown there either.
    options = fields.options("options") if kind == "multiple choice" else ()
    if not options and fields.raw.get("options", []) != []:
        fields.texts("options")
    answer = fields.tagged("solution")
    meta = optional_meta(fields)
    if fields.flag("grounding"):
        meta["grounding"] = True
    spans = fields.spans("time_spans", required=bool(meta.get("grounding")))
    medium = fields.choice("data_type", (*MEDIA_KINDS, "text"))
    media: tuple[Media, ...] = ()
    if medium == "text" and fields.raw.get("path"):
        fields.fail("data_type", "video or image, since the record has a path", medium)
    if medium != "text":
        media = fields.media_list(medium, "path") or (fields.media(medium, "path"),)
    return fields.record(
        id_field="problem_id",
        question=fields.text("problem"),
        answer=fields.letter("solution", answer, options) if options else fields.truth("solution", answer, kind),
        kind=kind,
        options=options,
        media=media,
        time_spans=spans,
        source=fields.optional_text("data_source", "dataset_name", default="Video-R1"),
        meta=meta,
    )


def _seed_bench(fields: Fields, seed: int) -> Record:
    question = fields.text("question")
    if "golden_choice_idx" in fields.raw or "choice_a" in fields.raw:
        texts = tuple(fields.text(f"choice_{letter}") for letter in "abcd")
        answer = fields.position("golden_choice_idx", len(texts))
        options = fields.lettered("choice_a", texts)
    else:
        right, wrong = fields.text("answer"), fields.texts("negative_answers")
        wrong = tuple(dict.fromkeys(text for text in wrong if text != right))
        if len(wrong) < SEED_NEGATIVES:
            fields.fail("negative_answers", f"at least {SEED_NEGATIVES} texts other than the answer", list(wrong))
        # A generator per record: its options do not change when the file is cut, filtered or reordered.
        chance = random.Random(f"{seed}/{fields.id('sample_id')}")
        drawn = [right, *chance.sample(wrong, SEED_NEGATIVES)]
        chance.shuffle(drawn)
        answer = LETTERS[drawn.index(right)]
        options = tuple(f"{letter}. {text}" for letter, text in zip(LETTERS, drawn, strict=False))
    # The released archives keep a folder per source; users who unpack one source have its files at the root.
    source = fields.text("video_source")
    fields.path("video_source", source)
    folders = (source, ".") if (fields.root / source).is_dir() else (".", source)
    names = [("video", "video_basename"), ("image", "current_observation_basename")]
    progress = fields.listed("task_progress_metadata")
    if not isinstance(progress, (list, type(None))):
        fields.fail("task_progress_metadata", "a list", progress)
    if progress == []:  # nothing has happened yet
        names = names[1:]
    media = tuple(fields.media(kind, name, folders) for kind, name in names)
    extra = ("task_goal", "task_progress_metadata", "video_source")
    return fields.record(
        id_field="sample_id",
        question=question,
        answer=answer,
        kind="multiple choice",
        options=options,
        media=media,
        source="SEED-Bench-R1",
        meta={key: fields.raw[key] for key in extra if key in fields.raw},
    )


def _next_qa(fields: Fields, seed: int) -> Record:
    options = fields.options("options")
    meta: dict[str, Any] = {"qtype": fields.text("qtype")} if "qtype" in fields.raw else {}
    spans = fields.spans("time_clues", required="time_clues" in fields.raw or "time_clues" in fields.nulls)
    if spans:
        meta["grounding"] = True
    return fields.record(
        id_field="qid",
        question=fields.text("question"),
        answer=fields.position("answer", len(options)),
        kind="multiple choice",
        options=options,
        media=(fields.media("video", "video_path"),),
        time_spans=spans,
        source="NExT-GQA" if spans else "NExT-QA",
        meta=meta,
    )


def _next_gqa_tagged(fields: Fields, seed: int) -> Record:
    """The form with ``problem`` and ``solution``; its options may stand in the problem's text."""
    question, options = fields.text("problem"), tuple[str, ...]()
    if "options" in fields.raw:
        options = fields.options("options")
    else:
        question, texts = split_options(question)
        options = fields.lettered("problem", texts) if texts else ()
    path_field = next((name for name in ("video_path", "path", "video") if name in fields.raw), "video_path")
    span_fields = [name for name in ("time_clues", "glue", "time_spans") if name in fields.raw.keys() | fields.nulls]
    spans = fields.spans(span_fields[0], required=True) if span_fields else ()
    return fields.record(
        id_field="qid" if "qid" in fields.raw else "problem_id",
        question=question,
        answer=fields.letter("solution", fields.tagged("solution", required=False), options),
        kind="multiple choice",
        options=options,
        media=(fields.media("video", path_field),),
        time_spans=spans,
        source="NExT-GQA",
        meta={"grounding": True} if spans else {},
    )


def _grounding(fields: Fields, seed: int) -> Record:
    options = fields.options("options")
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.letter("answer", fields.text("answer"), options),
        kind="multiple choice",
        options=options,
        media=(fields.media("video", "video"),),
        time_spans=fields.spans("glue", required=True),
        source="VideoChat-R1",
        meta={"grounding": True},
    )


def _video_question(fields: Fields, seed: int) -> Record:
    """A plain record, or one of VideoChat-R1 that has lost its spans: asked without them it would be another task."""
    options = fields.listed("options")
    lost = isinstance(options, list) and bool(options) and str(options[0]).startswith("(A)")
    return (_grounding if lost and "time_spans" not in fields.raw else formats_plain.plain)(fields, seed)


def optional_meta(fields: Fields) -> dict[str, Any]:
    """``task``, a text, and ``seen``, a list of [start, end, word], where a record has them."""
    meta: dict[str, Any] = {"task": fields.text("task")} if "task" in fields.raw else {}
    if "seen" in fields.raw:
        meta["seen"] = fields.listed("seen")
        if not isinstance(meta["seen"], list) or not all(isinstance(m, list) and len(m) == 3 for m in meta["seen"]):
            fields.fail("seen", "a list of [start, end, word]", meta["seen"])
    return meta


def _has(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a record has all of the fields ``names``; "a|b" stands for either."""
    wanted = [set(name.split("|")) for name in names]
    return lambda raw: all(raw.keys() & either for either in wanted)


def _named(name: str, *otherwise: str) -> Callable[[dict[str, Any]], bool]:
    return lambda raw: raw.get("dataset_name") == name or bool(otherwise and raw.keys() & set(otherwise))


def _is_mv_bench(raw: dict[str, Any]) -> bool:
    return {"question", "candidates"} <= raw.keys() and ("video" in raw or not raw.keys() & MEDIA_FIELDS.keys())


def _is_raw_perception_test(raw: dict[str, Any]) -> bool:
    others = {"video", "answer"}
    return bool(raw.keys() & {"options", "area"}) and (
        "video_name" in raw or ("answer_id" in raw and not raw.keys() & others)
    )


def _is_verl(raw: dict[str, Any]) -> bool:
    """Also without its truth, which other formats keep in fields that it does not have."""
    if "reward_model" in raw:
        return "prompt" in raw or not raw.keys() & set(QUESTION_FIELDS)
    return {"prompt", "data_source"} <= raw.keys() and not raw.keys() & set(formats_plain.ANSWER_FIELDS)


# The first that recognises a record reads it.
FORMATS = (
    Format("ours", "media, kind", _has("media"), formats_plain.own),
    Format(
        "SEED-Bench-R1",
        "negative_answers or golden_choice_idx",
        _named("seed_bench_r1", "negative_answers", "golden_choice_idx", "current_observation_basename"),
        _seed_bench,
    ),
    Format("NExT-GQA, tagged", 'dataset_name "next-gqa"', _named("next-gqa"), _next_gqa_tagged),
    Format(
        "NExT-QA and NExT-GQA tables", "qid, a0, a1, ...", _has("qid|type", "a0|a1|a2"), formats_benchmarks.next_table
    ),
    Format("NExT-QA and NExT-GQA", 'qid, video_path, or dataset_name "nextqa"', _named("nextqa", "qid"), _next_qa),
    Format("VideoChat-R1 grounding", "video, glue", _has("glue"), _grounding),
    Format(
        "LongVideoBench",
        "correct_choice",
        _has("correct_choice|question_wo_referring_query|option0|duration_group"),
        formats_benchmarks.long_video_bench,
    ),
    Format(
        "VSI-Bench",
        "scene_name, ground_truth",
        _has("scene_name|question_type", "scene_name|ground_truth"),
        formats_benchmarks.vsi_bench,
    ),
    Format("Video-MME", "videoID, options", _has("videoID|sub_category"), formats_benchmarks.video_mme),
    Format("MVBench", "video, candidates", _is_mv_bench, formats_benchmarks.mv_bench),
    Format("TempCompass", "video_id, dim", _has("dim"), formats_benchmarks.temp_compass),
    Format(
        "Perception Test, raw",
        "video_name, answer_id",
        _is_raw_perception_test,
        formats_benchmarks.perception_test,
    ),
    Format("LLaVA", "conversations", _has("conversations"), formats_chat.llava),
    Format("ms-swift", "messages", _has("messages"), formats_chat.ms_swift),
    Format("verl", "prompt, reward_model", _is_verl, formats_chat.verl),
    Format("TRL", "prompt", _has("prompt"), formats_chat.trl),
    Format(
        "Video-R1 and Perception Test",
        "problem, problem_type, solution, path",
        lambda raw: bool(raw.keys() & {"problem_type", "data_type"} or {"problem", "path"} <= raw.keys()),
        _video_r1,
    ),
    Format("EasyR1", "problem, answer", _has("problem"), formats_chat.easy_r1),
    Format("VideoChat-R1 or plain", "video, question, options", _has("video", "question", "options"), _video_question),
    Format("plain", "question, answer", _has("question"), formats_plain.plain),
)

_recognised: dict[tuple[str | None, ...], Format] = {}  # records of one file mostly have the same fields
