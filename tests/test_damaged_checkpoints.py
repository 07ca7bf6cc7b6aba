"""Checkpoints that are damaged, or cannot be written."""

import errno
import logging
import os

import pytest
from run_cases import lines, make, same, weights_of, without_time

from appo.train import checkpoints


def halve(path):
    (largest,) = path.glob("*.distcp")
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def flip(path):
    (largest,) = path.glob("*.distcp")
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0x10
    largest.write_bytes(data)


# Weights cut, changed or without their list; the state cut or gone; the folder of another step's name, and a file.
DAMAGES = {
    "cut": (halve, "bytes instead of"),
    "other bytes": (flip, "other contents"),
    "a file missing": (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
    "state cut": (lambda path: (path / checkpoints.STATE).write_text('{"step": 2, "fi'), "JSONDecodeError"),
    "state missing": (lambda path: (path / checkpoints.STATE).unlink(), checkpoints.STATE),
    "renamed": (lambda path: path.rename(path.with_name("step-000009")), "of step 2"),
    "a file": (lambda path: (path.rename(path.with_name("old")), path.write_text("x")), "step-000002"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trainer = make(folder, max_steps=2, save_every=1)
    trainer.train()
    return folder, without_time(lines(folder)), weights_of(trainer)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(two_steps, tmp_path, caplog, kind):
    import shutil

    folder, metrics, weights = two_steps
    shutil.copytree(folder, tmp_path / "run")
    damage, reason = DAMAGES[kind]
    damage(tmp_path / "run" / "checkpoints" / "step-000002")
    (tmp_path / "run" / "checkpoints" / "step-banana").mkdir()
    with caplog.at_level(logging.WARNING, "appo"):
        trainer = make(tmp_path / "run", model_seed=3, max_steps=2, save_every=1)
        trainer.train()
    (warning,) = [record.getMessage() for record in caplog.records if "checkpoint passed over" in record.getMessage()]
    assert reason in warning and str(tmp_path / "run") in warning
    assert without_time(lines(tmp_path / "run")) == metrics and same(weights_of(trainer), weights)


def test_without_a_checkpoint_that_is_whole_a_run_does_not_start_over(two_steps, tmp_path):
    import shutil

    shutil.copytree(two_steps[0], tmp_path / "run")
    for path in checkpoints.existing(tmp_path / "run" / "checkpoints"):
        halve(path)
    with pytest.raises(checkpoints.CheckpointError, match=r"step-000002: .*step-000001: .*Remove .* to start from the"):
        make(tmp_path / "run", max_steps=3).train()
    assert len(lines(tmp_path / "run")) == 2


def test_a_full_disk_is_named_and_the_older_checkpoint_kept(tmp_path, monkeypatch):
    make(tmp_path, max_steps=1).train()

    def full(states, checkpoint_id, **_):
        (checkpoint_id / "__0_0.distcp").write_bytes(b"half of it")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("writer failed") from error  # as torch wraps it

    monkeypatch.setattr(checkpoints.dcp, "save", full)
    with pytest.raises(
        checkpoints.CheckpointError, match=r"step-000002: cannot be saved: the disk is full \(\d+ MiB free\)"
    ):
        make(tmp_path, max_steps=2).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
