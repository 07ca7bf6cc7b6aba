"""Commands that show what happened: `appo inspect`, `appo parity`, `appo report`."""

from pathlib import Path
from typing import Annotated

import typer

from appo.cli_errors import check_given
from appo.cli_options import DataRoot, Model, Overrides


def inspect_clips(
    model: Model,
    video: Annotated[Path | None, typer.Option(help="The clip.")] = None,
    question: Annotated[str, typer.Option(help="What to ask about it.")] = "",
    option: Annotated[
        list[str] | None, typer.Option(help='An answer to choose from, such as "A. red"; repeat.')
    ] = None,
    answer: Annotated[str | None, typer.Option(help="The right one, when known: then responses are rewarded.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the page.")] = Path("inspection"),
    heads: Annotated[bool, typer.Option(help="Also which layers and heads look at the clip.")] = False,
    data: Annotated[Path | None, typer.Option(help="Records instead of one clip: a page each, and one of all.")] = None,
    data_root: DataRoot = None,
    limit: Annotated[int, typer.Option(min=1, help="Of the records, the first so many with a video.")] = 8,
    overrides: Overrides = None,
) -> None:
    """Draw which frames each response token looks at, which frames APPO picks and what the tokens weigh.

    Example: appo inspect --model M --data test.json --limit 20
    """
    from appo.config import ConfigError
    from appo.output_paths import check_output_folder

    check_output_folder("output", output)
    if (video is None) == (data is None):
        raise ConfigError("`video`: expected either --video or --data, got both or neither.")
    if data is not None:
        if question or option or answer is not None:
            raise ConfigError("`question`: expected nothing beside --data, whose records have their own.")
        from rich.progress import Progress

        from appo.reports.inspect_clip import examine_records

        with Progress() as progress:
            task = progress.add_task("clips", total=limit)
            pages = examine_records(
                model,
                data,
                output,
                overrides or [],
                data_root=data_root,
                limit=limit,
                heads=heads,
                show=lambda done, total: progress.update(task, completed=done, total=total),
            )
        typer.echo(pages[0])
        return
    assert video is not None
    if not question.strip():
        raise ConfigError("`question`: expected text, got nothing. Pass what to ask about the clip.")
    from appo.reports.inspect_clip import examine

    for path in examine(model, video, question, option or [], answer, output, overrides or [], heads=heads):
        typer.echo(path)


def compare_engine(
    model: Model,
    data: Annotated[Path, typer.Option(help="Records whose clips go through both.")],
    data_root: DataRoot = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first so many records.")] = 4,
    engine: Annotated[str, typer.Option(help="transformers, vllm or vllm-server.")] = "vllm-server",
    overrides: Overrides = None,
) -> None:
    """Show whether a rollout engine sees what the trainer sees: ids, grids, frame times and log-probabilities.

    Exit code 1 if prompts or log-probabilities differ.

    Example: appo parity --model M --data test.json vllm_python=vllm-env/bin/python dtype=float32
    """
    import tempfile

    from rich.console import Console

    from appo.config import APPOConfig
    from appo.data.load import check_media, load_records
    from appo.reports.parity import examine_parity, parity_table
    from appo.train.before_loading import check_run
    from appo.train.setup import load_model
    from appo.train.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        settings = APPOConfig.from_dict(
            {"model": model, "engine": engine, "output": folder, "group_size": 2, "max_new_tokens": 16}, overrides
        )
        check_given(settings, "model")
        check_run(settings)
        records = load_records(data, data_root=data_root, limit=limit)
        check_media(records)
        loaded, processor = load_model(settings)
        found = examine_parity(Trainer(loaded, processor, records, config=settings), records)
    Console().print(parity_table(found))
    for each in found:
        if each.problem:
            typer.echo(each.problem)
    if not all(each.equal for each in found):
        typer.echo("They differ. Known reasons: docs/engines.md, section 'Where engines differ'.")
        raise typer.Exit(1)


def report_runs(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are drawn side by side.")],
    output: Annotated[
        Path | None, typer.Option(help="Where the page goes (default: report.html in the first run).")
    ] = None,
) -> None:
    """One page of curves: reward, accuracy, entropy, gradient norm, lengths, weights, frames picked."""
    from appo.output_paths import check_output_file

    page = check_output_file("output", output or runs[0] / "report.html", [".html", ".htm"])
    from appo.reports.run_report import write_report

    typer.echo(write_report(runs, page))
