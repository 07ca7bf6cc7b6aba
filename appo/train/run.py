"""A run: steps from the newest checkpoint to the last, with evaluations, checkpoints and logs in one folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from appo.train import checkpoints
from appo.train.engine_difference import warn_of_drift
from appo.train.evaluate import evaluate
from appo.train.interrupt import StopFlag
from appo.train.logs import RunLog
from appo.train.looking import head_shares
from appo.train.metrics import sample_record
from appo.train.progress import training_progress
from appo.train.sharding import full_weights, gathered

if TYPE_CHECKING:
    from appo.train.trainer import Trainer


def run(trainer: "Trainer") -> Path:
    """Train to ``max_steps`` (or to Ctrl-C) and return the run folder; the trained model is in ``final/`` there."""
    config, accelerator = trainer.config, trainer.accelerator
    output = Path(config.output)
    state = checkpoints.load_newest(trainer.unwrapped, trainer.optimizer, output / "checkpoints") or {"step": 0}
    start = step = trainer.version = state["step"]
    trainer.sampler.load_state_dict(state.get("samplers", []))
    main = accelerator.is_main_process
    log = RunLog(output, tensorboard=config.tensorboard, enabled=main, resume_step=start)
    if main:
        config.save(output / "config.yaml")
    if start == 0:
        _evaluate(trainer, log, 0)
    with StopFlag() as stop, training_progress(config.max_steps, start, enabled=main) as show:
        for step in range(start + 1, config.max_steps + 1):
            metrics = trainer.step(step)
            log.metrics(step, metrics)
            if main:
                warn_of_drift(step, metrics, config.engine)
            if step == 1 or _due(step, config.sample_every):
                log.sample(step, sample_record(trainer.groups[0], trainer.processor))
            if _due(step, config.heads_every):
                _record_heads(trainer, log, step)
            show(step, metrics)
            last = step == config.max_steps or stop.requested(accelerator)
            if last or _due(step, config.save_every):
                _save(trainer, step)
            if step == config.max_steps or _due(step, config.eval_every):
                _evaluate(trainer, log, step)
            if last:
                break
    if step == config.max_steps:
        save_model(trainer, output / "final")
    log.close()
    return output


def _evaluate(trainer: "Trainer", log: RunLog, step: int) -> None:
    """Answers to the held-out records, each process its share."""
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


def _record_heads(trainer: "Trainer", log: RunLog, step: int) -> None:
    """Which heads looked at the video of the step's first group; every process records one, the main one's is kept."""
    trainer.policy.eval()
    with gathered(trainer.policy), trainer.autocast():  # a group without a video makes no forward
        shares = head_shares(
            trainer.groups[0], trainer.policy, trainer.unwrapped, trainer.pad_id, trainer.accelerator.device
        )
    if shares is not None:
        log.heads(step, shares.as_json())


def _save(trainer: "Trainer", step: int) -> None:
    samplers = gather_object([trainer.sampler.state_dict()])
    folder = Path(trainer.config.output) / "checkpoints"
    checkpoints.save(
        trainer.accelerator,
        trainer.unwrapped,
        trainer.optimizer,
        folder,
        {"step": step, "samplers": samplers},
        trainer.config.keep_checkpoints,
    )


def save_model(trainer: "Trainer", folder: Path) -> None:
    """The model (or its adapters) and the processor, as ``from_pretrained`` loads them."""
    weights = full_weights(trainer.unwrapped)
    if trainer.accelerator.is_main_process:
        trainer.model.save_pretrained(folder, state_dict=weights)
        trainer.processor.save_pretrained(folder)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
