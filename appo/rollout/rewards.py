"""Rewards: what a response earns for its answer, its format, the moments it names and its length.

A reward takes the responses and the record of each, and gives one number per response, or None where it does not apply
to the record (temporal IoU of a record without time spans). What the model got wrong is 0; what the data got wrong is
an error. Specification: section 8.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.data.records import Record

Reward = Callable[[list[str], list[Record]], list[float | None]]
Interval = tuple[float, float]

REWARDS: dict[str, Reward] = {}

_TAG = r"((?:(?!</?(?:think|answer|time)>).)*)"  # what stands between tags: text without any tag
_FORMAT = re.compile(rf"\s*<think>{_TAG}</think>\s*<answer>{_TAG}</answer>\s*", re.DOTALL)
_TIME_FORMAT = re.compile(
    rf"\s*<think>{_TAG}</think>\s*"
    rf"(?:<answer>{_TAG}</answer>\s*<time>{_TAG}</time>|<time>{_TAG}</time>\s*<answer>{_TAG}</answer>)\s*",
    re.DOTALL,
)
_LETTER = re.compile(r"\(([A-Z])\)\s*(.*)|([A-Z])(?:[.:)]\s*(.*))?", re.DOTALL | re.IGNORECASE)
_SECONDS = r"(\d+(?:\.\d+)?|\.\d+)"
_SPAN = re.compile(rf"\s*{_SECONDS}\s*s?\s+to\s+{_SECONDS}\s*s?\s*")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")  # not a LaTeX command
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def register(name: str) -> Callable[[Reward], Reward]:
    """Make a reward known under ``name``, for ``combine`` and for configuration files."""

    def add(reward: Reward) -> Reward:
        if name in REWARDS:
            raise ValueError(f"register: `name`: expected a new name, got {name!r}. Choose another.")
        REWARDS[name] = reward
        return reward

    return add


def per_response(score: Callable[[str, Record], float | None]) -> Reward:
    """A reward from a function of one response and its record."""

    @functools.wraps(score)
    def reward(completions: list[str], records: list[Record]) -> list[float | None]:
        if len(completions) != len(records):
            raise ValueError(
                f"{score.__name__}: `records`: expected one per completion, {len(completions)}, got {len(records)}. "
                "Repeat the record for each response of its group."
            )
        return [score(text, record) for text, record in zip(completions, records, strict=True)]

    return reward


def tagged(text: str, tag: str) -> str | None:
    """What stands in the one ``<tag>...</tag>`` of ``text``; None where there is none, or more than one."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, end = text.index(opening) + len(opening), text.index(closing)
    return text[start:end].strip() if start <= end else None


@register("multiple_choice")
@per_response
def multiple_choice(completion: str, record: Record) -> float | None:
    """1 where the only answer tag names the right option: "B", "(B)", "B.", or "B. a ball" with option B's own text."""
    if record.kind != "multiple choice":
        return None
    match = _LETTER.fullmatch(tagged(completion, "answer") or "")
    if match is None:
        return 0.0
    letter, rest = (match[1] or match[3]).upper(), _plain(match[2] or match[4] or "")
    texts = {option[:1]: _plain(option[2:]) for option in record.options}
    return float(letter == record.answer and (not rest or rest == texts.get(letter)))


@register("math")
@per_response
def mathematical(completion: str, record: Record) -> float | None:
    """1 where math-verify finds the answer equal to the record's number or expression.

    Raises ValueError when the record's own answer cannot be parsed.
    """
    if record.kind not in ("numerical", "math"):
        return None
    import math_verify

    gold = _parse_math(record.answer)
    if all(isinstance(reading, str) for reading in gold):
        raise ValueError(f"{record.place}: `answer`: expected a number or expression, got {record.answer!r}.")
    answer = tagged(completion, "answer") or ""
    if _WORD.search(answer) and len(_NUMBER.findall(answer)) > 1 and "\\boxed" not in answer:
        return 0.0  # "3 or 4" names no answer; math-verify would take the last number
    return float(bool(answer) and math_verify.verify(gold, _parse_math(answer)))


