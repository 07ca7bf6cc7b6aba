"""verl's synchronous trainer that keeps groups together and asks the engine of `appo.integrations.verl` for weights."""

from collections import defaultdict
from dataclasses import fields
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import OmegaConf, open_dict
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions

from appo.config import APPOConfig
from appo.integrations.before_training import check_model
from appo.integrations.verl_scoring import SETTINGS
from appo.models.load import read_config, without_weights


def settings_of(config: Any) -> dict[str, Any]:
    """The settings ``appo`` of a run, checked, with what verl knows under names of its own.

    Raises:
        ValueError: an unknown setting, or an option of verl under which there is no forward that could be recorded.
    """
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    wanted: Any = OmegaConf.to_container(config.get("appo") or OmegaConf.create({}))
    known = {field.name for field in fields(APPOConfig)} | set(SETTINGS) - {"group_size"}
    for name in wanted:
        if name not in known:
            raise ValueError(f"`appo.{name}`: expected one of {', '.join(sorted(known))}. Leave it out.")
    options = {
        "actor.strategy": (actor.strategy, ("fsdp", "fsdp2")),
        "model.use_remove_padding": (model.use_remove_padding, (True,)),
        "model.use_fused_kernels": (model.use_fused_kernels, (True,)),
        "model.fused_kernel_options.impl_backend": (model.fused_kernel_options.impl_backend, ("torch", "liger")),
        "actor.ulysses_sequence_parallel_size": (actor.get("ulysses_sequence_parallel_size", 1), (1,)),
        "algorithm.rollout_correction.bypass_mode": (
            bool((algorithm.get("rollout_correction") or {}).get("bypass_mode", False)), (False,),
        ),
    }  # fmt: skip
    for name, (got, possible) in options.items():
        if got not in possible:
            raise ValueError(f"`{name}`: expected {' or '.join(map(str, possible))} for token weights, got {got!r}.")
    if rollout.n < 2:
        raise ValueError(f"`rollout.n`: expected at least 2 responses of a prompt, got {rollout.n}.")
    APPOConfig(**{name: value for name, value in wanted.items() if name not in SETTINGS})
    return {"accuracy": None, "frame_mass": 0} | wanted | {"group_size": rollout.n}


def check_attention_of(path: str, settings: dict[str, Any]) -> None:
    """Raise ValueError where the model in a folder or on the hub attends in a way that cannot be recorded.

    Its configuration alone is read. A model that sees nothing has nothing to be recorded, and one that only workers
    can reach is looked at by them, in the first scoring forward.
    """
    if "://" not in path and hasattr(read_config(path), "vision_config"):
        own = {name: value for name, value in settings.items() if name not in SETTINGS}
        check_model(APPOConfig(**own), without_weights(path))


@register_trainer("appo")
class APPOTrainer(PPOTrainerSync):
    """``PPOTrainerSync`` whose scoring forward weighs the tokens of whole groups; choose with trainer_mode=appo."""

    def __init__(self, config: Any) -> None:
        self.appo = settings_of(config)
        check_attention_of(config.actor_rollout_ref.model.path, self.appo)
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # by which verl tells how samples are drawn
        super().__init__(config)

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Whole groups to each process, one after another, with about as many tokens in each process."""
        batch = super()._balance_batch(batch, metrics, *args, **kwargs)
        found = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid"])
        processes = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        order = grouped_order(
            tu.get(found, "uid"), [tag["seq_len"] for tag in batch.tags], self.appo["group_size"], processes
        )
        batch.reorder(order)
        return batch

    def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any:
        asked = {"appo": self.appo, "force_group_size": self.appo["group_size"]}
        batch.extra_info.update(asked)
        result = super()._compute_old_log_prob(batch, metrics)
        for meta in (batch, result):  # the reference policy and the update are not asked
            for name in asked:
                meta.extra_info.pop(name, None)
        weights = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["token_weights"])
        values = weights["token_weights"].values()
        metrics["appo/weight_mean"] = values.mean().item()
        metrics["appo/weighted_tokens"] = (values > 1).float().mean().item()
        return result


def grouped_order(uids: list[Any], lengths: list[int], group_size: int, processes: int) -> list[int]:
    """Indices of rows: equally many whole groups to each of ``processes``, groups of about as many tokens in all.

    Raises:
        ValueError: a group of another size (rows of several turns, padding of the batch), or groups that do not divide.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, uid in enumerate(uids):
        groups[uid].append(index)
    for uid, rows in groups.items():
        if len(rows) != group_size:
            raise ValueError(
                f"`train_batch_size`: expected {group_size} rows of each prompt, got {len(rows)} of {uid!r}. Choose "
                "batch sizes that divide, so that verl need not pad, and rollouts of one row each."
            )
    if len(groups) % processes:
        raise ValueError(
            f"`train_batch_size`: expected a multiple of the {processes} data-parallel processes, got {len(groups)}."
        )
    rows_of = list(groups.values())
    load = calculate_workload(torch.tensor([[lengths[i] for i in rows] for rows in rows_of]).flatten())
    work = [int(part.sum()) for part in load.view(len(rows_of), group_size)]
    partitions = get_seqlen_balanced_partitions(work, k_partitions=processes, equal_size=True)
    return [index for partition in partitions for group in partition for index in rows_of[group]]
