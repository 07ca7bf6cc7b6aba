"""Weights and adapters on their way to a vLLM server, the one that tests/played_server.py plays."""

import pytest
import torch
from played_server import SAMPLING, Played, prompt_with_clip
from safetensors.torch import load_file

from appo.rollout.vllm_extension import Checksum
from appo.rollout.vllm_server import VLLMServerRollout
from appo.rollout.weight_files import described_weights, weights_of, write_weights
from appo.tasks.tiny import build_tiny


@pytest.fixture
def tiny():
    return build_tiny()


def test_weights_are_those_of_the_saved_model(tiny, tmp_path):
    model = tiny[0]
    checksum = write_weights(model, tmp_path / "w")
    model.save_pretrained(tmp_path / "saved")
    saved, ours = load_file(tmp_path / "saved" / "model.safetensors"), load_file(tmp_path / "w/model-00000.safetensors")
    assert checksum[1] == sum(tensor.numel() for tensor in saved.values())
    sums = Checksum()
    for tensor in saved.values():
        sums.add(tensor)
    assert checksum == (sums.total, sums.count)
    assert sorted(t.float().sum().item() for t in saved.values()) == sorted(
        t.float().sum().item() for t in ours.values()
    )


def with_adapters(model, **options):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**settings))


def test_adapters_travel_alone_where_the_server_takes_them(tiny, tmp_path):
    """The weights below them once, also for a server that lost them; adapters after every update, with their sum."""
    server = Played(info={"lora_rank": 8})
    model = with_adapters(tiny[0])
    engine = VLLMServerRollout(model, tiny[1], tmp_path / "engine", urls=[server.url], timeout=5)
    engine.update_weights(model, 0)
    engine.update_weights(model, 1)
    assert server.loaded == ["weights-below-0", "adapters-0", "adapters-1"]
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == ["adapters-1", "weights-below-0"]
    saved = load_file(tmp_path / "engine/adapters-1/adapter_model.safetensors")
    model.save_pretrained(tmp_path / "peft")
    expected = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)
    below = load_file(tmp_path / "engine/weights-below-0/model-00000.safetensors")
    name = next(name for name in below if name.endswith("q_proj.weight"))
    layer = dict(model.get_base_model().named_modules())[name.removesuffix(".weight")]
    assert torch.equal(below[name], layer.base_layer.weight)
    server.faults["forgets"] = True
    assert engine.generate([prompt_with_clip()], SAMPLING, [1])[0][0].weight_version == 1
    assert server.loaded[3:] == ["weights-below-0", "adapters-1"]
    server.version = -1  # started again by somebody, and not asked since
    engine.update_weights(model, 2)
    assert server.loaded[5:] == ["weights-below-0", "adapters-2"]


# Of a larger rank, of a kind that vLLM has not, and a server without adapters.
@pytest.mark.parametrize(("options", "rank"), [({"r": 16}, 8), ({"use_dora": True}, 8), ({}, 0)])
def test_adapters_that_a_server_does_not_take_are_added_in(options, rank, tiny, tmp_path):
    server = Played(info={"lora_rank": rank})
    model = with_adapters(tiny[0], **options)
    engine = VLLMServerRollout(model, tiny[1], tmp_path / "engine", urls=[server.url], timeout=5)
    engine.update_weights(model, 0)
    engine.update_weights(model, 1)
    assert server.loaded == ["weights-0", "weights-1"]


# Plain adapters, and those with a norm of each row.
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_added_to_the_weights(dora, tiny):
    adapted = with_adapters(tiny[0], use_dora=dora)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)  # trained
    got, described = dict(weights_of(adapted)), described_weights(adapted, torch.bfloat16)
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert got.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(got[name], tensor.detach(), rtol=1e-5, atol=1e-6)
    assert described == [(name, torch.bfloat16, tuple(tensor.shape)) for name, tensor in got.items()]


def test_a_checksum_does_not_depend_on_how_weights_are_joined():
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    apart, joined = Checksum(), Checksum()
    apart.add(a)
    apart.add(b)
    joined.add(torch.cat([b, a]))
    assert (apart.total, apart.count) == (joined.total, joined.count)
    joined.add(torch.full((), 1e-30))
    assert (apart.total, apart.count) != (joined.total, joined.count)
