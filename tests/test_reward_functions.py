"""Rewards together: their weighted sum, registered ones, and functions of a user's file."""

import math
from pathlib import Path

import pytest
import torch
from test_rewards import CHOICE, GROUNDED, answered

from appo.rollout.registry import check_user_code
from appo.rollout.rewards import (
    REWARDS,
    combine,
    get_reward,
    per_response,
    register,
)
from appo.rollout.user_code import UserCodeError


def test_combine_weighs_and_keeps_each_reward() -> None:
    completions = [answered("B"), "<answer>B</answer>", answered("A"), "?"]
    rewards = combine({"accuracy": 0.9, "format": 0.1}, completions, [CHOICE] * 4)
    torch.testing.assert_close(rewards.total, torch.tensor([1.0, 0.9, 0.1, 0.0]))
    assert rewards.by_name["accuracy"].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert rewards.by_name["format"].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert rewards.total.dtype == torch.float32


def test_combine_leaves_out_what_does_not_apply_and_says_so() -> None:
    rewards = combine({"accuracy": 1.0, "temporal_iou": 0.5}, [answered("B")] * 2, [CHOICE, GROUNDED])
    assert rewards.total.tolist() == [1.0, 0.0]
    assert math.isnan(rewards.by_name["temporal_iou"][0])
    assert rewards.by_name["temporal_iou"][1] == 0.0
    with pytest.raises(ValueError, match="none of the rewards temporal_iou applies to a record of kind"):
        combine({"temporal_iou": 1.0}, ["x"], [CHOICE])


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "at least one reward"),
        ({"acuracy": 1.0}, "Did you mean `accuracy`"),
        ({"beauty": 1.0}, "expected one of accuracy, .* got 'beauty'"),
        ({"accuracy": math.inf}, "scale of `accuracy`: expected a finite number"),
    ],
)
def test_combine_refuses(scales: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(scales, ["x"], [CHOICE])


def test_combine_refuses_records_of_another_number() -> None:
    with pytest.raises(ValueError, match=r"`records`: expected one per completion, 2, got 1"):
        combine({"accuracy": 1.0}, ["x", "y"], [CHOICE])
    with pytest.raises(ValueError, match=r"`records`: expected one per completion, 2, got 1"):
        get_reward("accuracy")(["x", "y"], [CHOICE])


def test_a_registered_reward_is_used_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("brief", "lossy", "nan"):
        monkeypatch.setitem(REWARDS, name, None)
        del REWARDS[name]
    register("brief")(per_response(lambda completion, record: float(len(completion) < 3)))
    assert combine({"brief": 2.0}, ["ab", "abc"], [CHOICE] * 2).total.tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="expected a new name"):
        register("brief")(per_response(lambda completion, record: 0.0))
    register("lossy")(lambda completions, records: [1.0])
    with pytest.raises(ValueError, match="'lossy': expected one value per response, 2, got 1"):
        combine({"lossy": 1.0}, ["ab", "abc"], [CHOICE] * 2)
    register("nan")(per_response(lambda completion, record: math.nan))
    with pytest.raises(ValueError, match=r"'nan': .*expected a finite number or None"):
        combine({"nan": 1.0}, ["ab"], [CHOICE])


USERS = """
def right(text, record): return float(record.id == "1")
def one(text): return 1.0
def more(text, record, extra): return 1.0
def words(text, record): return "1.0"
def none(text, record): return None
def boom(text, record): return record.missing
class Judge: ...
number = 3
"""


@pytest.fixture
def users(tmp_path: Path) -> str:
    """The file of a user's functions."""
    (tmp_path / "my.py").write_text(USERS)
    return f"{tmp_path}/my.py"


# Too few arguments, too many, a class, no function, nothing of that name.
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("one", r"expected a function of \(text, record\), got one of \(text\)"),
        ("more", r"expected a function of \(text, record\)"),
        ("Judge", r"expected a function of \(text, record\), got the class Judge\."),
        ("number", r"expected a function of \(text, record\), got 3"),
    ],
)
def test_a_users_function_is_looked_at_before_it_is_called(name: str, says: str, users: str) -> None:
    with pytest.raises(UserCodeError, match=rf"reward .*my\.py:{name}: {says}"):
        check_user_code([f"{users}:{name}"], "appo")


def test_the_functions_of_a_users_file_are_named_where_one_is_missing(users: str) -> None:
    says = r"reward .*my\.py: no function `booom` in it; it has right, one, more, words, none, boom, Judge\. .*`boom`"
    with pytest.raises(UserCodeError, match=says):
        check_user_code([f"{users}:booom"], "appo")


# Text in the place of a number, and an error of its own.
@pytest.mark.parametrize(
    ("name", "says"),
    [("words", "expected a number or None, got '1.0'"), ("boom", r"AttributeError: .*\(my\.py, line 7\)")],
)
def test_a_users_function_that_fails_names_the_record(name: str, says: str, users: str) -> None:
    with pytest.raises(UserCodeError, match=rf"reward .*my\.py:{name}: .*record.*{says}"):
        combine({f"{users}:{name}": 1.0}, ["x"], [CHOICE])


def test_a_users_file_that_does_not_load_and_a_method_of_other_arguments(users: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package_of_mine")
    with pytest.raises(UserCodeError, match="cannot be loaded: ModuleNotFoundError"):
        check_user_code([f"{tmp_path}/broken.py:x"], "appo")
    with pytest.raises(UserCodeError, match=r"expected a function of \(group, divergence, config\)"):
        check_user_code(["accuracy"], f"{users}:right")
    with pytest.raises(UserCodeError, match=r"got the class Judge\. A subclass of Trainer is started from Python"):
        check_user_code(["accuracy"], f"{users}:Judge")
    check_user_code([f"{users}:right", "accuracy"], "appo")
