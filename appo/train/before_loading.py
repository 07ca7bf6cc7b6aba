"""Checks of a run before its model is loaded: launch, packages, the user's code, engines."""

from collections.abc import Mapping

from appo.config import APPOConfig, ConfigError
from appo.models import liger
from appo.models.load import check_attention
from appo.packages import why_not_bitsandbytes
from appo.rollout.build import check_engine
from appo.rollout.registry import check_user_code
from appo.train.ahead import check_asynchronous
from appo.train.launch import check_launch
from appo.train.trackers import check_trackers


def check_run(config: APPOConfig, rewards: Mapping[str, float] | None = None, *, own_engine: bool = False) -> None:
    """Raise an error for settings that no run here can have, whatever the model; nothing is loaded.

    own_engine: an engine was passed, so that the settings of others are not asked for.

    Raises ConfigError, EngineError for a server that does not answer, UserCodeError.
    """
    check_launch(config)
    check_trackers(config)
    check_user_code(rewards or config.rewards, config.method)
    check_attention(config)
    if config.liger:
        liger.check()
    if config.optimizer != "adamw" and (reason := why_not_bitsandbytes()):
        raise ConfigError(f"`optimizer`: expected adamw here, got {config.optimizer}: {reason}")
    if not own_engine:
        check_asynchronous(config, config.engine == "transformers")
        check_engine(config)
