"""Options and labels: the short way that most files take gives what the long way gives."""

import random

import pytest

from appo.data import options
from appo.data.options import LabelError, label, letter_options

# Letters, digits, marks that comparison drops, and characters that case or composition changes.
CHARACTERS = "aAbB1 .:;,)-é\u0301"


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except LabelError as error:
        return str(error)


def texts(chance: random.Random) -> list[str]:
    return ["".join(chance.choices(CHARACTERS, k=chance.randrange(5))) for _ in range(chance.randint(2, 3))]


def test_a_letter_is_named_as_by_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, cases = random.Random(0), []
    for _ in range(4000):
        given = tuple(f"{letter}. {text}" for letter, text in zip("ABC", texts(chance), strict=False))
        answer = chance.choice(["A", "B", "C", "a", "1", given[0][3:]])
        cases.append((answer, given, outcome(label, answer, given)))
    monkeypatch.setattr(options, "_is_longer", lambda option: False)
    assert [outcome(label, answer, given) for answer, given, _ in cases] == [found for *_, found in cases]
    assert len({found for *_, found in cases}) > 4  # letters, and more than one error


def test_lettered_options_are_read_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, cases = random.Random(1), []
    for _ in range(4000):
        given = tuple(f"{letter}. {text}".strip() for letter, text in zip("ABC", texts(chance), strict=False))
        cases.append((given, outcome(letter_options, given)))
    monkeypatch.setattr(options, "_MARKS", ("\0",) * 26)  # never in front of a text
    long = [outcome(letter_options, given) for given, _ in cases]
    as_lettered = [
        found
        if isinstance(found, str)
        else tuple(f"{own}. {text[1:]}" for own, text in zip("ABC", found, strict=False))
        for found in long
    ]
    assert as_lettered == [found for _, found in cases]
    assert sum(isinstance(found, tuple) for _, found in cases) > 100
