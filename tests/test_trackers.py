"""What a run leaves with trackers, how fast it says it was, and the models it saves with a card."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import training
import yaml
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from appo.config import ConfigError
from appo.train import run as run_module
from appo.train.trackers import as_markdown, start_trackers
from appo.train.trainer import Trainer

SHORT: dict[str, Any] = {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 6, "eval_every": 1, "max_steps": 2}


class Kept(GeneralTracker):
    name, requires_logging_directory, main_process_only = "kept", False, True

    def __init__(self) -> None:
        super().__init__(_blank=True)
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.tables: list[tuple[str, int, list[str], list[list[Any]]]] = []
        self.config: dict[str, Any] = {}
        self.finished = 0

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((step, values))

    def log_table(self, name: str, columns: list[str], data: list[list[Any]], step: int) -> None:
        self.tables.append((name, step, columns, data))

    def finish(self) -> None:
        self.finished += 1


def trainer(output: Path, *trackers: GeneralTracker, **settings: Any) -> Trainer:
    model, processor = training.tiny()
    config = training.config(output, **(SHORT | settings))
    records = training.records()
    return Trainer(model, processor, records, config=config, eval_dataset=records[:2], trackers=trackers)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_tracker_gets_numbers_evaluations_settings_and_rollouts(tmp_path):
    kept = Kept()
    trainer(tmp_path, kept, sample_every=2, engine_token="secret").train()
    metrics, evaluations = lines(tmp_path / "metrics.jsonl"), lines(tmp_path / "eval.jsonl")
    trained = [(step, values) for step, values in kept.logged if any(name.startswith("train/") for name in values)]
    assert [step for step, _ in trained] == [line["step"] for line in metrics] == [1, 2]
    assert all(values[f"train/{name}"] == metrics[0][name] for values in [trained[0][1]] for name in ("reward", "loss"))
    assert len(kept.logged) == len(metrics) + len(evaluations) and len(evaluations) == 3
    assert [(name, step) for name, step, *_ in kept.tables] == [("rollouts", 1), ("rollouts", 2)]
    (sample, *_) = lines(tmp_path / "samples.jsonl")
    (_, _, columns, rows) = kept.tables[0]
    responses = [dict(zip(columns, row, strict=True)) for row in rows]
    assert [row["response"] for row in responses] == [one["text"] for one in sample["completions"]]
    assert [row["reward"] for row in responses] == [one["reward"] for one in sample["completions"]]
    assert kept.finished == 1 and kept.config["group_size"] == 3 and "secret" not in str(kept.config)


def test_tensorboard_has_numbers_and_rollouts(tmp_path):
    trainer(tmp_path, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2]
    assert [e.step for e in events.Scalars("eval/eval/accuracy")] == [0, 1, 2]
    (text,) = events.Tensors("rollouts/text_summary")
    assert b"| record |" in text.tensor_proto.string_val[0]


def test_tables_hold_any_text():
    assert as_markdown((["a", "b"], [["x|y\nz", 0.12345]])).splitlines()[-1] == "| x\\|y<br>z | 0.123 |"


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("appo.train.trackers.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match="`trackers`: swanlab cannot be imported"):
        trainer(tmp_path, trackers=["swanlab"])
    with pytest.raises(ConfigError, match=r"`trackers\[0\]`: expected one of wandb"):
        training.config(tmp_path, trackers=["weights"])


class Services:
    """Starts trackers as an accelerator does, and keeps what they were started with."""

    log_with, is_main_process = ("any",), True

    def __init__(self, *trackers: SimpleNamespace) -> None:
        self.trackers, self.arguments = list(trackers), dict[str, Any]()

    def init_trackers(self, project: str, *, init_kwargs: dict[str, Any]) -> None:
        self.arguments = init_kwargs


def test_a_run_that_goes_on_is_the_same_run_of_each_service(tmp_path: Path) -> None:
    """By an id of ours where a service takes one, else by the one that it gave."""
    started: list[int] = []

    def services() -> Services:
        task = SimpleNamespace(id="task", set_initial_iteration=started.append)
        given = {"mlflow": SimpleNamespace(info=SimpleNamespace(run_id="m")), "aim": SimpleNamespace(hash="a")}
        named = {**given, "clearml": task, "wandb": None}
        return Services(*(SimpleNamespace(name=name, tracker=of, store_init_configuration=lambda values: None)
                          for name, of in named.items()))  # fmt: skip

    config = training.config(tmp_path)
    runs: list[dict[str, Any]] = []
    for step in (0, 3, 0):
        service: Any = services()
        start_trackers(service, config, tmp_path, step)
        runs.append(service.arguments)
    first, second, another = runs
    for name, key in [("wandb", "id"), ("swanlab", "id"), ("comet_ml", "experiment_key"), ("trackio", "name")]:
        assert first[name][key] == second[name][key] != another[name][key]
    assert [name["resume"] for name in (second["wandb"], second["swanlab"], second["trackio"])] == ["allow"] * 3
    assert (second["mlflow"]["run_id"], second["aim"]["run_hash"]) == ("m", "a")
    assert second["clearml"]["continue_last_task"] == "task" and started == [0]
    for new in (first, another):
        assert not {"run_id", "run_hash", "continue_last_task"} & {*new["mlflow"], *new["aim"], *new["clearml"]}


def test_mlflow_and_tensorboard_go_on_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    output = tmp_path / "run"
    for max_steps in (1, 2):  # a setting that may change
        trainer(output, trackers=["mlflow"], tensorboard=True, max_steps=max_steps, eval_every=0).train()
    (found,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/reward.length_parity")
    assert [point.step for point in history] == [1, 2] and found.info.run_name == "run"
    assert found.data.params["group_size"] == "3" and found.info.status == "FINISHED"
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/reward")] == [1, 2]
    (output / ".trackers.json").write_text(json.dumps({"run": "x", "mlflow": "0" * 32}))
    trainer(output, trackers=["mlflow"], max_steps=3, eval_every=0).train()  # of a run that MLflow has no more
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 2


def test_a_step_says_how_fast_it_was_and_what_was_padding(tmp_path):
    packed, apart = (
        trainer(tmp_path / "a", entropy_coef=0.01),
        trainer(tmp_path / "b", share_prompt="off", entropy_coef=0.01),
    )
    for one in (packed, apart):
        found = one.step(1)
        tokens = sum(len(group.prompt) + group.tokens for group in one.groups)
        assert found["time/tokens_per_second"] * found["time/step"] == pytest.approx(tokens)
        assert found["time/samples_per_second"] * found["time/step"] == pytest.approx(6)
        shares = [found[f"time/share/{phase}"] for phase in ("rollout", "score", "update")]
        assert all(0 < share < 1 for share in shares) and sum(shares) <= 1
        assert "tokens" not in found and "samples" not in found
    assert packed.meter.means()["padding"] == 0
    longest = max(len(group.prompt) for group in apart.groups) + max(group.mask.shape[1] for group in apart.groups)
    real = sum(len(group.prompt) * 3 + group.tokens for group in apart.groups)
    assert apart.meter.means()["padding"] == pytest.approx(1 - real / (6 * longest))


def test_the_best_model_is_kept_by_validation(tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.2, 0.5, 0.5, 0.4])
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: {"accuracy": next(accuracies)})
    saved = []
    write = run_module._write_model
    monkeypatch.setattr(
        run_module, "_write_model", lambda one, folder, *rest: (saved.append(folder.name), write(one, folder, *rest))
    )
    trainer(tmp_path, max_steps=4, save_best=True).train()
    # The evaluation before training is of no model that the run made.
    assert saved == ["best", "best", "final"]
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": 2, "accuracy": 0.5}
    assert (tmp_path / "best" / "config.json").is_file() and not (tmp_path / "final" / "best.json").exists()


# A whole model, and adapters, whose card names the model they belong to.
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_saved_model_has_a_card(tmp_path, lora_rank):
    trainer(tmp_path, lora_rank=lora_rank, model="Org/Base-7B", max_steps=1, engine_token="secret").train()
    card = (tmp_path / "final" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    fields = yaml.safe_load(head)
    assert fields["base_model"] == "Org/Base-7B" and fields["library_name"] == ("peft" if lora_rank else "transformers")
    (evaluation,) = [line for line in lines(tmp_path / "eval.jsonl") if line["step"] == 1]
    assert f"| eval | {evaluation['accuracy']:.4g} |" in body and "learning_rate: 0.001" in body
    assert "secret" not in card and str(tmp_path) not in card
