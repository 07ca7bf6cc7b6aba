"""Hidden states of responses: the same logits as the model's own forward, the vision tower once per prompt."""

import pytest
import torch
import training

from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.models.loaded import refuse_dense_mask
from appo.recording.recorder import record_frame_mass
from appo.train.groups import Group, batch_parts, whole_groups
from appo.train.policy import Policy
from appo.train.scoring import score_parts
from appo.train.setup import prepare_model


def make_groups(builder, count, size, lengths, vocab):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for record, length in zip(training.records()[:count], lengths, strict=True):
        ids = torch.randint(0, vocab, (size, length), generator=generator)
        mask = torch.arange(length) < torch.randint(1, length + 1, (size, 1), generator=generator)
        nothing = torch.zeros(size)
        texts, logprobs = [""] * size, torch.zeros(ids.shape)
        groups.append(Group(builder(record), ids, mask, logprobs, mask[:, -1], texts, nothing, nothing, {}))
    return groups


# Both families: Qwen2.5-VL has one run of tokens per video, Qwen3-VL timestamps between frames and deepstack features.
@pytest.mark.parametrize("share_prompt", ["on", "off"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_hidden_states_give_the_logits_of_each_response_alone(family, share_prompt, tmp_path):
    model, processor = training.tiny(family=family)
    settings = training.config(tmp_path, max_pixels=32 * 32 if family == "qwen3_vl" else 28 * 28)
    builder = PromptBuilder(processor, model.config, settings)
    vocab = processor.tokenizer.convert_tokens_to_ids("a") + 1
    groups = make_groups(builder, 3, 2, [5, 7, 1], 20 if vocab < 20 else vocab)
    calls = []
    model.base_model.visual.register_forward_hook(lambda module, args, output: calls.append(1))
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    with torch.no_grad():
        logits = Policy(model.eval(), share_prompt)(batch, lambda hidden, weight, bias: hidden @ weight.T)
        assert len(calls) == 1, "the vision tower runs once for all prompts and responses"
        for index, group in enumerate(groups):
            prompt = collate([group.prompt], 0)
            for row in range(2):
                count = int(group.mask[row].sum())
                inputs = dict(prompt.inputs)
                response = group.completion_ids[row : row + 1, :count]
                inputs["input_ids"] = torch.cat([inputs["input_ids"], response], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
                if "mm_token_type_ids" in inputs:
                    inputs["mm_token_type_ids"] = torch.cat(
                        [inputs["mm_token_type_ids"], torch.zeros_like(response)], 1
                    )
                alone = model(**inputs).logits[0, len(group.prompt) - 1 : -1]
                torch.testing.assert_close(logits[index * 2 + row, :count], alone, rtol=1e-4, atol=1e-4)


# Adapters and checkpointing, by which transformers lets the output of every embedding require a gradient, that of
# patches as well; neither; and a tower that is trained.
@pytest.mark.parametrize(
    "settings",
    [{"lora_rank": 2}, {"gradient_checkpointing": True}, {}, {"freeze_vision": False, "gradient_checkpointing": True}],
)
def test_a_frozen_tower_keeps_nothing_for_a_backward(settings, tmp_path):
    model, processor = training.tiny()
    config = training.config(tmp_path, **({"freeze_vision": True} | settings))
    builder = PromptBuilder(processor, model.config, config)
    batch = batch_parts(whole_groups(make_groups(builder, 2, 2, [3, 4], 50)), processor.tokenizer.pad_token_id, "cpu")
    policy, seen = Policy(prepare_model(model, config)).train(), []
    policy.causal.base_model.visual.register_forward_hook(lambda module, args, out: seen.append(out.pooler_output))
    policy(batch, lambda hidden, weight, bias: (hidden @ weight.T).logsumexp(-1).mean()).backward()
    assert [features.requires_grad for features in seen] == [not config.freeze_vision]
    reached = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("visual" in name for name in reached) == (not config.freeze_vision)
    assert any("q_proj" in name for name in reached)


# Groups in one packed row, and padded sequences.
@pytest.mark.parametrize("share_prompt", ["on", "off"])
def test_frames_stand_where_the_video_tokens_are(share_prompt, tmp_path):
    model, processor = training.tiny()
    builder = PromptBuilder(processor, model.config, training.config(tmp_path))
    groups = make_groups(builder, 2, 2, [3, 4], 50)
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    sequences = Policy(model, share_prompt).sequences(batch)
    torch.testing.assert_close(sequences.frame_ids >= 0, sequences.token_types == 2)
    assert batch.prompts.num_frames == 8 and int(sequences.frame_ids.max()) == 7


def test_recorded_mass_and_gradients_do_not_depend_on_the_layout(tmp_path):
    """A group behind one prompt and each response behind its own: the same mass, the same gradient of a loss."""
    model, processor = training.tiny()
    builder = PromptBuilder(processor, model.config, training.config(tmp_path))
    batch = batch_parts(
        whole_groups(make_groups(builder, 3, 3, [4, 6, 5], 50)), processor.tokenizer.pad_token_id, "cpu"
    )
    found = []
    for share_prompt in ("on", "off"):
        policy = Policy(model, share_prompt)
        sequences = policy.sequences(batch)
        model.zero_grad()
        with record_frame_mass(model, sequences.frame_ids, rows=sequences.rows, reduction="sum") as recorder:
            loss = policy(
                batch, lambda hidden, weight, bias: (hidden @ weight.T)[batch.mask].square().mean(), sequences
            )
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((sequences.per_response(recorder.mass)[batch.mask], loss.detach(), gradient))
        assert (sequences.layout is not None) == (share_prompt == "on")
    for shared, separate in zip(*found, strict=True):
        assert float((shared - separate).norm() / separate.norm()) < 1e-5
    assert found[0][0].sum(-1).max() > 0.1


def test_sharing_a_prompt_is_refused_where_a_layer_cannot():
    model, _ = training.tiny()
    model.config.get_text_config().layer_types[1] = "sliding_attention"
    with pytest.raises(ValueError, match=r"`share_prompt`: .* layer 1 is of the kind sliding_attention"):
        Policy(model, "on")
    assert not Policy(model).share_prompt
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_dense_masks_are_refused_where_torch_is_wrong():
    model, _ = training.tiny()
    long = torch.ones(1, 65_537)
    refuse_dense_mask(model, long, "cuda")  # without padding attention is causal, without a mask
    long[0, 0] = 0
    refuse_dense_mask(model, long, "cpu")
    refuse_dense_mask(model, long[:, :-1], "cuda")
    with pytest.raises(ValueError, match="expected rows without padding beyond 65,536 tokens on CUDA, got a padded"):
        refuse_dense_mask(model, long, "cuda")
    model.config.get_text_config().layer_types[1] = "sliding_attention"
    whole = torch.ones(1, 65_537)
    refuse_dense_mask(model, whole[:, :-1], "cuda")
    with pytest.raises(ValueError, match=r"expected rows without windows beyond 65,536 .* Lower `max_frames`"):
        refuse_dense_mask(model, whole, "cuda")


def test_labelled_frames_hold_the_deciding_moment(tmp_path):
    model, processor = training.tiny()
    builder = PromptBuilder(processor, model.config, training.config(tmp_path))
    for record in training.records():
        prompt = builder(record)
        labelled = prompt.labelled_frames()
        assert labelled and all(0 <= frame < prompt.num_frames for frame in labelled)
        middles = [(start + end) / 2 for start, end in record.time_spans]
        for frame in labelled:  # 4 samples a second, 2 a frame: a labelled frame is within 0.75 s of a moment's middle
            first, last = prompt.frame_times[frame]
            assert min(abs((first + last) / 2 - middle) for middle in middles) < 0.75


def test_a_model_that_is_not_known_to_be_right_is_refused_by_name():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    with pytest.raises(ValueError, match=r"got 'llama'.*docs/models.md"):
        Policy(LlamaForCausalLM(small))


def test_under_autocast_the_head_gets_the_dtype_of_the_forward(tmp_path):
    """Master weights are fp32; the products with the vocabulary are the largest of all and must not be."""
    model, processor = training.tiny()
    builder = PromptBuilder(processor, model.config, training.config(tmp_path))
    batch = batch_parts(whole_groups(make_groups(builder, 1, 2, [3], 50)), processor.tokenizer.pad_token_id, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = Policy(model)(batch, lambda hidden, weight, bias: (hidden.dtype, weight.dtype))
    assert dtypes == (torch.bfloat16, torch.bfloat16)


# One group alone in its micro-batch, with columns that are all padding, and with none at all; and beside another group.
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("share_prompt", ["on", "off"])
def test_a_group_whose_responses_are_all_empty_is_scored(share_prompt, beside, columns, tmp_path):
    model, processor = training.tiny()
    config = training.config(tmp_path)
    builder = PromptBuilder(processor, model.config, config)
    groups = make_groups(builder, 2, 2, [4, 3], 50)
    empty, other = groups
    for name in ("completion_ids", "mask", "rollout_logprobs"):
        setattr(empty, name, getattr(empty, name)[:, :columns])
    empty.mask = torch.zeros_like(empty.mask)
    parts = whole_groups(groups if beside else [empty])
    batch = batch_parts(parts, processor.tokenizer.pad_token_id, "cpu")
    policy = Policy(model, share_prompt)
    score_parts(parts, batch, policy, policy, config)
    assert empty.mass.shape == (2, columns, empty.prompt.num_frames)
    for values in (empty.old_logprobs, empty.entropy, empty.lse, empty.hidden):
        assert values.shape[:2] == (2, columns) and bool(values.isfinite().all())
    if beside:
        alone = whole_groups([other])
        found = other.mass, other.old_logprobs
        score_parts(alone, batch_parts(alone, processor.tokenizer.pad_token_id, "cpu"), policy, policy, config)
        for row, mask in enumerate(other.mask):
            torch.testing.assert_close(found[0][row, mask], other.mass[row, mask], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[1], other.old_logprobs, rtol=1e-4, atol=1e-5)
