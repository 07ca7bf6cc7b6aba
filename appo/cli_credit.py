"""appo credit: how well the gradient of each way of weighting tokens points, on the user's own model."""

from pathlib import Path
from typing import Annotated

import typer


def measure_credit(
    run: Annotated[Path, typer.Argument(help="Run folder, whose final model is measured; or a YAML file of settings.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace those of the run: key=value ...")
    ] = None,
    groups: Annotated[int, typer.Option(min=16, help="Groups whose rewards differ.")] = 256,
    told: Annotated[
        str, typer.Option(help="Places that tell what was seen: auto (bundled tasks), none, or FILE.py:NAME.")
    ] = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder of the results (default: RUN/credit).")] = None,
) -> None:
    """Compare the gradients of every way of weighting tokens on the same responses; nothing is trained.

    Each batch of prompts is kept as soon as it is measured; the same command goes on where it was interrupted.

    Example: appo credit runs/appo --groups 512 model=Qwen/Qwen2.5-VL-7B-Instruct lora_rank=16
    """
    from appo.output_paths import check_output_folder

    place = check_output_folder("output", output or (run if run.is_dir() else run.parent) / "credit")
    from appo.credit.command import measure_run

    path = measure_run(run, place, groups=groups, told=told, overrides=overrides or [], show=typer.echo)
    typer.echo(path.read_text(encoding="utf-8"))
    typer.echo(path)
