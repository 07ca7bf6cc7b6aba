"""ms-swift's own pipeline with ours: a whole GRPO run on videos, its weights against eager attention and all logits."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("swift.rlhf_trainers", reason="ms-swift is not installed: `make test-integrations`")
# Frames of 28 x 28, for the tiny model; read when ms-swift is imported.
os.environ.update(VIDEO_MIN_PIXELS="784", VIDEO_MAX_PIXELS="784", FPS_MAX_FRAMES="8", FPS="4", CUDA_VISIBLE_DEVICES="")

import av
import numpy as np
from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main
from swift.rewards import ORM, orms
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer
from swift.rlhf_trainers.utils import collate_to_grpo_micro_batch
from swift.template.templates.qwen import Qwen2VLTemplate

from appo import frame_ids, perception_slots, select_frames, token_weights
from appo.config import APPOConfig
from appo.integrations import ms_swift
from appo.tasks.tiny import build_tiny
from appo_kernels.ops.group_divergence import reference

G, TEMPERATURE = 4, 0.9


class Parity(ORM):
    """Differs within almost every group."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion) % 2) for completion in completions]


def prepare(folder: Path) -> None:
    """A model, four clips of two lengths and questions about them."""
    model, processor = build_tiny(0)
    vocabulary = processor.tokenizer.get_vocab()
    model.generation_config.suppress_tokens = [number for token, number in vocabulary.items() if "|>" in token]
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    rows, random = [], np.random.default_rng(0)
    for index in range(4):
        path = str(folder / f"{index}.mp4")
        with av.open(path, "w") as file:
            stream = file.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 56, 56, "yuv420p"
            for _ in range(8 if index % 2 else 4):
                pixels = random.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
        rows.append({"messages": [{"role": "user", "content": "<video>which colour is first"}], "videos": [path]})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("swift")
    prepare(folder)
    return folder


def run(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "model/config.json").read_text())
    # Those of Qwen's tokenizer are written into the template.
    Qwen2VLTemplate.video_token_id, Qwen2VLTemplate.image_token_id = config["video_token_id"], config["image_token_id"]
    orms["parity"] = Parity
    settings: dict[str, Any] = {
        "model": str(folder / "model"), "model_type": "qwen2_5_vl", "template": "qwen2_5_vl", "torch_dtype": "float32",
        "dataset": [str(folder / "data.jsonl")], "split_dataset_ratio": 0, "load_from_cache_file": False,
        "rlhf_type": "grpo", "reward_funcs": ["parity"], "num_generations": G, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "max_completion_length": 10, "temperature": TEMPERATURE, "max_steps": 1,
        "output_dir": str(folder / "out"), "report_to": [], "tuner_type": "full", "use_cpu": True, "use_hf": True,
        "logging_steps": 1, "save_strategy": "no", "beta": 0.0, "learning_rate": 1e-3, "attn_impl": "sdpa",
        "dataset_num_proc": 1, "dataloader_num_workers": 0, "bf16": False, "seed": 3,
    }  # fmt: skip
    rlhf_main(RLHFArguments(**(settings | changes)))


def expected(trainer: Any, group: list[Any], rewards: torch.Tensor) -> list[torch.Tensor]:
    """Weights of a group by the definitions: eager attention, all logits."""
    with trainer._template_context(trainer.template):
        inputs, batch = collate_to_grpo_micro_batch(
            [type(one)(**(vars(one) | {"encoded": dict(one.encoded)})) for one in group], trainer.template,
            device=torch.device("cpu"), use_logits_to_keep=True,
        )  # fmt: skip
    inputs.pop("labels")
    ids, mask = inputs["input_ids"], batch.completion_mask.bool()
    length, model = mask.shape[1], trainer.model
    frames = frame_ids(ids, model.config, video_grid_thw=inputs["video_grid_thw"])
    model.set_attn_implementation("eager")
    text_config = model.get_decoder().config  # ms-swift's hook drops the argument
    text_config.output_attentions = True
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    text_config.output_attentions = False
    model.set_attn_implementation("sdpa")
    in_frame = (frames.ids[..., None] == torch.arange(int(frames.num_frames.max()))).float()
    rows = torch.stack(out.attentions[-3:]).mean((0, 2))[:, -length - 1 : -1]
    mass = rows @ in_frame / in_frame.sum(1).clamp(min=1)[:, None]
    logits = out.logits[:, -length - 1 : -1] / TEMPERATURE
    found = select_frames(mass, mask, rewards, strategy="all", top_tokens=3, top_frames=2)
    slots = perception_slots(mass, mask, found, top_tokens=4)
    divergence = reference.group_divergence_from_logits(logits, logits.logsumexp(-1), slots)
    return [row[own] for row, own in zip(token_weights(divergence, slots, mask), mask, strict=True)]


