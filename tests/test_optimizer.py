"""The optimizer: AdamW of torch or of bitsandbytes, kept over checkpoints."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import training

from appo.config import ConfigError
from appo.train.trainer import Trainer

SHORT: dict[str, Any] = {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "learning_rate": 1e-4}


def run(output: Path, **settings: Any) -> dict[str, torch.Tensor]:
    model, processor = training.tiny()
    trainer = Trainer(model, processor, training.records(), config=training.config(output, **(SHORT | settings)))
    trainer.train()
    weights: dict[str, torch.Tensor] = trainer.model.state_dict()
    return weights


# State in fp32, and in 8 bits with its own format of checkpoints.
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_its_state_goes_on(tmp_path, optimizer):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    whole = run(tmp_path / "whole", max_steps=3, optimizer=optimizer)
    run(tmp_path / "parts", max_steps=2, optimizer=optimizer)
    parts = run(tmp_path / "parts", max_steps=3, optimizer=optimizer)
    before = training.tiny()[0].state_dict()
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert any(not value.equal(before[name]) for name, value in whole.items())


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"`optimizer`: expected adamw here, got adamw_paged: .*pip install"):
        run(tmp_path, optimizer="adamw_paged")


def test_shards_take_their_own(tmp_path):
    with pytest.raises(ConfigError, match="`optimizer`: expected adamw with shard = fsdp"):
        training.config(tmp_path, shard="fsdp", optimizer="adamw_8bit")
