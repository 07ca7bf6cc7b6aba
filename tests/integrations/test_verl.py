"""verl's engine, losses and trainer with ours, in one process on a CPU: no Ray worker, no rollout engine, no GPU."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed: `make test-integrations` has an environment with it")
pytest.importorskip("transfer_queue", reason="verl's trainer needs it: `make test-integrations`")

import verl_cpu
from hydra import compose, initialize_config_module
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.v1 import get_trainer_cls, trainer_base
from verl.utils import tensordict_utils as tu
from verl.utils.experimental.torch_functional import FusedLinearForPPO, FusedLinearForPPOFunction
from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine.base import EngineRegistry
from verl.workers.utils.losses import ppo_loss

import appo.integrations.verl
from appo import frame_ids, perception_slots, select_frames, token_weights
from appo.integrations import verl_trainer
from appo.tasks.tiny import build_tiny
from appo_kernels.ops.group_divergence import reference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
G, TEMPERATURE = 3, 0.9
OVERRIDES = [
    "trainer.v1.trainer_mode=appo", "actor_rollout_ref.model.use_fused_kernels=True",
    "actor_rollout_ref.model.fused_kernel_options.impl_backend=torch", f"actor_rollout_ref.rollout.n={G}",
    f"actor_rollout_ref.rollout.temperature={TEMPERATURE}", "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.calculate_log_probs=False", "+appo.strategy=all",
    "+appo.top_tokens=3", "+appo.top_frames=2", "+appo.slot_tokens=4", "+appo.frame_mass=6",
]  # fmt: skip


def config(*overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*OVERRIDES, *overrides])


def nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(model: Any, processor: Any) -> TensorDict:
    """Two groups, of videos of unequal length, responses of unequal length, and tokens that a tool wrote."""
    generator = torch.Generator().manual_seed(7)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("prompts", "responses", "input_ids", "position_ids", "response_mask", "rm_scores")
    }
    media = []
    for group, frames in enumerate((8, 4)):
        video = torch.randint(0, 256, (frames, 3, 28, 28), dtype=torch.uint8, generator=generator)
        chat = [
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which colour " * (group + 1)}]}
        ]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(text=[text], videos=[video], do_sample_frames=False, return_tensors="pt")
        prompt = inputs["input_ids"][0]
        for member in range(G):
            response = torch.randint(8, 90, (5 + 2 * member + group,), generator=generator)
            ids = torch.cat([prompt, response])
            types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(response)))
            positions, _ = model.model.get_rope_index(
                ids[None], mm_token_type_ids=types, video_grid_thw=inputs["video_grid_thw"],
                **{name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs},
            )  # fmt: skip
            mask = torch.ones(len(response), dtype=torch.long)
            mask[2:4] = 0 if member == 1 else 1
            scores = torch.zeros(len(response))
            scores[-1] = float(member == group)
            values = (prompt, response, ids, torch.cat([torch.arange(len(ids))[None], positions[:, 0]]), mask, scores)
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
            media.append({name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")})
    data = TensorDict({name: nested(rows) for name, rows in columns.items()}, batch_size=[2 * G])
    masks = zip(columns["prompts"], columns["response_mask"], strict=True)
    data["loss_mask"] = nested([torch.cat([torch.zeros_like(prompt), mask]) for prompt, mask in masks])
    tu.assign_non_tensor_stack(data, "multi_modal_inputs", media)
    tu.assign_non_tensor_stack(data, "uid", ["first"] * G + ["second"] * G)
    tu.assign_non_tensor_stack(data, "extra_fields", [{"reward_extra_info": {"acc": i % 2}} for i in range(2 * G)])
    return data


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def expected(model: Any, data: TensorDict) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Log-probabilities, mass and weights of each sequence by the definitions: eager attention, all logits."""
    model.set_attn_implementation("eager")
    names = ("input_ids", "responses", "response_mask", "position_ids", "rm_scores")
    rows = list(zip(*(data[name].unbind() for name in names), data["multi_modal_inputs"], strict=True))
    logprobs, masses, weights = [], [], []
    for start in (0, G):
        logits, mass = [], []
        for ids, response, _, positions, _, media in rows[start : start + G]:
            with torch.no_grad():
                out = model(
                    input_ids=ids[None], position_ids=positions[:, None], output_attentions=True, use_cache=False,
                    mm_token_type_ids=(ids[None] == model.config.video_token_id).int() * 2, **media,
                )  # fmt: skip
            frames = frame_ids(ids[None], model.config, video_grid_thw=media["video_grid_thw"])
            in_frame = (frames.ids[..., None] == torch.arange(int(frames.num_frames))).float()[0]
            attention = torch.stack(out.attentions[-3:]).mean((0, 2))[0, -len(response) - 1 : -1]
            mass.append(attention @ in_frame / in_frame.sum(0))
            logits.append(out.logits[0, -len(response) - 1 : -1] / TEMPERATURE)
            logprobs.append(logits[-1].log_softmax(-1).gather(-1, response[:, None])[:, 0])
        own = rows[start : start + G]
        mask = padded([row[2][:, None] for row in own])[..., 0].bool()
        rewards = torch.stack([row[4].sum() for row in own])
        found = select_frames(padded(mass), mask, rewards, strategy="all", top_tokens=3, top_frames=2)
        slots = perception_slots(padded(mass), mask, found, top_tokens=4)
        divergence = reference.group_divergence_from_logits(padded(logits), padded(logits).logsumexp(-1), slots)
        group = token_weights(divergence, slots, mask)
        masses += mass
        weights += [row[: len(one)] for row, one in zip(group, mass, strict=True)]
    return logprobs, masses, weights


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def made(request: Any, tmp_path_factory: Any) -> Any:
    """What is expected first: verl patches the classes of transformers when an engine builds its model."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = build_tiny(0, family=request.param)
    data = batch(model, processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    wanted = expected(model, data)
    with verl_cpu.process(folder):
        yield SimpleNamespace(engine=engine_of(folder), data=data, wanted=wanted)


def engine_of(folder: Any) -> Any:
    """verl's engine, as registered, of the model in a folder; in a process group."""
    precision = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    engine = EngineRegistry.new(
        model_type="language_model", backend="fsdp2",
        model_config=HFModelConfig(
            path=str(folder / "model"), use_fused_kernels=True, fused_kernel_options={"impl_backend": "torch"},
            override_config={"attn_implementation": "sdpa"},
        ),
        engine_config=FSDPEngineConfig(strategy="fsdp2", mixed_precision=precision, use_torch_compile=False),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    engine.initialize()
    assert type(engine) is appo.integrations.verl.APPOEngine
    return engine


def asked(data: TensorDict, **settings: Any) -> TensorDict:
    """Micro-batches of one group: 3 rows are all that their number of tokens allows."""
    data = data.copy()
    tu.assign_non_tensor(
        data, use_remove_padding=True, use_fused_kernels=True, use_dynamic_bsz=True, max_token_len_per_gpu=220,
        calculate_entropy=True, temperature=TEMPERATURE, **settings,
    )  # fmt: skip
    return data


def assert_close(found: Tensor, wanted: list[Tensor], tolerance: float) -> None:
    for row, one in zip(found.unbind(), wanted, strict=True):
        torch.testing.assert_close(row, one, rtol=tolerance, atol=tolerance)


def test_one_pass_gives_logprobs_mass_and_weights(made: Any) -> None:
    settings = verl_trainer.settings_of(config())
    with made.engine.eval_mode():
        plain = made.engine.infer_batch(asked(made.data))["model_output"]
        found = made.engine.infer_batch(asked(made.data, appo=settings, force_group_size=G))["model_output"]
    assert plain.keys() == {"log_probs", "entropy"} and found.keys() == plain.keys() | {"token_weights", "frame_mass"}
    for name in plain:
        assert_close(found[name], list(plain[name].unbind()), 1e-5)
    logprobs, mass, weights = made.wanted
    ends = [row[-len(one) - 1 : -1] for row, one in zip(found["log_probs"].unbind(), logprobs, strict=True)]
    assert_close(nested(ends), logprobs, 1e-4)
    assert_close(found["frame_mass"], [torch.nn.functional.pad(x, (0, 6 - x.shape[1])) for x in mass], 1e-4)
    assert_close(found["token_weights"], weights, 1e-3)
    assert max(row.max() for row in weights) > 1.1


def test_advantages_are_weighted_before_any_loss(made: Any) -> None:
    actor = ActorConfig(strategy="fsdp2", rollout_n=G, use_dynamic_bsz=True, ppo_mini_batch_size=2 * G)
    lengths = [len(row) for row in made.data["responses"].unbind()]
    generator = torch.Generator().manual_seed(1)
    rows = lambda: [torch.randn(n, generator=generator) for n in lengths]  # noqa: E731
    data = made.data.copy()
    data["old_log_probs"], data["advantages"] = nested([x - 4 for x in rows()]), nested(rows())
    weights = [1 + x.abs() for x in rows()]
    weighted, folded = data.copy(), data.copy()
    weighted["token_weights"] = nested(weights)
    folded["advantages"] = nested([a * w for a, w in zip(data["advantages"].unbind(), weights, strict=True)])

    def step(batch: TensorDict) -> tuple[float, Tensor]:
        tu.assign_non_tensor(batch, global_batch_size=2 * G)
        with made.engine.train_mode():
            output = made.engine.forward_backward_batch(asked(batch), partial(ppo_loss, actor))
            gradients = [p.grad.full_tensor().flatten() for p in made.engine.module.parameters() if p.grad is not None]
        return sum(output["loss"]), torch.cat(gradients)

    (ours, gradient), (theirs, wanted), (plain, _) = step(weighted), step(folded), step(data)
    assert ours == pytest.approx(theirs, rel=1e-6) and abs(ours - plain) > 1e-3
    assert float((gradient - wanted).norm()) <= 1e-6 * float(wanted.norm()) and float(wanted.norm()) > 0


# As verl calls it: a packed row with a batch dimension, and rows; a temperature away from one.
@pytest.mark.parametrize("shape", [(1, 37), (20,)])
def test_fused_head_is_verls(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    ids = torch.randint(50, shape, generator=generator)
    results = []
    for call in (FusedLinearForPPO(), lambda *a: FusedLinearForPPOFunction.apply(*a, 512)):
        logprobs, entropy = call(hidden, weight, ids, 0.7)
        assert logprobs.shape == entropy.shape == shape
        results.append((logprobs, entropy, *torch.autograd.grad((logprobs.sin() + entropy).sum(), (hidden, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


class Store:
    """What the trainer and its workers share, in place of TransferQueue."""

    def __init__(self, data: TensorDict) -> None:
        self.data, self.keys = data, [f"{i}_0_0" for i in range(len(data))]

    def kv_batch_get(self, keys: list[str], partition_id: str, select_fields: list[str]) -> TensorDict:
        chosen = self.data.select(*(name for name in select_fields if name in self.data))
        return tu.index_select_tensor_dict(chosen, [self.keys.index(key) for key in keys])

    def kv_batch_put(self, keys: list[str], partition_id: str, fields: TensorDict, **_: Any) -> KVBatchMeta:
        order = [keys.index(key) for key in self.keys]
        for name in fields.keys():  # noqa: SIM118 (a TensorDict's iterator is over its rows)
            rows = fields[name].unbind()
            self.data[name] = nested([rows[i] for i in order])
        return KVBatchMeta(partition_id=partition_id, keys=keys, tags=self.tags(keys))

    def tags(self, keys: list[str]) -> list[dict[str, Any]]:
        lengths = self.data["input_ids"].offsets().diff().tolist()
        return [{"seq_len": lengths[self.keys.index(key)]} for key in keys]


def test_trainer_keeps_groups_whole_and_asks_once(made: Any, monkeypatch: Any) -> None:
    mixed = [0, 3, 1, 4, 2, 5]  # groups apart, as the rollouts come back
    store = Store(tu.index_select_tensor_dict(made.data, mixed))
    for module in (trainer_base, verl_trainer):
        monkeypatch.setattr(module, "tq", store)
    requests = []

    def compute_log_prob(meta: KVBatchMeta) -> KVBatchMeta:
        rows = tu.index_select_tensor_dict(store.data, [store.keys.index(key) for key in meta.keys])
        requests.append(dict(meta.extra_info))
        with made.engine.eval_mode():
            extra = {name: value for name, value in meta.extra_info.items() if name in ("appo", "force_group_size")}
            output = made.engine.infer_batch(asked(rows, **extra))["model_output"]
        store.kv_batch_put(meta.keys, "train", output)
        return meta

    cls = get_trainer_cls("appo")
    settings = config("actor_rollout_ref.actor.ppo_mini_batch_size=2", "data.train_batch_size=2")
    trainer = cls.__new__(cls)
    trainer.config, trainer.appo = settings, verl_trainer.settings_of(settings)
    trainer.tokenizer, trainer.use_critic, trainer.global_steps = SimpleNamespace(eos_token_id=0), False, 1
    trainer.ref_in_actor = True
    trainer.actor_rollout_wg = SimpleNamespace(_dispatch_info={"actor": [0]}, compute_log_prob=compute_log_prob)
    meta = KVBatchMeta(partition_id="train", keys=list(store.keys), tags=store.tags(store.keys))
    metrics: dict[str, Any] = {}
    meta = trainer._balance_batch(meta, metrics)
    assert sorted([mixed[int(key.split("_")[0])] // G for key in meta.keys][:G]) in ([0] * G, [1] * G)
    meta = trainer._compute_old_log_prob(meta, metrics)
    meta = trainer._compute_ref_log_prob(meta, metrics)
    meta = trainer._compute_advantage(meta, metrics)
    assert "appo" in requests[0] and "appo" not in requests[1] and "force_group_size" not in requests[1]
    assert metrics["appo/weight_mean"] > 1 and 0 < metrics["appo/weighted_tokens"] < 1
    wanted = [made.wanted[2][i] for i in mixed]
    assert_close(store.data["token_weights"], wanted, 1e-3)
    assert {"advantages", "old_log_probs", "ref_log_prob"} <= set(store.data.keys())


def test_groups_are_kept_in_processes() -> None:
    uids = ["a", "b", "c", "d"] * 2
    order = verl_trainer.grouped_order(uids, [10, 20, 30, 40] * 2, 2, 2)
    assert sorted(order) == list(range(8)) and [uids[i] for i in order[::2]] == [uids[i] for i in order[1::2]]
    assert {frozenset(uids[i] for i in order[:4]), frozenset(uids[i] for i in order[4:])} == {
        frozenset("ad"), frozenset("bc"),
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected 2 rows of each prompt, got 1 of 'b'"):
        verl_trainer.grouped_order(["a", "a", "b"], [1, 1, 1], 2, 1)
    with pytest.raises(ValueError, match="multiple of the 2 data-parallel processes, got 1"):
        verl_trainer.grouped_order(["a", "a"], [1, 1], 2, 2)


# One option that has to be, and a value under which nothing could be recorded.
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("+appo.stratgy=all", "appo.stratgy"),
        ("+appo.alpha=-1", "alpha"),
        ("actor_rollout_ref.model.use_fused_kernels=False", "model.use_fused_kernels"),
        ("actor_rollout_ref.model.use_remove_padding=False", "model.use_remove_padding"),
        ("actor_rollout_ref.model.fused_kernel_options.impl_backend=triton", "impl_backend"),
        ("actor_rollout_ref.actor.ulysses_sequence_parallel_size=2", "ulysses_sequence_parallel_size"),
        ("actor_rollout_ref.actor.strategy=megatron", "actor.strategy"),
        ("+algorithm.rollout_correction.bypass_mode=True", "bypass_mode"),
        ("actor_rollout_ref.rollout.n=1", "rollout.n"),
    ],
)
def test_what_cannot_be_weighed_is_refused(override: str, named: str) -> None:
    overrides = [override.lstrip("+")] if "bypass" in override else [override]
    with pytest.raises(ValueError, match=named):
        verl_trainer.settings_of(config(*overrides))


def test_attention_that_cannot_be_recorded_is_refused_before_workers_start(tmp_path: Any) -> None:
    """From the configuration of the model, which has 4 layers."""
    model, _ = build_tiny(0)
    model.config.save_pretrained(tmp_path)
    settings = verl_trainer.settings_of(config("+appo.layers=4"))
    verl_trainer.check_attention_of(str(tmp_path), settings)
    with pytest.raises(ValueError, match="`layers`: expected 1 to 4"):
        verl_trainer.check_attention_of(str(tmp_path), settings | {"layers": 5})
    verl_trainer.check_attention_of("hdfs://elsewhere/model", settings | {"layers": 5})


def test_accuracy_by_name(made: Any) -> None:
    settings = verl_trainer.settings_of(config("+appo.accuracy=acc"))
    with made.engine.eval_mode():
        made.engine.infer_batch(asked(made.data, appo=settings, force_group_size=G))
        with pytest.raises(ValueError, match="expected one of acc"):
            made.engine.infer_batch(asked(made.data, appo=settings | {"accuracy": "format"}, force_group_size=G))
        with pytest.raises(ValueError, match="`frame_mass`: expected at least 4 frames, got 3"):
            made.engine.infer_batch(asked(made.data, appo=settings | {"frame_mass": 3}, force_group_size=G))
