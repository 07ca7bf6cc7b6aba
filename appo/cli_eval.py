"""appo eval: answers to held-out records, or a published benchmark's table."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from appo.cli_errors import check_given
from appo.cli_options import DataRoot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appo.config import APPOConfig
    from appo.data.records import Record
    from appo.evaluation.benchmark import Benchmark


def evaluate_model(
    data: Annotated[Path, typer.Option(help="Records; of a benchmark also the folder with its files.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the model.")] = None,
    data_root: DataRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many records.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write every answer to this .jsonl file.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="seed-bench-r1, next-gqa, vsi-bench, ... (docs/evaluation.md), its own table.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="benchmark: its own prompt; training: that of training.")] = "benchmark",
    answers: Annotated[Path | None, typer.Option(help="Score the answers of this file, without a model.")] = None,
    against: Annotated[Path | None, typer.Option(help="Answers of another model to compare with.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the benchmark's table to this .html file.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the defaults: key=value ...")
    ] = None,
) -> None:
    """Answer records greedily and print accuracy, format and temporal IoU; or a benchmark's own table.

    Each answer is in the file as soon as there is one; the same command goes on where it was interrupted.

    Example: appo eval --benchmark vsi-bench --data VSI-Bench --model Qwen/Qwen2.5-VL-7B-Instruct --output answers.jsonl
    """
    from appo.config import ConfigError
    from appo.output_paths import check_output_file

    if output is not None:
        check_output_file("output", output, [".jsonl"])
    if page is not None:
        check_output_file("page", page, [".html", ".htm"])
    if prompt not in ("benchmark", "training"):
        raise ConfigError(f"`prompt`: expected benchmark or training, got {prompt!r}.")
    if benchmark is None:
        for name, value in (("answers", answers), ("against", against), ("page", page)):
            if value is not None:
                raise ConfigError(f"`{name}`: expected a benchmark to score by, got none. Pass --benchmark NAME.")
        _answer(model or "", data, data_root, limit, output, overrides)
        return
    if model is not None and answers is not None:
        raise ConfigError("`answers`: expected either --model or --answers, got both. Leave one out.")
    _benchmark(benchmark, data, model, answers, against, data_root, limit, output, page, prompt, overrides)


def _answer(
    model: str, data: Path, data_root: str | None, limit: int | None, output: Path | None, overrides: list[str] | None
) -> None:
    settings = _settings(model, overrides)
    check_given(settings, "model")
    from appo.data.load import load_records

    records = load_records(data, data_root=data_root, limit=limit, allow_outside=settings.allow_outside)
    values, _ = _evaluate(settings, records, output)
    for name, value in values.items():
        typer.echo(f"{name:24} {value:.4g}")


def _settings(model: str, overrides: list[str] | None, **own: Any) -> "APPOConfig":
    """Those beside a model that a run saved, of which is said that they were taken; then ``own``, then overrides."""
    from appo.config import APPOConfig
    from appo.shown_settings import shown_settings, told

    kept = {name: value for name, value in shown_settings(model).items() if name not in own}
    if line := told(model, kept, overrides):
        typer.echo(line, err=True)
    return APPOConfig.from_dict({"model": model, **kept, **own}, overrides)


def _benchmark(
    name: str,
    data: Path,
    model: str | None,
    answers: Path | None,
    against: Path | None,
    data_root: str | None,
    limit: int | None,
    output: Path | None,
    page: Path | None,
    prompt: str,
    overrides: list[str] | None,
) -> None:
    from appo.config import ConfigError
    from appo.evaluation.files import find_benchmark, read_benchmark
    from appo.evaluation.scoring import changed, score_answers, table, text_table
    from appo.evaluation.stored import read_answers

    known = find_benchmark(name)
    own = known.settings if prompt == "benchmark" else {}
    settings = _settings(model or "", overrides, **own)
    if answers is None:
        check_given(settings, "model")
    if settings.eval_samples > 1:
        raise ConfigError(f"`eval_samples`: expected 0 or 1 for a benchmark, got {settings.eval_samples}.")
    records = read_benchmark(known, data, data_root=data_root, limit=limit, allow_outside=settings.allow_outside)
    other = None if against is None else score_answers(known, records, read_answers(against, records))
    looked: dict[str, float] = {}
    if answers is not None:
        texts = read_answers(answers, records)
    else:
        asked = known if prompt == "benchmark" else None
        values, texts = _evaluate(settings, records, output, asked)
        looked = {name: value for name, value in values.items() if name.startswith("mass/")}
    scores = score_answers(known, records, texts)
    rows = table(known, records, scores if other is None else other, None if other is None else scores)
    typer.echo(f"{known.title} ({known.paper}), {len(records)} questions, in percent with 95 % intervals")
    if other is not None:
        better, worse = changed(other, scores, known.headline[0])
        typer.echo(f"{against}, {answers or model}, difference in points; {better} answers better, {worse} worse")
    text_table(rows, typer.echo)
    for name, value in looked.items():
        typer.echo(f"{name:24} {value:.4g}")
    if page is not None:
        from appo.reports.benchmark_page import write_benchmark_page

        names = [str(each) for each in (against, answers or model) if each is not None]
        typer.echo(write_benchmark_page(page, known, rows, names))


def _evaluate(
    settings: "APPOConfig", records: "Sequence[Record]", output: Path | None, asked: "Benchmark | None" = None
) -> tuple[dict[str, float], list[str]]:
    """The means of `evaluate`, and the text of the answer to each record."""
    from rich.progress import Progress

    from appo.data.load import check_media
    from appo.data.prompts import PromptBuilder
    from appo.models.load import check_attention
    from appo.rollout.build import build_engine, check_engine
    from appo.train.answers import AnswerFile
    from appo.train.evaluate import evaluate
    from appo.train.setup import load_model

    check_engine(settings)
    check_attention(settings)
    if settings.on_broken == "stop":
        check_media(records)
    name = "" if asked is None else asked.name
    file = None if output is None else AnswerFile(output, records, settings, benchmark=name)
    loaded, processor = load_model(settings, trained=False)
    engine = build_engine(settings, loaded, processor)
    if settings.engine != "transformers":
        engine.update_weights(loaded, 0)
    builder = PromptBuilder(processor, loaded.config, settings, ask=None if asked is None else asked.ask)
    known = {} if file is None else file.known
    texts = {place: answers[0]["text"] for place, answers in known.items()}

    def keep(answer: dict[str, Any]) -> None:
        texts[answer["place"]] = answer["text"]
        if file is not None:
            file.write(answer)

    with file or nullcontext(), Progress() as progress:
        task = progress.add_task("records", total=len(records))
        values = evaluate(
            loaded,
            processor,
            records,
            settings,
            engine=engine,
            builder=builder,
            show=lambda done: progress.update(task, completed=done),
            keep=keep,
            known=known,
        )
    return values, [texts.get(place, "") for place in range(len(records))]


def run_the_matrix(
    config: Annotated[Path, typer.Argument(help="YAML file: data, perceivers, reasoners (docs/evaluation.md).")],
) -> None:
    """Perception against reasoning (the paper's Figure 2): some models describe videos, others answer from that.

    Replies are kept in `output`; the same command goes on where it ended, and a model that is added is asked alone.

    Example: appo matrix examples/matrix.yaml
    """
    from rich.progress import Progress

    from appo.data.load import check_media, load_records
    from appo.evaluation.matrix import MatrixSettings, run_matrix
    from appo.evaluation.scoring import shown
    from appo.output_paths import check_output_folder
    from appo.reports.matrix_page import gains, matrix_rows, write_matrix_page
    from appo.yaml_files import read_yaml

    matrix = MatrixSettings.from_dict(read_yaml(config))
    folder = check_output_folder("output", matrix.output)
    records = load_records(
        matrix.data, data_root=matrix.data_root, limit=matrix.limit, allow_outside=matrix.settings.allow_outside
    )
    check_media(records)
    with Progress() as progress:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        found = run_matrix(matrix, list(records), show=show)
    typer.echo(f"Accuracy in percent with 95 % intervals, {len(records)} questions")
    for perceiver, reasoner, value in matrix_rows(found):
        typer.echo(f"{perceiver + ' -> ' + reasoner:40} {shown(value)}")
    for name, value in gains(found):
        typer.echo(f"{name:60} {shown(value, sign=True)} points")
    for name, (read, written, price) in found.costs.items():
        typer.echo(f"{name:40} {read:10,} tokens read {written:9,} written" + (f" {price:12.4f}" if price else ""))
    typer.echo(write_matrix_page(folder / "matrix.html", found))
