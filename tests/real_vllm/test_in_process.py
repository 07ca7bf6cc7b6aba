"""vLLM in the trainer's process: run by the interpreter of an environment that has both (`make test-vllm`)."""

import os

import pytest
import torch
import training

from appo.data.prompts import PromptBuilder
from appo.rollout.engine import Sampling
from appo.tasks.tiny import build_tiny
from appo.train.engine_difference import compare
from appo.train.groups import whole_groups
from appo.train.trainer import Trainer

pytest.importorskip("vllm", reason="this environment has no vLLM; `make test-vllm` has one with both")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore"),  # the versions of that environment are vLLM's
]
ENGINE = {"enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16, "dtype": "float32"}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def together(request, tmp_path_factory):
    """(model, processor, engine): the engine is of a folder with other weights than those of the model in training."""
    from appo.rollout.vllm_engine import VLLMRollout

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = tmp_path_factory.mktemp(request.param)
    saved, processor = build_tiny(seed=0, family=request.param)
    saved.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    model, _ = build_tiny(seed=1, family=request.param)
    engine = VLLMRollout(model, processor, str(folder / "model"), arguments=ENGINE)
    yield model, processor, engine
    engine.close()


def trainer_of(together, folder, **settings):
    model, processor, engine = together
    changes = {"max_pixels": 32 * 32, "max_new_tokens": 8, "prompts_per_step": 2} | settings
    return Trainer(model, processor, training.records(), config=training.config(folder, **changes), engine=engine)


def test_steps_with_weights_and_log_probabilities_of_the_trainer(together, tmp_path):
    """Two steps: after each the engine has the weights of the one before, and what it samples is what is scored."""
    trainer = trainer_of(together, tmp_path)
    for number in (1, 2):
        metrics = trainer.step(number)
        assert trainer.version == number and metrics["grad_norm"] > 0
        assert metrics["engine/unknown"] == 0 and metrics["engine/age"] == 0
        assert metrics["engine/logprob_diff_max"] < 1e-3
        assert metrics["engine/effective_sample_size"] > 0.999


def test_seeds_decide(together, tmp_path):
    engine, trainer = together[2], trainer_of(together, tmp_path)
    trainer.sync_engine()
    prompt = trainer.build_prompt(training.records()[0])
    first, again, other = (engine.generate([prompt], Sampling(4, 8), [seed])[0] for seed in (5, 5, 6))
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(first, other, strict=True))


def test_nothing_of_old_weights_stays(together, tmp_path):
    """Another vision tower, the same prompt: other log-probabilities, and again those of a trainer's forward."""
    model, processor, engine = together
    trainer = trainer_of(together, tmp_path)
    prompt = PromptBuilder(processor, model.config, trainer.config)(training.records()[0])
    found = []
    for version, factor in ((20, 1.0), (21, 1.5)):
        with torch.no_grad():
            for parameter in model.model.visual.parameters():
                parameter.mul_(factor)
        engine.update_weights(model, version)
        (group,) = trainer.reward([(prompt, engine.generate([prompt], Sampling(2, 4), [1])[0])])
        trainer.score(whole_groups([group]))
        assert group.weight_version == version and compare(group)["engine/logprob_diff_max"] < 1e-3
        found.append(group.rollout_logprobs)
    assert not torch.equal(*found)
