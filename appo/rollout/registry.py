"""Rewards by name: those of `appo.rollout.rewards`, those that a program registers, and functions of a user's file."""

import functools
from collections.abc import Callable, Iterable

from appo.constraints import suggestion
from appo.data.records import Record
from appo.rollout.user_code import user_errors, user_function
from appo.settings_together import REWARD_NAMES

Reward = Callable[[list[str], list[Record]], list[float | None]]
REWARDS: dict[str, Reward] = {}


class _Unreadable(float):
    """The reward 0 of a response in which there was nothing to judge; `combine` counts these."""


UNREADABLE = _Unreadable(0.0)


def register(name: str) -> Callable[[Reward], Reward]:
    """Make a reward known under ``name``, for ``combine`` and for configuration files."""

    def add(reward: Reward) -> Reward:
        if name in REWARDS:
            raise ValueError(f"register: `name`: expected a new name, got {name!r}. Choose another.")
        REWARDS[name] = reward
        REWARD_NAMES.add(name)
        return reward

    return add


def per_response(score: Callable[[str, Record], float | None]) -> Reward:
    """A reward from a function of one response and its record."""

    @functools.wraps(score)
    def reward(completions: list[str], records: list[Record]) -> list[float | None]:
        if len(completions) != len(records):
            raise ValueError(
                f"{score.__name__}: `records`: expected one per completion, {len(completions)}, got {len(records)}. "
                "Repeat the record for each response of its group."
            )
        return [score(text, record) for text, record in zip(completions, records, strict=True)]

    return reward


def get_reward(name: str) -> Reward:
    """The reward registered under ``name``, or the function NAME of a file "FILE.py:NAME".

    Such a function takes the text of one response and its `Record`, and returns a number, None where it does not apply,
    or `UNREADABLE`. The file is run: name only files that you trust. Relative paths start from the working directory.

    Raises ValueError naming the rewards there are, or saying what is wrong with the file.
    """
    if name in REWARDS:
        return REWARDS[name]
    if ".py:" in name:
        return _from_file(name)
    hint = suggestion(name, REWARDS) or " Register your own, or name a function of a file: my.py:name."
    raise ValueError(f"reward: expected one of {', '.join(sorted(REWARDS))}, got {name!r}.{hint}")


@functools.cache
def _from_file(name: str) -> Reward:
    found, place = user_function(name, "reward"), f"reward {name}"

    def score(text: str, record: Record) -> float | None:
        with user_errors(f"{place}: {record.place}", name):
            value = found(text, record)
            if isinstance(value, (str, bytes)):
                raise TypeError(f"expected a number or None, got {value!r}")
            return value if value is None or value is UNREADABLE else float(value)

    return per_response(score)


def check_user_code(rewards: Iterable[str], method: str) -> None:
    """Load the functions of the user's files that settings name, before anything is lost by their faults.

    Raises UserCodeError.
    """
    for name in rewards:
        if ".py:" in name:
            get_reward(name)
    if ".py:" in method:
        user_function(method, "method")
