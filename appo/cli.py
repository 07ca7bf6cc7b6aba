"""The command line `appo`; commands with more to say are functions of the other cli_*.py."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from appo_kernels.closed_pipe import quiet_on_closed_pipe

try:
    import typer
except ModuleNotFoundError:
    sys.exit("appo: the command line needs the training packages. Install them with: pip install 'appo[train]'")

from appo.cli_credit import measure_credit
from appo.cli_data import data_app
from appo.cli_errors import check_given, guarded
from appo.cli_eval import evaluate_model, run_the_matrix
from appo.cli_options import Overrides
from appo.cli_reports import compare_engine, inspect_clips, report_runs

if TYPE_CHECKING:
    from appo.config import APPOConfig
    from appo.data.records import Record

app = typer.Typer(
    help="Train video models on what they look at: attention-guided policy optimisation (arXiv 2602.23823).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(data_app, name="data")


def command(name: str | None = None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command of ``appo`` whose errors are one line."""
    return lambda run: app.command(name)(guarded(run))


@command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for clips, models, runs and pages.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seeds clips, model, warm start and training.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 36,
    method: Annotated[
        str,
        typer.Option(
            help="appo, released, grpo, dapo, tw-grpo, top-entropy, vppo, pgpo, ral, or FILE.py:NAME (a rule)."
        ),
    ] = "appo",
    compare: Annotated[bool, typer.Option(help="Train with GRPO as well, beside the method on the page.")] = True,
    engine: Annotated[str, typer.Option(help="What samples: transformers, or vllm-server.")] = "transformers",
    vllm_python: Annotated[
        str, typer.Option(envvar="APPO_VLLM_PYTHON", help="Interpreter of an environment with vLLM, for vllm-server.")
    ] = "",
    task: Annotated[
        str, typer.Option(help="Clips: moment, cue, or verbose-48x4 and others (docs/credit.md).")
    ] = "moment",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the method's training: key=value ...")
    ] = None,
) -> None:
    """Make clips, warm up a tiny Qwen2.5-VL, train it with APPO and report. No GPU, no download, a few minutes.

    Interrupted, it goes on from the last stage that is complete, or from a run's checkpoint, when run again with the
    same --output.

    A method of your own: appo demo --method my_method.py:NAME mass_reduction=sum
    """
    from appo.output_paths import check_output_folder

    check_output_folder("output", output)
    from appo.demo import run_demo

    sampler = {"engine": engine, "vllm_python": vllm_python}
    run_demo(
        output, seed=seed, steps=steps, method=method, overrides=overrides or [], compare=compare, task=task, **sampler
    )


@command()
def doctor() -> None:
    """Say which optional packages a run here can use, and why not the others."""
    from appo.doctor import report

    typer.echo(report())


@command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file with the fields of APPOConfig (see examples/).")],
    overrides: Overrides = None,
) -> None:
    """Train a model on records, as a YAML file says.

    Ctrl-C saves a checkpoint and ends; the same command goes on from the newest checkpoint in `output`.

    On several GPUs: accelerate launch -m appo train CONFIG.yaml

    Example: appo train examples/qwen2_5_vl_7b.yaml data=train.json learning_rate=2e-6 rewards.format=0.1
    """
    from appo.config import APPOConfig
    from appo.output_paths import check_output_folder

    settings = APPOConfig.load(config, overrides)
    check_output_folder("output", settings.output)
    for name in ("model", "data"):
        check_given(settings, name)
    from appo.data.load import check_media
    from appo.train.before_loading import check_run
    from appo.train.folder import check_goes_on
    from appo.train.setup import load_model
    from appo.train.trainer import Trainer

    check_run(settings)
    check_goes_on(settings)
    records = _records(settings.data, settings)
    held_out = _records(settings.eval_data, settings) if settings.eval_data else []
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes that torchrun or accelerate started here
    for part in (records, held_out) if first and settings.on_broken == "stop" else ():
        check_media(part)
    model, processor = load_model(settings)
    output = Trainer(model, processor, records, config=settings, eval_dataset=held_out).train()
    typer.echo(f"Run folder: {output}    Curves: appo report {output}")


def _records(file: str, settings: "APPOConfig") -> "Sequence[Record]":
    """The records of a file. Raises DataError for the first that cannot be used, and says how to see the others."""
    from appo.data.load import load_records
    from appo.data.records import DataError

    try:
        return load_records(
            file, data_root=settings.data_root, seed=settings.seed, allow_outside=settings.allow_outside
        )
    except DataError as error:
        raise DataError(f"{error} All that is wrong with the file: appo data check {file}") from error


command("eval")(evaluate_model)
command("credit")(measure_credit)
command("matrix")(run_the_matrix)


command("inspect")(inspect_clips)
command("parity")(compare_engine)
command("report")(report_runs)


