"""Settings: presets, files, overrides, and what a wrong one says."""

import pytest

from appo.config import APPOConfig, ConfigError


def test_presets_are_the_settings_of_the_specification():
    paper, released = APPOConfig.paper(), APPOConfig.released()
    assert (paper.group_size, paper.prompts_per_step, paper.learning_rate) == (8, 16, 1e-6)
    assert (paper.top_tokens, paper.top_frames, paper.slot_tokens) == (15, 3, 64)
    assert (paper.strategy, paper.divergence, paper.alpha, paper.average, paper.layers) == (
        "hard",
        "kl",
        1.7,
        "frames",
        3,
    )
    assert (paper.eps_low, paper.eps_high, paper.beta) == (0.2, 0.28, 0.0)
    assert (released.strategy, released.divergence, released.slot_tokens) == ("all", "k3", 128)
    assert (released.alpha, released.average) == (0.7, "member")
    assert released.rewards == {"accuracy": 0.9, "format": 0.1}
    assert released.max_pixels == 64 * 28 * 28 and released.max_frames == 16 and released.fps == 1.0


def test_grpo_and_dapo_are_rows_of_the_same_table():
    grpo, dapo = APPOConfig.grpo(), APPOConfig.dapo(max_new_tokens=40)
    assert grpo.method == dapo.method == "grpo"
    assert grpo.eps_high == grpo.eps_low and grpo.aggregation == "grpo"
    assert dapo.eps_high > dapo.eps_low and dapo.aggregation == "dapo" and dapo.dynamic_sampling
    assert 0 < dapo.overlong_buffer <= 40


def test_file_preset_overrides_and_paths(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    file = tmp_path / "run.yaml"
    file.write_text("preset: released\ndata: train.json\nlearning_rate: 1e-6\nrewards: {accuracy: 0.9, format: 0.1}\n")
    config = APPOConfig.load(file, ["learning_rate=2e-6", "rewards.format=0.2", "strategy=hard", "delta=4"])
    assert config.data == str(tmp_path / "train.json"), "a path in the file is taken from the file's folder"
    assert config.learning_rate == 2e-6 and config.rewards == {"accuracy": 0.9, "format": 0.2}
    assert config.strategy == "hard" and config.divergence == "k3" and config.delta == 4.0
    config.save(tmp_path / "again.yaml")
    assert APPOConfig.load(tmp_path / "again.yaml") == config


# One wrong setting each, and what the message must name.
@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("learning_rat=1e-6", "Did you mean `learning_rate`"),
        ("strategy=hardest", "`strategy`: expected one of hard"),
        ("group_size=1", "`group_size`: expected at least 2, got 1"),
        ("group_size=many", "`group_size`: expected int, got 'many'"),
        ("learning_rate=0", "`learning_rate`: expected a number above 0"),
        ("top_p=1.5", "`top_p`"),
        ("dynamic_sampling=1", "`dynamic_sampling`: expected bool"),
        ("rewards={}", "`rewards`: expected at least one"),
        ("overlong_buffer=500", "`overlong_buffer`: expected at most 384"),
        ("updates_per_step=17", "`updates_per_step`: expected at most prompts_per_step = 16"),
        ("preset=best", "`preset`: expected one of paper"),
    ],
)
def test_wrong_settings_are_named(tmp_path, item, named):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n")
    with pytest.raises(ConfigError) as error:
        APPOConfig.load(file, [item])
    assert named in str(error.value) and str(file) in str(error.value)


def test_missing_or_unreadable_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        APPOConfig.load(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2\n")
    with pytest.raises(ConfigError, match="not readable"):
        APPOConfig.load(bad)
