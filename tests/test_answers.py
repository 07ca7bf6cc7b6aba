"""What answers say, as people and models write them: numbers, words of any script, lenient reading, hostile lengths."""

import math
import threading
from pathlib import Path

import pytest
import torch

from appo.data.math_answers import equal, is_number, number, quantity
from appo.data.records import Record
from appo.data.words import spaced, split_words
from appo.method.advantages import group_advantages
from appo.rollout.rewards import UNREADABLE, combine, get_reward, time_spans

CHOICE = Record("q1", "Which colour?", "B", "multiple choice", options=("A. red", "B. green ball", "C. blue"))
BARE = Record("q1", "Which? A. red B. green", "B", "multiple choice")
GROUNDED = Record("q2", "When?", "A", "multiple choice", time_spans=((13.0, 29.0),), meta={"grounding": True})


def record(kind: str, answer: str) -> Record:
    return Record("q", "?", answer, kind)


def score(name: str, completion: str, of: Record) -> float | None:
    return get_reward(name)([completion], [of])[0]


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


# Minus signs and digits of Unicode, separators of both conventions, fractions, powers that are no part of the number.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("−5", -5), ("–5", -5), ("－５", -5), ("٣٫٥", 3.5), ("१२", 12),
        ("1,5", 1.5), ("0,123", 0.123), ("1,234", 1234), ("1.234,5", 1234.5), ("1,234.5", 1234.5),
        ("1.234.567", 1234567), ("1 234", 1234), ("1\u202f234", 1234), ("5.", 5), ("-1,5e2", -150),
        ("5 m²", 5), ("5 m^2", 5), ("5 m/s^2", 5), ("about 5 kg", 5), ("3½", 3.5), ("½", 0.5),
        ("5²", None), ("10^5", None), ("5**2", None), ("\\sqrt{2}", None), ("5 million", None), ("1/2", None),
        ("12,34", 12.34), ("3 or 4", None), ("1e999", None), ("9" * 400, None), ("NaN", None), ("", None),
    ],
)  # fmt: skip
def test_numbers_as_they_are_written(text: str, expected: float | None) -> None:
    assert number(text) == expected


def test_a_quantity_is_a_number_and_its_unit_and_nothing_else() -> None:
    assert [quantity(text) for text in ("5 m^2", "5 km/h", "5apples", "5.")] == [5, 5, 5, 5]
    assert [quantity(text) for text in ("5x", "x = 5", "5 or so", "5 billion", "2\\pi", "5 6")] == [None] * 6


@pytest.mark.parametrize("kind", ["numerical", "math", "regression"])
@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("5", "−5", False), ("-5", "−5", True), ("1.5", "1,5", True), ("15", "1,5", False),
        ("5", "5 m²", True), ("5", "5 m^2", True), ("5", "5²", False), ("1234", "1,234", True),
    ],
)  # fmt: skip
def test_written_numbers_earn_what_they_say(kind: str, truth: str, answer: str, right: bool) -> None:
    earned = score("accuracy", answered(answer), record(kind, truth))
    assert earned == 1.0 if right else earned < 0.5


@pytest.mark.parametrize("text", ["NaN", "a lot", "25 m^2", "25 m²", "1e999", "-inf", "x", "", "x^2", "five"])
def test_texts_that_are_no_number(text: str) -> None:
    assert not is_number(text)


@pytest.mark.parametrize(
    "text", ["3", "-2.5e3", "1/2", "\\frac{1}{2}", "2\\sqrt{2}", "$3\\pi$", "50%", "5 meters", "10^5"]
)
def test_texts_that_are_numbers(text: str) -> None:
    assert is_number(text)


def test_expressions_are_compared_in_any_thread() -> None:
    found: list[object] = []
    thread = threading.Thread(
        target=lambda: found.append([equal("x^2+1", "1 + x^2"), equal("1/2", "0.25"), equal("2", "?!")])
    )
    thread.start()
    thread.join(60)
    assert found == [[True, False, None]]


