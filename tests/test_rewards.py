"""Rewards by hand: what earns 1, what earns part of it, what the model got wrong (0) and what the data got wrong."""

import pytest
import torch

from appo.data.records import Record
from appo.rollout.rewards import (
    get_reward,
    interval_iou,
    overlong_penalty,
    think_length,
    time_spans,
)

CHOICE = Record("q1", "Which colour?", "B", "multiple choice", options=("A. red", "B. green ball", "C. blue"))
GROUNDED = Record("q2", "When?", "A", "multiple choice", time_spans=((2.0, 4.0), (6.0, 8.0)), meta={"grounding": True})


def record(kind: str, answer: str) -> Record:
    return Record("q", "?", answer, kind)


def score(name: str, completion: str, of: Record) -> float | None:
    return get_reward(name)([completion], [of])[0]


def answered(text: str) -> str:
    return f"<think>so</think><answer>{text}</answer>"


# The letter and the option, in the ways in which models write them.
@pytest.mark.parametrize("text", ["B", " B\n", "(B)", "B.", "b", "B. green ball", "(B) Green  ball.", "B: green ball"])
def test_right_option(text: str) -> None:
    assert score("multiple_choice", answered(text), CHOICE) == 1.0
    assert score("accuracy", answered(text), CHOICE) == 1.0


# Another letter, two letters, the right letter with another option's text, the text alone, nothing.
@pytest.mark.parametrize("text", ["A", "B, C", "B or C", "B. red", "AB", "green ball", "Because", ""])
def test_wrong_option(text: str) -> None:
    assert score("multiple_choice", answered(text), CHOICE) == 0.0


# No tag, half a tag, tags the wrong way round, two answers, tags in tags.
@pytest.mark.parametrize(
    "completion",
    ["B", "<answer>B", "</answer>B<answer>", "<answer>A</answer><answer>B</answer>", "<answer><answer>B</answer>"],
)
def test_anything_but_one_answer_tag_is_wrong(completion: str) -> None:
    assert score("multiple_choice", completion, CHOICE) == 0.0


# Right with and without white space; each part missing, swapped, followed, separated, doubled, nested.
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>B</answer>", 1.0),
        (" <think>a\nb</think>\n\n<answer>B</answer>\n", 1.0),
        ("<answer>B</answer>", 0.0),
        ("<answer>B</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>B</answer> and more", 0.0),
        ("<think>a</think>well<answer>B</answer>", 0.0),
        ("<think>a</think><answer>B</answer><answer>B</answer>", 0.0),
        ("<think>a<think></think><answer>B</answer>", 0.0),
        ("<think>a</think><answer>B</answer><time>1 to 2</time>", 0.0),
    ],
)
def test_format(completion: str, expected: float) -> None:
    assert score("format", completion, CHOICE) == expected


# Times before or after the answer; missing, no times, twice.
@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think><answer>B</answer><time>8.4 to 12.5, 25 to 30.2</time>", 1.0),
        ("<think>a</think><time>1 to 2</time><answer>B</answer>", 1.0),
        ("<think>a</think><answer>B</answer>", 0.0),
        ("<think>a</think><answer>B</answer><time>soon</time>", 0.0),
        ("<think>a</think><answer>B</answer><time>1 to 2</time><time>1 to 2</time>", 0.0),
    ],
)
def test_format_of_grounding(completion: str, expected: float) -> None:
    assert score("format", completion, GROUNDED) == expected


# Two spans and one with units; backwards, half, other separators, no number, nothing.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.4 to 12.5, 25 to 30.2", [(8.4, 12.5), (25.0, 30.2)]),
        (" 1s to 2 s ", [(1.0, 2.0)]),
        ("5 to 3", None),
        ("1 to 2,", None),
        ("1 to 2 and 3 to 4", None),
        ("1-2", None),
        ("nan to 2", None),
        ("", None),
    ],
)
def test_time_spans(text: str, expected: list | None) -> None:
    assert time_spans(f"<time>{text}</time>") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 to 4, 6 to 8", 1.0),
        ("6 to 8, 2 to 4", 1.0),
        # 3 s of truth's 4 are covered, 6 s in the union.
        ("3 to 8", 3 / 6),
        # The two overlap: their union is 2 to 5, that is 2 s of 4 + 1.
        ("2 to 4, 3 to 5", 2 / 5),
        ("0 to 2", 0.0),
        ("5 to 5", 0.0),
        ("2.5 to 3.25", 0.75 / 4),
    ],
)
def test_temporal_iou_by_hand(text: str, expected: float) -> None:
    assert score("temporal_iou", f"<time>{text}</time>", GROUNDED) == pytest.approx(expected)


def test_temporal_iou_always_has_an_entry() -> None:
    completions = ["<time>2 to 4, 6 to 8</time>", "<time>?</time>", "no time", "<time>2 to 4, 6 to 8</time>"]
    values = get_reward("temporal_iou")(completions, [GROUNDED, GROUNDED, GROUNDED, CHOICE])
    assert values == [1.0, 0.0, 0.0, None]


