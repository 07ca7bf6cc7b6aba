"""appo data: checking and converting files of records."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from appo.cli_errors import guarded

data_app = typer.Typer(help="Check and convert files of records.", no_args_is_help=True)

Root = Annotated[Path | None, typer.Option(help="Folder that media paths start from (default: that of the file).")]
Outside = Annotated[bool, typer.Option(help="Take media from outside that folder.")]


@data_app.command()
@guarded
def check(
    file: Annotated[Path, typer.Argument(help="Records: .json, .jsonl, .csv, .parquet, .gz, a folder of datasets.")],
    data_root: Root = None,
    allow_outside: Outside = False,
    decode: Annotated[int | None, typer.Option(min=0, help="Records whose media are decoded (default: all).")] = None,
    record: Annotated[int, typer.Option(min=0, help="The record whose prompt is shown.")] = 0,
    show: Annotated[int, typer.Option(min=0, help="Messages of each problem that are printed.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Draws the records that are decoded.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one clip.")] = 60.0,
) -> None:
    """Read a whole file, look for its media, decode them, and say what is wrong; exit code 1 where anything is.

    Example: appo data check train.json --data-root videos --decode 100
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from appo.data.check import check_file, render
    from appo.data.opening import Source
    from appo.data.records import DataError

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, int] = {}

        def update(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = progress.add_task(phase, total=total)
            progress.update(tasks[phase], completed=done)  # type: ignore[arg-type]

        try:
            Source(file, None if data_root is None else Path(data_root)).check_root()
            found = check_file(
                file,
                data_root=data_root,
                allow_outside=allow_outside,
                seed=seed,
                decode=decode,
                sample=record,
                show=update,
                timeout=timeout,
            )
        except DataError as error:
            sys.exit(f"appo: {error}")
    for line in found.lines(show):
        typer.echo(line)
    if found.sample is not None:
        typer.echo(f"\nPrompt of {found.sample.place}:\n{render(found.sample)}")
    if not found.clean:
        raise typer.Exit(1)


@data_app.command()
@guarded
def convert(
    file: Annotated[Path, typer.Argument(help="Records of any known format.")],
    output: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    data_root: Root = None,
    allow_outside: Outside = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the options of SEED-Bench-R1.")] = 0,
    skip_broken: Annotated[bool, typer.Option(help="Leave out records that cannot be used.")] = False,
    force: Annotated[bool, typer.Option(help="Write over a file that exists.")] = False,
) -> None:
    """Write records of any known format in ours (docs/data.md), one a line; media that a table holds become files."""
    from appo.data.convert import convert_file
    from appo.data.records import DataError

    try:
        count, root = convert_file(
            file,
            output,
            data_root=data_root,
            allow_outside=allow_outside,
            seed=seed,
            skip_broken=skip_broken,
            force=force,
        )
    except DataError as error:
        sys.exit(f"appo: {error}")
    typer.echo(f"{count:,} records: {output}    Media are relative to data_root={root}")
