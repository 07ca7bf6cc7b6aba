"""The options of a multiple-choice question: their letters, and which of them a label names."""

import functools
import re
import unicodedata

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MARKS = tuple(f"{letter}. " for letter in LETTERS)
_LETTERED = re.compile(r"[(\[（]?([A-Za-z])(?:[).:\]）．：、]|\s[-–—](?=\s))\s*(.*)", re.DOTALL)
_BARE = re.compile(r"([A-Z])(?:\s+\S.*)?", re.DOTALL)  # "B a cat": a letter without a sign behind it, or a word
_LABEL = re.compile(r"\(?([A-Za-z])\)?[.:)]?|\(([A-Za-z])\)\s*(.+)|([A-Za-z])[.:)]\s*(.+)", re.DOTALL)
_ASKS_LETTER = re.compile(
    r"(?i)^\W*(?:please|answer|respond|select|choose|give|provide)\b.*\b(?:letters?|options?|choices?)\b"
)
_LINE = re.compile(r"\s*\(?([A-Za-z])[).:]\s*(\S.*)")


class LabelError(ValueError):
    """Options or a label that cannot be understood; the text is what was expected."""


def letter_options(texts: tuple[str, ...], *, distinct: bool = True) -> tuple[str, ...]:
    """Options lettered "A. text", whether they came as "A. text", "(A) text", "a) text" or "text".

    Raises LabelError for another number of options than 2 to 26, letters in another order, two options of one text
    where they are to be ``distinct``.
    """
    if not 2 <= len(texts) <= len(LETTERS):
        raise LabelError(f"2 to {len(LETTERS)} options")
    if all(map(str.startswith, texts, _MARKS)):  # most files have them so
        texts = tuple([text[2:].strip() for text in texts])
    else:
        texts = _without_letters(texts)
    if _BARE.fullmatch(texts[0]):
        bare = [match[1] if (match := _BARE.fullmatch(text)) else "" for text in texts]
        if bare != sorted(bare) and sorted(bare) == list(LETTERS[: len(texts)]):
            raise LabelError("the letters A, B, C, ... in order, or none")
    if not any(texts):  # the options stand in the picture
        texts = tuple(LETTERS[: len(texts)])
    if not all(texts):
        raise LabelError("a text behind each letter")
    plain = [same_text(text) for text in texts]
    if distinct and len(set(plain)) < len(plain):
        raise LabelError("options of different texts")
    return tuple([mark + text for mark, text in zip(_MARKS, texts, strict=False)])


def _without_letters(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Options without their letters, where they have them in order; as they are, where they have none."""
    matches = [_LETTERED.fullmatch(text) for text in texts]
    letters = [match[1].upper() if match else "" for match in matches]
    if letters == list(LETTERS[: len(texts)]):
        return tuple(match[2].strip() for match in matches if match)
    if any(letter == own for letter, own in zip(letters, LETTERS, strict=False)) or _are_labels(letters):
        # Another letter would be put before theirs, and "B" would name another option than it did.
        raise LabelError("the letters A, B, C, ... in order, or none")
    return texts


def label(answer: str, options: tuple[str, ...]) -> str:
    """The letter of the option that ``answer`` names: "C", "(C)", "C.", "C. text", or the text of one option.

    Without options, the letter that it begins with. Raises LabelError where no option or more than one is named.
    """
    allowed = LETTERS[: len(options)] if options else LETTERS
    answer = answer.strip()
    if answer in allowed and len(answer) == 1 and all(map(_is_longer, options)):
        return answer  # a letter, which is the text of no option
    expected = f"one of the letters {allowed[0]} to {allowed[-1]}" + (", or the text of an option" if options else "")
    texts = [same_text(option[2:].strip()) for option in options]
    by_text = [letter for letter, text in zip(allowed, texts, strict=False) if text == same_text(answer)]
    match = _LABEL.fullmatch(answer)
    letter, rest = ((match[1] or match[2] or match[4]).upper(), match[3] or match[5] or "") if match else ("", "")
    if letter and rest and options and (letter not in allowed or texts[allowed.index(letter)] != same_text(rest)):
        letter = ""  # "B. text" with another text than B's
    if letter and letter not in allowed:
        letter = ""
    if not letter and options and len(answer) > 2 and answer[1] == " " and answer[0] in allowed:
        # "C never": a letter and its option's text, without a sign between them.
        letter = answer[0] if texts[allowed.index(answer[0])] == same_text(answer[2:]) else ""
    if by_text and letter and by_text[0] != letter:
        raise LabelError(f"{expected}, not both: the letter {letter} is also the text of option {by_text[0]}")
    if not by_text and not letter:
        raise LabelError(expected)
    return by_text[0] if by_text else letter


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """A question and the options written below it, one a line, "A. text" or "(A) text"; () where there are none.

    A last line that asks for a letter ("Answer with the option's letter.") is left out: prompts ask in their own words.
    """
    lines = text.strip().splitlines()
    for first in range(1, len(lines)):
        match = _LINE.fullmatch(lines[first])
        if match is None or match[1].upper() != "A":
            continue
        found = [_LINE.fullmatch(line) for line in lines[first:] if line.strip()]
        if len(found) > 2 and found[-1] is None and _ASKS_LETTER.search(lines[-1]):
            found.pop()
        letters = [line[1].upper() if line else "" for line in found]
        count = next((i for i, letter in enumerate(letters) if letter != LETTERS[i : i + 1]), len(letters))
        if count >= 2 and count == len(letters):
            question = "\n".join(lines[:first]).strip().removesuffix("Options:").rstrip()
            return question, tuple(lines[first + i].strip() for i in _filled(lines[first:])[:count])
    return text.strip(), ()


@functools.lru_cache(64)  # a record's options are asked for when they are lettered, and when its answer is looked for
def same_text(text: str) -> str:
    """``text`` as options are compared: without case, outer space and closing punctuation."""
    if text.isascii():
        return " ".join(text.lower().split()).strip(" .:;,)")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .:;,)")


def _is_longer(option: str) -> bool:
    """Whether the text of an option is surely more than a letter: it begins with two."""
    begin = option[3:5]
    return len(begin) == 2 and begin.isascii() and begin.isalnum()


def _filled(lines: list[str]) -> list[int]:
    return [index for index, line in enumerate(lines) if line.strip()]


def _are_labels(letters: list[str]) -> bool:
    """Whether letters in front of all options are labels in another order, not initials such as "E. coli"."""
    places = sorted(LETTERS.index(letter) for letter in letters if letter)
    return len(places) == len(letters) and places[-1] - places[0] < len(letters) + 1
