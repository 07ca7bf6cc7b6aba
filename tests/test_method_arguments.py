"""Arguments that the method's functions are not for: a ValueError that names function and argument."""

import numpy as np
import pytest
import torch

from appo import FrameIds, group_advantages, perception_slots, record_frame_mass, select_frames, token_weights
from appo_kernels import merge_attention

G, N, F = 2, 5, 3
MASS, MASK, REWARDS = torch.rand(G, N, F), torch.ones(G, N, dtype=torch.bool), torch.tensor([1.0, 0.0])
SLOTS = torch.tensor([[[0, 1], [2, 3]]])  # (K, G, J)
PART = (torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3))
# Arguments that each function takes; one at a time is then replaced by those of WRONG.
VALID = {
    select_frames: {"mass": MASS, "mask": MASK, "rewards": REWARDS, "strategy": "hard", "top_tokens": 2,
                    "top_frames": 1, "threshold": 0.5},
    perception_slots: {"mass": MASS, "mask": MASK, "frames": torch.tensor([0, 2]), "top_tokens": 2,
                       "score": "share"},
    token_weights: {"divergence": torch.rand(1, 2), "slots": SLOTS, "mask": MASK, "alpha": 1.7, "average": "frames",
                    "normalise": "mean"},
    group_advantages: {"rewards": REWARDS, "scale": "group"},
    merge_attention: {"parts": [PART, PART]},
}  # fmt: skip
NO_TENSOR = (
    None,
    "text",
    3.5,
    [[1.0]],
    np.ones((2, 5)),
    torch.ones(1, 1, 1, 1, 1),
    torch.ones(G, N, F).to(torch.complex64),
)
NO_COUNT = (None, "2", [2], 2.5, 0, -1, True, float("nan"), torch.tensor([2]))
NO_NUMBER = (None, "0.5", [1.0], True, float("nan"), float("inf"), 10**400, np.ones(2), torch.ones(2))
NO_CHOICE = (None, "other", 1, ["hard"], torch.ones(2))
# By argument, values of other types, shapes and ranges.
WRONG = {
    "threshold": NO_NUMBER,
    "alpha": (*NO_NUMBER, -1.0),
    "top_tokens": NO_COUNT,
    "top_frames": NO_COUNT,
    "strategy": NO_CHOICE,
    "average": NO_CHOICE,
    "scale": NO_CHOICE,
    "score": NO_CHOICE,
    "normalise": NO_CHOICE[1:],
    "frames": (*NO_TENSOR, torch.tensor([1, 1]), torch.tensor([-1]), torch.tensor([F]), torch.tensor([0.5])),
    "slots": (*NO_TENSOR, torch.tensor([[[0, N], [1, 2]]]), torch.tensor([[[0, 0], [1, 2]]])),
    "parts": (None, "text", 3, [], [None], [PART[:1]], [(PART[0], None)], [(None, PART[1])],
              [PART, (PART[0][:, :1], PART[1])]),
}  # fmt: skip


def cases():
    for function, arguments in VALID.items():
        for name, value in arguments.items():
            wrong = NO_TENSOR if isinstance(value, torch.Tensor) and name not in WRONG else WRONG[name]
            for number, each in enumerate(wrong):
                yield pytest.param(function, name, each, id=f"{function.__name__}-{name}-{number}")


@pytest.mark.parametrize("function", VALID)
def test_the_valid_arguments_are_valid(function):
    function(**VALID[function])


@pytest.mark.parametrize(("function", "name", "value"), list(cases()))
def test_a_wrong_argument_is_named(function, name, value):
    with pytest.raises(ValueError, match=f"^{function.__name__}: `{name}"):
        function(**VALID[function] | {name: value})


# Nothing, another type, and a module without attention.
@pytest.mark.parametrize("model", [None, "text", torch.nn.Linear(2, 2)])
def test_what_is_no_model(model):
    ids = FrameIds(torch.tensor([[-1, 0, 0]], dtype=torch.int32), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^record_frame_mass: `model`: expected a transformers model"):
        record_frame_mass(model, ids, rows=slice(0, 1))
