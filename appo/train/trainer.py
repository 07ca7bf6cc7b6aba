"""One training step, top to bottom: rollout -> reward -> score -> select -> weigh -> advantage -> update."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker
from torch import Tensor, nn

from appo.config import APPOConfig
from appo.data.prompts import Prompt, PromptBuilder
from appo.data.records import Record
from appo.data.sampler import RecordSampler
from appo.method.advantages import group_advantages
from appo.method.attention_policy import attention_loss
from appo.models.load import check_fits
from appo.rollout.build import build_engine
from appo.rollout.engine import Completion, Rollout, Sampling, checked
from appo.rollout.model_engine import TransformersRollout
from appo.train.ahead import Ahead, check_asynchronous, forget_ahead, next_groups
from appo.train.attention_update import AttentionLoss, attention_update
from appo.train.before_loading import check_run
from appo.train.collective import total_of
from appo.train.drawing import draw_prompts
from appo.train.engine_difference import measure_engine
from appo.train.grade import grade
from appo.train.groups import Group, Part, batch_parts, loss_factor, loss_operands, whole_groups
from appo.train.launch import processes
from appo.train.logs import Meter, peak_memory_gib
from appo.train.metrics import measure_groups, measure_loss, measure_padding, measure_rewards, speed
from appo.train.micro_batches import micro_batches
from appo.train.policy import Policy
from appo.train.rules import ChooseFrames, WeighTokens, choose_frames, weigh_tokens
from appo.train.run import run
from appo.train.scoring import filter_tokens, score_parts, score_reference, weigh_groups
from appo.train.setup import autocast, learning_rate, prepare_model, reference_policy
from appo.train.sharding import gathered, idle_group, missing, no_loss, place, reshard
from appo.train.updates import Updates, shares
from appo_kernels import SurrogateOutput, linear_weighted_surrogate


class Trainer:
    """Trains a video model with APPO, or with GRPO and DAPO as settings of the same code (docs/method.md sections 3-6).

    Args:
        model, processor: a vision-language model of transformers (see `Policy`) and its processor.
        dataset: the records to train on.
        rewards: name and weight of each reward; None: those of ``config``.
        config: see `APPOConfig`.
        eval_dataset: held-out records, or several splits by name, answered at the start, every
            ``config.eval_every`` steps and at the end.
        engine: samples responses, for training and evaluation (see `Rollout`); None: that of ``config.engine``.
        choose_frames: (group, config) -> target frames (K,) int64 of a scored group.
        weigh_tokens: (group, divergence, config) -> weights (G, N) fp32; ``divergence(slots)`` is (K, J).
        attention_loss: of ``config.attention_coef``, called as `appo.method.attention_policy.attention_loss` is.
        surrogate: called as `appo_kernels.linear_weighted_surrogate` is, and returns what it does.
        trackers: of accelerate's kind, beside those that ``config.trackers`` names.

    A run lives in ``config.output``; ``train()`` goes on from its newest checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        dataset: Sequence[Record],
        rewards: dict[str, float] | None = None,
        config: APPOConfig | None = None,
        *,
        eval_dataset: Sequence[Record] | Mapping[str, Sequence[Record]] = (),
        engine: Rollout | None = None,
        choose_frames: ChooseFrames = choose_frames,
        weigh_tokens: WeighTokens = weigh_tokens,
        attention_loss: AttentionLoss = attention_loss,
        surrogate: Any = linear_weighted_surrogate,
        trackers: Sequence[GeneralTracker] = (),
    ) -> None:
        self.config = config = config or APPOConfig()
        config.check()
        check_run(config, rewards, own_engine=engine is not None)
        check_fits(config, model, processor)
        self.reward_weights = rewards or config.rewards
        self.accelerator = processes(config, trackers)
        self.processor = processor
        self.eval_splits = dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        self.eval_splits = {name: records for name, records in self.eval_splits.items() if records}
        self.choose_frames, self.weigh_tokens = choose_frames, weigh_tokens
        self.attention_loss, self.surrogate = attention_loss, surrogate
        self.pad_id = processor.tokenizer.pad_token_id
        self.meter = Meter()
        self.unwrapped = policy = Policy(prepare_model(model, config), config.share_prompt)
        self.reference = reference_policy(policy, config, self.accelerator)
        self.model: Any = policy.model
        self.policy = place(policy, config, self.accelerator)
        self.updates = Updates(policy, self.policy, self.accelerator, config)
        self.build_prompt = PromptBuilder(processor, policy.causal.config, config)
        self.sampler = RecordSampler(
            dataset, seed=config.seed, rank=self.accelerator.process_index, world=self.accelerator.num_processes
        )
        self.engine: Rollout = engine or build_engine(config, self.model, processor)
        own_engine = isinstance(self.engine, TransformersRollout)
        check_asynchronous(config, own_engine)
        self.corrects = config.corrects(own_engine)
        self.version = 0  # of the weights: the step that made them
        self.ahead: Ahead | None = None  # the next step's responses on their way
        self._engine_version: int | None = None  # of the weights that the engine has
        self.groups: list[Group] = []  # of the last step
        self.broken: list[dict[str, Any]] = []  # records skipped in it

    def train(self) -> Path:
        """Run to ``max_steps`` and return the run folder; the trained model is in ``final/`` there.

        Ctrl-C or SIGTERM ends it after the step it is in, with a checkpoint and `Stopped`, an exit of 130 or 143.
        """
        return run(self)

    def close(self) -> None:
        """End what the engine started, such as a server; the process's end does so as well."""
        forget_ahead(self)
        if hasattr(self.engine, "close"):
            self.engine.close()

    def step(self, number: int) -> dict[str, float]:
        """One step: sample responses, find out what they looked at, weight their tokens, update the model.

        Returns the numbers of the step, over all processes; ``groups`` are this process's.
        """
        config, self.meter, self.broken, started = self.config, Meter(), [], time.perf_counter()
        self.policy.eval()
        groups = next_groups(self, number)
        version = self.version  # of the weights that score
        # Groups that cannot move the model count in the loss's denominator, and cost no forward.
        groups.sort(key=self.has_gradient, reverse=True)
        with self.timed("score"):
            moving = [group for group in groups if self.has_gradient(group)]
            if not self.total(len(moving)) and self.accelerator.is_main_process:
                moving = groups[:1]  # all have equal rewards: one is scored, for the step's numbers
            batches = list(self.micro_batches(moving))
            idle = [whole_groups([idle_group(groups[0], self.pad_id)])]
            for parts in batches + idle * missing(self.policy, len(batches), self.accelerator.device):
                self.score(parts)
                with self.timed("weights"):
                    complete = [part.group for part in parts if part.last]
                    self.select(complete)
                    self.weigh(complete)
        self.advantage(groups)
        self.policy.train()
        with self.timed("update"):
            self.update(groups, number)
        reshard(self.policy)  # it is whole after scores that no update followed
        measure_groups(self.meter, groups)
        measure_engine(self.meter, groups, config, corrects=self.corrects, version=version)
        self.meter.add("time/step", time.perf_counter() - started)
        self.meter.maximum("memory/peak_gib", peak_memory_gib(self.accelerator.device))
        self.groups = groups
        return speed(self.meter, groups, self.accelerator)

    def rollout(self, count: int) -> list[tuple[Prompt, Sequence[Completion]]]:
        """G responses to each of the next ``count`` records."""
        with self.timed("decode"):
            prompts, seeds = draw_prompts(self.sampler, self.build_prompt, count, self.config, self.broken)
        return self.sample(prompts, seeds)

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Prompt, Sequence[Completion]]]:
        """G responses to each prompt."""
        config = self.config
        sampling = Sampling(config.group_size, config.max_new_tokens, config.temperature, config.top_p)
        with self.timed("generate"), self.autocast():
            found = self.engine.generate(prompts, sampling, seeds)
        return list(zip(prompts, checked(found, self.engine, prompts, sampling), strict=True))

    def reward(self, sampled: Sequence[tuple[Prompt, Sequence[Completion]]]) -> list[Group]:
        """The responses to each prompt as a group with rewards (docs/data.md)."""
        groups = [
            grade(prompt, completions, self.processor.tokenizer, self.reward_weights, self.config)
            for prompt, completions in sampled
        ]
        measure_rewards(self.meter, groups)
        return groups

    def score(self, parts: Sequence[Part]) -> None:
        """Log-probabilities, entropy and frame mass of the responses in one forward (docs/method.md 3)."""
        batch = batch_parts(parts, self.pad_id, self.accelerator.device)
        with self.autocast():
            score_parts(parts, batch, self.policy, self.unwrapped, self.config)
            if self.reference is not None:
                score_reference(parts, batch, self.reference, self.config)
        for part in parts:
            if part.last and not part.group.drop_score_unless_finite():
                self.meter.total("groups/nonfinite", 1.0)

    def select(self, groups: Sequence[Group]) -> None:
        """The frames that matter for each group (docs/method.md 4); one without frames or without a token has none."""
        for group in groups:
            if self.config.method == "appo" and group.mass is not None and group.tokens:
                group.target_frames = self.choose_frames(group, self.config).cpu()

    def weigh(self, groups: Sequence[Group]) -> None:
        """The weight of each token, by what the responses looked at (docs/method.md 5); 1 in a group without frames."""
        with self.autocast():
            weigh_groups(groups, self.unwrapped, self.weigh_tokens, self.config)

    def advantage(self, groups: Sequence[Group]) -> None:
        """The advantage of each response over its group (docs/method.md 6), and which tokens it is left out of."""
        for group in groups:
            group.advantages = group_advantages(group.rewards, scale=self.config.advantage_scale)
        filter_tokens(groups, self.config)

    def update(self, groups: Sequence[Group], number: int) -> None:
        """``updates_per_step`` optimizer steps, each on its own share of the groups (which come with signal first).

        The loss of a share is divided by its number of tokens over all processes, so that micro-batches and processes
        add up to the gradient of one large batch.
        """
        config, accelerator = self.config, self.accelerator
        if self.total(sum(group.informative for group in groups)) < config.min_groups:
            self.meter.add("updates/skipped", 1.0)
            return
        self.updates.set_rate(rate := learning_rate(number, config))
        updates = shares(groups, config.updates_per_step)
        if not updates:
            self.updates.skip(f"step {number}: no group has finite scores", self.meter)
        for share in updates:
            tokens, responses = self.total(sum(g.tokens for g in share)), self.total(len(share) * config.group_size)
            batches = list(self.micro_batches([g for g in share if g.scored]))
            # Copies average their gradients in one backward of each process.
            idle = missing(self.policy, len(batches), accelerator.device) or int(not batches)
            total = 0.0
            for parts in batches:
                with self.timed("loss"), nullcontext() if parts is batches[-1] else accelerator.no_sync(self.policy):
                    loss = self.loss(parts, tokens, responses)
                    self.updates.backward(loss * accelerator.num_processes)  # processes are averaged, shares summed
                    total += float(loss.detach())
            for _ in range(idle):
                self.idle_backward(groups[0])
            if self.updates.apply(number, self.total(total), self.meter):
                self.version = number
        self.meter.add("lr", rate)

    def loss(self, parts: Sequence[Part], tokens: float, responses: float) -> Tensor:
        """The weighted surrogate of some responses as part of a batch of ``tokens`` and ``responses`` (eq. 20)."""
        config = self.config
        batch = batch_parts(parts, self.pad_id, self.accelerator.device)
        operands = loss_operands(parts, self.accelerator.device, rollout_logprobs=self.corrects)
        arguments = operands | config.loss_arguments() | self.unwrapped.logit_arguments(config) | {"num_items": tokens}
        sequences = self.unwrapped.sequences(batch)
        attention = attention_update(parts, batch, sequences, self.unwrapped, config, self.attention_loss)

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SurrogateOutput:
            found = self.surrogate(hidden, weight, batch.completion_ids, mask=batch.mask, bias=bias, **arguments)
            return found if attention is None else attention.added(found, arguments)

        with self.autocast(), nullcontext() if attention is None else attention.recorder:
            result = self.policy(batch, head, sequences)
        measure_padding(self.meter, batch, shared=self.unwrapped.share_prompt)
        measure_loss(self.meter, result, parts)
        return result.loss * loss_factor(batch, config.aggregation, tokens, responses)

    def idle_backward(self, group: Group) -> None:
        """A forward and backward of no weight: those of a sharded policy are collectives, and others have more."""
        batch = batch_parts(whole_groups([idle_group(group, self.pad_id)]), self.pad_id, self.accelerator.device)
        with self.autocast():
            zero = self.policy(batch, no_loss)
        self.accelerator.backward(zero)

    def has_gradient(self, group: Group) -> bool:
        """Groups whose rewards are all equal have advantage 0: no gradient but that of a KL or an entropy term."""
        return group.informative or self.config.beta > 0 or self.config.entropy_coef != 0

    def sync_engine(self) -> None:
        """Hand changed weights to the engine, once it is free; every process calls it."""
        if self.ahead is not None:
            self.ahead.wait()
        if self._engine_version != self.version:
            self.engine.update_weights(self.model, self.version)
            self._engine_version = self.version

    def whole_weights(self) -> AbstractContextManager[None]:
        """A sharded policy made whole for sampling; nothing where another engine samples, with its own weights."""
        return gathered(self.policy) if self.config.engine == "transformers" else nullcontext()

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.config, self.accelerator.device)

    def micro_batches(self, groups: Sequence[Group]) -> Iterator[list[Part]]:
        """The parts that one forward and backward computes together: whole groups, or some responses of one."""
        config, shared = self.config, self.unwrapped.share_prompt
        return micro_batches(groups, groups_at_most=config.micro_groups, tokens=config.micro_tokens, shared=shared)

    def total(self, value: float) -> float:
        return total_of(value, self.accelerator)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        return self.meter.timed(f"time/{phase}", self.accelerator.device)
