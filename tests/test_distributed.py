"""Two processes: they stay in step, share the records, and log the numbers of both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import hashlib, sys
import training
from appo.train.trainer import Trainer
model, processor = training.tiny()
settings = training.config(sys.argv[1], max_steps=2, updates_per_step=2, eval_samples=1)
trainer = Trainer(model, processor, training.records(), config=settings, eval_dataset=training.records()[:3])
trainer.train()
weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
rank = trainer.accelerator.process_index
print("done", rank, trainer.sampler.taken, hashlib.sha256(weights).hexdigest(), flush=True)
"""


@pytest.mark.slow
def test_processes_keep_the_same_weights_and_share_the_work(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=280)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    ends = [output[output.index("done") :].split() for output in outputs]
    assert [end[2] for end in ends] == ["4", "4"], "two prompts a step each"
    assert ends[0][3] == ends[1][3], "the same weights in both"
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in metrics] == [1, 2] and metrics[1]["grad_norm"] > 0
    evaluations = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert all(record["records"] == 3 for record in evaluations)
