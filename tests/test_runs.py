"""A run that cannot lose work: what is skipped, refused, stopped, saved and resumed."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training
from accelerate import Accelerator
from run_cases import lines, make, same, weights_of, without_time

from appo.config import APPOConfig, ConfigError
from appo.data.records import DataError
from appo.train import checkpoints
from appo.train.evaluate import evaluate
from appo.train.folder import FREE, locked
from appo.train.interrupt import Stopped


def test_a_step_that_fails_leaves_a_checkpoint_of_the_one_before(tmp_path):
    whole = make(tmp_path / "whole", max_steps=3)
    whole.train()
    first = make(tmp_path / "parts", max_steps=3)
    score, calls = first.score, []

    def failing(groups):
        calls.append(1)
        if len(calls) == 2 * 2 + 1:
            raise RuntimeError("the power is out")
        score(groups)

    first.score = failing
    with pytest.raises(RuntimeError, match="the power is out"):
        first.train()
    assert [path.name for path in checkpoints.existing(tmp_path / "parts" / "checkpoints")] == ["step-000002"]
    second = make(tmp_path / "parts", model_seed=7, max_steps=3)
    second.train()
    assert same(weights_of(whole), weights_of(second))
    assert without_time(lines(tmp_path / "parts")) == without_time(lines(tmp_path / "whole"))


# A setting of each kind that decides the result: a rate, a method, a size, the seed, the rewards.
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "learning_rate = 0.001, now 0.002"),
        ({"method": "grpo"}, "method = 'appo', now 'grpo'"),
        ({"group_size": 2}, "group_size = 4, now 2"),
        ({"seed": 1}, "seed = 0, now 1"),
        ({"rewards": {"constant": 1.0}}, "rewards"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(finished, changes, named):
    before = (finished / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=named):
        make(finished, **({"max_steps": 1} | changes)).train()
    assert (finished / "config.yaml").read_text() == before, "the settings of the run there are kept"
    with pytest.raises(ConfigError, match="8 records, got 7"):
        make(finished, records=training.records()[:7], max_steps=1).train()


def test_every_setting_that_may_change_is_one():
    assert {field.name for field in dataclasses.fields(APPOConfig)} >= FREE


def test_more_steps_and_forced_settings_go_on(finished, tmp_path):
    trainer = make(finished, max_steps=2, micro_groups=1, save_every=1)
    trainer.train()
    assert [record["step"] for record in lines(finished)] == [1, 2]
    make(finished, max_steps=3, learning_rate=2e-3, resume="force").train()
    assert lines(finished)[2]["lr"] == 2e-3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make(folder, max_steps=1).train()
    return folder


def test_one_run_at_a_time_in_a_folder(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    with locked(Accelerator(), tmp_path):
        with pytest.raises(ConfigError, match=rf"another run is in .*process {os.getpid()} on"):
            trainer.train()
        assert not (tmp_path / "config.yaml").exists()
    trainer.train()


def test_the_lock_of_a_process_that_died_is_released(tmp_path):
    script = (
        "import os, pathlib, sys; from accelerate import Accelerator; from appo.train.folder import FREE, locked\n"
        "with locked(Accelerator(), pathlib.Path(sys.argv[1])):\n    os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=200, cwd=Path(__file__).parents[1])
    assert ended.returncode == -signal.SIGKILL and (tmp_path / ".lock").exists()
    with locked(Accelerator(), tmp_path):
        pass


def test_an_output_that_is_no_folder_is_refused_before_anything(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"`output`: .*file"):
        make(tmp_path / "file").train()
    assert (tmp_path / "file").read_text() == "mine"


# Ctrl-C, and what a scheduler sends.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, capfd, number, code):
    trainer = make(tmp_path, max_steps=5)
    step = trainer.step

    def interrupted(count):
        if count == 2:
            os.kill(os.getpid(), number)
        return step(count)

    trainer.step = interrupted
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == code and (stopped.value.step, stopped.value.steps) == (2, 5)
    assert f"stopped at step 2 of 5 by {number.name}" in capfd.readouterr().err
    assert [path.name for path in checkpoints.existing(tmp_path / "checkpoints")] == ["step-000002"]
    assert not (tmp_path / "final").exists()


def test_checkpoints_of_adapters_hold_nothing_else(tmp_path):
    import torch.distributed.checkpoint as dcp

    trainer = make(tmp_path, lora_rank=2, max_steps=1)
    trainer.train()
    (saved,) = checkpoints.existing(tmp_path / "checkpoints")
    names = dcp.FileSystemReader(saved).read_metadata().state_dict_metadata
    assert any("lora_A" in name for name in names)
    assert all("lora" in name or "param_groups" in name for name in names), sorted(names)[:5]
    size = sum(path.stat().st_size for path in saved.glob("*.distcp"))
    assert size < sum(p.numel() * 4 for p in trainer.model.parameters()) / 4
    again = make(tmp_path, lora_rank=2, model_seed=0, max_steps=1)
    again.train()
    assert same(weights_of(trainer), weights_of(again))


def broken(record, path):
    path.write_bytes(b"no video at all")
    return dataclasses.replace(record, media=(dataclasses.replace(record.media[0], path=path),))


def test_a_record_that_cannot_be_read_is_skipped_logged_and_counted_or_ends_the_run(tmp_path):
    first, *others = training.records()
    records = [broken(first, tmp_path / "broken.mp4"), *others]
    with pytest.raises(DataError, match=r"broken\.mp4"):
        make(tmp_path / "stop", records=records, max_steps=2).train()
    trainer = make(tmp_path / "skip", records=records, max_steps=2, on_broken="skip")
    trainer.train()
    metrics = lines(tmp_path / "skip")
    assert sum(record.get("records/broken", 0) for record in metrics) == 1 and len(trainer.groups) == 4
    (logged,) = lines(tmp_path / "skip", "broken.jsonl")
    assert logged["id"] == first.id and "broken.mp4" in logged["error"] and logged["step"] in (1, 2)
    assert trainer.sampler.taken == 9, "another record in its place"


def test_records_of_which_none_can_be_read_end_the_run(tmp_path):
    records = [broken(record, tmp_path / f"{i}.mp4") for i, record in enumerate(training.records()[:3])]
    with pytest.raises(DataError, match="none of 3 records can be read"):
        make(tmp_path / "run", records=records, prompts_per_step=2, on_broken="skip").train()


def test_evaluation_skips_what_cannot_be_read_when_told_to(tmp_path):
    first, *others = training.records()[:3]
    model, processor = training.tiny()
    records = [broken(first, tmp_path / "broken.mp4"), *others]
    with pytest.raises(DataError, match=r"broken\.mp4"):
        evaluate(model, processor, records, training.config(tmp_path))
    values = evaluate(model, processor, records, training.config(tmp_path, on_broken="skip"))
    assert values["records"] == 2 and values["broken"] == 1


def test_a_second_trainer_of_another_dtype_computes_in_its_own(tmp_path):
    for dtype in ("float32", "bfloat16", "float32"):
        trainer = make(tmp_path, dtype=dtype)
        seen = set()
        layer = trainer.unwrapped.causal.get_decoder().layers[0].mlp
        layer.register_forward_hook(lambda module, operands, output, seen=seen: seen.add(output.dtype))
        metrics = trainer.step(1)
        evaluate(trainer.model, trainer.processor, training.records()[:1], trainer.config)
        assert seen == {getattr(torch, dtype)} and metrics["grad_norm"] > 0


def test_files_are_utf8_whatever_the_locale(tmp_path):
    script = (
        "import sys, locale; from appo.train.logs import RunLog; assert locale.getpreferredencoding() != 'UTF-8'\n"
        "for _ in range(2):\n"
        "    log = RunLog(sys.argv[1], tensorboard=False, resume_step=1)\n"
        "    log.sample(1, {'text': 'r\\u00f6d \\u7ea2'}); log.close()"
    )
    ended = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", script, str(tmp_path)], timeout=200, cwd=Path(__file__).parents[1],
        env=os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    )  # fmt: skip
    assert ended.returncode == 0
    assert [record["text"] for record in lines(tmp_path, "samples.jsonl")] == ["röd 红", "röd 红"]
