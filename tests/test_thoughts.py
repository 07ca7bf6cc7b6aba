"""Answers that think at length: how many irrelevant words, which, where, and the places of what is told."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from appo.data.load import load_records
from appo.tasks import IRRELEVANT_WORDS, KINDS, Irrelevant, make_task, response_text, telling_spans, think_text
from appo.tasks.named import TASKS
from appo.tasks.questions import NUMBERS
from appo.tasks.tiny import build_tokenizer


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("thoughts")
    paths = make_task(folder, seed=3, sizes={"warmup": len(KINDS)}, kinds=tuple(KINDS), workers=1)
    return load_records(paths["warmup"])


def options_of(record):
    return [option.split(". ", 1)[1] for option in record.options]


def answered(record, answer, steps=(2,)):
    think = think_text(record.meta["task"], steps, answer)
    return think, response_text(think, "ABCDEFGH"[options_of(record).index(answer)])


def test_irrelevant_words_answer_nothing_and_are_single_tokens(records):
    tokenizer = build_tokenizer()
    taken = set(NUMBERS) | {word for record in records for word in options_of(record)}
    for record in records:
        taken |= set(answered(record, options_of(record)[0])[0].split())
    assert not taken & set(IRRELEVANT_WORDS)
    assert len(set(IRRELEVANT_WORDS)) == len(IRRELEVANT_WORDS) == 40
    ids = tokenizer.convert_tokens_to_ids(list(IRRELEVANT_WORDS))
    assert tokenizer.unk_token_id not in ids


# None, a few and the most of the named tasks; vocabularies of one word, of the told words' entropy, and of all.
@pytest.mark.parametrize(("words", "vocabulary"), [(0, 4), (7, 1), (24, 4), (96, 40)])
def test_words_are_counted_drawn_evenly_and_placed_at_random(words, vocabulary):
    rng, think = random.Random(0), "i see red at step two so the colour is red"
    before, drawn = Counter(), Counter()
    for _ in range(400):
        text = Irrelevant(words, vocabulary).around(think, rng)
        front, back = text.split(think)
        before[len(front.split())] += 1
        drawn.update(front.split() + back.split())
        assert len(front.split()) + len(back.split()) == words
    assert set(drawn) <= set(IRRELEVANT_WORDS[:vocabulary])
    assert min(before) >= 0 and max(before) <= words
    if words:
        entropy = -sum(n / drawn.total() * math.log(n / drawn.total()) for n in drawn.values())
        assert entropy == pytest.approx(math.log(vocabulary), abs=0.03)
        mean = sum(place * count for place, count in before.items()) / 400
        assert mean == pytest.approx(words / 2, abs=4 * words / math.sqrt(12 * 400) + 0.5)


def test_places_are_those_of_the_words_that_tell(records):
    rng = random.Random(1)
    for record in records:
        for answer in options_of(record):
            think, plain = answered(record, answer, (2,) if record.meta["task"] != "order" else (1, 4))
            for text in (plain, response_text(Irrelevant(24, 40).around(think, rng), plain[-len("A</answer>")])):
                spans = telling_spans(text, record)
                assert spans is not None, text
                said = {name: text[start:end] for name, (start, end) in spans.items()}
                assert said["seen"] == said["said"] == answer
                assert said["when"] in (NUMBERS[2], "two then five")
                assert said["letter"] == "ABCDEFGH"[options_of(record).index(answer)]
                assert said["sentence"] == think


def test_what_does_not_tell_has_no_places(records):
    record = next(record for record in records if record.meta["task"] == "colour")
    think, good = answered(record, "red")
    assert telling_spans(good, record)
    for bad in (
        "",
        think,  # no answer
        good.replace("see red", "see left"),  # an answer to another question
        good.replace("at step", "at"),
        good.replace("three", "three three"),
        good.replace(think, f"{think} {think}"),  # twice
        good + "<answer>B</answer></think><answer>B</answer>",
        response_text("look", "A") + think,  # behind the answer
        good.replace("i see", "hi see"),
    ):
        assert telling_spans(bad, record) is None, bad


def test_options_decide_what_a_telling_word_is(records):
    record = next(record for record in records if record.meta["task"] == "colour")
    _, text = answered(record, "red")
    assert telling_spans(text, replace(record, options=("A. up", "B. down"))) is None


def test_numbers_that_cannot_be_are_named():
    wrong = [({"words": -1}, "words"), ({"vocabulary": 0}, "vocabulary"), ({"vocabulary": 41}, "vocabulary")]
    for settings, name in [*wrong, ({"words": 2.0}, "words"), ({"words": True}, "words")]:
        with pytest.raises(ValueError, match=f"Irrelevant: `{name}`: expected a whole number"):
            Irrelevant(**settings)


def test_named_tasks_leave_room_for_their_words():
    verbose = {name: task for name, task in TASKS.items() if name.startswith("verbose")}
    assert {(t.warm["irrelevant"].words, t.warm["irrelevant"].vocabulary) for t in verbose.values()} == {
        (0, 1), *((words, size) for words in (24, 48, 96) for size in (2, 4, 40)),
    }  # fmt: skip
    for task in verbose.values():
        think = think_text("colour", [7], "yellow")
        text = response_text(task.warm["irrelevant"].around(think, random.Random(0)), "D")
        length = len(build_tokenizer()(text, add_special_tokens=False).input_ids) + 1
        assert length <= task.settings["max_new_tokens"]
