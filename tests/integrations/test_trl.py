"""TRL's trainer with ours: its own loss code, a reference made by hand from eager attention, and what it drops."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="TRL is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("datasets", reason="TRL needs datasets: `make test-integrations`")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from appo import frame_ids, perception_slots, select_frames, token_weights
from appo.config import APPOConfig
from appo.integrations.before_training import check_layout
from appo.integrations.media import forward_inputs, split_media
from appo.integrations.trl import APPOTrainer
from appo.tasks.tiny import build_tiny
from appo_kernels.ops.group_divergence import reference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
G = 4
SETTINGS = APPOConfig(strategy="all", top_tokens=3, top_frames=2, slot_tokens=4)


def parity(completions: Any, **_: Any) -> list[float]:
    """Differs within almost every group."""
    return [float(len(str(completion)) % 2) for completion in completions]


def prompts(kind: str) -> Dataset:
    """Four questions, with text alone, with a video, or with a video and an image; videos of unequal length."""
    generator = torch.Generator().manual_seed(3)
    videos = [torch.randint(0, 256, (n, 3, 28, 28), dtype=torch.uint8, generator=generator) for n in (8, 4, 8, 6)]
    images = [torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8, generator=generator) for _ in range(4)]

    def prompt(index: int) -> list[dict[str, Any]]:
        parts = [{"type": "text", "text": "which colour is the object " + ("first" * (index % 2))}]
        if kind == "video and image":
            parts.insert(0, {"type": "image", "image": images[index].permute(1, 2, 0).numpy()})
        if kind != "text":
            parts.insert(0, {"type": "video", "video": videos[index].numpy()})
        return [{"role": "user", "content": parts}]

    data = Dataset.from_dict({"index": [0, 1, 2, 3]})
    data.set_transform(lambda rows: {"prompt": [prompt(index) for index in rows["index"]]})
    return data


class Compared(APPOTrainer):
    """Keeps, of every micro-batch, the loss and gradients as computed here and by TRL's own code."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        losses = [super()._compute_loss(model, inputs), GRPOTrainer._compute_loss(self, model, inputs)]
        gradients = [torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True) for loss in losses]
        ours, theirs = (float(loss.detach()) for loss in losses)
        error = torch.cat([(a - b).flatten() for a, b in zip(*gradients, strict=True)]).norm()
        self.seen.append((inputs, ours, theirs, float(error), _norm(gradients[1])))
        return super()._compute_loss(model, inputs)


def _norm(tensors: Any) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def trainer(
    folder: Any, kind: str = "video", *, cls: type = Compared, peft: Any = None, appo: APPOConfig = SETTINGS,
    attention: str = "sdpa", **changes: Any,
) -> Any:  # fmt: skip
    model, processor = build_tiny(0)
    model.get_decoder().config._attn_implementation = attention
    if changes.get("beta") and peft is None:  # TRL loads the reference model from where the model came from
        model.save_pretrained(folder / "model")
        model = type(model).from_pretrained(folder / "model")
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_generations": G, "gradient_accumulation_steps": 2, "max_steps": 2,
        "max_completion_length": 12, "learning_rate": 1e-3, "temperature": 0.9, "report_to": [], "use_cpu": True,
        "bf16": False, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "epsilon_high": 0.28,
        "output_dir": str(folder), "seed": 5, "use_bias_correction_kl": False,
    }  # fmt: skip
    args = GRPOConfig(**(settings | changes))
    others = {} if cls is GRPOTrainer else {"appo": appo}
    made = cls(
        model=model, reward_funcs=parity, args=args, train_dataset=prompts(kind), processing_class=processor,
        peft_config=peft, **others,
    )  # fmt: skip
    made.seen = []
    return made


# Every loss that is fused, at both levels, on and off policy (two iterations on one generation), with and without KL.
@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "bnpo", "delta": 1.5, "num_iterations": 2},
        {"loss_type": "dr_grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"loss_type": "cispo", "epsilon_high": 1.5, "num_iterations": 2, "beta": 0.04, "use_bias_correction_kl": True},
        {"loss_type": "sapo", "num_iterations": 2},
    ],
    ids=lambda changes: changes["loss_type"],
)
@pytest.mark.parametrize("kind", ["text", "video"])
def test_the_fused_loss_is_trls(kind: str, changes: dict[str, Any], tmp_path: Any) -> None:
    made = trainer(tmp_path, kind, **changes)
    made.train()
    assert made._not_fused == "" and len(made.seen) == 4
    assert max(size for *_, size in made.seen) > 0
    for inputs, ours, theirs, error, size in made.seen:
        assert abs(ours - theirs) <= 1e-6 * max(1.0, abs(theirs)), (ours, theirs)
        assert error <= 1e-5 * size + 1e-7
        assert ("token_weights" in inputs) == (kind == "video")
    logged = made.state.log_history[0]
    assert logged["entropy"] > 0 and logged["grad_norm"] >= 0
    clipped = {"cispo": "cispo_clip_ratio", "sapo": "entropy"}.get(changes["loss_type"], "clip_ratio/region_mean")
    assert clipped in logged


