"""The tiny model and its processor, and the warm start that teaches it to answer."""

import math
import random
import re

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.data.records import Record
from appo.demo import SETTINGS
from appo.rollout.engine import Sampling
from appo.rollout.model_engine import TransformersRollout
from appo.rollout.rewards import combine
from appo.tasks import KINDS, Difficulty, make_task, response_text, think_text
from appo.tasks.named import TASKS
from appo.tasks.questions import NUMBERS
from appo.tasks.tiny import build_tiny, build_tokenizer
from appo.tasks.warmup import target, time_marked, warm_up, words_seen
from appo.train.grade import texts_of
from appo.train.groups import whole_groups
from appo.train.logs import Meter
from appo.train.metrics import measure_frames
from appo.train.trainer import Trainer

CONFIG = APPOConfig(fps=4.0, max_frames=16, max_pixels=28 * 28, instructions=False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two of every kind."""
    root = tmp_path_factory.mktemp("task")
    paths = make_task(root, seed=2, sizes={"warmup": 2 * len(KINDS)}, kinds=tuple(KINDS))
    model, processor = build_tiny()
    build = PromptBuilder(processor, model.config, CONFIG)
    return [build(record) for record in load_records(paths["warmup"])]


def test_sizes(prompts, tmp_path):
    model, _ = build_tiny()
    assert 0.9e6 < sum(p.numel() for p in model.parameters()) < 1.2e6
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 4.8e6
    for prompt in prompts:
        assert prompt.vision["video_grid_thw"].tolist() == [[8, 4, 4]]
        assert prompt.num_frames == 8 and torch.bincount(prompt.frame_ids[prompt.frame_ids >= 0]).tolist() == [4] * 8
        assert len(prompt) <= 68


def test_every_word_of_the_task_is_known(prompts):
    tokenizer = build_tokenizer()
    for prompt in prompts:
        assert tokenizer.unk_token_id not in prompt.input_ids.tolist()
    for kind, build in KINDS.items():
        question = build(np.random.default_rng(0), Difficulty(), 4.0, 8)
        for letter, option in zip("ABCD", question.options, strict=False):
            steps = [0, 3, 5, 7][: {"order": 2, "count": "ABCD".index(letter) + 1}.get(kind, 1)]
            text = response_text(think_text(kind, steps, option), letter)
            ids = tokenizer(text + tokenizer.eos_token).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert 15 <= len(ids) <= 26


def test_decoding_gives_text_as_it_is_written():
    tokenizer = build_tokenizer()
    text = " Which colour is it?\nA. red\nB. green<think> i see</think><answer>B</answer><time>8.4 to 12.5</time>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text.replace(" 12", "12")  # digits carry no space: readers of <time> do not mind
    assert tokenizer("zebra").input_ids == [tokenizer.unk_token_id]


def test_saved_and_loaded_by_the_auto_classes(prompts, tmp_path):
    model, processor = build_tiny(4)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Qwen2_5_VLForConditionalGeneration and type(reader) is Qwen2_5_VLProcessor
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert reader.tokenizer.padding_side == "left" and reader.chat_template == processor.chat_template
    again = PromptBuilder(reader, loaded.config, CONFIG)(prompts[0].record)
    assert torch.equal(again.input_ids, prompts[0].input_ids)
    assert torch.equal(again.vision["pixel_values_videos"], prompts[0].vision["pixel_values_videos"])
    inputs = collate(prompts[:3], processor.tokenizer.pad_token_id).inputs
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded.eval()(**inputs).logits)


def test_built_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, again, other = (build_tiny(seed)[0].state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_families_and_options():
    model, processor = build_tiny(family="qwen3_vl", num_attention_heads=7, num_key_value_heads=1)
    assert model.config.text_config.num_attention_heads == 7 and model.config.model_type == "qwen3_vl"
    assert type(processor).__name__ == "Qwen3VLProcessor"
    with pytest.raises(ValueError, match="build_tiny: `family`: expected one of"):
        build_tiny(family="llama")


def test_targets_say_what_happened_and_when(prompts):
    for prompt in prompts:
        record = prompt.record
        text = target(prompt, random.Random(0), 0.0)
        assert combine({"accuracy": 1.0, "format": 1.0}, [text], [record]).total.item() == 2.0
        # The half second that holds the middle of the moment, the earlier one where it is on the border.
        steps = [math.ceil((start + end) / 2 / 0.5) - 1 for start, end in record.time_spans]
        if record.meta["task"] == "cue":  # four times of a second each
            steps = [int(record.time_spans[0][0])]
        option = record.options["ABCD".index(record.answer)][3:]
        assert text == response_text(think_text(record.meta["task"], steps, option), record.answer)


def test_noisy_targets_are_consistent_and_spread_over_the_options(prompts):
    rng = random.Random(0)
    for prompt in prompts:
        size = len(prompt.record.options)
        drawn = [target(prompt, rng, 1.0) for _ in range(60 * size)]
        letters = [text[text.index("<answer>") + 8] for text in drawn]
        assert all(60 - 40 < letters.count(letter) < 60 + 40 for letter in "ABCD"[:size])
        for text, letter in zip(drawn, letters, strict=True):
            option = prompt.record.options["ABCD".index(letter)][3:]
            assert text.count(option) >= 2, "what was seen and the answer agree"
            if prompt.record.meta["task"] == "count":
                assert text.count("then") == "ABCD".index(letter)


def test_a_target_reports_what_is_shown_at_the_time_it_names(prompts):
    rng, times = random.Random(1), set()
    for prompt in prompts:
        if prompt.record.meta["task"] != "cue":
            continue
        words = words_seen(prompt)
        for _ in range(200):
            found = re.match(r"<think> i see at time (\w+) (\w+) so the cue is (\w+)</think>", target(prompt, rng, 0.8))
            time = NUMBERS.index(found[1])
            times.add(time)
            assert found[2] == found[3] == words[2 * time] == words[2 * time + 1]
    assert times == {0, 1, 2, 3}


def test_words_seen_follow_the_spans(prompts):
    for prompt in prompts:
        words = words_seen(prompt)
        assert len(words) == prompt.num_frames
        if prompt.record.meta["task"] == "cue":
            assert words == [word for _, _, word in prompt.record.meta["seen"] for _ in range(2)]
            assert [words[frame] for frame in prompt.labelled_frames()] == [
                prompt.record.meta["seen"][time_marked(prompt.record)][2]
            ] * 2
            continue
        events = [index for index, word in enumerate(words) if word != "nothing"]
        # A moment of half a second touches one or two steps of half a second, and each span is found.
        assert len(prompt.record.time_spans) <= len(events) <= 2 * len(prompt.record.time_spans)
        assert set(events) <= set(prompt.labelled_frames())


def test_warm_up_learns_and_is_deterministic(prompts):
    models = [build_tiny(0) for _ in range(2)]
    losses = [[], []]
    torch.manual_seed(0)
    for (model, processor), kept in zip(models, losses, strict=True):
        stats = warm_up(
            model, processor, prompts, looking_steps=12, steps=8, batch_size=4,
            progress=lambda step, loss, seen, kept=kept: kept.append(loss),
        )  # fmt: skip
        torch.rand(7)  # the global generator must not matter
        assert stats.steps == 20 and not model.training
    assert np.isnan(losses[0][:12]).all() and np.isfinite(losses[0][12:]).all()
    assert losses[0][-1] < losses[0][12] - 1
    assert losses[0][12:] == losses[1][12:]
    assert all(torch.equal(a, b) for a, b in zip(models[0][0].parameters(), models[1][0].parameters(), strict=True))


def test_looking_trains_the_vision_tower_alone(prompts):
    model, processor = build_tiny(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    warm_up(model, processor, prompts, looking_steps=2, steps=0, batch_size=4)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("visual.patch_embed" in name for name in moved) and "lm_head.weight" in moved
    assert not any("language_model.layers" in name for name in moved)


def test_warm_up_wants_records_with_known_moments(prompts):
    model, processor = build_tiny()
    prompt = prompts[0]
    strange = Record(id="strange", question="?", answer="A", kind="multiple choice", options=("A. a",))
    with pytest.raises(ValueError, match=r"warm_up: `prompts`: expected records of appo\.tasks.*'strange'"):
        warm_up(model, processor, [type(prompt)(strange, prompt.input_ids, prompt.token_types)])


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_warm_start_leaves_something_to_learn(tmp_path):
    """What the demo builds on: good format, a best guess far from perfect on the hard split, groups that disagree."""
    paths = make_task(tmp_path, sizes={"warmup": 512, "validation": 96})
    model, processor = build_tiny()
    build = PromptBuilder(processor, model.config, CONFIG)
    splits = {name: [build(record) for record in load_records(path)] for name, path in paths.items()}
    warm_up(model, processor, splits["warmup"])
    held_out = splits["validation"]

    def answers(size, temperature):
        sampling = Sampling(group_size=size, max_new_tokens=32, temperature=temperature)
        done = TransformersRollout(model, processor).generate(held_out, sampling, range(len(held_out)))
        texts = [text for group in done for text in texts_of(group, processor.tokenizer)]
        records = [prompt.record for prompt in held_out for _ in range(size)]
        scores = combine({"accuracy": 1.0, "format": 1.0}, texts, records).by_name
        return scores["accuracy"].view(-1, size), scores["format"]

    best, _ = answers(1, 0.0)
    sampled, well_formed = answers(8, 1.0)
    assert 0.35 < best.mean() < 0.85
    assert 0.25 < sampled.mean() < 0.6
    assert well_formed.mean() > 0.8
    assert (sampled.amax(1) > sampled.amin(1)).float().mean() > 0.8


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_time_a_response_wrote_decides_where_it_looks(tmp_path):
    """The task "cue" of the learning benchmark: right and wrong responses look at different frames, `hard` sees it."""
    paths = make_task(tmp_path / "data", seed=102, kinds=("cue",), sizes={"warmup": 512, "train": 32})
    options = dict(TASKS["cue"].warm)
    model, processor = build_tiny(102, **options.pop("model_options"))
    build = PromptBuilder(processor, model.config, CONFIG)
    warm_up(model, processor, [build(record) for record in load_records(paths["warmup"])], seed=102, **options)
    settings = SETTINGS | TASKS["cue"].settings | {"prompts_per_step": 32, "output": str(tmp_path / "run")}
    trainer = Trainer(model, processor, load_records(paths["train"]), config=APPOConfig.from_dict(settings))
    groups = trainer.reward(trainer.rollout(32))
    trainer.score(whole_groups(groups))
    trainer.select(groups)

    consistent, on_written, elsewhere = [], [], []
    for group in groups:
        for ids, text, mass in zip(group.completion_ids, group.texts, group.mask[..., None] * group.mass, strict=True):
            if found := re.match(r"<think> i see at time (one|two|three|four) (\w+) so the cue is \2<", text):
                time, place = NUMBERS.index(found[1]), ids.tolist().index(build_tokenizer().get_vocab()[found[2]])
                consistent.append(group.prompt.record.meta["seen"][time][2] == found[2])
                on_written.append(mass[place, 2 * time : 2 * time + 2].mean().item())
                elsewhere.append((mass[place].sum().item() - 2 * on_written[-1]) / 6)
    assert len(consistent) > 0.85 * 32 * 8 and np.mean(consistent) > 0.85
    assert np.mean(on_written) > 1.2 * np.mean(elsewhere), "the colour is read where the time says"

    meter, informative = Meter(), [group for group in groups if group.informative]
    for group in informative:
        measure_frames(meter, group)
    found = meter.means()
    assert 0.3 < np.mean([group.accuracy.mean() for group in groups]) < 0.7 and len(informative) > 0.8 * 32
    # A quarter of the frames is right: that is what picking at random would come to. Flashes and blinks reach 0.16.
    assert found["frames/empty"] < 0.6 and found["frames/precision"] > 0.4 and found["frames/recall"] > 0.08
