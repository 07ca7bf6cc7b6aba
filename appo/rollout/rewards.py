"""Rewards: what a response earns for its answer, its format, the moments it names and its length.

A reward takes the responses and the record of each, and gives one number per response, or None where it does not apply
to the record (temporal IoU of a record without time spans). What the model got wrong is 0; what the data got wrong is
an error (docs/data.md).
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.data.math_answers import equal, number, reads
from appo.data.records import DataError, Record
from appo.data.words import spaced, split_words
from appo.rollout.lenient import lenient as read_leniently
from appo.rollout.registry import REWARDS as REWARDS
from appo.rollout.registry import UNREADABLE as UNREADABLE
from appo.rollout.registry import Reward, get_reward, per_response, register
from appo.rollout.tags import interval_iou, sections, tagged, time_spans

_LETTER = re.compile(r"\(([A-Z])\)\s*(.*)|([A-Z])(?:[.:)]\s*(.*))?", re.DOTALL | re.IGNORECASE)
_LARGEST = torch.finfo(torch.float32).max


@register("multiple_choice")
@per_response
def multiple_choice(completion: str, record: Record) -> float | None:
    """1 where the only answer tag names the right option: "B", "(B)", "B.", or "B. a ball" with option B's own text.

    Without a list of options any text may stand behind the letter.
    """
    if record.kind != "multiple choice":
        return None
    match = _LETTER.fullmatch(tagged(completion, "answer") or "")
    if match is None:
        return UNREADABLE
    letter, rest = (match[1] or match[3]).upper(), _plain(match[2] or match[4] or "")
    texts = {option[:1]: _plain(option[2:]) for option in record.options}
    return float(letter == record.answer and (not rest or not texts or rest == texts.get(letter)))


@register("math")
@per_response
def mathematical(completion: str, record: Record) -> float | None:
    """1 where the answer is the record's number, with or without a unit, or math-verify finds the expressions equal.

    Raises DataError where the record's own answer cannot be read. Safe in any thread.
    """
    if record.kind not in ("numerical", "math"):
        return None
    answer = tagged(completion, "answer")
    found = equal(record.answer, answer) if answer else None
    if not found and not _readable_truth(record.answer):
        raise DataError(f"{record.place}: `answer`: expected a number or expression, got {record.answer!r}.")
    return UNREADABLE if found is None else float(found)


@register("regression")
@per_response
def regression(completion: str, record: Record) -> float | None:
    """1 - |answer - truth| / |truth|, at least 0, for an answer with exactly one number in it; else 0."""
    if record.kind != "regression":
        return None
    truth, answer = number(record.answer), number(tagged(completion, "answer") or "")
    if truth is None:
        raise DataError(f"{record.place}: `answer`: expected one number, got {record.answer!r}.")
    if answer is None:
        return UNREADABLE
    return max(0.0, 1 - abs(answer - truth) / abs(truth)) if truth else float(answer == 0)


@register("ocr")
@per_response
def ocr(completion: str, record: Record) -> float | None:
    """1 - word error rate (jiwer), at least 0: word edits between answer and truth per word of the truth.

    Scripts without spaces between words (Chinese, Japanese, Thai) are compared by characters.
    """
    if record.kind != "ocr":
        return None
    import jiwer

    answer = tagged(completion, "answer")
    return max(0.0, 1 - jiwer.wer(spaced(record.answer), spaced(answer))) if answer else UNREADABLE


@register("rouge")
@per_response
def rouge(completion: str, record: Record) -> float | None:
    """Mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, without ROUGE-2 where the truth is a single word.

    English words are stemmed, as rouge-score does; other scripts are split as `split_words` says.
    """
    if record.kind != "free-form":
        return None
    answer = tagged(completion, "answer")
    if not answer:
        return UNREADABLE
    words = split_words(record.answer)
    if not words:  # "?!": nothing that ROUGE counts
        return float(answer.split() == record.answer.split())
    scores = _rouge_scorer().score(record.answer, answer)
    names = ("rouge1", "rouge2", "rougeL") if len(words) > 1 else ("rouge1", "rougeL")
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
    """The answer's correctness, 0 to 1, by the measure of the record's kind. Never None."""
    return ACCURACY_BY_KIND[record.kind]([completion], [record])[0]


@register("format")
@per_response
def response_format(completion: str, record: Record) -> float | None:
    """1 where the response is <think>...</think><answer>...</answer> and nothing else.

    A record that asks for time also needs one <time>8.4 to 12.5, 25 to 30.2</time> before or after the answer.
    """
    names = sections(completion)
    if not record.asks_time:
        return float(names == ["think", "answer"])
    right = names in (["think", "answer", "time"], ["think", "time", "answer"])
    return float(right and time_spans(completion) is not None)


@register("temporal_iou")
@per_response
def temporal_iou(completion: str, record: Record) -> float | None:
    """Intersection over union, in seconds, of the spans in <time> and the record's; 0 where <time> cannot be read."""
    if not record.time_spans:
        return None
    spans = time_spans(completion)
    return UNREADABLE if spans is None else interval_iou(spans, record.time_spans)


