"""FLOPs of a planned step.

They are counted as torch.utils.flop_counter does: two per multiply-add of matrix products, attention as the full square
of a padded sequence, or as the pairs that a group behind one prompt has.
"""

from dataclasses import dataclass

from appo.planning.tokens import PlannedTokens

# Backward products per forward one: two for a matrix; attention kernels compute the scores again.
MATRIX_BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5


@dataclass(frozen=True)
class PlannedFlops(PlannedTokens):
    """FLOPs of one GPU in one step of ``Trainer``."""

    def layers_flop(self, tokens: float, keys: float) -> tuple[float, float]:
        """Matrices, and attention over ``keys`` keys a token, of a forward through all decoder layers."""
        m = self.model
        matrices = 2 * m.hidden * m.query_width + 2 * m.hidden * m.key_width + 3 * m.hidden * m.intermediate
        return 2.0 * m.layers * matrices * tokens, 4.0 * m.layers * m.query_width * keys * tokens

    def head_flop(self, tokens: float) -> float:
        """One product with the head."""
        return 2.0 * self.model.head_parameters * tokens

    def vision_flop(self) -> float:
        """A forward of the tower on one video."""
        v, work = self.model.vision, self.work
        per_step = work.frame_tokens * v.merge**2  # patches of a temporal grid step, which attention does not leave
        patches = float(per_step * work.frames)
        feed_forward = (3 if v.gated else 2) * v.hidden * v.intermediate
        window = min(per_step, (v.window * v.merge) ** 2) if v.window else per_step
        seen = v.full_attention * per_step + (v.depth - v.full_attention) * window
        layers = 2.0 * v.depth * (4 * v.hidden**2 + feed_forward) + 4.0 * v.hidden * seen
        wide = v.hidden * v.merge**2
        merger = 2.0 * (1 + v.deepstack) * (wide * wide + wide * v.out_hidden) / v.merge**2
        return patches * (layers + merger + 2.0 * 3 * v.temporal_patch * v.patch**2 * v.hidden)

    def rollout_flop(self) -> float:
        """The prompt once per group, then N tokens of each response against a growing cache."""
        work, groups = self.work, self.work.prompts_per_gpu
        sampled = groups * work.responses * work.response
        prefill = sum(self.layers_flop(groups * self.prompt_tokens, self.prompt_tokens))
        decode = sum(self.layers_flop(sampled, self.prompt_tokens + work.response / 2))
        return groups * self.vision_flop() + prefill + decode + self.head_flop(sampled)

    def score_flop(self) -> float:
        """One forward, log-probabilities, and what the weights take."""
        work, rows = self.work, self.work.prompts_per_gpu * self.work.responses
        forward = sum(self.layers_flop(work.prompts_per_gpu * self.group_tokens, self.keys))
        vision = work.prompts_per_gpu * self.pieces * self.vision_flop()
        return vision + forward + self.head_flop(rows * work.response) + self.recording_flop() + self.divergence_flop()

    def recording_flop(self) -> float:
        """Scores of the response rows with all keys, in each tapped layer."""
        rows = self.work.prompts_per_gpu * self.work.responses * self.work.response
        return 2.0 * self.work.layers * self.model.query_width * rows * self.sequence

    def divergence_flop(self) -> float:
        """Logits of the rows that are in a slot: each once, at most all."""
        work = self.work
        unique = min(work.response, work.target_frames * work.slots)
        return self.head_flop(work.prompts_per_gpu * work.responses * unique)

    def update_flop(self) -> float:
        """Forward and backward over all groups; three products with the head. A frozen tower only runs forward, and
        frozen weights have no gradient, so that one product of two is left."""
        work, rows = self.work, self.work.prompts_per_gpu * self.work.responses
        matrices, attention = self.layers_flop(work.prompts_per_gpu * self.group_tokens, self.keys)
        again = self.checkpointed.count(True) / self.model.layers
        matrix_backward = MATRIX_BACKWARD / 2 if work.lora_rank else MATRIX_BACKWARD
        layers = matrices * (1 + again + matrix_backward) + attention * (1 + again + ATTENTION_BACKWARD)
        frozen_tower = work.freeze_vision or work.lora_rank
        vision = work.prompts_per_gpu * self.pieces * self.vision_flop() * (1.0 if frozen_tower else 3.0 + again)
        return vision + layers + (2 if work.lora_rank else 3) * self.head_flop(rows * work.response)

    def flop(self) -> dict[str, float]:
        """Phase -> FLOPs."""
        return {"rollout": self.rollout_flop(), "score": self.score_flop(), "update": self.update_flop()}