@register("regression")
@per_response
def regression(completion: str, record: Record) -> float | None:
    """1 - |answer - truth| / |truth|, at least 0, for an answer with exactly one number in it; else 0."""
    if record.kind != "regression":
        return None
    truth, answer = _number(record.answer), _number(tagged(completion, "answer") or "")
    if truth is None:
        raise ValueError(f"{record.place}: `answer`: expected one number, got {record.answer!r}.")
    if answer is None:
        return 0.0
    return max(0.0, 1 - abs(answer - truth) / abs(truth)) if truth else float(answer == 0)


@register("ocr")
@per_response
def ocr(completion: str, record: Record) -> float | None:
    """1 - word error rate (jiwer), at least 0: word edits between answer and truth per word of the truth."""
    if record.kind != "ocr":
        return None
    import jiwer

    answer = tagged(completion, "answer")
    return max(0.0, 1 - jiwer.wer(record.answer, answer)) if answer else 0.0


@register("rouge")
@per_response
def rouge(completion: str, record: Record) -> float | None:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L (stemmed); without ROUGE-2 where the truth is a single word."""
    if record.kind != "free-form":
        return None
    answer = tagged(completion, "answer")
    if not answer:
        return 0.0
    scores = _rouge_scorer().score(record.answer, answer)
    names = ("rouge1", "rouge2", "rougeL") if len(record.answer.split()) > 1 else ("rouge1", "rougeL")
    return sum(scores[name].fmeasure for name in names) / len(names)


ACCURACY_BY_KIND = {
    "multiple choice": multiple_choice,
    "numerical": mathematical,
    "math": mathematical,
    "regression": regression,
    "ocr": ocr,
    "free-form": rouge,
}


@register("accuracy")
@per_response
def accuracy(completion: str, record: Record) -> float | None:
    """How right the answer is, 0 to 1, by the measure of the record's kind. Never None."""
    return ACCURACY_BY_KIND[record.kind]([completion], [record])[0]


@register("format")
@per_response
def response_format(completion: str, record: Record) -> float | None:
    """1 where the response is <think>...</think><answer>...</answer> and nothing else.

    A record that asks for time also needs one <time>8.4 to 12.5, 25 to 30.2</time> before or after the answer.
    """
    if not record.asks_time:
        return float(_FORMAT.fullmatch(completion) is not None)
    return float(_TIME_FORMAT.fullmatch(completion) is not None and time_spans(completion) is not None)


@register("temporal_iou")
@per_response
def temporal_iou(completion: str, record: Record) -> float | None:
    """Intersection over union, in seconds, of the spans in <time> and the record's; 0 where <time> cannot be read."""
    if not record.time_spans:
        return None
    spans = time_spans(completion)
    return 0.0 if spans is None else interval_iou(spans, record.time_spans)


def time_spans(completion: str) -> list[Interval] | None:
    """The (start, end) seconds of "<time>8.4 to 12.5, 25 to 30.2</time>"; None where any of it is not of this form."""
    spans = [_SPAN.fullmatch(part) for part in (tagged(completion, "time") or "").split(",")]
    found = [(float(match[1]), float(match[2])) for match in spans if match]
    return found if len(found) == len(spans) and all(start <= end for start, end in found) else None