def test_rouge_counts_words_of_every_script() -> None:
    for text in ("猫坐在垫子上", "Der Hund läuft über die Straße", "एक बिल्ली चटाई पर बैठी है", "Кошка сидит"):
        assert score("accuracy", answered(text), record("free-form", text)) == pytest.approx(1.0)
        assert score("accuracy", answered("dogs"), record("free-form", text)) == 0.0
    # 猫坐在 against 猫坐在垫子上: ROUGE-1 and -L P = 1, R = 3/6; ROUGE-2 P = 1, R = 2/5.
    expected = (2 / 3 + 4 / 7 + 2 / 3) / 3
    assert score("accuracy", answered("猫坐在"), record("free-form", "猫坐在垫子上")) == pytest.approx(expected)
    assert score("accuracy", answered("?!"), record("free-form", "?!")) == 1.0
    assert score("accuracy", answered("..."), record("free-form", "?!")) == 0.0


def test_words_of_ascii_text_are_those_of_rouge_score() -> None:
    from rouge_score.tokenizers import DefaultTokenizer

    for text in ("The cats' running_shoes -- don't 3.5 it", "A b2b DEALS", "", "..."):
        assert split_words(text) == DefaultTokenizer(use_stemmer=True).tokenize(text)
    assert split_words("Cafe\u0301 CAFÉ बिल्ली") == ["café", "café", "बिल्ली"]


def test_text_read_without_spaces_is_compared_by_characters() -> None:
    assert spaced("禁止 stop") == " 禁  止  stop"
    assert score("accuracy", answered("禁止停军"), record("ocr", "禁止停车")) == pytest.approx(0.75)


def test_a_letter_and_its_text_without_a_list_of_options() -> None:
    assert score("accuracy", answered("B. green"), BARE) == 1.0
    assert score("accuracy", answered("A. red"), BARE) == 0.0
    assert score("accuracy", answered("B or A"), BARE) is UNREADABLE


# What models write around an answer, each of which says B or 13 to 29 to a reader.
LETTERS = [
    "**B**", "\\boxed{B}", "Answer: B.", "（B）", "The answer is B", "**B.** green ball", "$\\boxed{\\text{B}}$", "`B`",
    "Option B", "“B”", "green ball", "*B*", "Ｂ",
]  # fmt: skip
TIMES = [
    "13 - 29", "00:13 - 00:29", "from 13.0 to 29.0", "13.0–29.0", "[13, 29]", "13s-29s", "13 seconds to 29 seconds",
    "between 13 and 29", "0:00:13 to 0:00:29", "13 ~ 29", "(13.0, 29.0)", "start: 13, end: 29",
]  # fmt: skip


@pytest.mark.parametrize("text", LETTERS)
def test_lenient_letters(text: str) -> None:
    assert combine({"accuracy": 1.0}, [answered(text)], [CHOICE], lenient=True).total.tolist() == [1.0]
    strict = combine({"accuracy": 1.0}, [answered(text)], [CHOICE])
    assert (strict.total.tolist(), strict.unreadable["accuracy"].tolist()) == ([0.0], [True])


@pytest.mark.parametrize("text", ["**A**", "A or B", "\\boxed{C}", "not B", "B, C", "**", "red", "a green thing"])
def test_lenient_letters_that_are_not_right(text: str) -> None:
    assert combine({"accuracy": 1.0}, [answered(text)], [CHOICE], lenient=True).total.tolist() == [0.0]


@pytest.mark.parametrize("text", TIMES)
def test_lenient_times(text: str) -> None:
    completion = answered("A") + f"<time>{text}</time>"
    names = {"temporal_iou": 1.0, "format": 1.0}
    assert combine(names, [completion], [GROUNDED], lenient=True).total.tolist() == [2.0]
    strict = combine({"temporal_iou": 1.0}, [completion], [GROUNDED])
    assert (strict.total.tolist(), strict.unreadable["temporal_iou"].tolist()) == ([0.0], [True])


@pytest.mark.parametrize("text", ["13", "13 29", "13 - 29 - 31", "1,5 - 2,5", "-13 to 29", "13 to 29 or later", "soon"])
def test_lenient_times_that_cannot_be_read(text: str) -> None:
    result = combine({"temporal_iou": 1.0}, [f"<time>{text}</time>"], [GROUNDED], lenient=True)
    assert (result.total.tolist(), result.unreadable["temporal_iou"].tolist()) == ([0.0], [True])


def test_several_spans_leniently_and_minutes() -> None:
    truth = Record("q", "?", "A", "multiple choice", time_spans=((1.0, 2.5), (65.0, 70.0)), meta={"grounding": True})
    for text in ("1 - 2.5 and 1:05 - 1:10", "[1, 2.5], [65, 70]", "1 to 2.5; 65 to 70"):
        assert combine({"temporal_iou": 1.0}, [f"<time>{text}</time>"], [truth], lenient=True).total.tolist() == [1.0]


