"""Ids that several records of a file share."""

import hashlib
from array import array

import numpy as np

from appo.data.records import Record


def id_hash(record: Record) -> int:
    """64 bits of a record's id, the same in every process."""
    # NExT-QA counts its questions within each video.
    video = record.media[0].path.name if record.source.startswith("NExT") and record.media else ""
    text = f"{record.id}\0{video}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


class EqualIds:
    """Finds ids that several records share, in 16 bytes a record."""

    def __init__(self, hashes: "array[int] | None" = None) -> None:
        """hashes: those of the ids of records 0, 1, ..."""
        self._hashes = array("q") if hashes is None else hashes
        self._numbers = array("q", range(len(self._hashes)))

    def add(self, record: Record, number: int) -> None:
        self._hashes.append(id_hash(record))
        self._numbers.append(number)

    def groups(self) -> list[list[int]]:
        """The numbers of the records of each id that is there more than once, in order."""
        hashes = np.frombuffer(self._hashes, np.int64) if self._hashes else np.empty(0, np.int64)
        values, counts = np.unique(hashes, return_counts=True)
        shared = values[counts > 1]
        if not len(shared):
            return []
        places = np.flatnonzero(np.isin(hashes, shared))
        found: dict[int, list[int]] = {}
        for place in places.tolist():
            found.setdefault(int(hashes[place]), []).append(self._numbers[place])
        return list(found.values())