@command()
def plan(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help="Name as published, such as Qwen2.5-VL-7B, or a folder or config.json.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A settings file instead: the plan of its run on --gpus.", dir_okay=False)
    ] = None,
    frames: Annotated[int, typer.Option(help="Temporal grid steps of a video.")] = 16,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each: 64 at 224 x 224 pixels.")] = 64,
    responses: Annotated[int, typer.Option(help="Responses of a group.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 384,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts of a step, over all GPUs (default: 16, at least one a GPU).")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Over which weights and optimizer are sharded.")] = 1,
    shard_group: Annotated[int, typer.Option(help="GPUs that share a set of shards; 0: all; 1: none do.")] = 0,
    offload: Annotated[bool, typer.Option(help="Shards in the host's memory.")] = False,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit, adamw_paged or adamw_paged_8bit.")] = "adamw",
    rollout_tokens: Annotated[int, typer.Option(help="Tokens that are sampled at a time.")] = 262_144,
    memory: Annotated[float, typer.Option(help="Of a GPU, GiB.")] = 80.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Of every n-th layer alone.")] = 1,
    checkpoint_offload: Annotated[
        bool, typer.Option("--checkpoint-offload", help="Inputs of these layers in the host's memory.")
    ] = False,
    micro_groups: Annotated[int, typer.Option(help="Groups in one forward and backward.")] = 1,
    micro_tokens: Annotated[
        int, typer.Option(help="Tokens in one forward and backward, at most; a larger group is split. 0: any number.")
    ] = 0,
    train_vision: Annotated[bool, typer.Option(help="Train the vision tower as well.")] = False,
    share_prompt: Annotated[
        bool, typer.Option(help="A group behind one prompt, in a packed row without a mask, as training does.")
    ] = True,
    own_rollout: Annotated[
        bool, typer.Option("--own-rollout/--other-engine", help="The model in training samples, whole on each GPU.")
    ] = True,
    lora_rank: Annotated[int, typer.Option(help="Adapters on a frozen model; 0: all weights.")] = 0,
    fit: Annotated[bool, typer.Option("--fit", help="Look for options with which it fits.")] = False,
    rate: Annotated[float, typer.Option(help="Rate that products reach, TFLOP/s; 400 of an H100's 989.")] = 400.0,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth that reads reach, TB/s.")] = 2.5,
    overrides: Overrides = None,
) -> None:
    """Memory and time of a training step, before anything is loaded (docs/performance.md has the cost model).

    Example: appo plan --model Qwen2.5-VL-7B --gpus 8 --gradient-checkpointing
    or: appo plan --config examples/qwen2_5_vl_7b_8gpu.yaml --gpus 8 preset=dapo
    """
    from appo.config import APPOConfig, ConfigError
    from appo.models.sizes import find_architecture
    from appo.planning.fit import fit as find_fit
    from appo.planning.fit import options
    from appo.planning.plan import GIB, Plan, planned
    from appo.planning.workload import Machine, Workload

    machine, settings = Machine(memory, rate, bandwidth), config is not None
    if config is not None:
        beside = {"config", "gpus", "memory", "fit", "rate", "bandwidth", "overrides"}
        for name in context.params.keys() - beside:
            if str(context.get_parameter_source(name)).endswith("COMMANDLINE"):
                raise ConfigError(
                    f"`{name}`: expected settings as name=value beside --config, got an option. For example: appo plan "
                    "--config FILE gradient_checkpointing=true"
                )
        found = planned(APPOConfig.load(config, overrides or []), gpus)
    elif model is None or overrides:
        raise ConfigError("`model`: expected its name, or --config with a settings file, got neither.")
    else:
        work = Workload(
            frames=frames,
            frame_tokens=frame_tokens,
            responses=responses,
            response=tokens,
            prompts=max(16, gpus) if prompts is None else prompts,
            gpus=gpus,
            micro_groups=micro_groups,
            micro_tokens=micro_tokens,
            checkpointing=gradient_checkpointing,
            checkpoint_every=checkpoint_every,
            checkpoint_offload=checkpoint_offload,
            freeze_vision=not train_vision,
            share_prompt=share_prompt,
            lora_rank=lora_rank,
            shard_group=shard_group,
            offload=offload,
            optimizer=optimizer,
            rollout_tokens=rollout_tokens,
            own_rollout=own_rollout,
        )
        found = Plan(find_architecture(model), work)
    if fit:
        fitting = find_fit(found, machine.memory * GIB)
        if fitting is None:
            typer.echo(f"Nothing that was tried fits in {machine.memory:g} GiB: options, LoRA, 64 times the GPUs.\n")
        else:
            changes = options(found, fitting, settings=settings)
            typer.echo(f"Fits with: {' '.join(changes) or 'no change'}\n")
            found = fitting
    speed = {"rate": machine.rate * 1e12, "bandwidth": machine.bandwidth * 1e12}
    typer.echo(found.text(memory=machine.memory * GIB, settings=settings, **speed))


@command()
def merge(
    adapters: Annotated[Path, typer.Argument(help="Folder of LoRA adapters, such as the `final` of a run.")],
    output: Annotated[Path, typer.Argument(help="Folder for the merged model and its processor; new or empty.")],
    model: Annotated[str | None, typer.Option(help="The model they belong to (default: the one they name).")] = None,
) -> None:
    """Add the adapters of a run into the weights of their model, so that it loads like any other."""
    from appo.models.merge import merge_adapters

    typer.echo(merge_adapters(adapters, output, model=model))


@quiet_on_closed_pipe()
def main() -> None:
    app()


if __name__ == "__main__":
    main()