def interval_iou(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """Intersection over union of two sets of intervals in continuous time; overlaps within a set count once."""
    first, second = _union(first), _union(second)
    overlap = sum(max(0.0, min(b, d) - max(a, c)) for a, b in first for c, d in second)
    total = sum(b - a for a, b in [*first, *second]) - overlap
    return overlap / total if total > 0 else 0.0


def think_length(minimum: int = 20, maximum: int = 300) -> Reward:
    """A reward for the number of words in <think>: 1 within minimum..maximum, words / minimum below, and above falling
    to 0 at twice the maximum; 0 without exactly one <think>."""
    if not 0 < minimum <= maximum:
        raise ValueError(f"think_length: expected 0 < minimum <= maximum, got {minimum} and {maximum}.")

    def think_length(completion: str, record: Record) -> float | None:
        words = len((tagged(completion, "think") or "").split())
        return min(1.0, words / minimum, max(0.0, 2 - words / maximum))

    return per_response(think_length)


register("think_length")(think_length())


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment (n,): 0 up to max_length - buffer tokens, falling to -1 at max_length, -1 beyond.

    lengths: (n,) response lengths in tokens. Raises ValueError unless 0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"overlong_penalty: `buffer`: expected 1 to max_length = {max_length} tokens, got {buffer}. "
            "Leave the penalty out instead of a buffer of 0."
        )
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1, 0)


@dataclass(frozen=True)
class Rewards:
    """total: (n,) fp32, the weighted sum; by_name: each reward (n,) fp32, unweighted, NaN where it does not apply."""

    total: Tensor
    by_name: dict[str, Tensor]


def combine(names_and_scales: Mapping[str, float], completions: list[str], records: list[Record]) -> Rewards:
    """The weighted sum of the named rewards per response; a reward that does not apply to a record adds nothing to it.

    Raises:
        ValueError: an unknown name, a scale that is not finite, a reward function that returns something else than one
            finite number or None per response, or a record to which none of the rewards applies.
    """
    if not names_and_scales:
        raise ValueError("combine: `names_and_scales`: expected at least one reward, got none. Pass {'accuracy': 1.0}.")
    if len(completions) != len(records):
        raise ValueError(f"combine: `records`: expected one per completion, {len(completions)}, got {len(records)}.")
    by_name = {}
    for name, scale in names_and_scales.items():
        if not math.isfinite(scale):
            raise ValueError(f"combine: scale of `{name}`: expected a finite number, got {scale!r}.")
        by_name[name] = _checked(name, get_reward(name)(completions, records), records)
    applies = torch.stack([~values.isnan() for values in by_name.values()]).any(dim=0)
    for record, ok in zip(records, applies.tolist(), strict=True):
        if not ok:
            raise ValueError(
                f"{record.place}: none of the rewards {', '.join(by_name)} applies to a record of kind "
                f"{record.kind!r}. Add `accuracy`, which applies to every kind."
            )
    scaled = [scale * by_name[name].nan_to_num(nan=0.0) for name, scale in names_and_scales.items()]
    return Rewards(torch.stack(scaled).sum(dim=0), by_name)


def get_reward(name: str) -> Reward:
    """The reward registered under ``name``; raises ValueError naming the ones there are."""
    if name not in REWARDS:
        close = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else " Add your own with appo.rewards.register."
        raise ValueError(f"reward: expected one of {', '.join(sorted(REWARDS))}, got {name!r}.{hint}")
    return REWARDS[name]


def _checked(name: str, values: list[float | None], records: list[Record]) -> Tensor:
    if len(values) != len(records):
        raise ValueError(f"reward {name!r}: expected one value per response, {len(records)}, got {len(values)}.")
    for value, record in zip(values, records, strict=True):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"reward {name!r}: {record.place}: expected a finite number or None, got {value!r}.")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def _union(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _plain(text: str) -> str:
    """Text as it is compared with an option: without case, outer spaces and closing punctuation."""
    return " ".join(text.casefold().split()).strip(" .:)")


def _number(text: str) -> float | None:
    """The one number in ``text``, thousands separators allowed; None where there is none, or more than one."""
    found = _NUMBER.findall(text)
    return float(found[0].replace(",", "")) if len(found) == 1 else None


def _parse_math(text: str) -> list[Any]:
    """math-verify's reading: a bare expression such as x^2 + 1 is read as LaTeX, prose as it is."""
    import math_verify

    if "$" in text or "\\boxed" in text:
        return math_verify.parse(text)
    as_prose = math_verify.parse(text) if _WORD.search(text) else []
    return as_prose or math_verify.parse(f"${text}$")


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