def think_length(minimum: int = 20, maximum: int = 300) -> Reward:
    """A reward for the number of words in <think>: 1 within minimum..maximum, words / minimum below, and above falling
    to 0 at twice the maximum; 0 without exactly one <think>."""
    if not 0 < minimum <= maximum:
        raise ValueError(f"think_length: expected 0 < minimum <= maximum, got {minimum} and {maximum}.")

    def think_length(completion: str, record: Record) -> float | None:
        thought = tagged(completion, "think")
        if thought is None:
            return UNREADABLE
        words = len(thought.split())
        return min(1.0, words / minimum, max(0.0, 2 - words / maximum))

    return per_response(think_length)


register("think_length")(think_length())
_BUILT_IN = frozenset(REWARDS)


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
    """total: (n,) fp32, the weighted sum; by_name: each reward (n,) fp32, unweighted, NaN where it does not apply;
    unreadable: (n,) bool for each reward, where a response had no answer that it could read (it is 0 there)."""

    total: Tensor
    by_name: dict[str, Tensor]
    unreadable: dict[str, Tensor] = field(default_factory=dict)


def combine(
    reward_weights: Mapping[str, float], completions: list[str], records: list[Record], *, lenient: bool = False
) -> Rewards:
    """The weighted sum of the named rewards per response; a reward that does not apply to a record adds nothing to it.

    reward_weights: a registered name, or "FILE.py:NAME" for a function of the user's (`get_reward`), and its weight.
    lenient: read answers as models write them (`appo.rollout.lenient`); rewards of the user's get the text as it is.

    Raises:
        ValueError: an unknown name, a scale that is not finite, a reward function that returns something else than one
            finite number or None per response, or a record to which none of the rewards applies.
    """
    if not reward_weights:
        raise ValueError("combine: `reward_weights`: expected at least one reward, got none. Pass {'accuracy': 1.0}.")
    if len(completions) != len(records):
        raise ValueError(f"combine: `records`: expected one per completion, {len(completions)}, got {len(records)}.")
    by_name, unreadable = {}, {}
    for name, scale in reward_weights.items():
        if not math.isfinite(scale):
            raise ValueError(f"combine: scale of `{name}`: expected a finite number, got {scale!r}.")
        texts = completions
        if lenient and name in _BUILT_IN:  # the format reward asks for tags: none are put in for it
            pairs = zip(completions, records, strict=True)
            texts = [read_leniently(text, record, anywhere=name != "format") for text, record in pairs]
        values = get_reward(name)(texts, records)
        by_name[name] = _checked(name, values, records)
        unreadable[name] = torch.tensor([value is UNREADABLE for value in values], dtype=torch.bool)
    applies = torch.stack([~values.isnan() for values in by_name.values()]).any(dim=0)
    for record, ok in zip(records, applies.tolist(), strict=True):
        if not ok:
            raise ValueError(
                f"{record.place}: none of the rewards {', '.join(by_name)} applies to a record of kind "
                f"{record.kind!r}. Add `accuracy`, which applies to every kind."
            )
    scaled = [scale * by_name[name].nan_to_num(nan=0.0) for name, scale in reward_weights.items()]
    total = torch.stack(scaled).sum(dim=0)
    if not bool(total.isfinite().all()):
        raise ValueError(f"combine: expected a sum of rewards within float32, got {total.tolist()}. Scale them down.")
    return Rewards(total, by_name, unreadable)


def _checked(name: str, values: list[float | None], records: list[Record]) -> Tensor:
    if len(values) != len(records):
        raise ValueError(f"reward {name!r}: expected one value per response, {len(records)}, got {len(values)}.")
    for value, record in zip(values, records, strict=True):
        if value is not None and not (isinstance(value, (int, float)) and abs(value) <= _LARGEST):
            raise ValueError(f"reward {name!r}: {record.place}: expected a finite number or None, got {value!r}.")
    return torch.tensor([math.nan if value is None else float(value) for value in values])


def _plain(text: str) -> str:
    """Text as it is compared with an option: without case, outer spaces and closing punctuation."""
    return " ".join(text.casefold().split()).strip(" .:)")


@functools.lru_cache(4096)
def _readable_truth(answer: str) -> bool:
    return reads(answer)


class _Words:
    """`split_words` as a tokenizer of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


@functools.cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())
