"""What is not finite: updates that are skipped, weights that are not saved, scores that take no part."""

import json
import math

import pytest
import torch
from run_cases import lines, make, same, weights_of

from appo.train import checkpoints
from appo.train.updates import NonFiniteError
from appo_kernels import linear_weighted_surrogate


class Spoiled:
    """The surrogate, whose loss or gradient is not finite in the calls with these numbers."""

    def __init__(self, calls, factor, of):
        self.calls, self.factor, self.of, self.count = calls, factor, of, 0

    def __call__(self, hidden, *operands, **arguments):
        self.count += 1
        if self.count in self.calls and self.of == "gradient":
            hidden = hidden * 1.0
            hidden.register_hook(lambda gradient: gradient * self.factor)
        result = linear_weighted_surrogate(hidden, *operands, **arguments)
        return (
            result._replace(loss=result.loss * self.factor)
            if self.count in self.calls and self.of == "loss"
            else result
        )


# NaN and infinity, in the loss with its gradient, and in a gradient whose loss is finite; two micro-batches a step.
@pytest.mark.parametrize(("factor", "of"), [(math.nan, "loss"), (math.inf, "loss"), (math.nan, "gradient")])
def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path, factor, of):
    trainer = make(tmp_path, surrogate=Spoiled({3}, factor, of), max_steps=3)
    trainer.step(1)
    before, moments = weights_of(trainer), json.dumps(str(trainer.updates.optimizer.state_dict()["state"][0]))
    metrics = trainer.step(2)
    assert metrics["updates/nonfinite"] == 1 and "grad_norm" not in metrics and trainer.version == 1
    assert same(before, weights_of(trainer)), "weights are those of step 1"
    assert moments == json.dumps(str(trainer.updates.optimizer.state_dict()["state"][0])), "so is the optimizer"
    metrics = trainer.step(3)
    assert "updates/nonfinite" not in metrics and metrics["grad_norm"] > 0 and trainer.version == 3
    assert not same(before, weights_of(trainer))


def test_too_many_in_a_row_end_the_run_with_what_it_saw_and_good_checkpoints(tmp_path):
    # Step 2 is spoiled, step 3 is not: the count starts again. Steps 4 and 5 are.
    trainer = make(
        tmp_path,
        surrogate=Spoiled({3, 7, 9}, math.nan, "loss"),
        max_steps=9,
        max_skipped=2,
        save_every=1,
        keep_checkpoints=9,
    )
    with pytest.raises(NonFiniteError, match=r"2 updates in a row.*step 4: loss nan.*step 5: loss nan"):
        trainer.train()
    assert [path.name for path in checkpoints.existing(tmp_path / "checkpoints")][-1] == "step-000004"
    again = make(tmp_path, model_seed=5, max_steps=5, max_skipped=2)
    again.train()
    assert all(value.isfinite().all() for value in weights_of(again).values())
    assert [record["step"] for record in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    trainer = make(tmp_path, max_steps=3, save_every=1)
    step, steps = trainer.updates.optimizer.step, []

    def overflow():
        step()
        steps.append(1)
        if len(steps) == 2:
            with torch.no_grad():
                next(p for p in trainer.policy.parameters() if p.requires_grad).view(-1)[3] = math.inf

    trainer.updates.optimizer.step = overflow
    with pytest.raises(NonFiniteError, match=r"weight is not finite after step 2\. It is not saved"):
        trainer.train()
    (left,) = checkpoints.existing(tmp_path / "checkpoints")
    assert left.name == "step-000001" and not (tmp_path / "final").exists()


def test_groups_whose_scores_are_not_finite_take_no_part(tmp_path):
    trainer = make(tmp_path, micro_groups=1)
    values, calls = trainer.policy.output_head, []

    def spoiled(dtype):
        weight, bias = values(dtype)
        calls.append(1)
        return (weight * math.nan if len(calls) == 1 else weight), bias

    trainer.policy.output_head = spoiled  # the first group that is scored
    metrics = trainer.step(1)
    assert metrics["groups/nonfinite"] == 1 and metrics["grad_norm"] > 0
    scored = sum(group.scored for group in trainer.groups)
    assert scored == sum(group.informative for group in trainer.groups) - 1
