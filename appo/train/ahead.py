"""Responses of the next step, sampled while this one updates the model (the setting ``asynchronous``)."""

import copy
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appo.train.groups import Group
from appo.train.logs import Meter

if TYPE_CHECKING:
    from appo.train.trainer import Trainer


@dataclass
class Collected:
    """The rewarded groups of a step, and what sampling them left behind."""

    groups: list[Group]
    meter: Meter
    broken: list[dict[str, Any]]  # records skipped


def collect(trainer: "Trainer") -> Collected:
    """Sample and reward this process's groups of a step; no other process is asked or waited for."""
    own = copy.copy(trainer)  # the same engine, sampler and prompts; numbers of its own
    own.meter, own.broken = Meter(), []
    with own.timed("rollout"):
        groups = own.collect()
    return Collected(groups, own.meter, own.broken)


class Ahead:
    """One step's responses being sampled by a thread; between ``start`` and ``result`` the engine belongs to it.

    before: the sampler's state before it drew: that of a checkpoint, so that a run which ends with responses on the way
    draws the same records again, and neither loses a record nor trains on one twice.
    """

    def __init__(self, trainer: "Trainer", version: int) -> None:
        self.before, self.version = trainer.sampler.state_dict(), version
        self._found: Collected | None = None
        self._error: BaseException | None = None
        # A daemon: a run that is interrupted does not wait for an engine.
        self._thread = threading.Thread(target=self._run, args=(trainer,), name="rollouts ahead", daemon=True)
        self._thread.start()

    def _run(self, trainer: "Trainer") -> None:
        try:
            self._found = collect(trainer)
        except BaseException as error:  # raised where the responses are asked for
            self._error = error

    def wait(self) -> None:
        """Until the engine is free."""
        self._thread.join()

    def result(self) -> Collected:
        """What was sampled. Raises what sampling raised, and ValueError for responses of other weights."""
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._found is not None
        for group in self._found.groups:
            if group.weight_version != self.version:
                raise ValueError(
                    f"`asynchronous`: expected responses of weights {self.version}, which the engine was handed, got "
                    f"{group.weight_version}. An engine has to put the version of `update_weights` on its completions."
                )
        return self._found
