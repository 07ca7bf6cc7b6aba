"""Settings: presets, files, overrides, and what a wrong one says."""

import dataclasses
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

from appo.config import APPOConfig, ConfigError
from appo.yaml_files import LARGEST_FILE, dump_yaml, parse_yaml

HINTS = get_type_hints(APPOConfig)


def of_kind(*kinds: type) -> list[str]:
    return [f.name for f in fields(APPOConfig) if HINTS[f.name] in kinds]


def refused(**settings: Any) -> str:
    """The message of the ConfigError that these settings give."""
    with pytest.raises(ConfigError) as error:
        APPOConfig(**settings)
    return str(error.value)


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
        ("overlong_buffer=500", "`overlong_buffer`: expected at most max_new_tokens = 384"),
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


# Values of no number: not finite, beyond what C takes, of another type, or text that looks like one.
@pytest.mark.parametrize(
    "value",
    [np.nan, np.inf, -np.inf, 10**400, -(10**5000), True, "8", "", None, [1], {}, 1j],
    ids=lambda x: type(x).__name__,
)
def test_every_number_is_finite_and_of_its_type(value):
    for name in of_kind(int, float, float | None):
        if not (value is None and HINTS[name] == float | None):
            message = refused(**{name: value})
            assert message.startswith(f"`{name}`: expected") and len(message) < 300


# Between two whole numbers, and below the least.
@pytest.mark.parametrize("value", [1.5, -1])
def test_counts_are_whole_and_not_negative(value):
    for name in of_kind(int):
        assert refused(**{name: value}).startswith(f"`{name}`: expected")


# What other languages and YAML 1.1 take for true and false.
@pytest.mark.parametrize("value", [1, 0, "true", "on", None])
def test_switches_are_true_or_false(value):
    for name in of_kind(bool):
        assert f"`{name}`: expected bool" in refused(**{name: value})


# What no path or name holds: of another type, control characters, half a surrogate pair, too long, or to be resolved.
@pytest.mark.parametrize(
    "value", [5, True, b"x", ["x"], "a\0b", "a\nb", "\x1b[31m", "\ud800", "x" * 5000, "${oc.env:HOME}"]
)
def test_text_is_plain(value):
    for name in of_kind(str, str | None):
        assert refused(**{name: value}).startswith(f"`{name}`: expected")


# One value outside of each range that is no plain "at least", and what reaches training as nonsense otherwise.
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eps_low": 2}, "`eps_low`: expected a number at least 0 and at most 1, got 2."),
        ({"eps_high": -0.1}, "`eps_high`"),
        ({"delta": -1}, "`delta`: expected a number above 0, got -1"),
        ({"delta": 1.2}, "`delta`: expected more than 1 + eps_high = 1.28"),
        ({"alpha": -1}, "`alpha`: expected a number at least 0, got -1."),
        ({"beta": -1e-3}, "`beta`"),
        ({"threshold": 1.5}, "`threshold`: expected a number at least 0 and at most 1, got 1.5."),
        ({"adam_beta2": 1.5}, "`adam_beta2`: expected a number at least 0 and below 1, got 1.5."),
        ({"adam_beta2": 1}, "`adam_beta2`"),
        ({"weight_decay": -1}, "`weight_decay`"),
        ({"rollout_cap": 0}, "`rollout_cap`: expected a number above 0, got 0."),
        ({"learning_rate": 30}, "`learning_rate`: expected a number above 0 and at most 1, got 30."),
        ({"temperature": 1e-30}, "`temperature`"),
        ({"top_p": 0}, "`top_p`"),
        ({"max_pixels": 10}, "`max_pixels`: expected at least 196, got 10."),
        ({"output": ""}, "`output`: expected text that is not empty"),
        ({"output": "  "}, "`output`"),
        ({"data_root": ""}, "`data_root`"),
        ({"attn_implementation": "fancy"}, "`attn_implementation`: expected one of sdpa, eager"),
        ({"attn_implementation": "someone/kernels"}, "`attn_implementation`: expected one of sdpa, eager"),
        ({"strategy": None}, "`strategy`: expected one of hard"),
        ({"min_groups": 17}, "`min_groups`: expected at most prompts_per_step = 16, got 17."),
        ({"warmup_steps": 101}, "`warmup_steps`: expected at most max_steps = 100, got 101."),
        ({"lora_targets": []}, "`lora_targets`: expected a list that is not empty"),
        ({"lora_targets": "q_proj"}, "`lora_targets`: expected a list"),
        ({"lora_targets": ["q_proj", ""]}, "`lora_targets[1]`"),
        ({"rewards": {}}, "`rewards`: expected at least one"),
        ({"rewards": ["accuracy"]}, "`rewards`: expected at least one"),
        ({"rewards": {"acuracy": 1}}, "got 'acuracy'. Did you mean `accuracy`?"),
        ({"rewards": {"accuracy": "abc"}}, "`rewards.accuracy`: expected float, got 'abc'."),
        ({"rewards": {"accuracy": float("nan")}}, "`rewards.accuracy`: expected a finite number, got nan."),
        ({"rewards": {"accuracy": True}}, "`rewards.accuracy`: expected float, got True."),
        ({"rewards": {"accuracy": None}}, "`rewards.accuracy`"),
        ({"rewards": {1: 1.0}}, "`rewards`: expected names that are text, got 1."),
        ({"rewards": {"accuracy": 0, "format": 0.0}}, "`rewards`: expected a weight other than 0"),
    ],
)
def test_values_that_no_run_can_use(settings, named):
    assert named in refused(**settings)
    if all(isinstance(key, str) for key in settings.get("rewards", ())):
        with pytest.raises(ConfigError) as error:
            APPOConfig.from_dict(settings)
        assert named in str(error.value)


