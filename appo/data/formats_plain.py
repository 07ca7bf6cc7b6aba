"""Questions and answers in plain fields, and the format that `appo data convert` writes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from appo.data.fields import Fields
from appo.data.math_answers import is_number, quantity
from appo.data.options import LETTERS, LabelError, label, split_options
from appo.data.overlooked import MEDIA_FIELDS, OPTION_FIELDS, check_media, check_options
from appo.data.records import IDS, KINDS, MEDIA_KINDS, Media, Record

ANSWER_FIELDS = ("answer", "solution", "ground_truth")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_HASHES = re.compile(r"\n#### ?(\S[^\n]*)\s*$")
_MATH = re.compile(r"[\\^=]|\$.+\$")
_MARK = re.compile(r"<(image|video)>")


def plain(fields: Fields, seed: int) -> Record:
    """question, answer, and what there is of options, video, images, frames, time_spans, duration."""
    name = next((name for name in ANSWER_FIELDS if name in fields.raw), "answer")
    return question_and_answer(fields, "question", fields.text("question"), name, fields.scalar(name), source="plain")


def question_and_answer(
    fields: Fields,
    question_field: str,
    question: str,
    answer_field: str,
    answer: str,
    *,
    media: tuple[Media, ...] | None = None,
    source: str,
    id: str | None = None,
) -> Record:
    """A record of the fields that all plain formats share; its kind is told from options and answer unless it says."""
    media = media_of(fields) if media is None else media
    check_media(fields, media)
    question = _placed(fields, question_field, question, media)
    answer = _final(answer)
    names = [name for name in OPTION_FIELDS if fields.raw.get(name, []) != []]
    columns = () if names else letter_columns(fields)
    if names:
        options = fields.options(names[0])
    elif columns:
        names, options = ["A"], fields.lettered("A", columns)
    else:
        check_options(fields, answer)
        bare, texts = split_options(question)
        options = fields.lettered(question_field, texts) if texts and _names_one(answer, texts) else ()
        question = bare if options else question
    kinds = {kind: kind for kind in KINDS} | {"OCR": "ocr"}
    named = next((name for name in ("kind", "problem_type") if name in fields.raw), None)
    kind = kinds[fields.choice(named, tuple(kinds))] if named else _kind(answer, bool(options))
    if kind != "multiple choice" and names:
        fields.fail(named or "kind", "multiple choice, since the record has options", kind)
    if kind != "multiple choice":  # what stands in the question is part of it
        question, options = ("\n".join((question, *options)), ()) if options else (question, options)
    grounding = fields.flag("grounding")
    meta: dict[str, Any] = {"grounding": True} if grounding else {}
    meta |= {"task": fields.text("task")} if "task" in fields.raw else {}
    return fields.record(
        id_field=next((name for name in IDS if name in fields.raw), "id"),
        id=id,
        question=question,
        answer=fields.letter(answer_field, answer, options)
        if kind == "multiple choice"
        else fields.truth(answer_field, answer, kind),
        kind=kind,
        options=options,
        media=media,
        time_spans=fields.spans("time_spans", required=grounding),
        source=fields.optional_text("data_source", "source", default=source),
        meta=meta,
    )


def letter_columns(fields: Fields) -> tuple[str, ...]:
    """The options of a table with a column for each, A, B, C, ...; () without such columns."""
    names = [letter for letter in LETTERS[:8] if letter in fields.raw]
    if not {"A", "B"} <= set(names):
        return ()
    if names != list(LETTERS[: len(names)]):
        fields.fail(LETTERS[next(i for i, name in enumerate(names) if name != LETTERS[i])], "text", None)
    return tuple(fields.scalar(name) for name in names)


def media_of(fields: Fields, names: dict[str, str] = MEDIA_FIELDS) -> tuple[Media, ...]:
    """The media that a record names in any of the usual fields."""
    found: list[Media] = []
    for name, kind in names.items():
        if name not in fields.raw:
            continue
        if name == "frames":
            value = fields.listed(name)
            found.append(fields.medium(kind, name, value))
        else:
            found += fields.media_list(kind, name)
    return tuple(found)


def own(fields: Fields, seed: int) -> Record:
    """A record from a row that `as_row` wrote."""
    kind = fields.choice("kind", KINDS)
    options = fields.options("options") if fields.raw.get("options", []) != [] else ()
    if kind == "multiple choice" and "options" not in fields.raw:
        fields.fail("options", "a list of texts, since the kind is multiple choice", None)
    answer = fields.text("answer")
    meta = fields.listed("meta") if "meta" in fields.raw else {}
    if not isinstance(meta, dict):
        fields.fail("meta", "an object", meta)
    if fields.flag("grounding"):
        meta = meta | {"grounding": True}
    return fields.record(
        id_field="id",
        question=fields.text("question"),
        answer=fields.letter("answer", answer, options)
        if kind == "multiple choice"
        else fields.truth("answer", answer, kind),
        kind=kind,
        options=options,
        media=tuple(_own_medium(fields, part) for part in _list(fields, "media")),
        time_spans=fields.spans("time_spans", required=bool(meta.get("grounding"))),
        source=fields.optional_text("source"),
        meta=meta,
    )


def as_row(record: Record, root: Path) -> dict[str, Any]:
    """A record in the format that `own` reads; media paths are relative to ``root`` where they lie in it."""

    def path(place: Path) -> str:
        return place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place.absolute())

    media = []
    for medium in record.media:
        row: dict[str, Any] = {"kind": medium.kind, "path": path(medium.path)}
        row |= {"frames": [path(frame) for frame in medium.frames]} if medium.frames else {}
        row |= {name: value for name in ("fps", "start", "end") if (value := getattr(medium, name)) is not None}
        media.append(row)
    meta = {name: value for name, value in record.meta.items() if name not in ("file", "index", "grounding")}
    row = {"id": record.id, "question": record.question, "kind": record.kind, "options": list(record.options)}
    row |= {"answer": record.answer, "media": media}
    row |= {"time_spans": [list(span) for span in record.time_spans]} if record.time_spans else {}
    row |= {"duration": record.duration} if record.duration is not None else {}
    row |= {"grounding": True} if record.asks_time else {}
    return row | {"source": record.source or "unknown"} | ({"meta": meta} if meta else {})


def _own_medium(fields: Fields, part: Any) -> Media:
    if not isinstance(part, dict) or part.get("kind") not in MEDIA_KINDS:
        fields.fail("media", 'a list of {"kind": "video" or "image", "path": ...}', part)
    # Times and rate are of the medium, not of the record.
    inner = {name: part[name] for name in ("start", "end", "fps") if name in part}
    own = replace(fields, raw=inner)
    return own.medium(part["kind"], "media", part.get("frames") or part.get("path"))


def _list(fields: Fields, name: str) -> list[Any]:
    value = fields.listed(name)
    if not isinstance(value, list):
        fields.fail(name, "a list", value)
    return list(value)


def _placed(fields: Fields, name: str, question: str, media: tuple[Media, ...]) -> str:
    """The question without marks <image> and <video> in front or behind; marks in the middle stay where they are."""
    marks = _MARK.findall(question)
    for kind in MEDIA_KINDS:
        count = sum(medium.kind == kind for medium in media)
        if marks.count(kind) not in (0, count):
            named = ", ".join(field for field, of in MEDIA_FIELDS.items() if of == kind)
            fields.fail(name, f"<{kind}> once for each of the {count} {kind}s of the record (in {named})", question)
    bare = question.strip()
    while match := re.match(r"<(?:image|video)>\s*", bare):
        bare = bare[match.end() :]
    if len(marks) == 1:
        bare = re.sub(r"\s*<(?:image|video)>$", "", bare)
    if not bare or "\0" in bare:
        fields.fail(name, "a question" if not bare else "text without NUL characters", question)
    return question.strip() if _MARK.search(bare) else bare


def _final(text: str) -> str:
    """The final answer of a solution: what stands in <answer>, behind "####" at its end (GSM8K), in \\boxed{}, or the
    whole."""
    if text.count("<answer>") == 1 and text.count("</answer>") == 1:
        text = text.partition("<answer>")[2].partition("</answer>")[0]
    if (last := _HASHES.search(text)) is not None:
        text = last[1]
    if len(boxed := _BOXED.findall(text)) == 1:
        text = boxed[0]
    return text.strip()


def _names_one(answer: str, texts: tuple[str, ...]) -> bool:
    try:
        return bool(label(answer, texts))
    except LabelError:
        return False


def _kind(answer: str, has_options: bool) -> str:
    if has_options or re.fullmatch(r"\(?[A-Z]\)?\.?", answer):
        return "multiple choice"
    if quantity(answer) is not None:
        return "numerical"
    return "math" if is_number(answer) or _MATH.search(answer) else "free-form"
