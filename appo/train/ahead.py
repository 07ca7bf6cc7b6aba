"""Responses of the next step, sampled while this one updates the model (the setting ``asynchronous``)."""

import copy
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate import Accelerator

from appo.config import APPOConfig, ConfigError
from appo.data.prompts import Prompt, PromptBuilder
from appo.data.sampler import RecordSampler
from appo.rollout.engine import Completion
from appo.train.collective import together
from appo.train.groups import Group
from appo.train.logs import Meter


class SamplingTrainer(Protocol):
    """A trainer, as far as its responses are concerned."""

    config: APPOConfig
    accelerator: Accelerator
    sampler: RecordSampler
    build_prompt: PromptBuilder
    meter: Meter
    broken: list[dict[str, Any]]  # records skipped
    version: int  # of the weights
    ahead: "Ahead | None"

    def rollout(self, count: int) -> list[tuple[Prompt, Sequence[Completion]]]: ...

    def reward(self, sampled: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[Group]: ...

    def sync_engine(self) -> None: ...

    def whole_weights(self) -> AbstractContextManager[None]: ...

    def timed(self, phase: str) -> AbstractContextManager[None]: ...


@dataclass
class Collected:
    """The rewarded groups of a step, and what sampling them left behind."""

    groups: list[Group]
    meter: Meter
    broken: list[dict[str, Any]]  # records skipped


def collect(trainer: SamplingTrainer) -> Collected:
    """Sample and reward this process's groups of a step; no other process is asked or waited for."""
    own = copy.copy(trainer)  # the same engine, sampler and prompts; numbers of its own
    own.meter, own.broken = Meter(), []
    with own.timed("rollout"):
        groups = _rewarded_groups(own)
    return Collected(groups, own.meter, own.broken)


def _rewarded_groups(trainer: SamplingTrainer) -> list[Group]:
    """With dynamic sampling, groups without signal give way to others."""
    config, groups = trainer.config, list[Group]()
    wanted = config.prompts_per_step // trainer.accelerator.num_processes
    for _ in range(config.max_sampling_rounds if config.dynamic_sampling else 1):
        sampled = trainer.reward(trainer.rollout(wanted - len(groups)))
        groups += [group for group in sampled if group.informative or not config.dynamic_sampling]
        if len(groups) == wanted:
            break
    return groups or sampled[:1]


class Ahead:
    """One step's responses being sampled by a thread; between ``start`` and ``result`` the engine belongs to it.

    before: the sampler's state before it drew: that of a checkpoint, so that a run which ends with responses on the way
    draws the same records again, and neither loses a record nor trains on one twice.
    """

    def __init__(self, trainer: SamplingTrainer, version: int) -> None:
        self.before, self.version = trainer.sampler.state_dict(), version
        self._found: Collected | None = None
        self._error: BaseException | None = None
        # A daemon: a run that is interrupted does not wait for an engine.
        self._thread = threading.Thread(target=self._run, args=(trainer,), name="rollouts ahead", daemon=True)
        self._thread.start()

    def _run(self, trainer: SamplingTrainer) -> None:
        try:
            self._found = collect(trainer)
        except BaseException as error:  # raised where the responses are asked for
            self._error = error

    def wait(self) -> None:
        """Until the engine is free."""
        self._thread.join()

    def result(self) -> Collected:
        """The sampled responses. Raises what sampling raised, and ValueError for responses of other weights."""
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


def check_asynchronous(config: APPOConfig, own_engine: bool) -> None:
    """Raise ConfigError where the model in training would have to sample while it is updated."""
    if own_engine and config.asynchronous:
        raise ConfigError(
            "`asynchronous`: expected an engine beside the model in training (engine: vllm-server), got the model "
            "itself, which cannot sample while it is updated. Set it to false, or choose another `engine`."
        )


def next_groups(trainer: SamplingTrainer, number: int) -> list[Group]:
    """The rewarded groups of a step: sampled now, or with ``asynchronous`` while the step before was updating."""
    found = None
    if trainer.ahead is not None:
        with trainer.timed("wait"), together(trainer.accelerator):  # all, before the engine is handed weights
            found = trainer.ahead.result()
        trainer.ahead = None
    trainer.sync_engine()
    if found is None:
        with together(trainer.accelerator), trainer.whole_weights():
            found = collect(trainer)
    trainer.meter.take_over(found.meter)
    trainer.broken += found.broken
    if trainer.config.asynchronous and number < trainer.config.max_steps:
        trainer.ahead = Ahead(trainer, trainer.version)
    else:  # decode while the step computes
        trainer.build_prompt.prefetch(record for _, record in trainer.sampler.peek(len(found.groups)))
    for index, group in enumerate(found.groups):
        group.place = index * trainer.accelerator.num_processes + trainer.accelerator.process_index
    return found.groups


def forget_ahead(trainer: SamplingTrainer) -> None:
    """Drop responses on their way, as if their records had not been drawn."""
    if trainer.ahead is not None:
        trainer.ahead.wait()
        trainer.sampler.taken, trainer.ahead = trainer.ahead.before["taken"], None


def sampler_state(trainer: SamplingTrainer) -> dict[str, Any]:
    """The state of the trainer's sampler, without what was drawn for a step to come."""
    return trainer.sampler.state_dict() if trainer.ahead is None else trainer.ahead.before
