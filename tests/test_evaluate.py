"""Evaluation: one greedy answer or the mean of several, per task, independent of the batch."""

import pytest
import training

from appo.train.evaluate import evaluate


def test_greedy_answers_do_not_depend_on_the_batch_and_are_kept(tmp_path):
    model, processor = training.tiny()
    records = training.records()[:5]
    found, kept = [], []
    for size in (2, 5):
        answers: list = []
        settings = training.config(tmp_path, eval_batch=size)
        found.append(evaluate(model, processor, records, settings, keep=answers.append))
        kept.append(answers)
    assert kept[0] == kept[1]
    assert found[0] == pytest.approx(found[1])
    assert found[0]["records"] == 5 and {"accuracy", "format", "length"} <= found[0].keys()
    assert sum(name.startswith("accuracy/") for name in found[0]) == len({r.meta["task"] for r in records})
    assert [answer["id"] for answer in kept[0]] == [record.id for record in records]


def test_samples_are_several_per_record_and_seeded(tmp_path):
    model, processor = training.tiny()
    settings = training.config(tmp_path, eval_samples=3)
    kept: list[list] = [[], []]
    for answers in kept:
        evaluate(model, processor, training.records()[:2], settings, keep=answers.append)
    assert kept[0] == kept[1] and len(kept[0]) == 6
    assert len({answer["text"] for answer in kept[0]}) > 1
