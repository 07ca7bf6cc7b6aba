"""Perception against reasoning (the paper's Figure 2): several models describe, several answer from the descriptions.

Every reply is written down as soon as there is one, by what it depends on: the same command goes on where it ended,
and adding a model asks that model alone.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.config import APPOConfig, ConfigError
from appo.constraints import annotations, check_fields, setting, shown
from appo.data.messages import ANSWER_PROMPTS
from appo.data.records import DataError, Record
from appo.evaluation.speakers import Reply, Speaker, SpeakerSettings, open_speaker
from appo.given_values import given_values
from appo.rollout.rewards import combine

DESCRIBE = (
    "Describe the video in full detail, in the order of time: what is there, what happens when, where things are, what "
    "is written and how many there are of what. Somebody who cannot see the video will be asked about it."
)
FOR_QUESTION = " The question will be: {question} Describe what is needed to answer it. Do not answer it."
REASON = (
    "You cannot see a video, but have a description of it.\n\nDescription: {description}\n\nQuestion: {question}\n"
    "{how} First reason inside <think> </think> tags, then give the final answer inside <answer> </answer> tags."
)
BATCH = 8  # records between two lines of the files, of models that are loaded here


@dataclass
class MatrixSettings:
    """A matrix: its data, its models in the order of the axes, where it is written.

    ``settings`` are fields of APPOConfig that all models share: frames, pixels, dtype, timeouts.
    """

    data: str = setting("", not_empty=True)
    data_root: str | None = setting(None)
    output: str = setting("matrix", not_empty=True)
    limit: int | None = setting(None, at_least=1)  # of records
    with_question: bool = setting(True)  # whether those that describe know what will be asked
    perceivers: dict[str, SpeakerSettings] = setting(factory=dict, not_empty=True)
    reasoners: dict[str, SpeakerSettings] = setting(factory=dict, not_empty=True)
    settings: APPOConfig = field(default_factory=APPOConfig)

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MatrixSettings":
        """The matrix of a YAML file. Raises ConfigError naming the field that is unknown, missing or wrong."""
        values = dict(values)
        for role in ("perceivers", "reasoners"):
            models = values.get(role)
            if isinstance(models, dict):
                values[role] = {name: _made(SpeakerSettings, f"{role}.{name}", one) for name, one in models.items()}
        if "settings" in values:
            if not isinstance(values["settings"], dict):
                raise ConfigError(f"`settings`: expected fields of APPOConfig, got {shown(values['settings'])}.")
            values["settings"] = APPOConfig.from_dict(values["settings"])
        made: MatrixSettings = _made(cls, "", values)
        return made


def _made(kind: Any, where: str, values: Any) -> Any:
    """A dataclass from names and values; errors begin with ``where`` it stands."""
    if not isinstance(values, dict):
        raise ConfigError(f"`{where}`: expected `name: value` pairs, got {shown(values)}.")
    try:
        return kind(**given_values(values, [], annotations(kind)).values)
    except ConfigError as error:
        raise ConfigError(f"`{where}`: {error}" if where else str(error)) from error


@dataclass(frozen=True)
class Matrix:
    """Accuracy of every pair on the same records, and what the replies cost."""

    perceivers: tuple[str, ...]
    reasoners: tuple[str, ...]
    records: Sequence[Record]
    accuracy: dict[tuple[str, str], list[float]]  # (perceiver, reasoner) -> one number a record
    costs: dict[str, tuple[int, int, float]]  # "perceiver NAME" or "reasoner NAME" -> tokens read, written, price


Show = Callable[[str, int, int], None]
Opener = Callable[[str, SpeakerSettings, APPOConfig], Speaker]


def run_matrix(
    matrix: MatrixSettings,
    records: Sequence[Record],
    *,
    show: Show = lambda what, done, total: None,
    opener: Opener = open_speaker,
) -> Matrix:
    """Ask every perceiver about every record, every reasoner about every description, and score the answers.

    show: called with what is being done and how far it is. opener: makes a model of its settings.

    Raises ConfigError for a model that cannot be loaded, EndpointError for one that does not answer, DataError for a
    record or a file of replies that cannot be read. What was said until then is in ``matrix.output``.
    """
    if not records:
        raise DataError(f"{matrix.data}: expected at least one record, got none.")
    folder = Path(matrix.output)
    costs: dict[str, tuple[int, int, float]] = {}
    described, accuracy = {}, {}
    for name, settings in matrix.perceivers.items():
        book = _Replies(folder / "descriptions" / f"{_file(name)}.jsonl", settings, matrix.settings, look=True)
        asks = [_description_prompt(record, matrix.with_question) for record in records]
        speaker = functools.cache(functools.partial(opener, name, settings, matrix.settings))
        described[name] = book.collect(records, asks, speaker, f"{name} describes", show)
        costs[f"perceiver {name}"] = _cost(described[name], settings)
    for name, settings in matrix.reasoners.items():
        speaker = functools.cache(functools.partial(opener, name, settings, matrix.settings))  # loaded once, if at all
        spent = []
        for perceiver in matrix.perceivers:
            path = folder / "answers" / f"{_file(perceiver)}--{_file(name)}.jsonl"
            book = _Replies(path, settings, matrix.settings, look=False)
            asks = [
                _reason_prompt(record, reply.text) for record, reply in zip(records, described[perceiver], strict=True)
            ]
            what = f"{name} answers for {perceiver}"
            answers = book.collect(records, asks, speaker, what, show)
            spent += answers
            found = combine({"accuracy": 1.0}, [reply.text for reply in answers], list(records), lenient=True)
            accuracy[perceiver, name] = found.by_name["accuracy"].tolist()
        costs[f"reasoner {name}"] = _cost(spent, settings)
    return Matrix(tuple(matrix.perceivers), tuple(matrix.reasoners), records, accuracy, costs)


def _description_prompt(record: Record, with_question: bool) -> str:
    asked = "\n".join((record.question, *record.options))
    return DESCRIBE + (FOR_QUESTION.format(question=asked) if with_question else "")


def _reason_prompt(record: Record, description: str) -> str:
    asked = "\n".join((record.question, *record.options))
    return REASON.format(description=description, question=asked, how=ANSWER_PROMPTS[record.kind])


def _file(name: str) -> str:
    """A file name of a model's name, unlike that of any other."""
    plain = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _cost(replies: Sequence[Reply], settings: SpeakerSettings) -> tuple[int, int, float]:
    read, written = sum(reply.read for reply in replies), sum(reply.written for reply in replies)
    return read, written, (read * settings.price_read + written * settings.price_written) / 1e6


