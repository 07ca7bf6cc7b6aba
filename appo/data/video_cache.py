"""Decoded clips on disk, so that a video that is read again in a later epoch or run is not decoded again."""

import hashlib
import json
import logging
import os
import tempfile
import threading
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from appo.data.clip import Clip
from appo.data.video_timeline import Sampling

logger = logging.getLogger(__name__)

FORMAT = 1  # to be raised when the same file and settings give other frames
GIB = 2**30
FULL, EMPTIED = 1.0, 0.9  # of the limit: when files are removed, and down to what


class ClipCache:
    """Clips by file and sampling, in a folder that processes may share.

    A clip is found again while path, size and modification time of its file and the settings of sampling are the same.
    Files are written whole or not at all; those that were not read for longest go when the folder holds more than
    ``limit`` bytes. What cannot be read from the cache is decoded again; what cannot be written is logged.
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: float = 20 * GIB) -> None:
        if not limit > 0:
            raise ValueError(f"ClipCache: `limit`: expected a positive number of bytes, got {limit!r}.")
        self.folder, self.limit = Path(folder), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._held = sum(size for _, size, _ in self._files())  # bytes, as far as this process knows
        self._told = False

    def get(self, path: str, sampling: Sampling, decoder: str) -> Clip | None:
        place = self._place(path, sampling, decoder)
        try:
            with np.load(place, allow_pickle=False) as stored:
                fields = {name: stored[name] for name in stored.files}
            os.utime(place)  # read just now
            return Clip(
                frames=torch.from_numpy(fields.pop("frames")),
                timestamps=torch.from_numpy(fields.pop("timestamps")),
                **{name: float(value) for name, value in fields.items()},
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s: not a cached clip (%s); decoding the video again", place, error)
            place.unlink(missing_ok=True)
            return None

    def put(self, path: str, sampling: Sampling, decoder: str, clip: Clip) -> None:
        place = self._place(path, sampling, decoder)
        fields: dict[str, Any] = {name: np.asarray(value) for name, value in vars(clip).items()}
        name = None
        try:
            place.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="part-", delete=False) as file:
                name = file.name
                np.savez(file, **fields)
            os.replace(name, place)
            with self._lock:
                self._held += place.stat().st_size
                if self._held > FULL * self.limit:
                    self._shrink()
        except OSError as error:
            if name is not None:
                Path(name).unlink(missing_ok=True)
            if not self._told:
                logger.warning("%s: clips cannot be kept there (%s); going on without", self.folder, error)
            self._told = True

    def _place(self, path: str, sampling: Sampling, decoder: str) -> Path:
        status = os.stat(path)
        known = [FORMAT, os.path.realpath(path), status.st_size, status.st_mtime_ns, asdict(sampling), decoder]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest[2:]}.npz"

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of the last reading, bytes, path) of every clip; others' files may vanish meanwhile."""
        found = []
        for path in self.folder.glob("??/*.npz"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, path))
        return found

    def _shrink(self) -> None:
        files = sorted(self._files())
        self._held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._held <= EMPTIED * self.limit:
                break
            path.unlink(missing_ok=True)
            self._held -= size
