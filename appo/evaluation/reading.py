"""Answers read as the published scorers read them: a letter, yes or no, a number, a span of seconds.

Each function says whose rule it is and where it departs from it. All take the part of a response that is the answer
(`answer_part`) and return None where it cannot be read.
"""

import re
from collections.abc import Callable

from appo.data.options import same_text
from appo.data.records import Record
from appo.rollout.tags import Interval, tagged, time_spans

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip
Rule = Callable[[str, Record], str | None]


def answer_part(text: str) -> str:
    """The inside of the only answer tag; without one, the text without its reasoning."""
    inside = tagged(text, "answer")
    return _THOUGHT.sub("", text).strip() if inside is None else inside


def letters_of(record: Record) -> str:
    return "".join(option[0] for option in record.options)


def first_letter(letters: str) -> Rule:
    """The first of the capital ``letters``, behind phrases such as "The best answer is": the rule of Video-MME (A to D)
    and of LongVideoBench (A to E, also where a question has fewer options)."""

    def read(text: str, record: Record) -> str | None:
        for prefix in _PREFIXES:
            text = text.replace(prefix, "")
        match = re.search(f"[{letters}]", text)
        return match[0] if match else None

    return read


def first_lone_letter(text: str, record: Record) -> str | None:
    """The first of A to D that stands alone, the rule of Perception Test's generative form, also with three options."""
    match = re.search(r"\b([A-D])\b", text)
    return match[1] if match else None


def first_answer(text: str) -> str:
    """The inside of the first answer tag, "" without one: where SEED-Bench-R1 looks."""
    match = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return match[1].strip() if match else ""


def leading_character(text: str, record: Record) -> str | None:
    """The answer's first character, the rule of SEED-Bench-R1."""
    return text[0] if text and text[0] in letters_of(record) else None


def first_word(text: str, record: Record) -> str | None:
    """The first word without closing full stops, of any case, the rule of VSI-Bench."""
    word = text.split(" ")[0].rstrip(".").strip().upper()
    return word if len(word) == 1 and word in letters_of(record) else None


def opening_option(text: str, record: Record) -> str | None:
    """The letter of the first word, as "A", "(A)", "A.", "A)", of any case: the rule of MVBench, whose prompt leaves
    "Best option:(" before it. There an empty answer is right; here it is unreadable."""
    word, letters = text.split(" ")[0].upper(), letters_of(record)
    bare = word.strip("().:")
    if len(bare) == 1 and bare in letters:
        return bare
    return next((letter for letter in letters if f"({letter})" in word), None)


def last_listed(text: str, record: Record) -> str | None:
    """lmms-eval's rule for NExT-QA (it is MMMU's): letters in brackets, else before a space, else before a full stop,
    else, in an answer of more than five words, an option's text; of several the one that comes last.

    None where nothing is found; there one is drawn.
    """
    for sign in (",", ".", "!", "?", ";", ":", "'"):
        text = text.strip(sign)
    text = f" {text} "
    texts = {option[0]: option[2:].strip().lower() for option in record.options}
    forms = [{letter: form.format(letter) for letter in texts} for form in ("({})", "{} ", "{}.")]
    found = next((each for each in ([a for a in form if form[a] in text] for form in forms) if each), [])
    if found:
        mark = "({})" if f"({found[0]})" in text else " {} "
        return max(found, key=lambda letter: text.rfind(mark.format(letter)))
    named = [letter for letter, own in texts.items() if own in text.lower()] if len(text.split()) > 5 else []
    return max(named, key=lambda letter: text.lower().rfind(texts[letter]), default=None)


def named_option(text: str, record: Record) -> str | None:
    """A letter in front, as "(B)" or "B. text"; else an option's own text; else the last letter that stands alone.

    Ours, for NExT-GQA, which publishes no rule for written answers.
    """
    letters = letters_of(record)
    if match := re.match(rf"\(?([{letters}])(?:[).:]|\s*$)", text):
        return match[1]
    plain = same_text(text)
    named = [option[0] for option in record.options if same_text(option[2:]) == plain]
    alone = re.findall(rf"(?<![A-Za-z'])([{letters}])(?![A-Za-z'])", text)
    return named[0] if len(named) == 1 else alone[-1] if alone else None


def matched_choice(text: str, record: Record) -> str | None:
    """TempCompass, several options: the option as written, a letter alone, or a letter before "." or ")"."""
    if match := re.match(rf"([{letters_of(record)}])(?:[.)]|$)", text):
        return match[1]
    return next((option[0] for option in record.options if option == text), None)


def yes_or_no(text: str, record: Record) -> str | None:
    """TempCompass, yes or no: how the answer begins."""
    text = text.lower()
    return "A" if text.startswith("yes") else "B" if text.startswith("no") else None


def matched_caption(text: str, record: Record) -> str | None:
    """TempCompass, captions: the option as it stands in the question, its sentence, "Caption A" or "A"."""
    for line, option in zip(record.meta["asked"].split("\n")[1:], record.options, strict=True):
        label, _, sentence = line.partition(": ")
        forms = {line, sentence, label, label.split()[-1]}
        behind = text.split(") ")[1] if ") " in text else None
        if text in forms or text.replace(".", "") in (label, label.split()[-1]) or behind == sentence:
            return option[0]
    return None


def leading_number(text: str) -> float | None:
    """The first word as a number, the rule of VSI-Bench."""
    try:
        return float(text.split(" ")[0].rstrip(".").strip())
    except ValueError:
        return None


def named_span(text: str) -> Interval | None:
    """The (start, end) seconds of a response's time tag, from the first to the last of the spans it names.

    NExT-GQA takes one span; a response with several names the whole from the first to the last.
    """
    spans = time_spans(text)
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else None