def test_values_are_kept_in_the_type_of_their_field():
    config = APPOConfig(group_size=np.int64(4), learning_rate=np.float32(0.5), fps=2, output=Path("a/b"), seed=0)
    assert (config.group_size, config.learning_rate, config.fps, config.output) == (4, 0.5, 2.0, "a/b")
    assert [type(v) for v in (config.group_size, config.learning_rate, config.fps)] == [int, float, float]
    assert APPOConfig(rewards={"accuracy": 1}).rewards == {"accuracy": 1.0}
    # Rates are often written as text by other readers of YAML, which take 1e-6 for it.
    assert APPOConfig.from_dict({"learning_rate": "1e-6", "delta": "4"}).learning_rate == 1e-6
    for text in ("nan", "inf", "1_0", "0x1", "1e999", "\u0661"):
        with pytest.raises(ConfigError, match="`learning_rate`"):
            APPOConfig.from_dict({"learning_rate": text})


def test_a_change_is_checked_when_asked():
    config = APPOConfig()
    config.temperature = float("nan")
    with pytest.raises(ConfigError, match="`temperature`"):
        config.check()


def test_a_registered_reward_is_known():
    import training  # registers two

    assert training.config("x", rewards={"length_parity": 1.0, "constant": -0.5}).rewards["constant"] == -0.5