def watched(folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, int]:
    """The trainer of a run, whose advantages are those of eager attention, and its number of responses."""
    ms_swift.use(APPOConfig(strategy="all", top_tokens=3, top_frames=2, slot_tokens=4), accuracy="Parity")
    seen, trainers, plain = [], [], GRPOTrainer._postprocess_batch
    ours = ms_swift.APPOTrainer._postprocess_batch

    def theirs(self: Any, samples: Any, batches: Any) -> None:
        plain(self, samples, batches)
        self.kept = [dict(one.encoded) for one in samples]  # what is collated is taken out of it
        self.unweighted = [one["grpo_batch"].advantages.clone() for one in batches]

    def both(self: Any, samples: Any, batches: Any) -> None:
        ours(self, samples, batches)
        trainers.append(self)
        rewards = self._rewards_per_func[:, 0].chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        for one, encoded in zip(samples, self.kept, strict=True):
            one.encoded = encoded
        weights = [w for i in range(0, len(samples), G) for w in expected(self, samples[i : i + G], rewards[i : i + G])]
        for one, before in zip(batches, self.unweighted, strict=True):
            batch = one["grpo_batch"]
            for row, advantage, mask in zip(batch.advantages, before, batch.completion_mask.bool(), strict=True):
                seen.append((row[mask].clone(), advantage[mask], weights.pop(0)))

    patch.setattr(GRPOTrainer, "_postprocess_batch", theirs)
    patch.setattr(ms_swift.APPOTrainer, "_postprocess_batch", both)
    run(folder, **changes)
    assert len(seen) % G == 0 and max(weights.max() for *_, weights in seen) > 1.1
    assert max(advantage.abs().max() for _, advantage, _ in seen) > 0
    for found, advantage, weights in seen:
        torch.testing.assert_close(found, advantage * weights, rtol=1e-3, atol=1e-4)
    return trainers[-1], len(seen)


def test_a_run_weighs_the_advantages_of_every_loss(folder: Path, monkeypatch: Any) -> None:
    assert watched(folder, monkeypatch)[1] == 8


# What takes the weights away, or hides a group: before a model is touched.
@pytest.mark.parametrize("option", ["use_liger_kernel", "padding_free", "sequence_parallel_size"])
def test_what_loses_weights_is_refused(option: str) -> None:
    settings = SimpleNamespace(use_liger_kernel=option == "use_liger_kernel")
    template = SimpleNamespace(
        padding_free=option == "padding_free", sequence_parallel_size=1 + (option == "sequence_parallel_size")
    )
    with pytest.raises(ValueError, match=f"`{option}`: expected it off"):
        ms_swift.APPOTrainer(args=settings, template=template)


def test_an_unknown_reward_is_named(folder: Path) -> None:
    ms_swift.use(APPOConfig(), accuracy="format")
    with pytest.raises(ValueError, match="expected one of Parity, got 'format'"):
        run(folder)


def test_what_cannot_be_recorded_or_served_is_refused_before_anything_is_sampled(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"group_weights: `config`: expected attention_coef = 0\.0, got 1\.0"):
        ms_swift.use(APPOConfig.preset("ral"))
    ms_swift.use(APPOConfig(layers=99))
    with pytest.raises(ValueError, match="`layers`: expected 1 to 4"):
        run(folder)


def test_groups_that_straddle_processes_are_refused() -> None:
    trainer = ms_swift.APPOTrainer.__new__(ms_swift.APPOTrainer)
    trainer.num_generations = 2
    samples = [type("Sample", (), {"prompt_id": name})() for name in ("a", "b")]
    with pytest.raises(ValueError, match="whole groups in each process"):
        trainer._weigh(samples, torch.zeros(2))
