"""Sizes of families whose parameters are counted in transformers' own model, and the activations of their layers."""

import json
from typing import Any

import layout_cases
import pytest
import torch
import training
import transformers as hf
import vision_models
from test_planned_memory import saved_bytes

from appo.config import ConfigError
from appo.data.prompts import PromptBuilder
from appo.models.counted_sizes import FAMILIES
from appo.models.layouts import layout_of
from appo.models.sizes import find_architecture, from_config
from appo.planning.plan import Plan, planned
from appo.planning.workload import Workload

TEXT = {
    "hidden_size": 192, "intermediate_size": 448, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 640,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 32,
}  # fmt: skip
TOWER = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
# Of each family a config of its own; of InternVL and LLaVA-OneVision with the text models that they are published with.
CONFIGS: dict[str, tuple[Any, dict[str, Any], str, bool]] = {
    "internvl": (hf.InternVLConfig, {"image_size": [56, 56], "patch_size": [14, 14]}, "qwen2", True),
    "internvl qwen3": (hf.InternVLConfig, {"image_size": [56, 56], "patch_size": [14, 14]}, "qwen3", False),
    "llava_onevision": (hf.LlavaOnevisionConfig, {"image_size": 70, "patch_size": 14}, "qwen2", False),
    "smolvlm": (hf.SmolVLMConfig, {"image_size": 64, "patch_size": 16}, "llama", False),
    "video_llama_3": (hf.VideoLlama3Config, {"patch_size": 14}, "qwen2", True),
}


# Those whose positions are of three parts: the configs of the tests of layouts.
TINY = ("qwen2_vl", "qwen2_5_omni_thinker")


def config_of(name: str, layers: int) -> Any:
    if name in TINY:
        config = vision_models.build(name)[0].config
        text = config.get_text_config()
        text.num_hidden_layers, text.layer_types = layers, ["full_attention"] * layers
        return config
    kind, vision, text, tied = CONFIGS[name]
    tower = hf.AutoConfig.for_model(kind().vision_config.model_type, **TOWER, **vision)
    texts = hf.AutoConfig.for_model(text, **TEXT, num_hidden_layers=layers, tie_word_embeddings=tied)
    return kind(text_config=texts.to_dict(), vision_config=tower.to_dict(), tie_word_embeddings=tied)


def sizes_of(config: Any) -> Any:
    return from_config(json.loads(config.to_json_string(use_diff=False)), "x")


def test_every_family_has_a_case() -> None:
    assert {kind().model_type for kind, *_ in CONFIGS.values()} | set(TINY) == set(FAMILIES)


# All of them.
@pytest.mark.parametrize("name", [*CONFIGS, *TINY])
def test_parameters_and_activations_are_those_of_the_model(name: str) -> None:
    B, S = 2, 96
    taken = []
    for layers in (2, 3):
        config = config_of(name, layers)
        model = hf.AutoModelForImageTextToText.from_config(config)
        sizes = sizes_of(config)
        assert sizes.parameters == sum(p.numel() for p in model.parameters())
        decoder = model.get_decoder()
        assert sizes.layer_parameters == sum(p.numel() for p in decoder.layers[0].parameters())
        assert sizes.tied == config.tie_word_embeddings
        decoder.set_attn_implementation("sdpa")
        embedded, mask = torch.randn(B, S, sizes.hidden, requires_grad=True), torch.ones(B, S, dtype=torch.long)
        mask[0, :5] = 0  # padding, as in training
        taken.append(saved_bytes(decoder.train(), embedded, mask, mixed=False))
    work = Workload(frames=1, frame_tokens=1, text=1, response=S - 2 - sizes.frame_text, mixed=False)
    plan = Plan(sizes, work)
    assert plan.layer_activations() * B * S == pytest.approx(taken[1] - taken[0], rel=0.10)


# Those whose frames have one size: the number that the processor makes of a frame.
@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "smolvlm"])
def test_tokens_of_a_frame_are_those_of_a_prompt(family: str, tmp_path: Any) -> None:
    model, processor = vision_models.build(family)
    settings = layout_cases.settings(processor, tmp_path, layout_of(model.config))
    prompt = PromptBuilder(processor, model.config, settings)(training.records()[0])
    sizes = sizes_of(model.config)
    assert sizes.frame_tokens == int((prompt.frame_ids == 0).sum())
    model.config.save_pretrained(tmp_path / "model")
    plan = planned(training.config(tmp_path, model=str(tmp_path / "model"), max_frames=6, prompts_per_step=2), 1)
    assert (plan.work.frames, plan.work.frame_tokens) == (6, sizes.frame_tokens)
    assert find_architecture(str(tmp_path / "model")).parameters == sum(p.numel() for p in model.parameters())


# Layers with windows, norms of their own or experts; and a text model that a served family does not have.
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "exaone4_5", "qwen3_vl_moe", "qwen3_omni_moe_thinker"])
def test_other_families_are_refused_by_name(family: str) -> None:
    config = json.loads(vision_models.build(family)[0].config.to_json_string(use_diff=False))
    with pytest.raises(ConfigError, match=rf"x: expected model_type .*, got '{family}', whose layers the plan"):
        from_config(config, "x")


def test_a_thinker_is_found_in_the_config_of_the_whole() -> None:
    thinker = json.loads(config_of("qwen2_5_omni_thinker", 2).to_json_string(use_diff=False))
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "talker_config": {"hidden_size": 1}}
    assert from_config(whole, "x") == from_config(thinker, "x")
    with pytest.raises(ConfigError, match=r"x: expected model_type .*, got None"):
        from_config({"model_type": "qwen2_5_omni", "thinker_config": 7}, "x")


def test_another_text_model_is_refused_by_name() -> None:
    config = json.loads(config_of("internvl", 2).to_json_string(use_diff=False))
    config["text_config"] = hf.AutoConfig.for_model("qwen3_moe", **TEXT, num_hidden_layers=2).to_dict()
    with pytest.raises(ConfigError, match=r"x: expected a text model whose layers are Qwen2's.* got qwen3_moe"):
        from_config(config, "x")
    with pytest.raises(ConfigError, match="x: expected sizes of a model"):
        from_config({"model_type": "internvl", "text_config": 7}, "x")