class _Replies:
    """The replies of one model, in a file of lines with a key of everything that a reply depends on."""

    def __init__(self, path: Path, settings: SpeakerSettings, config: APPOConfig, *, look: bool) -> None:
        self.path, self.settings, self.config, self.look = path, settings, config, look
        model = [settings.model, settings.max_tokens]
        seen = [config.fps, config.max_frames, config.max_pixels] if look else []
        self._depends = json.dumps([*model, *seen])
        self._known: dict[str, Reply] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):  # without one cut short
            try:
                reply = json.loads(line)
                self._known[reply["key"]] = Reply(reply["text"], int(reply["read"]), int(reply["written"]))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}: line {number} is no reply of a matrix. Remove the file, or the line."
                ) from error
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])

    def _key(self, record: Record, ask: str) -> str:
        media = [[str(m.path), m.start, m.end, *map(str, m.frames)] for m in record.media]
        media += [record.place for m in record.media if m.data is not None]
        text = json.dumps([self._depends, ask, media if self.look else []])
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def collect(
        self, records: Sequence[Record], asks: Sequence[str], speaker: Callable[[], Speaker], what: str, show: Show
    ) -> list[Reply]:
        """The reply about each record; those that are not known are asked for and written down."""
        keys = [self._key(record, ask) for record, ask in zip(records, asks, strict=True)]
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        show(what, len(records) - len(missing), len(records))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        size = 1 if self.settings.url else BATCH
        for start in range(0, len(missing), size):
            batch = missing[start : start + size]
            said = speaker().say([records[place] for place in batch], [asks[place] for place in batch], look=self.look)
            with self.path.open("a", encoding="utf-8") as file:
                for place, reply in zip(batch, said, strict=True):
                    self._known[keys[place]] = reply
                    line = {"key": keys[place], "id": records[place].id, "text": reply.text}
                    file.write(json.dumps(line | {"read": reply.read, "written": reply.written}) + "\n")
            show(what, len(records) - len(missing) + start + len(batch), len(records))
        return [self._known[key] for key in keys]
