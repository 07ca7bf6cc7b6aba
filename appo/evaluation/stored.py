"""Answers that were written elsewhere, or by an earlier evaluation, matched with the records they answer."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from appo.data import strict_json
from appo.data.records import IDS, DataError, Record
from appo.data.rows import open_rows

TEXTS = ("text", "response", "prediction", "pred", "output", "model_output")


def read_answers(path: Path, records: Sequence[Record]) -> list[str]:
    """The text of the answer to each of ``records``, in their order.

    path: a list of objects with an id (``id``, ``question_id``, ...) or the ``place`` of the record, and the answer as
    ``text``, ``response``, ``prediction``, ``pred``, ``output`` or ``model_output``, in any of the forms that records
    come in (.json, .jsonl, .csv, .parquet); or one JSON object of ids and texts. An answer file of ``appo eval`` fits.

    Raises DataError naming the file and what is missing, unknown, twice, or no text.
    """
    found: dict[int, str] = {}
    by_id = _places(records)
    for index, key, text in _answers(path):
        place = _place(path, index, key, by_id, records)
        if not isinstance(text, str):
            raise DataError(f"{path}: answer {index} (id {key!r}): expected a text, got {text!r:.200}.")
        if place in found:
            raise DataError(
                f"{path}: answer {index} (id {key!r}): expected one answer to a record, got a second one. Keep one: "
                "a table is of one answer each."
            )
        found[place] = text
    missing = [record for place, record in enumerate(records) if place not in found]
    if missing:
        raise DataError(
            f"{path}: expected an answer to each of {len(records)} records, got none to {len(missing)}, the first being"
            f" {missing[0].place}. Give an empty text where the model gave no answer."
        )
    return [found[place] for place in range(len(records))]


def _answers(path: Path) -> Iterator[tuple[int, str | int, Any]]:
    """(index, id or place, text) of each answer of a file."""
    for index, row in enumerate(_rows(path)):
        if isinstance(row, DataError):
            raise row
        name = next((name for name in TEXTS if isinstance(row, dict) and name in row), None)
        key = None if name is None else row.get("place", next((row[each] for each in IDS if each in row), None))
        if name is None or key is None or isinstance(key, bool) or not isinstance(key, (int, str)):
            raise DataError(
                f"{path}: answer {index}: expected an object with `place` or an id ({', '.join(IDS)}) and the "
                f"answer as {', '.join(TEXTS)}, got {row!r:.200}."
            )
        yield index, key if "place" in row else str(key), row[name]


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".json" and path.is_file():
        try:
            value = strict_json.loads(path.read_bytes())
        except strict_json.JSONError as error:
            raise DataError(error.at(str(path))) from error
        if isinstance(value, dict) and value:
            for key, answer in value.items():
                yield {"id": key, "text": answer} if isinstance(answer, str) else {"id": key} | _object(path, answer)
            return
    try:
        rows = open_rows(path)
    except OSError as error:
        raise DataError(f"{path}: expected a file of answers that can be read: {error.strerror}.") from error
    yield from (row for _, row in rows.scan())


def _object(path: Path, answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise DataError(f"{path}: expected a text or an object for each id, got {answer!r:.200}.")
    return answer


def _places(records: Sequence[Record]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(record.id, []).append(place)
    return places


def _place(path: Path, index: int, key: Any, by_id: dict[str, list[int]], records: Sequence[Record]) -> int:
    if isinstance(key, int):
        if not 0 <= key < len(records):
            raise DataError(f"{path}: answer {index}: expected a place from 0 to {len(records) - 1}, got {key}.")
        return key
    places = by_id.get(key, [])
    if len(places) != 1:
        raise DataError(
            f"{path}: answer {index}: expected the id of one record, such as {records[0].id!r}, got {key!r}, which "
            f"{'no record has' if not places else f'{len(places)} records have: name them by their `place`'}."
        )
    return places[0]
