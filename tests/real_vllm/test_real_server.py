"""The trainer against a real vLLM server on the CPU: ids, weights, log-probabilities, caches, a killed server."""

import os
import signal
from dataclasses import replace
from fractions import Fraction

import psutil
import pytest
import torch
import video_clips
from peft import LoraConfig, get_peft_model

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.records import Media, Record
from appo.reports.parity import examine_parity
from appo.rollout.engine import Sampling
from appo.rollout.vllm_requests import EngineError
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
BLOCK = 32  # tokens of a block of the cache; the least on a CPU
ENGINE = {"block_size": BLOCK, "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 16, "dtype": "float32"}


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
        assert numbers["engine/logprob_diff_max"] < 1e-3, numbers


def test_text_alone_is_exact(served, records, tmp_path):
    trainer = trainer_of(served, records, tmp_path)
    trainer.sync_engine()
    prompt = trainer.build_prompt(replace(records[0], media=()))
    (group,) = trainer.reward(trainer.sample([prompt], [1]))
    trainer.score(whole_groups([group]))
    assert compare(group)["engine/logprob_diff_max"] < 1e-4


def clips_of_every_kind(folder):
    """Clips as the tests of decoding make them: containers and codecs, times, turned, stretched, odd, few, cut."""
    slides, varying = [7.0 * i for i in range(10)], [0.1 * i for i in range(16)] + [1.6 + 2.0 * i for i in range(20)]
    kinds = {
        "plain.mp4": {},
        "reordered.mkv": {"options": {"x264-params": "bframes=2"}},
        "vp9.webm": {"codec": "libvpx-vp9", "numbers": range(30)},
        "mpeg4.avi": {"codec": "mpeg4"},
        "film.mp4": {"numbers": range(200), "times": [i / 23.976 for i in range(200)]},
        "slides.mp4": {"numbers": range(10), "times": slides},
        "varying.mp4": {"numbers": range(36), "times": varying},
        "late.mp4": {"start": 5.0},
        "held.mp4": {"numbers": range(20), "rotation": 90},
        "stretched.mkv": {"numbers": range(20), "sar": Fraction(2, 1)},
        "odd.mp4": {"numbers": range(20), "size": (51, 65), "pix_fmt": "yuv444p"},
        "large.mp4": {"numbers": range(20), "size": (240, 320)},
        "one.mp4": {"numbers": range(1)},
        "two.mp4": {"numbers": range(2)},
        "three.mp4": {"numbers": range(3)},
        "sound.mp4": {"numbers": range(50), "audio": 9.0},
    }
    paths = {name: video_clips.make(folder / name, **settings) for name, settings in kinds.items()}
    records = [Record(name, "When?", "1", "numerical", media=(Media("video", path),)) for name, path in paths.items()]
    cut = Media("video", paths["plain.mp4"], start=2.0, end=7.3)
    both = (Media("video", paths["two.mp4"]), Media("video", paths["held.mp4"]))
    return [
        *records,
        Record("cut", "When?", "1", "numerical", media=(cut,)),
        Record("two clips", "When?", "1", "numerical", media=both),
    ]


def test_clips_of_every_kind_are_read_alike(served, records, tmp_path):
    """Ids, grids, times and log-probabilities, by what `appo parity` does."""
    trainer = trainer_of(served, records, tmp_path, max_pixels=64 * 64, max_new_tokens=4)
    clips = clips_of_every_kind(tmp_path)
    found = examine_parity(trainer, clips)
    assert len(found) == len(clips) and all(each.same_prompt for each in found)
    apart = [each for each in found if each.place]
    told = [(each.record.id, each.numbers, each.place) for each in apart]
    assert all(rounds_otherwise(trainer.build_prompt(each.record), served[0]) for each in apart), told
    assert max(each.numbers["engine/logprob_diff_max"] for each in found if not each.place) < 1e-3


def rounds_otherwise(prompt, model):
    """Whether a frame's position falls on a whole number that fp32, as in transformers and in the models' original
    code, reaches and fp64, as in vLLM, does not, or the other way round (docs/engines.md)."""
    per_second = getattr(model.config.vision_config, "tokens_per_second", None)
    if per_second is None:
        return False
    for (steps, *_), seconds in zip(prompt.vision["video_grid_thw"], prompt.vision["second_per_grid_ts"], strict=True):
        single = (torch.arange(int(steps)) * (per_second * seconds.float())).long()
        double = (torch.arange(int(steps)).double() * (per_second * float(seconds.float()))).long()
        if not torch.equal(single, double):
            return True
    return False


def test_a_prompt_of_a_group_is_computed_once(served, records, tmp_path):
    """Of eight responses to a prompt, seven find it in the cache but for its last block."""
    trainer = trainer_of(served, records, tmp_path, max_pixels=64 * 64)
    trainer.sync_engine()
    server, size = served[2].servers[0], 8
    prompt = trainer.build_prompt(records[1])
    before = server.call("/stats", timeout=10)
    served[2].generate([prompt], Sampling(size, 4), [3])
    after = server.call("/stats", timeout=10)
    asked, cached = (after[name] - before[name] for name in ("prompt_tokens", "cached_tokens"))
    assert asked == size * len(prompt)
    assert cached >= (size - 1) * (len(prompt) - 2 * BLOCK), (len(prompt), cached)


def test_seeds_decide_and_neighbours_do_not(served, records, tmp_path):
    trainer, sampling = trainer_of(served, records, tmp_path), Sampling(4, 8)
    trainer.sync_engine()
    prompts = [trainer.build_prompt(record) for record in records[:2]]

    def ids(prompts, seeds):
        return [[each.ids.tolist() for each in group] for group in served[2].generate(prompts, sampling, seeds)]

    together = ids(prompts, [5, 6])
    assert together == [ids(prompts[:1], [5])[0], ids(prompts[1:], [6])[0]]
    assert together[0] != ids(prompts[:1], [7])[0] and len({tuple(each) for each in together[0]}) > 1


def test_more_prompts_than_are_read_at_a_time(served, records, tmp_path):
    """A prompt that is read in parts and has a seed ends vLLM 0.32 on a CPU: prompts wait until they fit."""
    trainer = trainer_of(served, records, tmp_path, max_pixels=112 * 112)
    trainer.sync_engine()
    prompts = [trainer.build_prompt(record) for record in records] * 6
    total = sum(len(prompt) for prompt in prompts)
    groups = served[2].generate(prompts, Sampling(4, 2), list(range(len(prompts))))
    assert len(groups) == len(prompts) and total > 2048, total


def test_weights_of_another_shape(served, records, tmp_path):
    """A model of the same kind and another size: named, and nothing is trained on."""
    other, _ = build_tiny(seed=1, family=served[0].config.model_type, intermediate_size=96)
    version = served[2].version
    with pytest.raises(EngineError, match="expected weights of the shapes of the server's model"):
        served[2].update_weights(other, version + 1)
    trainer = trainer_of(served, records, tmp_path)
    trainer.version = version + 2
    trainer.sync_engine()
    (group,) = trainer.reward(trainer.sample([trainer.build_prompt(records[0])], [1]))
    trainer.score(whole_groups([group]))
    assert compare(group)["engine/logprob_diff_max"] < 1e-3


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


def test_training_goes_on_when_the_engine_behind_the_server_dies(served, records, tmp_path):
    """The server's own process lives, and its engine's is gone."""
    trainer = trainer_of(served, records, tmp_path)
    trainer.sync_engine()
    prompt, server = trainer.build_prompt(records[0]), served[2].servers[0]
    before = served[2].generate([prompt], Sampling(2, 4), [1])[0]
    for child in psutil.Process(server.process.pid).children(recursive=True):
        child.kill()
    after = served[2].generate([prompt], Sampling(2, 4), [1])[0]
    assert [each.ids.tolist() for each in before] == [each.ids.tolist() for each in after]


def test_training_goes_on_when_the_server_is_killed(served, records, tmp_path):
    (tmp_path / "reward.py").write_text("def odd(text, record): return len(text) % 2\n")  # differs within a group
    trainer = trainer_of(served, records, tmp_path, rewards={f"{tmp_path}/reward.py:odd": 1.0})
    first = trainer.step(1)
    assert first["engine/effective_sample_size"] > 0.5
    os.killpg(served[2].servers[0].process.pid, signal.SIGKILL)
    second = trainer.step(2)
    assert second["engine/logprob_diff"] < 0.5 and trainer.version == 2
    assert served[2].servers[0].call("/info", timeout=10)["weight_version"] == served[2].version


def test_adapters_alone(python, records, tmp_path):
    """A server with LoRA: weights once, adapters after each update; what it samples is what the trainer scores."""
    model, processor = build_tiny(seed=0)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    settings = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", init_lora_weights=False)
    model = get_peft_model(model, settings)
    arguments = ENGINE | {"enable_lora": True, "max_lora_rank": 8}
    engine = VLLMServerRollout(
        model, processor, tmp_path / "engine", python=python, model_path=str(tmp_path / "model"), arguments=arguments
    )
    try:
        trainer = trainer_of((model, processor, engine), records, tmp_path, lora_rank=4)
        found = []
        for version in (1, 2):
            engine.update_weights(trainer.model, version)
            assert sorted(path.name for path in engine.folder.glob("[aw]*")) == [
                f"adapters-{version}",
                "weights-below-1",
            ]
            prompt = trainer.build_prompt(records[0])
            (group,) = trainer.reward([(prompt, engine.generate([prompt], Sampling(4, 6), [1])[0])])
            trainer.score(whole_groups([group]))
            numbers = compare(group)
            assert numbers["engine/logprob_diff_max"] < 1e-3, numbers
            found.append(group.rollout_logprobs)
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(-3)
        assert found[0].shape != found[1].shape or not torch.equal(*found)
    finally:
        engine.close()
