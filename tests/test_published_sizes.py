"""Sizes of published models against real ones, and configurations that are none."""

import json
from dataclasses import replace
from typing import Any

import pytest
from published_models import BOTH, build, config_of, small

from appo.config import ConfigError
from appo.models.architectures import ARCHITECTURES
from appo.models.sizes import find_architecture, from_config


# One tied and one untied head of each family, and both sizes of Qwen3-VL's vision tower.
@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-2B", "Qwen3-VL-8B"])
def test_parameters_are_exactly_those_of_the_published_model(name: str) -> None:
    sizes = ARCHITECTURES[name]
    model = build(sizes, "meta")
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters
    assert sum(p.numel() for p in model.model.visual.parameters()) == sizes.vision.parameters
    assert sum(p.numel() for p in model.model.language_model.layers[0].parameters()) == sizes.layer_parameters


# A family whose tower has windows, and one with normalised queries and several outputs of the tower.
@pytest.mark.parametrize("name", BOTH)
def test_sizes_are_read_from_a_local_config(name: str, tmp_path: Any) -> None:
    sizes = small(name)
    config_of(sizes).save_pretrained(tmp_path)
    assert find_architecture(str(tmp_path)) == replace(sizes, name=str(tmp_path))
    content = json.loads((tmp_path / "config.json").read_text())
    flat = {**content["text_config"], **{k: v for k, v in content.items() if k != "text_config"}}
    assert from_config(flat, "flat") == replace(sizes, name="flat")


def test_names_are_found_as_they_are_published() -> None:
    assert find_architecture("Qwen/Qwen2.5-VL-7B-Instruct").name == "Qwen2.5-VL-7B"
    assert find_architecture("qwen3-vl-8b").name == "Qwen3-VL-8B"
    with pytest.raises(ConfigError, match=r"`model`: expected a folder .* got 'GPT-9'"):
        find_architecture("GPT-9")
    with pytest.raises(ConfigError, match="expected model_type"):
        from_config({"model_type": "llama"}, "x")
    with pytest.raises(ConfigError, match="expected a field 'depth'"):
        from_config({"model_type": "qwen3_vl"}, "x")


# Files that are no configuration of a model, or one with sizes of no model.
@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", "7", "[" * 100_000, '{"model_type": "qwen3_vl"}', '{"model_type": "qwen3_vl", "text_config": 7}',
     '{"model_type": "qwen2_5_vl", "vision_config": []}'],
)  # fmt: skip
def test_files_that_are_no_configuration(content: str, tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        find_architecture(str(tmp_path))


# Text, negative, zero, infinite, nothing, a truth value, a list, beyond any memory.
@pytest.mark.parametrize("value", ["64", -1, 0, 1e400, None, True, [64], 10**12])
def test_sizes_that_no_model_has_are_named(value: Any, tmp_path: Any) -> None:
    config_of(small("Qwen3-VL-8B")).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    for part, name in (("text_config", "hidden_size"), ("vision_config", "depth"), ("vision_config", "patch_size")):
        changed = content | {part: content[part] | {name: value}}
        with pytest.raises(ConfigError, match="x: "):
            from_config(changed, "x")


def test_names_that_are_no_paths() -> None:
    for name in ("", "a\0b", "x" * 5000):
        with pytest.raises(ConfigError, match="`model`: expected a folder"):
            find_architecture(name)
