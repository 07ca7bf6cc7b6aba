"""The published record formats: how each spells its fields, and how to tell them apart (docs/data.md)."""

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from appo.data.records import KINDS, MEDIA_KINDS, DataError, Media, Record

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SEED_NEGATIVES = 3  # wrong options drawn for a SEED-Bench-R1 training record

_LETTERED = re.compile(r"\(?([A-Z])[).:]\s*(.*)", re.DOTALL)
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def parse_record(raw: Any, *, file: Path, index: int, root: Path, seed: int) -> Record:
    """One decoded JSON object as a Record; raises DataError naming file, record and field."""
    if not isinstance(raw, dict):
        raise DataError(f"{file}: record {index}: expected an object with fields, got {type(raw).__name__}.")
    reader = _Reader(raw, file, index, root)
    name = raw.get("dataset_name")
    if name == "seed_bench_r1" or raw.keys() & {"negative_answers", "golden_choice_idx"}:
        return _seed_bench(reader, seed)
    if name == "next-gqa":
        return _next_gqa_tagged(reader)
    if name == "nextqa" or "qid" in raw:
        return _next_qa(reader)
    if "glue" in raw or {"video", "question"} <= raw.keys():
        return _grounding(reader)
    if raw.keys() & {"problem", "problem_type", "data_type"}:
        return _video_r1(reader)
    raise DataError(
        f"{file}: record {index}: field `dataset_name`: expected a known format, got the fields {sorted(raw)}. "
        "Known are Video-R1 and Perception Test (problem, problem_type, solution, path), SEED-Bench-R1 "
        "(negative_answers or golden_choice_idx), NExT-QA and NExT-GQA (qid, video_path), VideoChat-R1 grounding "
        "(video, glue)."
    )


def _video_r1(reader: "_Reader") -> Record:
    kinds = {kind: kind for kind in KINDS} | {"OCR": "ocr"}
    kind = kinds[reader.choice("problem_type", tuple(kinds))]
    options = reader.options("options") if kind == "multiple choice" else ()
    solution = _TAGGED.findall(reader.text("solution"))
    if len(solution) != 1 or not solution[0].strip():
        reader.fail("solution", "one <answer>...</answer> with text in it", reader.raw["solution"])
    answer = solution[0].strip()
    meta: dict[str, Any] = {key: reader.raw[key] for key in ("task", "seen") if key in reader.raw}
    if reader.flag("grounding"):
        meta["grounding"] = True
    spans = reader.spans("time_spans", required=bool(meta.get("grounding")))
    return reader.record(
        id_field="problem_id",
        question=reader.text("problem"),
        answer=reader.letter("solution", answer, options) if options else answer,
        kind=kind,
        options=options,
        media=(reader.media(reader.choice("data_type", MEDIA_KINDS), "path"),),
        time_spans=spans,
        source=reader.raw.get("data_source") or reader.raw.get("dataset_name") or "Video-R1",
        meta=meta,
    )


def _seed_bench(reader: "_Reader", seed: int) -> Record:
    question = reader.text("question")
    if "golden_choice_idx" in reader.raw:
        options = tuple(reader.text(f"choice_{letter}") for letter in "abcd")
        answer = reader.position("golden_choice_idx", len(options))
    else:
        right, wrong = reader.text("answer"), reader.texts("negative_answers")
        wrong = tuple(dict.fromkeys(text for text in wrong if text != right))
        if len(wrong) < SEED_NEGATIVES:
            reader.fail("negative_answers", f"at least {SEED_NEGATIVES} texts other than the answer", list(wrong))
        # A generator per record: its options do not change when the file is cut, filtered or reordered.
        chance = random.Random(f"{seed}/{reader.id('sample_id')}")
        drawn = [right, *chance.sample(wrong, SEED_NEGATIVES)]
        chance.shuffle(drawn)
        options, answer = tuple(drawn), LETTERS[drawn.index(right)]
    # The released archives keep a folder per source; users who unpack one source have its files at the root.
    source = reader.text("video_source")
    folders = (source, ".") if (reader.root / source).is_dir() else (".", source)
    names = (("video", "video_basename"), ("image", "current_observation_basename"))
    media = tuple(reader.media(kind, name, folders) for kind, name in names)
    extra = ("task_goal", "task_progress_metadata", "video_source")
    return reader.record(
        id_field="sample_id",
        question=question,
        answer=answer,
        kind="multiple choice",
        options=_lettered(options),
        media=media,
        source="SEED-Bench-R1",
        meta={key: reader.raw[key] for key in extra if key in reader.raw},
    )


def _next_qa(reader: "_Reader") -> Record:
    options = reader.options("options")
    meta = {key: reader.raw[key] for key in ("qtype",) if key in reader.raw}
    spans = reader.spans("time_clues")
    if spans:
        meta["grounding"] = True
    return reader.record(
        id_field="qid",
        question=reader.text("question"),
        answer=reader.position("answer", len(options)),
        kind="multiple choice",
        options=options,
        media=(reader.media("video", "video_path"),),
        time_spans=spans,
        source="NExT-GQA" if spans else "NExT-QA",
        meta=meta,
    )


