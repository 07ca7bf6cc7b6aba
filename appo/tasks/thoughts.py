"""Long thoughts of which a few words count: irrelevant words around what was seen, and the places of what was told.

The weight of a token can help a policy gradient only where other tokens carry noise (docs/credit.md). Irrelevant words
are that noise, in a known amount and of a known entropy; the words that tell what was seen are known by their place.
"""

import random
import re
from dataclasses import dataclass

from appo.data.records import Record
from appo.tasks.questions import NUMBERS

# Words of the tiny model that are no answer to any question and no part of the sentence that tells.
IRRELEVANT_WORDS = (
    "look", "watch", "there", "where", "bright", "dark", "change", "clip", "moment", "short",
    "shape", "shapes", "show", "shows", "white", "black", "grey", "between", "within", "inside",
    "last", "first", "second", "seconds", "more", "than", "that", "these", "they", "this",
    "when", "while", "why", "with", "was", "were", "has", "how", "many", "from",
)  # fmt: skip

STEP = rf"(?:{'|'.join(NUMBERS)})"
SENTENCE = re.compile(
    rf"\bi see (?:at time (?P<time>{STEP}) (?P<seen_then>\w+)"
    rf"|(?P<seen>\w+) at step (?P<step>{STEP}(?: then {STEP})*)) so the (?P<task>\w+) is (?P<said>\w+)\b"
)
LETTER = re.compile(r"</think>\s*<answer>\s*(?P<letter>[A-Z])\s*</answer>")


@dataclass(frozen=True)
class Irrelevant:
    """``words`` irrelevant words in a response, each drawn from the first ``vocabulary`` of `IRRELEVANT_WORDS`.

    A number of them that is drawn anew for each response stands before what was seen, the rest behind it: places then
    say nothing about what a token is. The entropy of a word is log(vocabulary) nats.
    """

    words: int = 48
    vocabulary: int = 4

    def __post_init__(self) -> None:
        _at_least("words", self.words, 0, None)
        _at_least("vocabulary", self.vocabulary, 1, len(IRRELEVANT_WORDS))

    def around(self, think: str, rng: random.Random) -> str:
        """``think`` with the words around it."""
        before = rng.randint(0, self.words)
        drawn = [IRRELEVANT_WORDS[rng.randrange(self.vocabulary)] for _ in range(self.words)]
        return " ".join([*drawn[:before], think, *drawn[before:]])


def telling_spans(text: str, record: Record) -> dict[str, tuple[int, int]] | None:
    """The places (start, end) in characters of what a response to a record of ``appo.tasks`` tells, or None.

    "seen": the word for what was seen, the first that depends on it; "when": the step or time; "said": the word in the
    conclusion; "letter": the answer. "sentence": from "i see" to the conclusion. A response tells if it has the
    sentence once, with options of the record in both places, then one answer.
    """
    found, letters = list(SENTENCE.finditer(text)), list(LETTER.finditer(text))
    if len(found) != 1 or len(letters) != 1 or letters[0].start() < found[0].end():
        return None
    sentence, options = found[0], {option.split(". ", 1)[1] for option in record.options}
    seen, when = ("seen_then", "time") if sentence["time"] else ("seen", "step")
    if sentence[seen] not in options or sentence["said"] not in options:
        return None
    return {
        "seen": sentence.span(seen),
        "when": sentence.span(when),
        "said": sentence.span("said"),
        "letter": letters[0].span("letter"),
        "sentence": sentence.span(),
    }


def _at_least(name: str, value: object, least: int, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"a whole number of at least {least}" + ("" if most is None else f" and at most {most}")
        raise ValueError(f"Irrelevant: `{name}`: expected {limits}, got {value!r}. It counts words.")