# Losses that are not fused: one that clips otherwise, one whose factor is of sequences.
@pytest.mark.parametrize("loss_type", ["cispo", "vespo"])
def test_every_other_loss_of_trl_takes_the_weights(loss_type: str, tmp_path: Any) -> None:
    made = trainer(tmp_path, loss_type=loss_type, max_steps=1)
    made.train()
    assert ("epsilon_high" if loss_type == "cispo" else loss_type) in made._not_fused
    for inputs, ours, theirs, error, size in made.seen:
        expected = inputs["response_advantages"][:, None] * inputs["token_weights"]
        assert torch.equal(inputs["advantages"], expected) and inputs["token_weights"].max() > 1
        assert ours == theirs and error == 0 and size >= 0


def test_weights_are_those_of_eager_attention(tmp_path: Any) -> None:
    """Mass from attention matrices, divergence from all logits, per group, by the definitions."""
    made = trainer(tmp_path, max_steps=1)
    made.model.train()
    output = made._generate_and_score_completions([made.train_dataset[i // G] for i in range(2 * G)])
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    attention = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    length, mask = output["completion_ids"].shape[1], output["completion_mask"].bool()
    made.model.set_attn_implementation("eager")
    with torch.no_grad():
        inputs = forward_inputs(output["media"], ids, length)
        out = made.model(input_ids=ids, attention_mask=attention, **inputs, output_attentions=True)
    frames = frame_ids(ids, made.model.config, video_grid_thw=inputs["video_grid_thw"])
    in_frame = (frames.ids[..., None] == torch.arange(int(frames.num_frames.max()))).float()
    rows = torch.stack(out.attentions[-3:]).mean((0, 2))[:, -length - 1 : -1]
    mass = rows @ in_frame / in_frame.sum(1).clamp(min=1)[:, None]
    logits = out.logits[:, -length - 1 : -1] / made.temperature
    assert int(frames.num_frames[0]) != int(frames.num_frames[-1]), "groups with clips of unequal length"
    for start in (0, G):
        own = slice(start, start + G)
        seen = mass[own, :, : int(frames.num_frames[start])]
        found = select_frames(seen, mask[own], made._accuracy[own], strategy="all", top_tokens=3, top_frames=2)
        slots = perception_slots(seen, mask[own], found, top_tokens=4)
        divergence = reference.group_divergence_from_logits(logits[own], logits[own].logsumexp(-1), slots)
        torch.testing.assert_close(
            output["token_weights"][own], token_weights(divergence, slots, mask[own]), rtol=1e-3, atol=1e-3
        )


def test_log_probabilities_depend_on_the_video(tmp_path: Any) -> None:
    """TRL alone gives the same ones whatever the video shows."""

    def scored(cls: type, brightness: int) -> Tensor:
        made = trainer(tmp_path, cls=cls, num_iterations=2)  # off policy: TRL scores what it sampled
        made.model.train()
        rows = [made.train_dataset[0] for _ in range(G)]
        shown = rows[0]["prompt"][0]["content"][0]["video"]
        for row in rows:
            row["prompt"][0]["content"][0]["video"] = (shown // 2 + brightness).astype("uint8")
        fixed = torch.arange(5, 5 + 12).tolist()
        made._generate_single_turn = lambda ids, *_, **__: ([fixed] * len(ids), None)
        return made._generate_and_score_completions(rows)["old_per_token_logps"]

    assert torch.equal(scored(GRPOTrainer, 0), scored(GRPOTrainer, 120)), "TRL has learned to: is this class needed?"
    assert not torch.allclose(scored(APPOTrainer, 0), scored(APPOTrainer, 120), atol=1e-4)


def test_a_video_beside_an_image(tmp_path: Any) -> None:
    made = trainer(tmp_path, "video and image", max_steps=1)
    made.train()
    (inputs, ours, theirs, *_), *_ = made.seen
    assert {"pixel_values", "pixel_values_videos"} <= inputs["media"][0].keys() and abs(ours - theirs) < 1e-6


def test_media_stay_with_their_rows_and_types_end_with_the_prompt() -> None:
    chats = [
        [{"role": "user", "content": [{"type": "video"}] * n + [{"type": "text", "text": "a"}]}] for n in (1, 0, 2)
    ]
    grids = torch.tensor([[1, 2, 2], [2, 2, 2], [1, 2, 2]])
    fields = {
        "pixel_values_videos": torch.arange(16.0)[:, None], "video_grid_thw": grids,
        "second_per_grid_ts": [1.0, 2.0, 3.0], "mm_token_type_ids": [[0, 2], [0], [2, 2, 0]],
    }  # fmt: skip
    media = split_media(chats, fields, torch.device("cpu"))
    order = [2, 1, 0]
    inputs = forward_inputs([media[i] for i in order], torch.zeros(3, 5, dtype=torch.int64), 2)
    assert inputs["pixel_values_videos"].flatten().tolist() == [*range(4, 16), *range(4)]
    assert inputs["video_grid_thw"].tolist() == grids[[1, 2, 0]].tolist()
    assert inputs["second_per_grid_ts"].tolist() == [2.0, 3.0, 1.0]
    assert inputs["mm_token_type_ids"].tolist() == [
        [2, 2, 0, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 2, 0, 0][:1] + [0, 2, 0, 0],
    ]
    with pytest.raises(ValueError, match="video_grid_thw"):
        split_media(chats[:2], fields, torch.device("cpu"))


def test_tokens_of_tools_carry_no_weight_and_no_loss(tmp_path: Any) -> None:
    made = trainer(tmp_path, max_steps=1)
    plain = GRPOTrainer._generate_and_score_completions

    def with_tools(self: Any, inputs: Any) -> dict[str, Any]:
        output = plain(self, inputs)
        output["tool_mask"] = torch.ones_like(output["completion_mask"])
        output["tool_mask"][:, 2:5] = 0
        output["num_items_in_batch"] = (output["completion_mask"] * output["tool_mask"]).sum()
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_generate_and_score_completions", with_tools)
        made.train()
    for inputs, ours, theirs, error, size in made.seen:
        assert (
            (inputs["token_weights"][:, 2:5] == 1).all() and abs(ours - theirs) < 1e-6 and error <= 1e-5 * size + 1e-7
        )


def test_lora_and_gradient_checkpointing(tmp_path: Any) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    made = trainer(tmp_path, peft=lora, beta=0.04, max_steps=1, gradient_checkpointing=True)
    made.train()
    assert made._not_fused == ""
    for inputs, ours, theirs, error, size in made.seen:
        assert inputs["token_weights"].max() > 1 and abs(ours - theirs) < 1e-6 and error <= 1e-5 * size + 1e-7


def test_groups_that_straddle_processes_are_refused(tmp_path: Any) -> None:
    made = trainer(tmp_path, max_steps=1)
    args = SimpleNamespace(per_device_train_batch_size=3, steps_per_generation=2)
    state = SimpleNamespace(deepspeed_plugin=None)
    with pytest.raises(ValueError, match=r"steps_per_generation = 6 to be a multiple of num_generations = 4"):
        check_layout(SimpleNamespace(args=args, num_generations=4, accelerator=SimpleNamespace(state=state)))
    state.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    args.per_device_train_batch_size = 4
    with pytest.raises(ValueError, match="ZeRO-3"):
        check_layout(SimpleNamespace(args=args, num_generations=4, accelerator=SimpleNamespace(state=state)))
    made.use_vllm = True
    with pytest.raises(ValueError, match="does not hand to vLLM"):
        made._tokenize_prompts([made.train_dataset[0]["prompt"]])
    with pytest.raises(ValueError, match="expected one of parity, got 'accuracy'"):
        model, processor = build_tiny(0)
        APPOTrainer(
            model, parity, GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), prompts("text"),
            processing_class=processor, accuracy="accuracy",
        )  # fmt: skip


# A loss on attention itself, and a filter of the whole batch's tokens.
@pytest.mark.parametrize("preset", ["ral", "top-entropy"])
def test_methods_that_are_more_than_weights_are_refused_before_anything_is_loaded(preset: str) -> None:
    with pytest.raises(ValueError, match=r"group_weights: `config`: expected (attention_coef|entropy_share) = "):
        APPOTrainer(appo=APPOConfig.preset(preset))


def test_attention_that_cannot_be_recorded_is_refused_before_anything_is_sampled(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="`layers`: expected 1 to 4"):
        trainer(tmp_path, appo=APPOConfig(layers=99))
    with pytest.raises(ValueError, match="expected modules before the language-model head"):
        from peft import LoraConfig

        trainer(tmp_path, peft=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="expected a registered attention implementation, got 'unheard_of'"):
        trainer(tmp_path, attention="unheard_of")


# By position, by mass, and a rule of one's own file; "text" has no frames, and W = 1 but by position.
@pytest.mark.parametrize(
    ("method", "kind"), [("vppo", "video"), ("tw-grpo", "text"), ("own", "video"), ("own", "text")]
)
def test_other_methods_and_ones_own_weigh_too(method: str, kind: str, tmp_path: Any) -> None:
    if method == "own":
        (tmp_path / "my_method.py").write_text(
            "def looks(group, divergence, config):\n    return 2 * group.mass.sum(-1)\n"
        )
        config = APPOConfig(method=f"{tmp_path}/my_method.py:looks", mass_reduction="sum")
    else:
        config = APPOConfig.preset(method)
    made = trainer(tmp_path, kind, appo=config, max_steps=1)
    made.train()
    for inputs, ours, theirs, *_ in made.seen:
        assert abs(ours - theirs) < 1e-6
        if method == "own" and kind == "text":
            assert "token_weights" not in inputs
            continue
        weights = inputs["token_weights"][inputs["completion_mask"].bool()]
        expected = {"vppo": bool((weights == 0).any()), "tw-grpo": bool((weights >= 1).all()), "own": weights.max() < 2}
        assert expected[method] and float(weights.std()) > 0