def test_interval_iou_is_symmetric_and_continuous() -> None:
    first, second = [(0.0, 1.0), (0.5, 2.0)], [(1.5, 3.0)]
    assert interval_iou(first, second) == interval_iou(second, first) == pytest.approx(0.5 / 3)
    assert interval_iou([(0, 1e-3)], [(0, 2e-3)]) == pytest.approx(0.5)


# Equal in another form; wrong by sign; ambiguous, no number, nothing; expressions that are equal by algebra.
@pytest.mark.parametrize(
    ("truth", "text", "expected"),
    [
        ("3.5", "7/2", 1.0),
        ("12", "12.0", 1.0),
        ("1,234", "1234", 1.0),
        ("5", "5 meters", 1.0),
        ("-3", "3", 0.0),
        ("4", "3 or 4", 0.0),
        ("4", "four and a bit", 0.0),
        ("4", "", 0.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("x^2+1", "1 + x^2", 1.0),
        ("2\\sqrt{2}", "$\\sqrt{8}$", 1.0),
    ],
)
@pytest.mark.parametrize("kind", ["numerical", "math"])
def test_numbers_and_expressions(kind: str, truth: str, text: str, expected: float) -> None:
    assert score("accuracy", answered(text), record(kind, truth)) == expected


# Right, off by a part, by more than all; negative; a truth of zero, from which every distance is all; ambiguous,
# none.
@pytest.mark.parametrize(
    ("truth", "text", "expected"),
    [
        ("10", "10", 1.0),
        ("10", "9", 0.9),
        ("10", "12.5 m", 0.75),
        ("10", "40", 0.0),
        ("-10", "-9", 0.9),
        ("0", "0.0", 1.0),
        ("0", "0.1", 0.0),
        ("10", "9 or 11", 0.0),
        ("10", "ten", 0.0),
    ],
)
def test_regression(truth: str, text: str, expected: float) -> None:
    assert score("accuracy", answered(text), record("regression", truth)) == pytest.approx(expected)


# Right; a word missing, another word, more words than there were, none.
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keep off the grass", 1.0),
        ("keep off grass", 0.75),
        ("keep of the grass", 0.75),
        ("please keep off the nice green wet short grass now", 0.0),
        ("", 0.0),
    ],
)
def test_ocr_is_one_minus_word_error_rate(text: str, expected: float) -> None:
    assert score("accuracy", answered(text), record("ocr", "keep off the grass")) == pytest.approx(expected)


def test_rouge_by_hand() -> None:
    truth = record("free-form", "the cat sat on the mat")
    assert score("accuracy", answered("the cat sat on the mat"), truth) == pytest.approx(1.0)
    # "the cat": ROUGE-1 and -L P = 1, R = 2/6, F = 0.5; ROUGE-2 P = 1, R = 1/5, F = 1/3.
    assert score("accuracy", answered("the cat"), truth) == pytest.approx((0.5 + 1 / 3 + 0.5) / 3)
    assert score("accuracy", answered("dogs"), truth) == 0.0
    assert score("accuracy", "no tags", truth) == 0.0
    assert score("accuracy", answered("mat"), record("free-form", "mat")) == pytest.approx(1.0)


def test_think_length() -> None:
    reward = think_length(minimum=4, maximum=8)
    texts = ["a b", "a b c d", "a " * 8, "a " * 12, "a " * 16, ""]
    completions = [f"<think>{text}</think>" for text in texts]
    assert reward(completions, [CHOICE] * 6) == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert reward(["a b c d e"], [CHOICE]) == [0.0]
    with pytest.raises(ValueError, match="minimum"):
        think_length(minimum=5, maximum=4)


def test_each_kind_has_its_own_measure_and_others_do_not_apply() -> None:
    for name in ("multiple_choice", "math", "regression", "ocr", "rouge"):
        values = [score(name, "x", record(kind, "3")) for kind in ("numerical", "regression", "ocr", "free-form")]
        assert values.count(None) == (4 if name == "multiple_choice" else 3)


# The two kinds whose answer is a number.
@pytest.mark.parametrize("kind", ["numerical", "regression"])
def test_an_answer_of_the_data_that_cannot_be_read_is_an_error(kind: str) -> None:
    broken = Record("q9", "?", "??", kind, meta={"file": "train.json", "index": 7})
    with pytest.raises(ValueError, match=r"train.json: record 7 \(id 'q9'\): `answer`: expected .* got '\?\?'"):
        score("accuracy", answered("3"), broken)


def test_overlong_penalty_by_hand() -> None:
    lengths = torch.tensor([0, 60, 80, 90, 99, 100, 140])
    penalty = overlong_penalty(lengths, max_length=100, buffer=20)
    torch.testing.assert_close(penalty, torch.tensor([0, 0, 0, -0.5, -0.95, -1.0, -1.0]))
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            overlong_penalty(lengths, max_length=100, buffer=buffer)
