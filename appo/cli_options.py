"""Options that several commands have."""

from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file: key=value ...")]
Model = Annotated[str, typer.Option(help="Folder or hub name of the model.")]
DataRoot = Annotated[str | None, typer.Option(help="Folder that media paths start from.")]
