"""The difference between engine and trainer: measured, corrected by default, and a warning that says why."""

import logging
import math

import pytest
import torch
import training
from test_trainer_parts import Recited

from appo.config import APPOConfig, ConfigError
from appo.train.engine_difference import measure_engine, warn_of_drift
from appo.train.groups import Group
from appo.train.logs import Meter
from appo.train.trainer import Trainer
from appo_kernels import linear_weighted_surrogate


def group_of(trainer, engine, mask, version=0):
    zeros = torch.zeros(len(mask))
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    group = Group(None, ids, mask, engine, zeros > 0, [""] * len(mask), zeros, zeros, {}, weight_version=version)
    group.old_logprobs = trainer
    return group


def measured(group, version=0, **settings):
    meter = Meter()
    config = APPOConfig(**settings)
    measure_engine(meter, [group], config, corrects=config.corrects(False), version=version)
    return {name.removeprefix("engine/"): value for name, value in meter.means().items()}


def test_numbers_of_a_step_by_their_definitions():
    """Two responses, one token of padding that holds anything, one token that the engine does not know."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    trainer = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -0.5, math.nan]])
    engine = torch.tensor([[-1.0, -2.5, -2.999], [math.nan, -2.5, 5.0]])
    found = measured(group_of(trainer, engine, mask, version=3), version=5)
    differences = [0.0, 0.5, -0.001, 2.0]
    ratios = [math.exp(d) for d in differences]
    assert found["logprob_diff"] == pytest.approx(sum(map(abs, differences)) / 4, rel=1e-5)
    assert found["logprob_diff_max"] == pytest.approx(2.0)
    assert found["noticeable"] == 2 / 4
    assert found["effective_sample_size"] == pytest.approx(sum(ratios) ** 2 / (4 * sum(r * r for r in ratios)))
    assert found["unknown"] == pytest.approx(1 / 5)
    assert found["age"] == 2
    assert found["corrected"] == 1 / 4  # exp(2) alone is above the cap of 2


# Which of the ratios 1, e^0.5, e^-0.001, 1, e^2 a correction changes; by sequence: e^0.499 and e^2.
@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"rollout_cap": 1.5}, 2 / 4),
        ({"rollout_correction": "mask", "rollout_floor": 0.9999, "rollout_cap": 9.0}, 1 / 4),
        ({"rollout_correction": "clip", "rollout_floor": 1.2, "rollout_cap": 9.0}, 2 / 4),
        ({"rollout_level": "sequence"}, 1 / 4),
        ({"rollout_level": "sequence", "rollout_cap": 1.5}, 4 / 4),
        ({"rollout_correction": "none"}, None),
    ],
)
def test_share_that_is_corrected(settings, share):
    mask = torch.tensor([[True, True, True], [True, True, False]])
    trainer = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -0.5, math.nan]])
    engine = torch.tensor([[-1.0, -2.5, -2.999], [math.nan, -2.5, 5.0]])
    assert measured(group_of(trainer, engine, mask), **settings).get("corrected") == share


# The default; every setting away from its default; one kind alone; none.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("truncate", "token", 2.0, 0.0)),
        (
            {"rollout_correction": "mask", "rollout_level": "sequence", "rollout_floor": 0.5, "rollout_cap": 1.5},
            ("mask", "sequence", 1.5, 0.5),
        ),
        ({"rollout_correction": "clip", "rollout_floor": 0.5}, ("clip", "token", 2.0, 0.5)),
        ({"rollout_correction": "none"}, None),
    ],
)
def test_the_loss_corrects_for_another_engine(settings, expected, tmp_path):
    """By default for every engine but the model itself."""
    model, processor = training.tiny()
    calls = []

    def surrogate(*args, **options):
        calls.append(options)
        return linear_weighted_surrogate(*args, **options)

    engine = Recited(processor, ["red", "red blue"])
    config = training.config(tmp_path, **settings)
    Trainer(model, processor, training.records(), config=config, engine=engine, surrogate=surrogate).step(1)
    names = ("rollout_correction", "rollout_level", "rollout_cap", "rollout_floor")
    for options in calls:
        assert (options["rollout_logprobs"] is None) == (expected is None)
        if expected is not None:
            assert tuple(options[name] for name in names) == expected
    assert calls
    calls.clear()
    Trainer(model, processor, training.records(), config=training.config(tmp_path), surrogate=surrogate).step(1)
    assert calls and calls[0]["rollout_logprobs"] is None


# A floor without a use, of two kinds; a floor above the cap; a kind that is none.
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_floor": 0.5}, "`rollout_floor`: expected 0 with rollout_correction = auto"),
        ({"rollout_correction": "truncate", "rollout_floor": 0.5}, "has a cap only"),
        ({"rollout_correction": "mask", "rollout_floor": 3.0}, "expected at most rollout_cap = 2, got 3"),
        ({"rollout_correction": "some"}, "`rollout_correction`: expected one of"),
    ],
)
def test_corrections_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        APPOConfig(**settings)


# Numbers of an engine that samples from another distribution.
APART = {"engine/logprob_diff": 0.3, "engine/logprob_diff_max": 2.0, "engine/effective_sample_size": 0.4}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (APART, "positions, pixels or precision"),
        (APART | {"engine/age": 1.0}, "1.0 steps old"),
        (APART | {"engine/logprob_diff": 0.01}, "few differ much"),
        ({"engine/unknown": 0.5}, "no log-probability for 50% of the tokens"),
        ({"engine/logprob_diff": 0.02, "engine/effective_sample_size": 0.99, "engine/age": 1.0}, None),
        ({}, None),
    ],
)
def test_a_warning_says_why(values, reason, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_drift(7, values, "VLLMServerRollout")
    assert len(caplog.records) == (reason is not None)
    if reason:
        assert reason in caplog.text and "step 7: VLLMServerRollout" in caplog.text
