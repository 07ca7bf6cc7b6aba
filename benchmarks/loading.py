"""python -m benchmarks.loading [--records 260000]: time and memory of loading a file of records

Records as Video-R1 has them, written as JSON lines, a JSON list and Parquet (where pyarrow is installed); each is
loaded by a process of its own, first with an empty cache, then again.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def records(count: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(2, 9))) for _ in range(3000)]

    def text(length: int) -> str:
        return " ".join(chance.choices(words, k=length))

    for number in range(count):
        choice = chance.random() < 0.6
        yield {
            "problem_id": number,
            "problem": text(20) + "?",
            "data_type": "video",
            "problem_type": "multiple choice" if choice else "free-form",
            "options": [f"{letter}. {text(6)}" for letter in "ABCD"] if choice else [],
            "solution": f"<answer>{chance.choice('ABCD') if choice else text(12)}</answer>",
            "path": f"./source/{number % 30000}/video_{number}.mp4",
            "data_source": "source",
        }


def write(folder: Path, count: int) -> Iterator[Path]:
    with (folder / "records.jsonl").open("w") as lines, (folder / "records.json").open("w") as whole:
        for number, record in enumerate(records(count)):
            text = json.dumps(record)
            lines.write(text + "\n")
            whole.write(("," if number else "[") + text)
        whole.write("]")
    yield from (folder / "records.jsonl", folder / "records.json")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        return
    parquet.write_table(pyarrow.Table.from_pylist(list(records(count))), folder / "records.parquet")
    yield folder / "records.parquet"


def load(path: str) -> None:
    from appo.data.load import load_records
    from appo.process_memory import resident_bytes

    there, before, start = resident_bytes("VmRSS"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    count = len(load_records(path))
    seconds = time.perf_counter() - start
    after, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{Path(path).name:16} {count:,} records  {seconds:6.2f} s  CPU {cpu:5.2f} s, workers "
        f"{workers.ru_utime + workers.ru_stime:5.2f} s  {(resident_bytes('VmHWM') - there) / 2**20:4.0f} MiB more"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=260_000)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(arguments.load)
    print(f"{os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        for path in write(Path(folder), arguments.records):
            for _ in ("first", "again"):
                command = [sys.executable, "-m", "benchmarks.loading", "--load", str(path)]
                subprocess.run(command, check=True, env=os.environ | {"APPO_CACHE": f"{folder}/cache"})


if __name__ == "__main__":
    main()
