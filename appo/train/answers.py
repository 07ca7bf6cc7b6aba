"""The file of answers that an evaluation writes as it goes, and goes on from when it was interrupted."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from appo.config import APPOConfig, ConfigError
from appo.data.records import Record
from appo.train.evaluate import Answer

# Settings that decide what is answered; the others may differ from one call to the next.
SETTINGS = (
    "model", "seed", "fps", "max_frames", "max_pixels", "instructions", "max_new_tokens", "temperature", "top_p",
    "eval_samples", "rewards_lenient", "dtype",
)  # fmt: skip


class AnswerFile:
    """One JSON line per answer, written as soon as there is one. Opened first of all, so that a path that cannot be
    written to is known before a model is loaded.

    known: the answers that the file held already, by place of the record, for records that were answered in full.

    Raises ConfigError for a file that cannot be opened, that is not one of answers, or that holds those of another
    model, other settings or other records.
    """

    def __init__(self, path: Path, records: Sequence[Record], config: APPOConfig, *, benchmark: str = "") -> None:
        self.path, self.known = path, dict[int, list[Answer]]()
        decides = {name: getattr(config, name) for name in SETTINGS if hasattr(config, name)}
        decides |= {"benchmark": benchmark} if benchmark else {}  # whose prompts are asked
        decides |= {"looked": config.layers} if config.eval_looking else {}
        decides |= {"positions": config.video_positions} if config.video_positions != "original" else {}
        self._run = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
        try:
            before = path.read_bytes() if path.exists() else b""
            lines = before[: before.rfind(b"\n") + 1]  # without the last one where it was cut short
            for number, line in enumerate(lines.splitlines(), 1):
                self._read(number, line, records)
            samples = max(1, config.eval_samples)
            self.known = {place: answers for place, answers in self.known.items() if len(answers) == samples}
            kept = [answer for place in sorted(self.known) for answer in self.known[place]]
            partial = path.with_name("." + path.name + ".partial")
            partial.write_text("".join(map(_line, kept)), encoding="utf-8")
            partial.replace(path)
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"`output`: {path}: cannot be written to: {error.strerror or error}.") from error

    def _read(self, number: int, line: bytes, records: Sequence[Record]) -> None:
        remedy = "Remove the file, or choose another."
        try:
            answer = json.loads(line)
            place, run, _ = answer["place"], answer["run"], answer["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"`output`: {self.path}: line {number} is no answer of an evaluation. {remedy}"
            ) from error
        if run != self._run:
            raise ConfigError(f"`output`: {self.path} holds answers of another model or other settings. {remedy}")
        if not 0 <= place < len(records) or (answer["id"], answer["answer"]) != (
            records[place].id,
            records[place].answer,
        ):
            raise ConfigError(
                f"`output`: {self.path}: line {number} answers another record than place {place}. {remedy}"
            )
        self.known.setdefault(place, []).append(answer)

    def write(self, answer: dict[str, Any]) -> None:
        self._file.write(_line({"run": self._run} | answer))
        self._file.flush()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _line(answer: dict[str, Any]) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"
