"""A long prompt trains: memory of a step is linear in it."""

import dataclasses
from pathlib import Path

import pytest
import training

from appo.train.trainer import Trainer
from appo_kernels.testing import peak_extra_bytes

TOKENS = 20_000


@pytest.mark.slow
def test_a_step_makes_no_matrix_of_its_tokens(tmp_path: Path) -> None:
    """Rollout, scoring, loss and update of eight responses take less than one head's scores alone: 1.6 GB in fp32."""
    model, processor = training.tiny(num_hidden_layers=1)
    record = training.records()[0]
    words = ["watch the video step by step and then look"] * (TOKENS // 9 + 1)
    record = dataclasses.replace(record, question=" ".join([record.question, *words]))
    assert len(processor.tokenizer(record.question).input_ids) > TOKENS
    settings = training.config(tmp_path, prompts_per_step=1, group_size=8, micro_groups=1, layers=1)
    trainer = Trainer(model, processor, [record], config=settings)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert peak_extra_bytes(lambda: trainer.step(1)) < 4 * TOKENS**2
    assert any(not old.equal(new) for old, new in zip(before, model.parameters(), strict=True))