def test_an_override_changes_one_reward_and_keeps_the_others(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: released\n")
    assert APPOConfig.load(file, ["rewards.format=0.2"]).rewards == {"accuracy": 0.9, "format": 0.2}
    assert APPOConfig.from_dotlist(["rewards.format=0.1"]).rewards == {"accuracy": 1.0, "format": 0.1}
    assert APPOConfig.from_dotlist(["rewards.format=0.1", "rewards={ocr: 1}"]).rewards == {"ocr": 1.0}
    score = tmp_path / "my.py"
    score.write_text("def brevity(text, record): return -len(text)\n")
    own = APPOConfig.from_dotlist([f"rewards.{score}:brevity=0.5"])
    assert own.rewards == {"accuracy": 1.0, f"{score}:brevity": 0.5}
    assert APPOConfig.from_dotlist(["rewards={ocr: 1}", "rewards.format=1"]).rewards == {"ocr": 1.0, "format": 1.0}


def test_names_that_look_like_numbers(tmp_path):
    config = APPOConfig.from_dotlist(
        ["model=123", "data=2024-01-01", "output=1e5", "share_prompt=on", "eval_data=null"]
    )
    assert (config.model, config.data, config.output, config.share_prompt) == ("123", "2024-01-01", "1e5", "on")
    assert config.eval_data is None
    config.save(tmp_path / "again.yaml")
    assert APPOConfig.load(tmp_path / "again.yaml") == config
    file = tmp_path / "run.yaml"
    file.write_text("model: 123\n")
    with pytest.raises(ConfigError, match=r"`model`: expected str, got 123\. Put it in quotes\."):
        APPOConfig.load(file)


# Items that name nothing, no field, or a part of what has none; and values that are no YAML.
@pytest.mark.parametrize(
    ("item", "named"),
    [
        ("group_size", "expected key=value"),
        ("=3", "expected key=value"),
        ("", "expected key=value"),
        ("rewards.=1", "expected key=value"),
        ("learning_rate.x=1", "`learning_rate.x`: `learning_rate` is float and has no such part"),
        ("rewards.a.b=1", "got 'a.b'"),
        ("rewards.none.py:score=1", "'none.py': no such file"),
        ("seed=[", "not readable"),
        ("model=[", "not readable"),
        ("output=a\x01b", "not readable"),
        ("seed=!!int ", "tags such as"),
        ("seed=!!python/object:os.system x", "tags such as"),
        ("seed=" + "9" * 400, "a number of about 400 digits"),
        ("seed=" + "9" * 6000, "seed"),
        ("seed=1:30", "`seed`: expected int, got '1:30'"),
        ("instructions=yes", "`instructions`: expected bool"),
        ("preset=relesed", "Did you mean `released`"),
        ("preset=[paper]", "`preset`: expected one of paper"),
        ("output=${oc.env:HOME}", "`output`: expected a plain value"),
        ("presett=paper", "Did you mean `preset`"),
        ("seed=" + "[" * 50_000, "levels"),
    ],
)
def test_overrides_that_cannot_be_read(item, named):
    with pytest.raises(ConfigError) as error:
        APPOConfig.from_dotlist([item])
    assert named in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


# Files that hold no settings, or use YAML for more than values.
@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: [1, 2\n", "not readable"),
        ("- 1\n- 2\n", "expected `field: value` lines"),
        ("just text", "expected `field: value` lines"),
        ("!!int ", "tags such as"),
        ("seed: 1\nseed: 2\n", "line 2: `seed` stands twice"),
        ("rewards: {accuracy: 1, accuracy: 0}\n", "`accuracy` stands twice"),
        ("base: &a {seed: 1}\n<<: *a\n", "anchors and aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "anchors and aliases"),
        ("rewards: " + "{a: " * 5000, "levels"),
        ("seed: 1\n---\nseed: 2\n", "not readable"),
        ("? [1, 2]\n: 3\n", "expected a name before"),
        ("1: 2\n", "names of fields as text"),
        ("seed: \x07\n", "not readable"),
        ("learning_rate: 1e999\n", "`learning_rate`"),
        ("seed: .nan\n", "`seed`"),
        ("alpha: .nan\n", "`alpha`: expected a number at least 0, got nan"),
        ("output: ${oc.env:APPO_SECRET}\n", "`output`: expected a plain value"),
        ("output: ${oc.decode:${oc.env:APPO_SECRET}}\n", "`output`: expected a plain value"),
        ("model: ${data}\n", "`model`: expected a plain value"),
        ("seed:\n", "`seed`: expected int, got nothing"),
        ("strategy: soft # hidden\nstrateg: soft\n", "Did you mean `strategy`"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, monkeypatch, content, named):
    monkeypatch.setenv("APPO_SECRET", "swordfish")
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        APPOConfig.load(file)
    message = str(error.value)
    assert named in message and str(file) in message and "swordfish" not in message and len(message) < 600


def test_files_that_are_no_text_or_no_files(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path, Path("/dev/zero"), Path("a\0b"), Path("x" * 5000)):
        with pytest.raises(ConfigError, match=r"no such file|cannot be read"):
            APPOConfig.load(path)
    bad = tmp_path / "bad.yaml"
    bad.write_bytes(b"seed: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        APPOConfig.load(bad)
    bad.write_bytes(b"# " + b"x" * LARGEST_FILE)
    with pytest.raises(ConfigError, match="expected at most 256 KiB"):
        APPOConfig.load(bad)
    bad.write_bytes(b"\xef\xbb\xbfseed: 3\r\n")
    assert APPOConfig.load(bad).seed == 3


def test_values_survive_writing_and_reading():
    values = {
        "a": "on", "b": "1e-6", "c": 1e-6, "d": None, "e": "", "f": True, "g": "true", "h": [1, 2.5, "x"],
        "i": {"j": 0.9},
        "k": "null", "l": "010", "m": 1e22, "n": "=", "o": "<<", "p": "2024-01-01", "q": "1:30", "r": "ä ☃", "s": -0.0,
        "t": "# no comment", "u": "a: b", "v": " x ", "w": "~", "x": "!tag", "y": "*a", "z": "&b",
    }  # fmt: skip
    assert parse_yaml(dump_yaml(values)) == values
    assert parse_yaml("") == parse_yaml("# nothing\n") == {}


def test_a_saved_run_does_not_tell_the_token_of_its_servers(tmp_path):
    config = APPOConfig.from_dict({"engine_token": "s3cret"})
    config.save(tmp_path / "config.yaml")
    assert "s3cret" not in (tmp_path / "config.yaml").read_text()
    assert APPOConfig.load(tmp_path / "config.yaml") == dataclasses.replace(config, engine_token="")
