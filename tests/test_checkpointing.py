"""Activation checkpointing of every n-th layer, with inputs on the host: gradients of a run without, bit for bit."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import training
from test_policy import make_groups
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from appo.config import ConfigError
from appo.data.prompts import PromptBuilder
from appo.models import loaded
from appo.models.loaded import disable_checkpointing, enable_checkpointing, unwrapped
from appo.train.groups import ResponseBatch, batch_parts, whole_groups
from appo.train.policy import Policy
from appo.train.setup import prepare_model


def policy_and_batch(family: str, share_prompt: str, **settings: Any) -> tuple[Policy, ResponseBatch, Any]:
    model, processor = training.tiny(family=family)
    config = training.config("none", max_pixels=32 * 32 if family == "qwen3_vl" else 28 * 28, **settings)
    groups = make_groups(PromptBuilder(processor, model.config, config), 2, 2, [3, 5], 20)
    batch = batch_parts(whole_groups(groups), processor.tokenizer.pad_token_id, "cpu")
    policy = Policy(prepare_model(model, config), share_prompt).train()
    if config.lora_rank:  # the second matrix of an adapter starts as zeros, with which the first one has no gradient
        torch.manual_seed(1)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return policy, batch, config


def gradients(policy: Policy, batch: ResponseBatch, config: Any, *, mass: bool) -> dict[str, Tensor]:
    """Of a loss on logits, and on the recorded mass of frames."""
    policy.zero_grad()
    sequences = policy.sequences(batch)

    def loss(hidden: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return (hidden @ weight.T).logsumexp(-1).square().mean()

    if mass:
        with policy.recorder(sequences, config, gradient=True) as recorder:
            found = policy(batch, loss, sequences)
        found = found + 10 * recorder.mass.square().sum()
    else:
        found = policy(batch, loss, sequences)
    found.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@contextmanager
def recorded_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What is copied to the host, in place of torch's `save_on_cpu`, and back: copies, on a CPU too."""
    kept: list[Tensor] = []

    class Host(saved_tensors_hooks):
        def __init__(self, *, pin_memory: bool) -> None:
            assert not pin_memory, "memory is pinned for a GPU alone"
            super().__init__(self.pack, torch.clone)

        def pack(self, tensor: Tensor) -> Tensor:
            kept.append(tensor.detach().clone())
            return kept[-1]

    monkeypatch.setattr(loaded, "save_on_cpu", Host)
    yield kept


# All weights and a tower in training; a frozen one; adapters alone. Groups behind one prompt, and padded sequences.
@pytest.mark.parametrize("settings", [{}, {"freeze_vision": True}, {"freeze_vision": True, "lora_rank": 2}])
@pytest.mark.parametrize(("family", "share_prompt"), [("qwen2_5_vl", "on"), ("qwen3_vl", "on"), ("qwen2_5_vl", "off")])
def test_gradients_are_those_without(
    family: str, share_prompt: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, batch, config = policy_and_batch(family, share_prompt, **settings)
    want = gradients(policy, batch, config, mass=True)
    assert any("visual" in name for name in want) == (not config.freeze_vision)
    assert max(float(value.abs().max()) for value in want.values()) > 0
    layers = len(policy.causal.get_decoder().layers)
    towers = 0 if config.freeze_vision else len(policy.causal.base_model.visual.blocks)
    # Every layer; every second and third of four, so that the last is not computed again and is; the first alone.
    for every in (1, 2, 3, 4):
        with recorded_host(monkeypatch) as kept:
            enable_checkpointing(policy.model, every=every, offload=every != 1)
            found = gradients(policy, batch, config, mass=True)
        disable_checkpointing(policy.model)
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(found[name], value), name
        if every > 1:
            assert len(kept) == -(-layers // every) + -(-towers // every)
            width = policy.causal.get_input_embeddings().embedding_dim
            assert sum(tensor.shape[-1] == width for tensor in kept) >= -(-layers // every)


def test_torch_itself_keeps_the_inputs_on_the_host() -> None:
    """Nothing replaced: on a CPU the host's memory is where they are, and gradients are those without."""
    policy, batch, config = policy_and_batch("qwen2_5_vl", "on", freeze_vision=True)
    want = gradients(policy, batch, config, mass=False)
    enable_checkpointing(policy.model, every=2, offload=True)
    found = gradients(policy, batch, config, mass=False)
    assert all(torch.equal(found[name], value) for name, value in want.items())


def test_only_every_nth_layer_is_computed_again() -> None:
    policy, batch, config = policy_and_batch("qwen2_5_vl", "on", gradient_checkpointing=True, checkpoint_every=3)
    calls: list[tuple[str, int]] = []
    stacks = {"text": policy.causal.get_decoder().layers, "tower": policy.causal.base_model.visual.blocks}
    for name, stack in stacks.items():
        for index, layer in enumerate(stack):
            inner = layer.self_attn if name == "text" else layer.attn
            inner.register_forward_hook(lambda *_, place=(name, index): calls.append(place))
    gradients(policy, batch, config, mass=False)
    for name, stack in stacks.items():
        assert [calls.count((name, i)) for i in range(len(stack))] == [1 + (i % 3 == 0) for i in range(len(stack))]


# Of a run with each: settings that change memory alone, which a run may go on with in place of others.
def test_a_run_is_that_without_them_and_goes_on_with_others(tmp_path: Any) -> None:
    from appo.train.trainer import Trainer

    short = {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "learning_rate": 1e-4}

    def run(output: str, **settings: Any) -> list[dict[str, float]]:
        config = training.config(tmp_path / output, **(short | settings))
        Trainer(*training.tiny(), training.records(), config=config).train()
        lines = (tmp_path / output / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(x).items() if not k.startswith(("time/", "memory/"))} for x in lines]

    kept: dict[str, Any] = {"gradient_checkpointing": True, "checkpoint_every": 2, "checkpoint_offload": True}
    want = run("plain", max_steps=2)
    run("kept", max_steps=1, **kept)
    assert run("kept", max_steps=2, gradient_checkpointing=True) == want


class Unaware(nn.Module):
    """A model whose layers are none of transformers'."""

    supports_gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2)])

    def get_decoder(self) -> nn.Module:
        return self

    def gradient_checkpointing_enable(self, options: dict[str, Any]) -> None:
        """As a model does that checkpoints in its own forward."""


def test_models_without_such_layers_are_refused() -> None:
    enable_checkpointing(Unaware())
    with pytest.raises(ConfigError, match=r"`checkpoint_every`: expected at most the layers .* 0 in the text model"):
        enable_checkpointing(Unaware(), every=2)
    with pytest.raises(ConfigError, match=r"`checkpoint_offload`: expected .* 0 in the text model of Unaware"):
        enable_checkpointing(Unaware(), offload=True)
    model = unwrapped(training.tiny()[0])
    with pytest.raises(ConfigError, match=r"`checkpoint_every`: .* 4 in the text model of Qwen2_5_VL.*, got 5"):
        enable_checkpointing(model, every=5)
    model.supports_gradient_checkpointing = False
    with pytest.raises(
        ConfigError, match=r"`gradient_checkpointing`: expected a model whose layers .* Set it to false"
    ):
        enable_checkpointing(model)


# Each without what it is of.
@pytest.mark.parametrize("settings", [{"checkpoint_every": 2}, {"checkpoint_offload": True}])
def test_settings_of_nothing_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"`{name}`: expected .* without gradient_checkpointing, got"):
        training.config("none", **settings)
    training.config("none", gradient_checkpointing=True, **settings)
