"""Tokens and query-key pairs that scoring and update compute for a group, however it is laid out and split."""

from dataclasses import dataclass

from appo.constraints import ConfigError
from appo.models.architectures import Architecture
from appo.planning.workload import Workload


@dataclass(frozen=True)
class PlannedTokens:
    """Counts of `appo.train.micro_batches` and `appo.train.packing` for groups of equal responses."""

    model: Architecture
    work: Workload

    def __post_init__(self) -> None:
        if self.work.checkpoint_every > self.model.layers:
            raise ConfigError(
                f"`checkpoint_every`: expected at most the {self.model.layers} layers of {self.model.name}, got "
                f"{self.work.checkpoint_every}. Lower it, or leave gradient_checkpointing out."
            )

    @property
    def checkpointed(self) -> list[bool]:
        """Whether each decoder layer is computed again in the backward (`appo.models.loaded.enable_checkpointing`)."""
        work = self.work
        return [work.checkpointing and layer % work.checkpoint_every == 0 for layer in range(self.model.layers)]

    @property
    def prompt_tokens(self) -> int:
        work = self.work
        return work.text + work.frames * (work.frame_tokens + self.model.frame_text)

    @property
    def sequence(self) -> int:
        return self.prompt_tokens + self.work.response

    @property
    def whole_group(self) -> int:
        """Tokens of a group that is not split: each response with its prompt, or all behind one."""
        work = self.work
        if work.share_prompt:
            return self.prompt_tokens + work.responses * work.response
        return work.responses * self.sequence

    @property
    def responses_at_once(self) -> int:
        """Responses of a group in one micro-batch (`appo.train.micro_batches`)."""
        work = self.work
        if not work.micro_tokens or self.whole_group <= work.micro_tokens:
            return work.responses
        room = work.micro_tokens - (self.prompt_tokens if work.share_prompt else 0)
        return min(work.responses, max(1, room // (work.response if work.share_prompt else self.sequence)))

    @property
    def pieces(self) -> int:
        """Micro-batches that a group is split into, each of which computes the prompt."""
        return -(-self.work.responses // self.responses_at_once)

    @property
    def group_tokens(self) -> int:
        """Tokens of a group that scoring and update compute."""
        return self.whole_group + (self.pieces - 1) * (self.prompt_tokens if self.work.share_prompt else 0)

    @property
    def pairs(self) -> int:
        """Query-key pairs of a group in scoring and update: of packed groups those that are seen
        (`appo_kernels.GroupLayout.pairs`), of separate sequences, whose padding needs a mask, the full square."""
        work, P, N = self.work, self.prompt_tokens, self.work.response
        if work.share_prompt:
            return self.pieces * P * (P + 1) // 2 + work.responses * (P * N + N * (N + 1) // 2)
        return work.responses * self.sequence**2

    @property
    def keys(self) -> float:
        """Keys of a token in scoring and update, on average."""
        return self.pairs / self.group_tokens

    @property
    def micro_responses(self) -> int:
        """Responses of one micro-batch."""
        work = self.work
        if self.pieces > 1:
            return self.responses_at_once
        groups = min(work.micro_groups, work.prompts_per_gpu)
        if work.micro_tokens:
            groups = min(groups, max(1, work.micro_tokens // self.whole_group))
        return groups * work.responses

    @property
    def micro_prompts(self) -> int:
        """Prompts of one micro-batch, each of which the vision tower reads once."""
        return -(-self.micro_responses // self.work.responses)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch."""
        if not self.work.share_prompt:
            return self.micro_responses * self.sequence
        return self.micro_prompts * self.prompt_tokens + self.micro_responses * self.work.response
