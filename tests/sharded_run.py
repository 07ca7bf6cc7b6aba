"""Training in one process of several over gloo, for tests of sharding.

    python tests/sharded_run.py '{"output": "runs/a", "shard": "fsdp"}' ['{"output": "runs/b", ...}' ...]

trains with each of the settings, one after another, and prints one JSON line with what this process found of each.
"""

import datetime
import faulthandler
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import training

from appo.data.records import Record
from appo.data.sampler import RecordSampler
from appo.models.positions import use_positions
from appo.rollout import rewards
from appo.rollout.model_engine import TransformersRollout
from appo.rollout.weight_files import weights_of
from appo.train.setup import load_model
from appo.train.sharding import full_weights
from appo.train.trainer import Trainer

TIME_LIMIT = 60  # of a collective: failure is a process that waits for ever


@rewards.register("videos_differ")
def videos_differ(completions: list[str], records: list[Record]) -> list[float | None]:
    """No signal in groups without a video."""
    return [float(len(text) % 2) if r.media else 1.0 for text, r in zip(completions, records, strict=True)]


def mixed_records(without: Sequence[int] = (0, 2, 4, 6)) -> list[Record]:
    """Those at some places of the first epoch's order have no video: with two processes, all of the first one's."""
    order = RecordSampler(training.records(), seed=0).peek(len(training.records()))
    bare = {record.id for place, record in order if place in without}
    return [training.without_media(r) if r.id in bare else r for r in training.records()]


class Apart(TransformersRollout):
    """An engine with a model of its own, which weights are handed to one at a time."""

    def update_weights(self, model: Any, version: int) -> None:
        own = dict(self.model.named_parameters())
        for name, value in weights_of(model):
            own[name].data.copy_(value)
        super().update_weights(model, version)


def apart(positions: str) -> Apart:
    """The engine, with other weights at first and the positions of the model in training."""
    model, processor = training.tiny(seed=1)
    use_positions(model, positions)
    return Apart(model, processor)


def train(
    output: str, *, tied: bool = False, without: Sequence[int] = (0, 2, 4, 6), **settings: Any
) -> tuple[Trainer, dict[str, Any]]:
    """A run on `mixed_records`, and what this process found: forwards and backwards made, and `final/` against the
    weights it was saved from."""
    config = training.config(output, **({"rewards": {"videos_differ": 1.0}, "micro_groups": 1} | settings))
    model, processor = load_model(config) if config.model else training.tiny(tie_word_embeddings=tied)
    found = {"idle": 0, "meta": any(parameter.is_meta for parameter in model.parameters())}
    trainer = Trainer(
        model,
        processor,
        mixed_records(without),
        config=config,
        eval_dataset=training.records()[:3],
        engine=apart(config.video_positions) if settings.get("engine") == "vllm" else None,
    )
    idle = trainer.idle_backward

    def counted(group: Any) -> None:
        found["idle"] += 1
        idle(group)

    trainer.idle_backward = counted  # type: ignore[method-assign]
    trainer.train()
    weights = full_weights(trainer.unwrapped)
    if weights and not trainer.config.lora_rank:
        loaded = type(model).from_pretrained(Path(output) / "final").state_dict()
        found["saved"], found["equal"] = len(weights), sum(v.equal(loaded[name]) for name, v in weights.items())
    return trainer, found


def train_together(world: int, *runs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What each of ``world`` processes found, for each of the runs."""
    return run_together(world, __file__, *map(json.dumps, runs))


def run_together(world: int, script: str, *arguments: str) -> list[Any]:
    """The last line, as JSON, that each of ``world`` processes of a script prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * world, ended
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


if __name__ == "__main__":
    faulthandler.dump_traceback_later(280, exit=True)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIME_LIMIT))
    print(json.dumps([train(**json.loads(run))[1] for run in sys.argv[1:]]), flush=True)
    dist.destroy_process_group()