def test_leniently_an_answer_outside_tags_counts_but_not_for_the_format() -> None:
    for text in ("<think>so</think> Answer: **B**", "<think>so</think> it is \\boxed{B}", "so\n\nThe answer is (B)."):
        result = combine({"accuracy": 1.0, "format": 1.0}, [text], [CHOICE], lenient=True)
        assert [float(values) for values in result.by_name.values()] == [1.0, 0.0]


def test_share_of_unreadable_answers_of_each_reward() -> None:
    completions = [answered("B"), answered("A"), answered("well"), "?"]
    rewards = combine({"accuracy": 1.0, "format": 1.0}, completions, [CHOICE] * 4)
    assert rewards.unreadable["accuracy"].tolist() == [False, False, True, True]
    assert rewards.unreadable["format"].tolist() == [False] * 4


# Each is a text on which a pattern with two ways to match a run of characters takes time quadratic in it or worse.
HOSTILE = [
    "<time>1" + " " * 200_000 + "x</time>",
    "<time>" + "1 to 2, " * 50_000 + "</time>",
    "<answer>" * 50_000,
    "<think>" * 50_000 + "</think>",
    answered("(" * 100_000),
    answered("1," * 100_000),
    answered("\\boxed{" * 50_000),
    answered("answer is " * 50_000),
    answered("B." + " " * 200_000 + "x"),
    "<time>" + "1:1" * 50_000 + "</time>",
]


@pytest.mark.parametrize("text", HOSTILE, ids=[text[:12] for text in HOSTILE])
@pytest.mark.timeout(60)
def test_hostile_answers_of_any_length_are_read_at_once(text: str) -> None:
    names = {"accuracy": 1.0, "format": 1.0, "temporal_iou": 1.0}
    for kind in ("multiple choice", "numerical", "regression"):
        truth = Record("q", "?", "5", kind, time_spans=((1.0, 2.0),), meta={"grounding": True})
        for lenient in (False, True):
            assert math.isfinite(combine(names, [text], [truth], lenient=lenient).total[0])


def test_endless_times_are_no_times() -> None:
    assert time_spans(f"<time>0 to {'9' * 400}</time>") is None


def test_huge_rewards_have_finite_advantages() -> None:
    rewards = torch.tensor([1e308, -1e308, 0.0, 1e308], dtype=torch.float64)
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages, group_advantages(torch.tensor([1.0, -1.0, 0.0, 1.0]).double() * 1e6))
    with pytest.raises(ValueError, match="differences within"):
        group_advantages(torch.tensor([3.4e38, -3.4e38, -3.4e38]), scale="none")
    assert group_advantages(torch.tensor([3e38, -3e38])).isfinite().all()


def test_rewards_beyond_float32_name_the_record(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def huge(text, record): return 1e300\n")
    with pytest.raises(ValueError, match=r"mine.py:huge': record: .*expected a finite number or None, got 1e\+300"):
        combine({f"{file}:huge": 1.0}, ["x"], [CHOICE])


def test_rewards_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from appo.rollout.rewards import UNREADABLE\n"
        "def brief(text, record):\n"
        "    if not text: return UNREADABLE\n"
        "    return len(text) < 3 if record.answer == 'B' else None\n"
        "def broken(text, record): return text.nothing\n"
        "word = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    other = record("free-form", "x")
    result = combine({"mine.py:brief": 2.0, "accuracy": 0.0}, ["ab", "abc", "", "ab"], [CHOICE, CHOICE, CHOICE, other])
    assert result.total.tolist() == [2.0, 0.0, 0.0, 0.0]
    assert result.by_name["mine.py:brief"].isnan().tolist() == [False, False, False, True]
    assert result.unreadable["mine.py:brief"].tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=r"mine.py:broken: record: .*AttributeError: 'str' object has no attribute"):
        combine({"mine.py:broken": 1.0}, ["x"], [CHOICE])
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    for name, message in (
        ("mine.py:word", "expected a function of that name in the file, got 3"),
        ("mine.py:none", "got None"),
        ("gone.py:x", "no such file"),
        ("bad.py:x", "cannot be loaded: ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=message):
            get_reward(name)
