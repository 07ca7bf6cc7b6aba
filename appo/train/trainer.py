"""One training step, top to bottom: rollout -> rewards -> score -> select -> weights -> loss -> update."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from appo.config import APPOConfig
from appo.data.prompts import PromptBuilder, collate
from appo.data.records import Record
from appo.data.sampler import RecordSampler
from appo.method.advantages import group_advantages
from appo.method.selection import perception_slots, select_frames
from appo.method.token_weights import token_weights
from appo.recording.recorder import record_frame_mass
from appo.rollout.engine import TransformersRollout
from appo.rollout.rewards import combine, overlong_penalty
from appo.train import checkpoints
from appo.train.evaluate import evaluate
from appo.train.groups import Group, ResponseBatch, batch_groups, stack_tokens
from appo.train.interrupt import StopFlag
from appo.train.logs import Meter, RunLog, peak_memory_gib
from appo.train.metrics import measure_groups, measure_loss, sample_record
from appo.train.policy import Policy
from appo.train.progress import training_progress
from appo.train.setup import build_optimizer, learning_rate, prepare_model, reference_policy
from appo_kernels import SurrogateOutput, group_divergence, linear_weighted_surrogate, token_logprobs


class Trainer:
    """Trains a video model with APPO, or with GRPO and DAPO as settings of the same code (docs/method.md sections 3-6).

    Args:
        model: a vision-language model of transformers (see `Policy`).
        processor: its processor.
        dataset: the records to train on.
        rewards: name and weight of each reward; None: those of ``config``.
        config: see `APPOConfig`.
        eval_dataset: held-out records, or several splits by name, answered at the start, every
            ``config.eval_every`` steps and at the end.

    A run lives in ``config.output``; ``train()`` goes on from its newest checkpoint, and Ctrl-C saves one and returns.
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
    ) -> None:
        self.config = config = config or APPOConfig()
        self.reward_weights = rewards or config.rewards
        self.accelerator = Accelerator(mixed_precision={"bfloat16": "bf16", "float16": "fp16"}.get(config.dtype, "no"))
        if config.prompts_per_step % self.accelerator.num_processes:
            raise ValueError(
                f"`prompts_per_step`: expected a multiple of the {self.accelerator.num_processes} processes, got "
                f"{config.prompts_per_step}. Change it, or the number of processes."
            )
        self.processor = processor
        self.eval_splits = dict(eval_dataset) if isinstance(eval_dataset, Mapping) else {"eval": eval_dataset}
        self.eval_splits = {name: records for name, records in self.eval_splits.items() if records}
        self.pad_id = processor.tokenizer.pad_token_id
        self.meter = Meter()
        self.unwrapped = policy = Policy(prepare_model(model, config), config.share_prompt)
        self.reference = reference_policy(policy, config, self.accelerator.device)
        self.model: Any = policy.model
        self.policy, self.optimizer = self.accelerator.prepare(policy, build_optimizer(policy, config))
        self.logits: dict[str, Any] = {"temperature": config.temperature, "softcap": policy.softcap}
        self.build_prompt = PromptBuilder(processor, policy.causal.config, config)
        self.sampler = RecordSampler(
            dataset, seed=config.seed, rank=self.accelerator.process_index, world=self.accelerator.num_processes
        )
        self.engine = TransformersRollout(
            self.model,
            processor,
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        )

    def train(self) -> Path:
        """Run to ``max_steps`` (or to Ctrl-C) and return the run folder; the trained model is in ``final/`` there."""
        config, accelerator = self.config, self.accelerator
        output = Path(config.output)
        state = checkpoints.load_newest(accelerator, output / "checkpoints") or {"step": 0}
        first = state["step"] + 1
        self.sampler.load_state_dict(state["samplers"][accelerator.process_index] if "samplers" in state else None)
        main = accelerator.is_main_process
        self.log = RunLog(output, tensorboard=config.tensorboard, enabled=main, resume_step=state["step"])
        if main:
            config.save(output / "config.yaml")
        if first == 1:
            self.evaluate(0)
        step = state["step"]
        with StopFlag() as stop, training_progress(config.max_steps, step, enabled=main) as show:
            for step in range(first, config.max_steps + 1):
                metrics = self.step(step)
                self.log.metrics(step, metrics)
                show(step, metrics)
                last = step == config.max_steps or stop.requested(accelerator)
                if last or _due(step, config.save_every):
                    self.save(step)
                if step == config.max_steps or _due(step, config.eval_every):
                    self.evaluate(step)
                if last:
                    break
        if step == config.max_steps:
            self.save_model(output / "final")
        self.log.close()
        return output

    def step(self, number: int) -> dict[str, float]:
        """One step: sample responses, find out what they looked at, weight their tokens, update the model."""
        config, self.meter, started = self.config, Meter(), time.perf_counter()
        self.policy.eval()
        with self.timed("rollout"):
            groups = self.rollout(number)
        self.build_prompt.prefetch(self.sampler.peek(len(groups)))  # the next step's clips, while this one computes
        # Groups whose rewards are all equal move nothing: they count in the loss's denominator, and cost no forward.
        groups.sort(key=self.has_gradient, reverse=True)
        with self.timed("score"):
            for micro in self.micro_batches([group for group in groups if self.has_gradient(group)] or groups[:1]):
                self.score(micro)
        self.policy.train()
        with self.timed("update"):
            self.update(groups, learning_rate(number, config))
        measure_groups(self.meter, groups)
        self.meter.add("time/step", time.perf_counter() - started)
        self.meter.maximum("memory/peak_gib", peak_memory_gib(self.accelerator.device))
        if number == 1 or _due(number, config.sample_every):
            self.log.sample(number, sample_record(groups[0], self.processor))
        return self.meter.result(self.accelerator)

    # rollout -> rewards -> advantages

    def rollout(self, number: int) -> list[Group]:
        """This process's groups. With dynamic sampling, groups without signal give way to new prompts."""
        config, world = self.config, self.accelerator.num_processes
        wanted = config.prompts_per_step // world
        groups: list[Group] = []
        rounds = config.max_sampling_rounds if config.dynamic_sampling else 1
        generator = torch.Generator(self.accelerator.device)
        generator.manual_seed(_seed(config.seed, number, self.accelerator.process_index))
        for _ in range(rounds):
            sampled = self.sample_groups(self.sampler.take(wanted - len(groups)), generator)
            for group in sampled:
                self.meter.add("groups/no_signal", float(not group.informative))
            groups += [group for group in sampled if group.informative or not config.dynamic_sampling]
            if len(groups) == wanted:
                break
        return groups or sampled[:1]

    def sample_groups(self, records: Sequence[Record], generator: torch.Generator) -> list[Group]:
        """G responses to each record, with rewards and advantages (docs/method.md section 6, docs/data.md)."""
        config, size = self.config, self.config.group_size
        with self.timed("decode"):
            self.build_prompt.prefetch(records)
            prompts = [self.build_prompt(record) for record in records]
        inputs = collate(prompts, self.pad_id, self.accelerator.device).inputs
        with self.timed("generate"), self.accelerator.autocast():
            sampled = self.engine.generate(inputs, generator)
        groups = []
        for index, prompt in enumerate(prompts):
            rows = slice(index * size, (index + 1) * size)
            ids, mask = sampled.ids[rows].cpu(), sampled.mask[rows].cpu()
            texts = [
                self.processor.tokenizer.decode(row[valid], skip_special_tokens=True)
                for row, valid in zip(ids, mask, strict=True)
            ]
            rewards = combine(self.reward_weights, texts, [prompt.record] * size, lenient=config.rewards_lenient)
            for name, unreadable in rewards.unreadable.items():
                self.meter.add(f"reward/{name}/unreadable", float(unreadable.float().mean()))
            accuracy = rewards.by_name.get("accuracy")
            if accuracy is None:
                only = {"accuracy": 1.0}
                accuracy = combine(only, texts, [prompt.record] * size, lenient=config.rewards_lenient).total
            total = rewards.total
            if config.overlong_buffer:
                total = total + overlong_penalty(
                    mask.sum(1), max_length=config.max_new_tokens, buffer=config.overlong_buffer
                )
            groups.append(
                Group(
                    prompt=prompt,
                    completion_ids=ids,
                    mask=mask,
                    rollout_logprobs=sampled.logprobs[rows].cpu(),
                    finished=sampled.finished[rows].cpu(),
                    texts=texts,
                    rewards=total,
                    accuracy=accuracy,
                    rewards_by_name=rewards.by_name,
                    advantages=group_advantages(total, scale=config.advantage_scale),
                )
            )
        return groups

    # score -> select -> slots -> divergence -> weights

    @torch.no_grad()
    def score(self, groups: Sequence[Group]) -> None:
        """Log-probabilities, entropy and frame mass in one forward; from these the weight of every token."""
        config = self.config
        batch = batch_groups(groups, self.pad_id, self.accelerator.device)
        sequences = self.unwrapped.sequences(batch)
        recorder = None
        if config.method == "appo" and batch.prompts.num_frames > 0:
            recorder = record_frame_mass(
                self.model,
                sequences.frame_ids,
                rows=sequences.rows,
                layers=config.layers,
                reduction=config.mass_reduction,
            )

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
            logprobs, entropy, lse = self.token_values(batch, hidden, weight, bias)
            for index, group in enumerate(groups):
                own = slice(index * config.group_size, (index + 1) * config.group_size), slice(group.mask.shape[1])
                group.old_logprobs, group.entropy = logprobs[own].cpu(), entropy[own].cpu()
                if recorder is not None:
                    mass = sequences.per_response(recorder.mass)[own][..., : group.prompt.num_frames]
                    with self.timed("weights"):
                        self.weigh(group, mass, hidden[own], weight, bias, lse[own])

        with self.accelerator.autocast(), recorder or nullcontext():
            self.policy(batch, head, sequences)
        if self.reference is not None:
            self.score_reference(groups, batch)

    def weigh(
        self, group: Group, mass: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor
    ) -> None:
        """Token weights of a group from its frame mass (docs/method.md sections 4 and 5)."""
        config, device = self.config, mass.device
        mask, accuracy = group.mask.to(device), group.accuracy.to(device)
        frames = select_frames(
            mass, mask, accuracy, strategy=config.strategy,
            top_tokens=config.top_tokens, top_frames=config.top_frames, threshold=config.threshold,
        )  # fmt: skip
        slots = perception_slots(mass, mask, frames, top_tokens=config.slot_tokens)
        divergence = group_divergence(hidden, weight, lse, slots, kind=config.divergence, bias=bias, **self.logits)
        weights = token_weights(divergence, slots, mask, alpha=config.alpha, average=config.average)
        group.target_frames, group.weights = frames.cpu(), weights.cpu()
        group.mass, group.mass_reduction = mass.cpu(), config.mass_reduction

    def token_values(self, batch: ResponseBatch, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """Log-probability, entropy and log-sum-exp of every response token, each (B, N) fp32; 0 at padding."""
        targets = batch.completion_ids[batch.mask]
        values = token_logprobs(hidden[batch.mask], weight, targets, bias=bias, **self.logits)
        return [torch.zeros(batch.mask.shape, device=x.device).masked_scatter(batch.mask, x) for x in values]

    @torch.no_grad()
    def score_reference(self, groups: Sequence[Group], batch: ResponseBatch) -> None:
        """Log-probabilities under the reference policy, for the KL term (beta > 0)."""

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.token_values(batch, hidden, weight, bias)[0]

        with self.accelerator.autocast(), self.reference() as reference:
            logprobs = reference(batch, head).cpu()
        for group, rows in zip(groups, logprobs.split(self.config.group_size), strict=True):
            group.ref_logprobs = rows[:, : group.mask.shape[1]]

    # loss -> update

    def update(self, groups: Sequence[Group], rate: float) -> None:
        """``updates_per_step`` optimizer steps, each on its own share of the groups (which come with signal first).

        The loss of a share is divided by its number of tokens over all processes, so that micro-batches and processes
        add up to the gradient of one large batch.
        """
        config, accelerator = self.config, self.accelerator
        if self.total(sum(group.informative for group in groups)) < config.min_groups:
            self.meter.add("updates/skipped", 1.0)
            return
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        scored = self.tensor([sum(group.scored for group in groups)])
        updates = min(config.updates_per_step, int(accelerator.gather(scored).min()))
        for number in range(updates):
            share = groups[number::updates]
            tokens, responses = self.total(sum(g.tokens for g in share)), self.total(len(share) * config.group_size)
            parts = list(self.micro_batches([g for g in share if g.scored]))
            for index, part in enumerate(parts):
                last = index == len(parts) - 1
                with self.timed("loss"), nullcontext() if last else accelerator.no_sync(self.policy):
                    loss = self.loss(part, tokens, responses)
                    accelerator.backward(loss * accelerator.num_processes)  # processes are averaged, shares are summed
            norm = accelerator.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.meter.add("grad_norm", norm)
        self.meter.add("lr", rate)

    def loss(self, groups: Sequence[Group], tokens: float, responses: float) -> Tensor:
        """The weighted surrogate of some groups as part of a batch of ``tokens`` and ``responses`` (eq. 20)."""
        config = self.config
        batch = batch_groups(groups, self.pad_id, self.accelerator.device)

        def stack(values: Sequence[Tensor]) -> Tensor:
            return stack_tokens(values, 0.0).to(batch.mask.device)

        weights = [torch.ones_like(g.old_logprobs) if g.weights is None else g.weights for g in groups]
        arguments: dict[str, Any] = {
            "token_weights": stack(weights),
            "ref_logprobs": stack([g.ref_logprobs for g in groups if g.ref_logprobs is not None])
            if config.beta
            else None,
            "rollout_logprobs": stack([g.rollout_logprobs for g in groups]) if config.rollout_cap else None,
            "rollout_cap": config.rollout_cap or 2.0,
            "eps_low": config.eps_low,
            "eps_high": config.eps_high,
            "delta": config.delta,
            "beta": config.beta,
            "level": config.level,
            "aggregation": config.aggregation,
            "num_items": tokens,
            "max_length": config.max_new_tokens,
            "entropy_coef": config.entropy_coef,
        } | self.logits
        advantages = torch.cat([group.advantages for group in groups]).to(batch.mask.device)

        old = stack([group.old_logprobs for group in groups])

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> SurrogateOutput:
            return linear_weighted_surrogate(
                hidden, weight, batch.completion_ids, old, advantages, batch.mask, bias=bias, **arguments
            )

        with self.accelerator.autocast():
            result = self.policy(batch, head)
        count = sum(group.tokens for group in groups)
        weighted = sum(int((w > 1).sum()) for w in weights) / count
        measure_loss(self.meter, result, count, weighted)
        # "dapo" divides by the tokens of the whole batch itself; the others are means over these groups alone.
        share = {"dapo": 1.0, "bnpo": count / tokens}.get(config.aggregation, len(batch.mask) / responses)
        return result.loss * share

    def has_gradient(self, group: Group) -> bool:
        """Groups whose rewards are all equal move nothing unless there is a KL or an entropy term."""
        return group.informative or self.config.beta > 0 or self.config.entropy_coef != 0

    # keeping track

    def evaluate(self, step: int) -> None:
        """Answers to the held-out records, each process its share."""
        self.policy.eval()
        for split, records in self.eval_splits.items():
            values = evaluate(
                self.model,
                self.processor,
                records,
                self.config,
                builder=self.build_prompt,
                accelerator=self.accelerator,
            )
            self.log.evaluation(step, split, values)

    def save(self, step: int) -> None:
        samplers = gather_object([self.sampler.state_dict()])
        folder = Path(self.config.output) / "checkpoints"
        checkpoints.save(self.accelerator, folder, step, {"samplers": samplers}, self.config.keep_checkpoints)

    def save_model(self, folder: Path) -> None:
        """The model (or its adapters) and the processor, as ``from_pretrained`` loads them."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)

    def micro_batches(self, groups: Sequence[Group]) -> Iterator[Sequence[Group]]:
        size = self.config.micro_groups
        return (groups[start : start + size] for start in range(0, len(groups), size))

    def tensor(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.accelerator.device)

    def total(self, value: float) -> float:
        """The sum over all processes."""
        return float(self.accelerator.reduce(self.tensor([float(value)]), "sum"))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.meter.total(f"time/{phase}", time.perf_counter() - start)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed(*parts: int) -> int:
    """One seed from several numbers, so that a step's samples do not depend on how the run came to it."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
