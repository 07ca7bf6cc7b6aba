"""`appo merge`: the merged model answers as the one with adapters does, and nothing half-written is left."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import training
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from appo.config import ConfigError
from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.models.merge import merge_adapters
from appo.train.setup import prepare_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and adapters for it whose effect is far from zero."""
    base, adapters = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapters")
    model, processor = training.tiny()
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base)
    adapted: Any = prepare_model(model, training.config("x", lora_rank=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    adapted.save_pretrained(adapters)
    processor.save_pretrained(adapters)
    return base, adapters


def logits(model: Any, processor: Any, tmp_path: Path) -> torch.Tensor:
    prompt = PromptBuilder(processor, model.config, training.config(tmp_path))(training.records()[0])
    with torch.no_grad():
        return model(**collate([prompt], 0).inputs).logits


def test_the_merged_model_is_the_adapted_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapters = folders
    output = merge_adapters(adapters, tmp_path / "merged")
    assert not list(tmp_path.glob("*.partial")) and not list(output.glob("adapter*"))
    merged, processor = AutoModelForImageTextToText.from_pretrained(output), AutoProcessor.from_pretrained(output)
    plain = AutoModelForImageTextToText.from_pretrained(base)
    before = logits(plain, processor, tmp_path)
    with_adapters = logits(PeftModel.from_pretrained(plain, str(adapters)), processor, tmp_path)
    torch.testing.assert_close(logits(merged, processor, tmp_path), with_adapters, rtol=1e-4, atol=1e-4)
    assert (with_adapters - before).abs().max() > 0.1


def test_adapters_that_name_no_model_take_one(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapters = folders
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in adapters.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = json.loads((copy / "adapter_config.json").read_text()) | {"base_model_name_or_path": ""}
    (copy / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="Pass --model"):
        merge_adapters(copy, tmp_path / "out")
    assert merge_adapters(copy, tmp_path / "out", model=str(base)).is_dir()


def test_what_cannot_be_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapters = folders
    with pytest.raises(ConfigError, match="expected a folder of adapters"):
        merge_adapters(base, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        merge_adapters(adapters, base)
    other, processor = training.tiny(num_key_value_heads=1)
    other.save_pretrained(tmp_path / "other")
    processor.save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"expected adapters of .*other, got some that do not fit"):
        merge_adapters(adapters, tmp_path / "out", model=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="expected a folder that exists or a hub name"):
        merge_adapters(adapters, tmp_path / "out", model=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()
