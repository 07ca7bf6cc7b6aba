r"""Answers as models write them, in the form that the rewards read: the setting ``rewards_lenient``.

"**B**", "\boxed{B}", "Answer: B." and "（B）" become "B"; "13.8 - 29.8", "00:13 - 00:29" and "from 13.8 to 29.8" become
"13.8 to 29.8". What stands outside the tags stays as it is, so that the format reward still asks for the format.
"""

import re
import unicodedata
from itertools import pairwise

from appo.data.records import Record

_BOXED = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")
_LEAD = re.compile(
    r"(?:so |thus |therefore |hence )?,? ?"
    r"(?:(?:my |the )?(?:final |correct |right |best )?(?:answer|option|choice)(?: is)? ?[:=]? ?)+",
    re.IGNORECASE,
)
_ANSWER_LINE = re.compile(r"answer\**(?: is)? ?\**[:：]?\**", re.IGNORECASE)
_TIME = re.compile(r"\d+(?::\d{1,2}){1,2}(?:\.\d+)?|\d+(?:\.\d+)?")
_WITHIN = frozenset({"to", "-", "–", "—", "~", "until", "till", "through", "and", ",", "->", "→"})
_BETWEEN = frozenset({",", ";", "and", "", "then", "&", "/"})
_SECONDS = re.compile(r"(?<=\d)\s?(?:seconds|second|secs|sec|s)(?![a-z])")
_NOISE = re.compile(r"\b(?:from|between|start(?:s|ing)?|end(?:s|ing)?|at|about|around|the|moments?|span)\b|[:=<>*`]")


def lenient(completion: str, record: Record, *, anywhere: bool = False) -> str:
    """``completion`` with its answer and times rewritten; what cannot be read stays as it was.

    anywhere: take the answer from \\boxed{} or from a last line "Answer: B" where there is no answer tag, and append it
    in a tag.
    """
    answer = _between(completion, "answer")
    if answer is not None:
        start, end = answer
        completion = completion[:start] + _answer(completion[start:end], record) + completion[end:]
    elif anywhere and "<answer>" not in completion and (found := _untagged(completion)):
        completion = f"{completion}<answer>{_answer(found, record)}</answer>"
    times = _between(completion, "time")
    if times is not None:
        start, end = times
        completion = completion[:start] + (_times(completion[start:end]) or completion[start:end]) + completion[end:]
    return completion


def _between(text: str, tag: str) -> tuple[int, int] | None:
    if text.count(f"<{tag}>") != 1 or text.count(f"</{tag}>") != 1:
        return None
    start, end = text.index(f"<{tag}>") + len(tag) + 2, text.index(f"</{tag}>")
    return (start, end) if start <= end else None


def _untagged(text: str) -> str | None:
    text = text.rpartition("</think>")[2]
    if boxed := _BOXED.findall(text):
        return str(boxed[-1])
    lines = [line for line in text.splitlines() if line.strip()]
    found = list(_ANSWER_LINE.finditer(lines[-1])) if lines else []
    return lines[-1][found[-1].end() :].strip() if found else None


def _answer(text: str, record: Record) -> str:
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    text = _WRAPPED.sub(r"\1", text)
    if record.kind in ("ocr", "free-form"):
        return text.strip().strip("*`").strip()
    # NFKC would make "5²" of numbers 52; the letters of a choice have no powers.
    text = unicodedata.normalize("NFKC", text) if record.kind == "multiple choice" else text
    text = text.replace("*", "").replace("`", "") if record.kind == "multiple choice" else text.strip("*` ")
    text = text.replace("\\(", "").replace("\\)", "").strip().strip("$\"'“”‘’ ").strip()
    if match := _LEAD.match(text):
        text = text[match.end() :].strip()
    if record.kind != "multiple choice":
        return text.removeprefix("≈").removesuffix(".").strip()
    text = text.removesuffix(".").strip()
    plain = " ".join(text.casefold().split())
    named = [option[0] for option in record.options if " ".join(option[2:].casefold().split()).rstrip(".") == plain]
    return named[0] if len(named) == 1 and len(plain) > 1 else text


def _times(text: str) -> str | None:
    """ "a to b, c to d" from times in pairs; None where they do not pair up or other words stand between them."""
    text = unicodedata.normalize("NFKC", text).lower()
    found = list(_TIME.finditer(text := _SECONDS.sub("", text)))
    if not found or len(found) % 2:
        return None
    gaps = [text[: found[0].start()]]
    gaps += [text[a.end() : b.start()] for a, b in pairwise(found)]
    gaps += [text[found[-1].end() :]]
    gaps = [" ".join(_NOISE.sub(" ", re.sub(r"[\[\]()]", " ", gap)).split()) for gap in gaps]
    inside, between = gaps[1:-1:2], gaps[2:-1:2]
    if gaps[0] or gaps[-1].strip(".") or not all(gap in _WITHIN for gap in inside):
        return None
    if not all(gap.strip(" ,;") in _BETWEEN for gap in between):
        return None
    seconds = [_clock(match[0]) for match in found]
    return ", ".join(f"{start:.10g} to {end:.10g}" for start, end in zip(seconds[::2], seconds[1::2], strict=True))


def _clock(text: str) -> float:
    value = 0.0
    for part in text.split(":"):
        value = value * 60 + float(part)
    return value
