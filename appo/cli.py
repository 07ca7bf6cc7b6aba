"""The command line: appo demo, train, eval, inspect, report, plan."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from appo_kernels.pipes import quiet_on_closed_pipe

try:
    import typer
except ModuleNotFoundError:
    sys.exit("appo: the command line needs the training packages. Install them with: pip install 'appo[train]'")

if TYPE_CHECKING:
    from appo.config import APPOConfig

app = typer.Typer(
    help="Train video models on what they look at: attention-guided policy optimisation (arXiv 2602.23823).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: key=value ...")]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for clips, models, runs and pages.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seeds clips, model, warm start and training.")] = 0,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 48,
    method: Annotated[str, typer.Option(help="appo, grpo or dapo.")] = "appo",
    compare: Annotated[bool, typer.Option(help="Train with GRPO as well, beside APPO on the page.")] = True,
) -> None:
    """Make clips, warm up a tiny Qwen2.5-VL, train it with APPO and report. No GPU, no download, a few minutes.

    Interrupted, it goes on where it was when run again with the same --output.
    """
    from appo.demo import run_demo

    run_demo(output, seed=seed, steps=steps, method=method, compare=compare)


@app.command()
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
    from appo.data.load import check_media, load_records
    from appo.train.setup import load_model
    from appo.train.trainer import Trainer

    settings = APPOConfig.load(config, overrides)
    records = load_records(_required(settings, "data"), data_root=settings.data_root, seed=settings.seed)
    held_out = []
    if settings.eval_data:
        held_out = load_records(settings.eval_data, data_root=settings.data_root, seed=settings.seed)
    check_media([*records, *held_out])
    model, processor = load_model(settings)
    output = Trainer(model, processor, records, config=settings, eval_dataset=held_out).train()
    typer.echo(f"Run folder: {output}    Curves: appo report {output}")


@app.command("eval")
def evaluate_model(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model.")],
    data: Annotated[Path, typer.Option(help="Records, .json or .jsonl.")],
    data_root: Annotated[str | None, typer.Option(help="Folder that media paths start from.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many records.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write every answer to this .jsonl file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Answer records greedily and print accuracy, format and temporal IoU."""
    import json

    from rich.progress import Progress

    from appo.config import APPOConfig
    from appo.data.load import check_media, load_records
    from appo.train.evaluate import evaluate
    from appo.train.setup import load_model

    settings = APPOConfig.from_dotlist(["model=" + model, *(overrides or [])])
    records = load_records(data, data_root=data_root, limit=limit)
    check_media(records)
    loaded, processor = load_model(settings)
    answers: list[dict] = []
    with Progress() as progress:
        task = progress.add_task("records", total=len(records))
        values = evaluate(
            loaded,
            processor,
            records,
            settings,
            show=lambda done: progress.update(task, completed=done),
            keep=answers,
        )
    if output is not None:
        output.write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    for name, value in values.items():
        typer.echo(f"{name:24} {value:.4g}")


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="Folder or hub name of the model.")],
    video: Annotated[Path, typer.Option(help="The clip.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    option: Annotated[
        list[str] | None, typer.Option(help='An answer to choose from, such as "A. red"; repeat.')
    ] = None,
    answer: Annotated[str | None, typer.Option(help="The right one, when known: then responses are rewarded.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the page.")] = Path("inspection"),
    overrides: Overrides = None,
) -> None:
    """Draw which frames each response token looks at, which frames APPO picks and what the tokens weigh."""
    from appo.reports.inspect_clip import examine

    for path in examine(model, video, question, option or [], answer, output, overrides or []):
        typer.echo(path)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are drawn side by side.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes (default: report.html in the first run).")
    ] = None,
) -> None:
    """One page of curves: reward, accuracy, entropy, gradient norm, lengths, weights, frames picked."""
    from appo.reports.run_report import write_report

    typer.echo(write_report(runs, output or runs[0] / "report.html"))


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Name as published, such as Qwen2.5-VL-7B, or a folder or config.json.")],
    frames: Annotated[int, typer.Option(help="Temporal grid steps of a video.")] = 16,
    frame_tokens: Annotated[int, typer.Option(help="Tokens of each: 64 at 224 x 224 pixels.")] = 64,
    responses: Annotated[int, typer.Option(help="Responses of a group.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a response.")] = 384,
    prompts: Annotated[
        int | None, typer.Option(help="Prompts of a step, over all GPUs (default: 16, at least one a GPU).")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Over which weights and optimizer are sharded.")] = 1,
    memory: Annotated[float, typer.Option(help="Of a GPU, GiB.")] = 80.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again in the backward.")] = False,
    micro_groups: Annotated[int, typer.Option(help="Groups in one forward and backward.")] = 1,
    train_vision: Annotated[bool, typer.Option(help="Train the vision tower as well.")] = False,
    rate: Annotated[float, typer.Option(help="Rate that products reach, TFLOP/s; 400 of an H100's 989.")] = 400.0,
    bandwidth: Annotated[float, typer.Option(help="Memory bandwidth that reads reach, TB/s.")] = 2.5,
) -> None:
    """Memory and time of a training step, before anything is loaded (docs/performance.md has the cost model).

    Example: appo plan --model Qwen2.5-VL-72B --gpus 64 --gradient-checkpointing
    """
    from appo.models.architectures import find_architecture
    from appo.plan import GIB, Plan, Workload

    work = Workload(
        frames=frames,
        frame_tokens=frame_tokens,
        responses=responses,
        response=tokens,
        prompts=prompts or max(16, gpus),
        gpus=gpus,
        micro_groups=micro_groups,
        checkpointing=gradient_checkpointing,
        freeze_vision=not train_vision,
    )
    typer.echo(
        Plan(find_architecture(model), work).text(memory=memory * GIB, rate=rate * 1e12, bandwidth=bandwidth * 1e12)
    )


def _required(settings: "APPOConfig", name: str) -> str:
    from appo.config import ConfigError

    value: str = getattr(settings, name)
    if not value:
        raise ConfigError(f"`{name}`: expected a path, got nothing. Set it in the file or pass {name}=PATH.")
    return value


@quiet_on_closed_pipe()
def main() -> None:
    """Errors in what the user gave are one line; everything else keeps its traceback."""
    from appo.config import ConfigError
    from appo.data.records import DataError
    from appo.data.video import VideoError
    from appo.reports.run_report import ReportError

    try:
        app()
    except (ConfigError, DataError, ReportError, VideoError) as error:
        sys.exit(f"appo: {error}")


if __name__ == "__main__":
    main()
