"""The benchmarks: their prompts and rules, read in the code of their authors and of lmms-eval 75571cfe (2026-08)."""

import math
from pathlib import Path

import numpy as np

from appo.data.math_answers import number
from appo.data.records import DataError, Record
from appo.evaluation import reading
from appo.evaluation.benchmark import Benchmark, Facet, Scores, by_meta, choice, lettered
from appo.evaluation.reading import answer_part

DIRECT = {"max_new_tokens": 32}  # answers without reasoning
LETTER = "Answer with the option's letter from the given choices directly."


def _level(record: Record) -> str:
    """L1 to L3 of validation_L1.jsonl to validation_L3.jsonl."""
    name = Path(record.meta["file"]).name
    return next((level for level in ("L1", "L2", "L3") if f"_{level}." in name), "")


def _reasoned(record: Record) -> str:
    return (
        f"{record.question}\n{lettered(record)}\n Output the thinking process in <think> </think> and final answer in "
        "<answer> </answer> tags, i.e., <think> reasoning process here </think><answer> answer here </answer>. "
    )


SEED_BENCH_R1 = Benchmark(
    name="seed-bench-r1",
    title="SEED-Bench-R1",
    paper="arXiv 2503.24376",
    rules="TencentARC/SEED-Bench-R1 infer.py",
    departs="answers are greedy (`eval_samples=1` samples at temperature 1, as there), and math-verify is not asked "
    "whether a letter equals a letter.",
    files=("validation_L[123].jsonl", "annotations/validation_L[123].jsonl"),
    sources=("SEED-Bench-R1",),
    ask=_reasoned,
    score=lambda text, record: choice(reading.leading_character)(reading.first_answer(text), record),
    facets=(Facet("level", _level),),
    settings={"max_new_tokens": 256},
)


def _direct(record: Record) -> str:
    return f"{record.question}\n{lettered(record)}\n{LETTER}"


PERCEPTION_TEST = Benchmark(
    name="perception-test",
    title="Perception Test, multiple choice",
    paper="arXiv 2305.13786",
    rules="lmms-eval perceptiontest_val_mc",
    files=("mc_question_val*.parquet", "mc_question_val/*.parquet", "*mc_question_valid*.json"),
    sources=("Perception Test",),
    ask=_direct,
    score=lambda text, record: choice(reading.first_lone_letter)(answer_part(text), record),
    facets=(by_meta("area", "task"), by_meta("reasoning", "reasoning")),
    settings=DIRECT,
)

_TYPES = {"C": "causal", "T": "temporal", "D": "descriptive"}

NEXT_QA = Benchmark(
    name="next-qa",
    title="NExT-QA, multiple choice",
    paper="arXiv 2105.08276",
    rules="lmms-eval nextqa_mc_test; accuracy by question type as in the paper",
    departs="the prompt ends with a line that asks for the letter, there with the options; an answer that names no "
    "option is wrong, there one is drawn.",
    files=("test.csv", "val.csv", "MC/test*.parquet", "nextqa/test.csv", "nextqa/val.csv"),
    sources=("NExT-QA",),
    ask=_direct,
    score=lambda text, record: choice(reading.last_listed)(answer_part(text), record),
    facets=(
        Facet("group", lambda record: _TYPES.get(str(record.meta.get("qtype", ""))[:1], "")),
        by_meta("type", "qtype"),
    ),
    settings=DIRECT,
)


def _has_spans(record: Record) -> None:
    if not record.time_spans:
        raise DataError(
            f"{record.place}: field `location`: expected the spans of a NExT-GQA question, got none. Lay gsub_val.json "
            "or gsub_test.json, named after the table, beside it."
        )


