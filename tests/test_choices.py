"""Lists of names that several places know: each has one owner, and the others agree with it.

`appo.config` repeats the lists so that reading settings imports no torch.
"""

import subprocess
import sys
from dataclasses import fields

from appo.config import APPOConfig
from appo.data import video, video_decoders
from appo.method.advantages import SCALES
from appo.method.disagreement import DISAGREEMENTS
from appo.method.selection import SCORES, STRATEGIES
from appo.method.token_weights import AVERAGES
from appo.planning.workload import STATE_BYTES
from appo.reports import story
from appo.rollout import weight_transfer
from appo.settings_together import METHODS
from appo.train import model_card, rules, setup
from appo_kernels.attention.arguments import REDUCTIONS
from appo_kernels.ops.group_divergence.op import KINDS as DIVERGENCES
from appo_kernels.ops.weighted_surrogate import triton
from appo_kernels.ops.weighted_surrogate.arguments import AGGREGATIONS
from appo_kernels.ops.weighted_surrogate.kinds import KINDS, LEVELS
from appo_kernels.ops.weighted_surrogate.loss import CORRECTIONS

CHOICES = {f.name: f.metadata["constraint"].choices for f in fields(APPOConfig) if f.metadata["constraint"].choices}
OWNED = {
    "advantage_scale": SCALES,
    "aggregation": AGGREGATIONS,
    "average": AVERAGES,
    "disagreement": DISAGREEMENTS,
    "divergence": DIVERGENCES,
    "dtype": setup.DTYPES,
    "kind": KINDS,
    "level": LEVELS,
    "lr_schedule": setup.SCHEDULES,
    "mass_reduction": REDUCTIONS,
    "optimizer": STATE_BYTES,
    "rollout_correction": ("auto", "none", *CORRECTIONS),
    "rollout_level": LEVELS,
    "strategy": STRATEGIES,
    "token_score": SCORES,
    "video_decoder": ("auto", *video.DECODERS),
    "weight_transfer": weight_transfer.KINDS,
}
# Names that transformers has given, and switches: each is compared where it is used, and no other list has them.
WITHOUT_OWNER = {
    "attn_implementation", "engine", "normalise", "on_broken", "resume", "shard", "share_prompt", "video_positions",
}  # fmt: skip


def test_choices_of_settings_are_those_of_their_owners():
    assert {name: set(CHOICES[name]) for name in OWNED} == {name: set(owned) for name, owned in OWNED.items()}


def test_every_choice_has_an_owner_or_is_a_switch():
    assert set(CHOICES) == set(OWNED) | WITHOUT_OWNER


def test_rewards_of_the_config_are_those_that_are_registered():
    # In a process of its own: other tests register theirs.
    code = """
from appo.settings_together import REWARD_NAMES
named = set(REWARD_NAMES)  # before any is registered, which adds its name
from appo.rollout.rewards import REWARDS
print(sorted(named ^ set(REWARDS)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tables_beside_an_owner_have_its_names():
    assert set(model_card.METHODS) == set(METHODS) == {"grpo", *rules.RULES}
    assert set(story.STRATEGIES) == set(STRATEGIES)
    assert set(video_decoders.DECODERS) == set(video.DECODERS)
    assert set(triton.KIND) == set(KINDS)
