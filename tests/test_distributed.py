"""Two processes do what one does: the same samples, records, losses, updates, weights and numbers."""

import json

import processes
import pytest
import torch
import training
from transformers import AutoModelForImageTextToText

from appo.train.trainer import Trainer

# Entropy: groups whose rewards are all equal have a gradient by it alone. One group in a micro-batch, responses of
# unequal lengths, a loss that is divided by the tokens of all processes; a run that is stopped and goes on in between.
SETTINGS = {
    "micro_groups": 1, "entropy_coef": 0.02, "learning_rate": 1e-4, "group_size": 2, "eval_every": 2,
    "eval_samples": 1, "max_new_tokens": 8,
}  # fmt: skip


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def weights_of(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "final", dtype=torch.float32)
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.mark.timeout(600)
def test_two_processes_train_as_one_does(tmp_path):
    found = processes.train_together(
        2, tmp_path / "two", SETTINGS | {"max_steps": 2}, SETTINGS | {"max_steps": 3, "updates_per_step": 1}
    )
    model, processor = training.tiny()
    settings = training.config(tmp_path / "one", **(SETTINGS | {"max_steps": 3}))
    Trainer(model, processor, training.records(), config=settings, eval_dataset=training.records()[:3]).train()

    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [record["step"] for record in two] == [1, 2, 3]
    assert any(0 < record["groups/no_signal"] < 1 for record in one), "some groups have a gradient by entropy alone"
    for first, second in zip(one, two, strict=True):
        for name, value in first.items():
            if not name.startswith(("time/", "memory/", "tokens/")):
                assert second[name] == pytest.approx(value, rel=2e-3, abs=2e-5), (first["step"], name)
    assert found[0]["weights"] == found[1]["weights"], "the same weights in both"
    # Adam turns the smallest gradient into a full step, so weights are compared with the length of the way they went.
    start = torch.cat([value.flatten() for value in training.tiny()[0].state_dict().values()])
    ends = [weights_of(tmp_path / name) for name in ("one", "two")]
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[0] - start).norm()
    # Each process takes every other record, the one that goes on where it was; and scores its two groups one by one.
    assert [process["positions"] for process in found] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert [process["updates"] for process in found] == [sum("grad_norm" in record for record in one)] * 2 != [0, 0]
    assert [process["scored"] for process in found] == [[1] * 6] * 2
    assert [r["records"] for r in lines(tmp_path / "two", "eval.jsonl")] == [3] * len(
        lines(tmp_path / "one", "eval.jsonl")
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_goes_on_in_other_numbers_of_processes(tmp_path):
    """2, 3 and 1 processes after one another take each record once, as one process would."""
    settings = SETTINGS | {"prompts_per_step": 6, "save_every": 1}
    positions: list[int] = []
    for steps, world in ((1, 2), (2, 3), (3, 1)):
        for process in processes.train_together(world, tmp_path / "parts", settings | {"max_steps": steps}):
            positions += process["positions"]
    assert sorted(positions) == list(range(18))
    (alone,) = processes.train_together(1, tmp_path / "whole", settings | {"max_steps": 3})
    for first, second in zip(lines(tmp_path / "whole"), lines(tmp_path / "parts"), strict=True):
        shown = {"reward", "loss", "entropy", "grad_norm", "length/mean"}
        assert shown & first.keys() == shown & second.keys()
        for name in shown & first.keys():
            assert second[name] == pytest.approx(first[name], rel=5e-3, abs=1e-4), (first["step"], name)
    assert alone["updates"] == sum("grad_norm" in record for record in lines(tmp_path / "parts")) > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_updates_of_several_processes_are_as_many_on_each(tmp_path):
    """Several updates a step, and processes with unequally many groups that have a signal: none waits for another."""
    settings = SETTINGS | {"entropy_coef": 0.0, "updates_per_step": 2, "max_steps": 3}
    found = processes.train_together(2, tmp_path, settings)
    assert found[0]["updates"] == found[1]["updates"] > 0 and found[0]["weights"] == found[1]["weights"]
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3]