def _grounded(text: str, record: Record) -> Scores:
    """NExT-GQA (arXiv 2309.01327): the span named against each true one, the best counts."""
    letter, span = reading.named_option(answer_part(text), record), reading.named_span(text)
    truths = record.meta.get("location", record.time_spans)
    overlaps = [_overlap(truth, span) for truth in truths] if span else [(0.0, 0.0)]
    iou, iop = max(iou for iou, _ in overlaps), max(iop for _, iop in overlaps)
    right = float(letter == record.answer)
    return {
        "Acc@GQA": right * (iop >= 0.5),
        "Acc@QA": right,
        "mIoP": iop,
        "IoP@0.3": float(iop >= 0.3),
        "IoP@0.5": float(iop >= 0.5),
        "mIoU": iou,
        "IoU@0.3": float(iou >= 0.3),
        "IoU@0.5": float(iou >= 0.5),
        "unreadable": float(letter is None),
        "no span": float(span is None),
    }


def _overlap(truth: tuple[float, float], span: tuple[float, float]) -> tuple[float, float]:
    """(intersection over the hull of both, intersection over the span) of two spans in seconds.

    A span of one moment has an intersection over itself of 1 inside the truth.
    """
    (first, last), (start, end) = truth, span
    if start == end:
        return 0.0, float(first <= start <= last)
    inside = max(0.0, min(last, end) - max(first, start))
    return inside / (max(last, end) - min(first, start)), inside / (end - start)


NEXT_GQA = Benchmark(
    name="next-gqa",
    title="NExT-GQA",
    paper="arXiv 2309.01327",
    rules="doc-doc/NExT-GQA code/TempGQA/eval_ground.py",
    departs="a response without a span counts as 0; the released code leaves it out. Several spans are taken as "
    "the one from the first to the last. No prompt is published for written answers: it is that of training.",
    files=("test.csv", "val.csv", "nextgqa/test.csv", "nextgqa/val.csv"),
    sources=("NExT-GQA",),
    score=_grounded,
    headline=("Acc@GQA", "Acc@QA", "mIoP", "IoP@0.3", "IoP@0.5", "mIoU", "IoU@0.3", "IoU@0.5"),
    facets=(by_meta("type", "qtype"),),
    needs=_has_spans,
)

_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_DIRECTIONS = "object_rel_direction"


def _spatial(text: str, record: Record) -> Scores:
    """VSI-Bench (arXiv 2412.14171): right or wrong for options, mean relative accuracy for numbers."""
    text = answer_part(text)
    if record.options:
        letter = reading.first_word(text, record)
        return {"score": float(letter == record.answer), "unreadable": float(letter is None)}
    value, truth = reading.leading_number(text), number(record.answer)
    if truth is None or truth == 0:
        raise DataError(f"{record.place}: `ground_truth`: expected a number other than 0, got {record.answer!r}.")
    if value is None:
        return {"score": 0.0, "unreadable": 1.0}
    return {"score": relative_accuracy(value, truth), "unreadable": 0.0}


def relative_accuracy(value: float, truth: float) -> float:
    """The share of thresholds 0.5, 0.55, ..., 0.95 at which |value - truth| / truth <= 1 - threshold (MRA)."""
    error = abs(value - truth) / truth if math.isfinite(value) else math.inf
    return float((error <= 1 - _THRESHOLDS).mean())


def _spatial_task(record: Record) -> str:
    task = str(record.meta.get("task", ""))
    return _DIRECTIONS if task.startswith(_DIRECTIONS) else task


def _spatial_question(record: Record) -> str:
    start = f"These are frames of a video.\n{record.question}\n"
    if record.options:
        return f"{start}Options:\n{lettered(record)}\n{LETTER}"
    return f"{start}Please answer the question using a single word or phrase."


VSI_BENCH = Benchmark(
    name="vsi-bench",
    title="VSI-Bench",
    paper="arXiv 2412.14171",
    rules="vision-x-nyu/thinking-in-space lmms_eval/tasks/vsibench",
    files=("test*.jsonl", "test*.json", "test*.parquet"),
    sources=("VSI-Bench",),
    ask=_spatial_question,
    score=_spatial,
    headline=("score",),
    facets=(Facet("task", _spatial_task),),
    averaged=lambda record: (_spatial_task(record), str(record.meta.get("task", ""))),
    settings=DIRECT,
)