def _next_gqa_tagged(reader: "_Reader") -> Record:
    """The form with ``problem`` and ``solution``; its options may stand in the problem's text."""
    options = reader.options("options") if "options" in reader.raw else ()
    solution = reader.text("solution")
    tagged = _TAGGED.findall(solution)
    if len(tagged) > 1:
        reader.fail("solution", "one <answer>...</answer>", solution)
    path_field = next((name for name in ("video_path", "path", "video") if name in reader.raw), "video_path")
    span_fields = [name for name in ("time_clues", "glue", "time_spans") if name in reader.raw]
    spans = reader.spans(span_fields[0], required=True) if span_fields else ()
    return reader.record(
        id_field="qid" if "qid" in reader.raw else "problem_id",
        question=reader.text("problem"),
        answer=reader.letter("solution", tagged[0] if tagged else solution, options),
        kind="multiple choice",
        options=options,
        media=(reader.media("video", path_field),),
        time_spans=spans,
        source="NExT-GQA",
        meta={"grounding": True} if spans else {},
    )


def _grounding(reader: "_Reader") -> Record:
    options = reader.options("options")
    return reader.record(
        id_field="id",
        question=reader.text("question"),
        answer=reader.letter("answer", reader.text("answer"), options),
        kind="multiple choice",
        options=options,
        media=(reader.media("video", "video"),),
        time_spans=reader.spans("glue", required=True),
        source="VideoChat-R1",
        meta={"grounding": True},
    )


def _lettered(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


@dataclass(frozen=True)
class _Reader:
    """Takes typed fields out of one raw record; each method raises DataError naming file, record and field."""

    raw: dict[str, Any]
    file: Path
    index: int
    root: Path

    def fail(self, name: str, expected: str, got: Any) -> NoReturn:
        known = next((self.raw[key] for key in ("problem_id", "sample_id", "qid", "id") if key in self.raw), None)
        came = "no such field" if name not in self.raw else f"{got!r}"[:200]
        raise DataError(
            f"{self.file}: record {self.index} (id {known!r}): field `{name}`: expected {expected}, got {came}."
        )

    def id(self, name: str) -> str:
        """The record's id as text; its index where the format has none in this record."""
        value = self.raw.get(name, self.index)
        if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
            self.fail(name, "a number or text", value)
        return str(value)

    def text(self, name: str) -> str:
        value = self.raw.get(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "text", value)
        return value.strip()

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            self.fail(name, "a list of texts", value)
        return tuple(text.strip() for text in value)

    def flag(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            self.fail(name, "true or false", value)
        return value

    def choice(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.raw.get(name)
        if value not in allowed:
            self.fail(name, f"one of {', '.join(allowed)}", value)
        return str(value)

    def options(self, name: str) -> tuple[str, ...]:
        """Two or more options, lettered "A. text" whether they came as "A. text", "(A) text" or "text"."""
        texts = self.texts(name)
        if not 2 <= len(texts) <= len(LETTERS):
            self.fail(name, f"2 to {len(LETTERS)} options", list(texts))
        matches = [_LETTERED.fullmatch(text) for text in texts]
        own = [bool(match) and match[1] == letter for match, letter in zip(matches, LETTERS, strict=False)]  # type: ignore[index]
        if any(own) and not all(own):
            self.fail(name, "the letters A, B, C, ... in order, or none", list(texts))
        return _lettered(tuple(match[2] for match in matches if match) if all(own) else texts)

    def letter(self, name: str, answer: str, options: tuple[str, ...]) -> str:
        """The option letter that ``answer`` names: "C", "(C)", "C." or "C. text"."""
        allowed = LETTERS[: len(options)] if options else LETTERS
        match = re.fullmatch(r"\(?([A-Z])\)?(?:[.:)\s].*)?", answer.strip(), re.DOTALL)
        if match is None or match[1] not in allowed:
            self.fail(name, f"one of the letters {allowed[0]} to {allowed[-1]}", answer)
        return match[1]

    def position(self, name: str, count: int) -> str:
        """The letter of a 0-based option index, given as a number, its digits, or already a letter."""
        value = self.raw.get(name)
        text = str(value).strip().strip("()").upper() if isinstance(value, (int, str)) else ""
        number = int(text) if text.isdecimal() else LETTERS.find(text) if len(text) == 1 else -1
        if isinstance(value, bool) or not 0 <= number < count:
            self.fail(name, f"an option's index, 0 to {count - 1}, or its letter", value)
        return LETTERS[number]

    def seconds(self, name: str) -> float | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not _is_number(value) or value <= 0:
            self.fail(name, "seconds, more than 0", value)
        return float(value)

    def spans(self, name: str, *, required: bool = False) -> tuple[tuple[float, float], ...]:
        """Sorted (start, end) seconds, 0 <= start < end; empty where the field is absent and not required."""
        value = self.raw.get(name)
        if value is None and not required:
            return ()
        expected = "a list of [start, end] in seconds, 0 <= start < end"
        if not isinstance(value, list) or (required and not value):
            self.fail(name, expected, value)
        for pair in value:
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)):
                self.fail(name, expected, value)
            if not 0 <= pair[0] < pair[1]:
                self.fail(name, expected, value)
        return tuple(sorted((float(start), float(end)) for start, end in value))

    def media(self, kind: str, name: str, folders: tuple[str, ...] = (".",)) -> Media:
        """The medium a field names, in the first of ``folders`` under the data root that has it, else in the first."""
        places = [self.root / folder / self.text(name) for folder in folders]
        return Media(kind, next((place for place in places if place.is_file()), places[0]), name)

    def record(self, *, id_field: str, meta: dict[str, Any], **values: Any) -> Record:
        """A Record with the fields that every format shares."""
        place = {"file": str(self.file), "index": self.index}
        return Record(id=self.id(id_field), duration=self.seconds("duration"), meta=meta | place, **values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
