"""A run: steps from the newest checkpoint to the last, with evaluations, checkpoints and logs in one folder."""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import gather_object
from torch import Tensor, nn

from appo.config import ConfigError
from appo.data.records import Record
from appo.rollout.engine import Rollout
from appo.shown_settings import save_shown
from appo.train import checkpoints
from appo.train.ahead import SamplingTrainer, forget_ahead, sampler_state
from appo.train.collective import from_main, is_of_all
from appo.train.engine_difference import warn_of_drift
from appo.train.evaluate import evaluate
from appo.train.folder import check_same_settings, locked
from appo.train.groups import Group
from appo.train.interrupt import StopFlag, Stopped
from appo.train.logs import RunLog
from appo.train.looking import head_shares
from appo.train.metrics import sample_record
from appo.train.model_card import model_card, newest_evaluations
from appo.train.policy import Policy
from appo.train.progress import training_progress
from appo.train.sharding import full_weights, gathered
from appo.train.trackers import start_trackers
from appo.train.updates import Updates

BEST = "best.json"


class SteppingTrainer(SamplingTrainer, Protocol):
    """A trainer, as the run around its steps sees it."""

    processor: Any
    engine: Rollout
    eval_splits: dict[str, Sequence[Record]]
    model: Any
    policy: nn.Module
    unwrapped: Policy
    updates: Updates
    groups: list[Group]  # of the last step
    pad_id: int

    def step(self, number: int) -> dict[str, float]: ...

    def autocast(self) -> AbstractContextManager[Any]: ...


def run(trainer: SteppingTrainer) -> Path:
    """Train to ``max_steps`` and return the run folder; the trained model is in ``final/`` there.

    Raises Stopped after Ctrl-C or SIGTERM, with a checkpoint of the step it was in. When a step fails, the last one
    that was finished is saved before the exception goes on.
    """
    output = Path(trainer.config.output)
    with locked(trainer.accelerator, output):
        from_main(trainer.accelerator, lambda: check_same_settings(trainer.config, output))
        forget_ahead(trainer)  # of a run that failed in this process
        start = _restore(trainer, output)
        log = RunLog(
            output,
            tensorboard=trainer.config.tensorboard,
            enabled=trainer.accelerator.is_main_process,
            resume_step=start,
            trackers=start_trackers(trainer.accelerator, trainer.config, output, start),
        )
        try:
            _steps(trainer, output, log, start)
        finally:
            log.close()
    return output


def _steps(trainer: SteppingTrainer, output: Path, log: RunLog, start: int) -> None:
    config, accelerator = trainer.config, trainer.accelerator
    if accelerator.is_main_process:
        config.save(output / "config.yaml")
    if start == 0:
        _evaluate(trainer, log, 0)
    saved, state = start, _state(trainer, start)
    with (
        StopFlag() as stop,
        training_progress(config.max_steps, start, enabled=accelerator.is_main_process) as show,
    ):
        for step in range(start + 1, config.max_steps + 1):
            try:
                metrics = trainer.step(step)
            except Exception as error:
                # The sampler's place and the weights are those of the step before, unless it came to an update. Saving
                # takes all processes: they are here when the error is of all.
                if saved < step - 1 and trainer.version < step and is_of_all(accelerator, error):
                    _save(trainer, output, state)
                raise
            state = _state(trainer, step)
            broken = gather_object(trainer.broken)
            if broken:
                metrics["records/broken"] = len(broken)
            log.metrics(step, metrics)
            log.broken(step, broken)
            if accelerator.is_main_process:
                warn_of_drift(step, metrics, type(trainer.engine).__name__)
            if step == 1 or _due(step, config.sample_every):
                log.sample(step, sample_record(trainer.groups[0], trainer.processor))
            if _due(step, config.heads_every):
                _record_heads(trainer, log, step)
            show(step, metrics)
            last = step == config.max_steps
            if last or _due(step, config.save_every):
                _save(trainer, output, state)
                saved = step
            if last or (_due(step, config.eval_every) and stop.requested(accelerator) is None):
                _keep_best(trainer, output, step, _evaluate(trainer, log, step))
            signal = stop.requested(accelerator)
            if signal is not None and not last:
                if saved < step:
                    _save(trainer, output, state)
                stopped = Stopped(signal, step, config.max_steps)
                if accelerator.is_main_process:
                    print(f"{stopped}; the same command goes on from there.", file=sys.stderr)
                raise stopped
    save_model(trainer, output / "final", config.max_steps)