MVBENCH = Benchmark(
    name="mvbench",
    title="MVBench",
    paper="arXiv 2311.17005",
    rules="OpenGVLab/Ask-Anything video_chat2/mvbench.ipynb",
    departs="an empty answer is wrong, there it is right.",
    files=("json/*.json", "*.json"),
    sources=("MVBench",),
    ask=lambda record: (
        f"Question: {record.question}\nOptions:\n{lettered(record, '({letter}) {text}')}\nOnly give the best option."
    ),
    score=lambda text, record: choice(reading.opening_option)(answer_part(text), record),
    facets=(by_meta("task", "task"),),
    averaged=lambda record: (str(record.meta.get("task", "")), ""),
    settings=DIRECT | {"max_frames": 16},
)

VIDEO_MME = Benchmark(
    name="video-mme",
    title="Video-MME, without subtitles",
    paper="arXiv 2405.21075",
    rules="the prompt and answer rule of the benchmark's page and evaluation script",
    departs="an answer without a letter is wrong, there it is left out of the mean; 'Best answer:' and 'The best "
    "option is' in front of a letter are passed over, there the B of the first is read.",
    files=("videomme/test*.parquet", "test*.parquet", "*.json"),
    sources=("Video-MME",),
    ask=lambda record: (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        f"letter (A, B, C, or D) of the correct option.\n{record.question}\n{lettered(record)}\nThe best answer is:"
    ),
    score=lambda text, record: choice(reading.first_letter("ABCD"))(answer_part(text), record),
    facets=(by_meta("length", "length"), by_meta("domain", "domain"), by_meta("task", "task")),
    settings=DIRECT,
)

LONG_VIDEO_BENCH = Benchmark(
    name="longvideobench",
    title="LongVideoBench, without subtitles",
    paper="arXiv 2407.15754",
    rules="lmms-eval longvideobench_val_v",
    departs="an answer that names no option is wrong; there one is drawn.",
    files=("lvb_val.json", "validation*.parquet"),
    sources=("LongVideoBench",),
    ask=lambda record: _direct(record) + "\n",
    score=lambda text, record: choice(reading.first_letter("ABCDE"))(answer_part(text), record),
    facets=(by_meta("length in s", "length"), by_meta("category", "task")),
    settings=DIRECT,
)

_FORMS = {
    "multi-choice": (reading.matched_choice, "Please directly give the best option:"),
    "yes_no": (reading.yes_or_no, "Please answer yes or no:"),
    "caption_matching": (reading.matched_caption, "Please directly give the best option:"),
}


def _is_scored(record: Record) -> None:
    if record.meta["form"] not in _FORMS:
        raise DataError(
            f"{record.place}: expected a question of {', '.join(_FORMS)}, got one of {record.meta['form']}, which is "
            "scored by a language model. Leave captioning.json out."
        )


TEMP_COMPASS = Benchmark(
    name="tempcompass",
    title="TempCompass, without caption generation",
    paper="arXiv 2403.00476",
    rules="llyx97/TempCompass eval_*.py with --disable_llm; prompts of lmms-eval",
    files=tuple(
        " ".join(f"{folder}{form}.json" for form in ("multi-choice", "yes_no", "caption_matching"))
        for folder in ("questions/", "")
    ),
    sources=("TempCompass",),
    ask=lambda record: f"{record.meta['asked']}\n{_FORMS[record.meta['form']][1]}",
    score=lambda text, record: choice(_FORMS[record.meta["form"]][0])(answer_part(text), record),
    facets=(by_meta("form", "form"), by_meta("dimension", "task")),
    needs=_is_scored,
    settings=DIRECT,
)

BENCHMARKS = {
    each.name: each
    for each in (
        SEED_BENCH_R1, PERCEPTION_TEST, NEXT_GQA, NEXT_QA, VSI_BENCH,
        MVBENCH, VIDEO_MME, LONG_VIDEO_BENCH, TEMP_COMPASS,
    )
}  # fmt: skip
