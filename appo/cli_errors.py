"""Errors of commands: one line each, and an exit code that says whose fault it is."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from appo.config import APPOConfig

WRONG_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def guarded(run: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors are one line: exit code 2 for what the user gave, 1 for files, 130 for Ctrl-C."""

    @functools.wraps(run)
    def guarding(**arguments: Any) -> None:
        from appo.constraints import ConfigError

        try:
            run(**arguments)
        except KeyboardInterrupt:
            _stop("interrupted", INTERRUPTED)
        except ConfigError as error:
            _stop(error, WRONG_INPUT)
        except Exception as error:
            if _names_the_data(error):
                _stop(error, WRONG_INPUT)
            if _ends_a_run(error):
                _stop(error, FAILED)
            if isinstance(error, OSError) and error.filename is not None and not isinstance(error, BrokenPipeError):
                _stop(f"{error.filename}: {error.strerror}", FAILED)
            raise

    return guarding


def check_given(settings: "APPOConfig", name: str) -> None:
    """Raise ConfigError where the setting ``name``, model or data, is empty."""
    from appo.constraints import ConfigError

    if not getattr(settings, name):
        example = {"model": "Qwen/Qwen2.5-VL-7B-Instruct", "data": "train.json"}[name]
        raise ConfigError(f"`{name}`: expected a value, got nothing. Set it in the file or pass {name}={example}.")


def _names_the_data(error: Exception) -> bool:
    """True for errors about a record, a clip, a run folder or the user's own code; modules are loaded only then."""
    from appo.data.records import DataError
    from appo.data.video import VideoError
    from appo.reports.runs import ReportError
    from appo.rollout.user_code import UserCodeError

    return isinstance(error, (DataError, ReportError, UserCodeError, VideoError))


def _ends_a_run(error: Exception) -> bool:
    """True for what a run says when it cannot go on; its modules are loaded only once there is an error."""
    from appo.evaluation.speakers import EndpointError
    from appo.rollout.vllm_requests import EngineError
    from appo.train.checkpoints import CheckpointError
    from appo.train.updates import NonFiniteError

    return isinstance(error, (CheckpointError, EndpointError, EngineError, ImportError, NonFiniteError))


def _stop(message: object, code: int) -> None:
    typer.echo(f"appo: {message}", err=True)
    raise typer.Exit(code)
