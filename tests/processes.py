"""Training in processes of their own, for tests: several over gloo, or one that is killed.

They are forked from a server that has imported what they need, so that one starts in a fraction of a second.
"""

import faulthandler
import hashlib
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import training

from appo.data.load import load_records
from appo.train.sharding import full_weights
from appo.train.trainer import Trainer

TIME_LIMIT = 240
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes"])


def start(result: Path, output: Path, *settings: dict[str, Any], **environment: object) -> BaseProcess:
    """A process that trains in ``output`` with each of the settings, one after another, and leaves what it saw, as
    JSON, in the file ``result``."""
    records = training.records()[0].meta["file"]
    variables = {name: str(value) for name, value in environment.items()}
    process = CONTEXT.Process(target=train, args=(result, records, str(output), settings, variables))
    process.start()
    return process


def start_together(world: int, results: Path, output: Path, *settings: dict[str, Any]) -> list[BaseProcess]:
    """``world`` processes that train together; each leaves what it saw in the file of its rank in ``results``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": world}
    ranks = [{} if world == 1 else place | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)]
    return [start(results / str(rank), output, *settings, **ranks[rank]) for rank in range(world)]


def train_together(world: int, output: Path, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of ``world`` processes saw."""
    folder = Path(tempfile.mkdtemp())
    running = start_together(world, folder, output, *settings)
    for process in running:
        process.join(TIME_LIMIT + 30)
    assert [process.exitcode for process in running] == [0] * world
    return [json.loads((folder / str(rank)).read_text()) for rank in range(world)]


def train(result: Path, records_file: str, output: str, settings: Sequence[dict[str, Any]], variables: Any) -> None:
    os.environ.update(variables | {"ACCELERATE_USE_CPU": "true"})
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)  # a collective that waits for ever is seen
    records = load_records(records_file)
    found: dict[str, Any] = {"updates": 0, "positions": [], "scored": []}
    for part in settings:
        model, processor = training.tiny()
        config = training.config(output, **part)
        trainer = Trainer(model, processor, records, config=config, eval_dataset=records[:3])
        take, apply, score = trainer.sampler.take, trainer.updates.apply, trainer.score

        def taken(count: int, take: Any = take) -> Any:
            drawn = take(count)
            found["positions"] += [position for position, _ in drawn]
            return drawn

        def applied(*arguments: Any, apply: Any = apply) -> bool:
            made: bool = apply(*arguments)
            found["updates"] += made
            return made

        def scored(parts: Any, score: Any = score) -> None:
            found["scored"].append(len(parts))
            score(parts)

        trainer.sampler.take, trainer.updates.apply, trainer.score = taken, applied, scored  # type: ignore
        trainer.train()
    state = full_weights(trainer.unwrapped)  # {} in all but the first process, where they are sharded
    weights = b"".join(
        value.numpy().tobytes() for value in (trainer.model.state_dict() if state is None else state).values()
    )
    result.write_text(json.dumps(found | {"weights": hashlib.sha256(weights).hexdigest()}))
