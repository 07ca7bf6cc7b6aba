"""Every layout that is served, on random weights: hidden states, recorded mass, training; all others are refused."""

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import training
import transformers as hf
import vision_models
from layout_cases import logits_of, plain_inputs, plain_logits, settings
from PIL import Image
from test_policy import make_groups
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from appo import record_frame_mass
from appo.config import ConfigError
from appo.data.prompts import PromptBuilder
from appo.data.records import Media
from appo.models.layout_grid import GridLayout
from appo.models.layouts import LAYOUTS, layout_of, layout_table, register_layout
from appo.models.load import check_fits
from appo.recording.hooks import attention_modules, last_layers
from appo.rollout.build import build_engine
from appo.train.groups import batch_parts, whole_groups
from appo.train.policy import Policy
from appo.train.setup import load_model, prepare_model
from appo.train.trainer import Trainer

DOCS = Path(__file__).parents[1] / "docs" / "models.md"


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_hidden_states_and_mass_are_those_of_each_response_alone(model_type: str, tmp_path: Path) -> None:
    """Policy against a plain forward, recorded mass against eager attention; shared prompts as well where they are."""
    model, processor = vision_models.build(model_type)
    layout = LAYOUTS[model_type]
    builder = PromptBuilder(processor, model.config, settings(processor, tmp_path, layout))
    groups = make_groups(builder, 3, 2, [5, 7, 1], 100)
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    alone, eager = [], []
    for group in groups:
        assert group.prompt.num_frames > 1
        frames = (group.prompt.frame_ids[:, None] == torch.arange(group.prompt.num_frames)).double()
        for row in range(2):
            model.set_attn_implementation("sdpa")
            alone.append(plain_logits(model, group, row, processor, layout))
            model.set_attn_implementation("eager")
            with torch.no_grad():
                attentions = model(**plain_inputs(group, row, processor, layout), output_attentions=True).attentions
            layers = [layer for layer in attentions if layer is not None]
            rows = torch.stack([layer[0, :, len(group.prompt) - 1 : -1, : len(group.prompt)] for layer in layers])
            eager.append(rows.double().mean((0, 1)) @ frames)
    model.set_attn_implementation("sdpa")
    attending = sorted(attention_modules(model.get_decoder()))  # windowed ones too
    for share in ("on", "off") if layout.shares_prompt else ("auto",):
        policy = Policy(model, share)
        assert policy.share_prompt == (share == "on")
        sequences = policy.sequences(batch)
        recorder = record_frame_mass(model, sequences.frame_ids, rows=sequences.rows, layers=attending, reduction="sum")
        with torch.no_grad(), recorder:
            logits = policy(batch, logits_of(policy), sequences)
        mass = sequences.per_response(recorder.mass)
        for index in range(6):
            valid = batch.mask[index]
            torch.testing.assert_close(logits[index][valid], alone[index], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(
                mass[index][valid][:, : eager[index].shape[1]].double(), eager[index], rtol=1e-4, atol=1e-6
            )
        assert mass[batch.mask].sum(-1).max() > 0.05


def still_life(folder: Path, count: int) -> Any:
    """A record about ``count`` frames of 28 x 28 pixels, of which the left half stays as it is."""
    paths = [folder / f"{number}.png" for number in range(count)]
    folder.mkdir()
    for number, path in enumerate(paths):
        picture = torch.zeros(28, 28, 3, dtype=torch.uint8)
        picture[:, 14:] = (number * 97) % 251
        Image.fromarray(picture.numpy()).save(path)
    return dataclasses.replace(
        training.records()[0], media=(Media("video", folder, frames=tuple(paths), fps=4.0),), time_spans=()
    )


def test_tokens_that_are_as_in_the_frame_before_are_left_out(tmp_path: Path, monkeypatch: Any) -> None:
    """VideoLLaMA 3 with frames of up to four tokens: each frame keeps some, and features stand where they belong."""
    records = [still_life(tmp_path / str(count), count) for count in (4, 6)]
    monkeypatch.setattr(training, "records", lambda: records)
    model, processor = vision_models.build("video_llama_3")
    layout = LAYOUTS["video_llama_3"]
    builder = PromptBuilder(processor, model.config, settings(processor, tmp_path, layout, max_pixels=28 * 28))
    groups = make_groups(builder, 2, 2, [4, 3], 100)
    for group in groups:
        kept, frames = group.prompt.vision["video_compression_mask"], group.prompt.frame_ids
        sizes = frames[frames >= 0].bincount().tolist()
        assert 0 < kept.sum() < len(kept) and len(set(sizes)) > 1 and len(sizes) == len(group.prompt.frame_times)
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    policy = Policy(model, "on")
    with torch.no_grad():
        logits = policy(batch, logits_of(policy))
    for index in range(4):
        alone = plain_logits(model, groups[index // 2], index % 2, processor, layout)
        torch.testing.assert_close(logits[index][batch.mask[index]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_five_steps_of_training(model_type: str, tmp_path: Path) -> None:
    """The ratio of the first update is 1: rollout, scoring and update agree on every token's log-probability."""
    model, processor = vision_models.build(model_type)
    before = model.get_output_embeddings().weight.detach().clone()
    config = settings(processor, tmp_path, LAYOUTS[model_type], max_steps=5, prompts_per_step=2, max_new_tokens=6)
    Trainer(model, processor, training.records(), config=config).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "kl/approx" in line]  # a step whose rewards are all equal makes none
    assert len(lines) == 5 and updates
    assert all(abs(line["kl/approx"]) < 1e-5 and line["grad_norm"] > 0 and line["mass/frames"] > 0 for line in updates)
    assert not torch.equal(before, model.get_output_embeddings().weight.detach())


# transformers reads a tokenizer of Qwen3.5 as byte pairs, whatever was saved.
@pytest.mark.parametrize("model_type", [name for name in LAYOUTS if not name.startswith("qwen3_5")])
def test_a_saved_model_reads_a_record_as_before(model_type: str, tmp_path: Path) -> None:
    model, processor = vision_models.build(model_type)
    config = settings(processor, tmp_path / "run", LAYOUTS[model_type], model=str(tmp_path))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = load_model(config)
    expected, found = (
        PromptBuilder(reader, made.config, config)(training.records()[0])
        for made, reader in ((model, processor), loaded)
    )
    assert found.text == expected.text and found.num_frames == expected.num_frames
    assert torch.equal(found.input_ids, expected.input_ids) and torch.equal(found.frame_ids, expected.frame_ids)
    assert found.vision.keys() == expected.vision.keys()
    assert all(torch.equal(value, expected.vision[name]) for name, value in found.vision.items())


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_frozen_vision_is_all_but_the_text_model(model_type: str, tmp_path: Path) -> None:
    """Tower, projector, line breaks: with them frozen, features of a clip are the same all the run."""
    model, _ = vision_models.build(model_type)
    prepare_model(model, training.config(tmp_path, freeze_vision=True))
    text = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
    assert {parameter for parameter in model.parameters() if parameter.requires_grad} == text


def test_layers_with_a_window_are_not_recorded_in_training(tmp_path: Path) -> None:
    """Near the end of most of Gemma's layers stand windows, which see the last frames alone."""
    model, processor = vision_models.build("gemma3")
    kinds = model.config.get_text_config().layer_types
    whole = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    assert last_layers(model, 1) == whole[-1:] and last_layers(model, 2) == whole == [1, 3]
    check_fits(settings(processor, tmp_path, LAYOUTS["gemma3"]), model, processor)
    with pytest.raises(ConfigError, match="`layers`: expected 1 to 2 layers that see all frames, got 3"):
        check_fits(settings(processor, tmp_path, LAYOUTS["gemma3"], layers=3), model, processor)


def test_every_layout_has_a_tiny_model() -> None:
    assert set(vision_models.BUILDERS) == set(LAYOUTS)


def test_every_vision_language_model_of_transformers_is_served_or_refused_by_name() -> None:
    """The list of the installed transformers, whatever its version: no model is taken without having been checked."""
    served, broken, refused = [], [], []
    for model_type in sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        try:
            layout_of(SimpleNamespace(model_type=model_type))
            forward = getattr(hf, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type]).forward
            takes_features = "mm_encoder_outputs" in inspect.signature(forward).parameters
            (served if takes_features else broken).append(model_type)
        except ConfigError as error:
            assert repr(model_type) in str(error) and "docs/models.md" in str(error)
            refused.append(model_type)
    print("served:", *served, "\nbroken, no features computed before:", *broken, "\nrefused:", *refused)
    assert set(served) == set(LAYOUTS) and not broken and len(refused) > 10


# No field, nothing in it, empty text.
@pytest.mark.parametrize(
    "config", [SimpleNamespace(), SimpleNamespace(model_type=None), SimpleNamespace(model_type="")]
)
def test_configurations_without_a_type_are_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="layout is known to be right"):
        layout_of(config)


def test_a_layout_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appo.models.layouts.LAYOUTS", dict(LAYOUTS))
    with pytest.raises(ValueError, match="expected a new model type"):
        register_layout(LAYOUTS["qwen3_vl"])
    mine = GridLayout("mine", "Mine", "one run of tokens", False, "nobody tried")
    register_layout(mine)
    assert layout_of(SimpleNamespace(model_type="mine")) == mine


def test_the_page_has_the_table() -> None:
    assert layout_table() in DOCS.read_text(), "docs/models.md: write the table of appo.models.layouts.layout_table()"
    readme = (DOCS.parents[1] / "README.md").read_text()
    row = next(line for line in readme.splitlines() if line.startswith("| ") and "docs/models.md" in line)
    named = row.split("(")[0].replace(" and MoE", "").removeprefix("| ").split(", ")
    families = list(dict.fromkeys(layout.models.split(",")[0] for layout in LAYOUTS.values()))
    assert [name.strip() for name in named] == families, "README.md: the row of models"


@pytest.mark.parametrize("model_type", [name for name, layout in LAYOUTS.items() if layout.why_not_vllm])
def test_vllm_is_refused_where_its_frames_were_not_compared(model_type: str, tmp_path: Path) -> None:
    config = training.config(tmp_path, engine="vllm-server", vllm_python="python3")
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    with pytest.raises(
        ConfigError, match=f"`engine`: expected transformers with {LAYOUTS[model_type].models}, got vllm"
    ):
        build_engine(config, model, None)