def _restore(trainer: SteppingTrainer, output: Path) -> int:
    """Go on from the newest checkpoint, and return its step; 0 where there is none."""
    state = checkpoints.load_newest(
        trainer.accelerator, trainer.unwrapped, trainer.updates.optimizer, output / "checkpoints"
    )
    if state is None:
        return 0
    records = len(trainer.sampler.records)
    if state["records"] != records and trainer.config.resume != "force":
        raise ConfigError(
            f"`data`: {output} holds a run on {state['records']} records, got {records}. Pass the same, choose another "
            "`output`, or go on with the new ones with resume=force."
        )
    trainer.version = state["version"]
    trainer.sampler.load_state_dict(state["samplers"])
    if state["scaler"]:
        trainer.updates.scaler.load_state_dict(state["scaler"])
    return int(state["step"])


def _state(trainer: SteppingTrainer, step: int) -> dict[str, Any]:
    """The state in a checkpoint of ``step`` beside weights and optimizer; every process calls it."""
    return {
        "step": step,
        "version": trainer.version,
        "records": len(trainer.sampler.records),
        "samplers": gather_object([sampler_state(trainer)]),
        "scaler": trainer.updates.scaler.state_dict(),
    }


def _save(trainer: SteppingTrainer, output: Path, state: dict[str, Any]) -> None:
    trainer.updates.check_weights(f"after step {trainer.version}")
    checkpoints.save(
        trainer.accelerator,
        trainer.unwrapped,
        trainer.updates.optimizer,
        output / "checkpoints",
        state,
        trainer.config.keep_checkpoints,
    )


def _evaluate(trainer: SteppingTrainer, log: RunLog, step: int) -> float | None:
    """Answers to the held-out records, each process its share; the accuracy on the first split."""
    found: list[float] = []
    trainer.policy.eval()
    trainer.sync_engine()
    for split, records in trainer.eval_splits.items():
        with trainer.whole_weights():
            values = evaluate(
                trainer.model,
                trainer.processor,
                records,
                trainer.config,
                engine=trainer.engine,
                builder=trainer.build_prompt,
                accelerator=trainer.accelerator,
            )
        log.evaluation(step, split, values)
        found += [values["accuracy"]] if "accuracy" in values else []
    return found[0] if found else None


def _keep_best(trainer: SteppingTrainer, output: Path, step: int, accuracy: float | None) -> None:
    """With ``save_best`` the model in ``best/``, where its evaluation is better than those of earlier steps."""
    if not trainer.config.save_best or accuracy is None:
        return
    kept = output / "best" / BEST
    before = from_main(
        trainer.accelerator, lambda: json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else None
    )
    if before is None or accuracy > before["accuracy"]:
        save_model(trainer, output / "best", step, {"step": step, "accuracy": accuracy})


def _record_heads(trainer: SteppingTrainer, log: RunLog, step: int) -> None:
    """Record the heads that looked at the video of the step's first group: in every process; the main one's is kept."""
    trainer.policy.eval()
    with gathered(trainer.policy), trainer.autocast():  # a group without a video makes no forward
        shares = head_shares(
            trainer.groups[0], trainer.policy, trainer.unwrapped, trainer.pad_id, trainer.accelerator.device
        )
    if shares is not None:
        log.heads(step, shares.as_json())


def save_model(trainer: SteppingTrainer, folder: Path, step: int, best: dict[str, float] | None = None) -> None:
    """The model (or its adapters) of a step, the processor and a card, as ``from_pretrained`` loads them; complete or
    not there. best: written beside a model that was chosen."""
    trainer.updates.check_weights(f"after step {trainer.version}")
    weights = full_weights(trainer.unwrapped)
    from_main(trainer.accelerator, lambda: _write_model(trainer, folder, weights, step, best))


def _write_model(
    trainer: SteppingTrainer, folder: Path, weights: dict[str, Tensor] | None, step: int, best: dict[str, float] | None
) -> None:
    partial = folder.with_name("." + folder.name)
    shutil.rmtree(partial, ignore_errors=True)
    trainer.model.save_pretrained(partial, state_dict=weights)
    trainer.processor.save_pretrained(partial)
    card = model_card(trainer.config, step, newest_evaluations(Path(trainer.config.output) / "eval.jsonl"))
    (partial / "README.md").write_text(card, encoding="utf-8")
    save_shown(trainer.config, partial)
    if best is not None:
        (partial / BEST).write_text(json.dumps(best), encoding="utf-8")
    checkpoints.put_in_place(partial, folder)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
