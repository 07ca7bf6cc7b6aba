"""The trainer against a real vLLM server on the CPU: ids, weights, log-probabilities, caches, a killed server."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.rollout.engine import Sampling
from appo.rollout.vllm_server import VLLMServerRollout
from appo.tasks import make_task
from appo.tasks.tiny import build_tiny
from appo.train.engine_difference import compare
from appo.train.groups import whole_groups
from appo.train.trainer import Trainer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
SETTINGS = {
    "instructions": False, "fps": 4.0, "max_frames": 16, "max_pixels": 28 * 28, "dtype": "float32",
    "freeze_vision": False, "group_size": 4, "max_new_tokens": 12, "prompts_per_step": 2, "tensorboard": False,
    "learning_rate": 1e-2,
}  # fmt: skip
ENGINE = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16, "dtype": "float32"}


@pytest.fixture(scope="module")
def python():
    path = os.environ.get("APPO_VLLM_PYTHON")
    if not path:
        pytest.skip("APPO_VLLM_PYTHON names the interpreter of an environment with vLLM: run `make test-vllm`")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return path


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    files = make_task(tmp_path_factory.mktemp("clips"), seed=0, sizes={"train": 4})
    return load_records(files["train"])


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def served(request, python, tmp_path_factory):
    """(model, processor, engine): a server of the tiny model; the trainer's weights are others than its folder's."""
    folder = tmp_path_factory.mktemp(request.param)
    saved, processor = build_tiny(seed=0, family=request.param)
    saved.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model, _ = build_tiny(seed=1, family=request.param)
    engine = VLLMServerRollout(
        model, processor, folder / "engine", python=python, model_path=str(folder / "model"), arguments=ENGINE
    )
    yield model, processor, engine
    engine.close()


def trainer_of(served, records, tmp_path, **settings):
    model, processor, engine = served
    config = APPOConfig(**SETTINGS | {"output": str(tmp_path / "run")} | settings)
    return Trainer(model, processor, records, config=config, engine=engine)


def test_prompts_weights_and_log_probabilities_are_the_trainers(served, records, tmp_path):
    """The server's weights differ from its folder's: they were handed over, and their checksum is compared there."""
    trainer = trainer_of(served, records, tmp_path)
    trainer.sync_engine()
    prompts = [trainer.build_prompt(record) for record in records[:2]]
    groups = trainer.reward(trainer.sample(prompts, [1, 2]))  # raises where the server reads other ids
    for group in groups:
        trainer.score(whole_groups([group]))
        numbers = compare(group)
        assert numbers["engine/unknown"] == 0
        # Qwen2.5-VL: text after a video has other positions in transformers (docs/engines.md); Qwen3-VL: the same.
        qwen3 = "Qwen3" in type(served[0]).__name__
        assert numbers["engine/logprob_diff_max"] < (1e-3 if qwen3 else 0.5), numbers


def test_text_alone_is_exact(served, records, tmp_path):
    trainer = trainer_of(served, records, tmp_path)
    trainer.sync_engine()
    prompt = trainer.build_prompt(replace(records[0], media=()))
    (group,) = trainer.reward(trainer.sample([prompt], [1]))
    trainer.score(whole_groups([group]))
    assert compare(group)["engine/logprob_diff_max"] < 1e-4


def test_nothing_of_old_weights_stays(served, records, tmp_path):
    """After an update of the vision tower alone the same prompt has other log-probabilities: no cached features."""
    trainer = trainer_of(served, records, tmp_path)
    prompt = trainer.build_prompt(records[0])
    sampling = Sampling(2, 4, 0.01)
    version = served[2].version + 1
    served[2].update_weights(trainer.model, version)
    before = served[2].generate([prompt], sampling, [1])[0]
    tower = trainer.model.model.visual
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(1.5)
    served[2].update_weights(trainer.model, version + 1)
    after = served[2].generate([prompt], sampling, [1])[0]
    assert after[0].weight_version == version + 1
    assert any(not torch.equal(a.logprobs, b.logprobs) for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.div_(1.5)


def test_training_goes_on_when_the_server_is_killed(served, records, tmp_path):
    (tmp_path / "reward.py").write_text("def odd(text, record): return len(text) % 2\n")  # differs within a group
    trainer = trainer_of(served, records, tmp_path, rewards={f"{tmp_path}/reward.py:odd": 1.0})
    first = trainer.step(1)
    assert first["engine/effective_sample_size"] > 0.5
    os.killpg(served[2].servers[0].process.pid, signal.SIGKILL)
    second = trainer.step(2)
    assert second["engine/logprob_diff"] < 0.5 and trainer.version == 2
    assert served[2].servers[0].call("/info", timeout=10)["weight_version"] == served[2].version
