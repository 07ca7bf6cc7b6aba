"""Memory of a planned step: that of `appo.train.trainer.Trainer`. docs/performance.md has the model.

It has fp32 master weights, AdamW, autocast to bf16, attention that keeps no matrix, and no logits of whole responses.
"""

from dataclasses import dataclass, replace

from appo.planning.tokens import PlannedTokens
from appo.planning.workload import STATE_BYTES

# Tiles of logits on a GPU: bytes, whatever the number of tokens, and tokens (`appo_kernels.vocabulary.output_head`).
HEAD_TILE, HEAD_TILE_ROWS = 512 << 20, 4096
# Copies of (B, V) fp32 alive while a token is sampled: logits, scores, allowed scores, probabilities, noise.
SAMPLING_COPIES = 5


@dataclass(frozen=True)
class PlannedMemory(PlannedTokens):
    """Bytes of one GPU in the phases of a step."""

    @property
    def adapters(self) -> int:
        """Parameters of the adapters on the four projections of attention in every layer."""
        m = self.model
        return self.work.lora_rank * m.layers * 2 * (2 * m.hidden + m.query_width + m.key_width)

    @property
    def trained(self) -> int:
        if self.work.lora_rank:
            return self.adapters
        return self.model.text_parameters if self.work.freeze_vision else self.model.parameters

    def layer_activations(self) -> float:
        """Bytes that one decoder layer keeps for its backward, for each token (the table in docs/performance.md)."""
        m, w, lora = self.model, self.work.width, self.work.lora_rank
        # fp32, before attention and before the feed-forward layer: the input, and what a trained weight multiplies.
        residual_and_norm = 2 * (4 if lora else 4 + 4) * m.hidden
        # Under autocast each linear layer that reads a norm has a copy of its own: query, key, value; gate, up. Frozen
        # ones keep nothing: adapters on query, key and value keep theirs (one in fp32), and that of the output.
        if lora:
            inputs = (3 * 2 * m.hidden + 2 * m.query_width if self.work.mixed else 4 * m.hidden) + 4 * lora * w
        else:
            inputs = (5 * 2 if self.work.mixed else 2 * 4) * m.hidden
        if self.work.share_prompt:  # query, output, and key and value as they are
            attention = 2 * (m.query_width + m.key_width) * w + 4 * m.heads
        else:  # key and value repeated for the query heads, since a mask rules out grouped kernels, and the mask itself
            attention = 4 * m.query_width * w + 4 * m.heads + self.sequence * w
        if m.query_norm:  # what the norms of query and key normalised, and what they multiplied
            attention += (4 if lora else 8) * (m.query_width + m.key_width)
        # Gate, its activation, up, and the product that a trained matrix reads.
        return residual_and_norm + inputs + attention + (3 if lora else 4) * m.intermediate * w

    def layer_input(self) -> float:
        """Bytes that a checkpointed layer keeps, for each token; a frozen model's hidden states have its dtype."""
        return float(self.model.hidden * (self.work.width if self.work.lora_rank else 4))

    def kept(self) -> list[float]:
        """Bytes on the GPU that each layer keeps for its backward, for each token."""
        checkpointed = 0.0 if self.work.checkpoint_offload else self.layer_input()
        return [checkpointed if again else self.layer_activations() for again in self.checkpointed]

    def tower_layer_activations(self) -> float:
        """Bytes that a layer of a trained tower keeps, for each patch."""
        v, w = self.model.vision, self.work.width
        if v.gated:  # RMS norms: their input in fp32, normalised; and what the three linear layers behind them read
            norms = 2 * (4 + w) * v.hidden + (3 * 2 if self.work.mixed else 2 * 4) * v.hidden + 2 * 4
        else:  # layer norms: their input, two numbers, and their output
            norms = 2 * 2 * w * v.hidden + 2 * 2 * 4
        # The joint projection, query and key turned, output by frame or window, and in one tensor.
        attention = (3 + 2 + 1 + 1) * v.hidden * w + 4 * v.heads
        return norms + attention + (4 if v.gated else 2) * v.intermediate * w

    def tower_activations(self) -> float:
        """Bytes that a trained tower keeps of the videos of one micro-batch; a frozen one keeps none."""
        v, work = self.model.vision, self.work
        if work.freeze_vision or work.lora_rank:
            return 0.0
        pixels = 3 * v.temporal_patch * v.patch**2 * work.width
        mergers = (4 if v.gated else 2) * (1 + v.deepstack) * v.hidden * work.width
        again = self.tower_layers_again
        passed = 0.0 if work.checkpoint_offload else float(v.hidden * work.width)
        layers = again * passed + (v.depth - again) * self.tower_layer_activations()
        return self.micro_patches * (pixels + layers + mergers)

    @property
    def tower_layers_again(self) -> int:
        """Layers of the tower that are computed again in the backward."""
        return -(-self.model.vision.depth // self.work.checkpoint_every) if self.work.checkpointing else 0

    @property
    def micro_patches(self) -> int:
        """Patches of the videos of one micro-batch."""
        return self.micro_prompts * self.work.frames * self.work.frame_tokens * self.model.vision.merge**2

    def activations(self) -> float:
        """Bytes kept by the forward of one micro-batch."""
        ends = 4 * self.model.hidden * 3  # embeddings, and the last norm's input and normalised input
        return self.micro_tokens * (sum(self.kept()) + ends) + self.tower_activations()

    def layer_workspace(self) -> float:
        """Bytes that the backward of the last feed-forward layer adds: two gradients of its hidden units beyond what it
        has set free. The gradients of the residual take the place of what the last norm kept."""
        return 2.0 * self.micro_tokens * self.model.intermediate * self.work.width

    def backward_workspace(self) -> float:
        """Bytes that the backward of a layer adds to all that was kept. The activations of a checkpointed layer are
        made for it, when those of the layers behind it are gone."""
        kept = self.kept()
        made = self.layer_activations() + (self.layer_input() if self.work.checkpoint_offload else 0.0)
        added = [(made if again else 0.0) - sum(kept[i + 1 :]) for i, again in enumerate(self.checkpointed)]
        return self.micro_tokens * max(added) + self.layer_workspace()

    def head_tile(self) -> float:
        """Bytes of the logits that the loss makes at a time: all of a micro-batch where they take less than a gradient
        of the head would, else a tile of them."""
        m, tokens = self.model, self.micro_responses * self.work.response
        budget = HEAD_TILE
        if tokens <= min(m.hidden, HEAD_TILE_ROWS):
            budget = max(budget, 4 * m.head_parameters)
        return 4.0 * m.vocabulary * max(1, min(tokens, HEAD_TILE_ROWS, budget // (4 * m.vocabulary)))

    def head_workspace(self) -> float:
        """Bytes that the loss adds: it makes the head's gradient in its forward, in fp32, and a tile of logits."""
        gradient = 0.0 if self.work.lora_rank else 4.0 * self.model.head_parameters
        return gradient + self.head_tile()

    @property
    def root_parameters(self) -> int:
        """Parameters in no decoder layer: with shards they are whole from an update's forward to its backward."""
        return self.model.parameters - self.model.layers * self.model.layer_parameters

    def standing(self) -> dict[str, float]:
        """Bytes that are there in every phase."""
        m, work = self.model, self.work
        shards = 0.0 if work.offload else 1 / work.shards
        # A frozen model is kept in the dtype of the forward.
        weights = work.width * m.parameters + 4 * self.adapters if work.lora_rank else 4 * m.parameters
        reference = 4 * m.parameters if work.reference and not work.lora_rank else 0
        return {
            "weights": weights * shards,
            "reference": reference * shards,
            "optimizer": STATE_BYTES[work.optimizer] * self.trained * shards,
        }

    def cast_bytes(self) -> dict[str, float]:
        """Beside weights that are whole: the copies of them that autocast keeps."""
        m, work = self.model, self.work
        cast = work.mixed and not work.sharded and not work.lora_rank
        trained = m.layers * m.layer_parameters + (0 if work.freeze_vision else m.vision.parameters)
        return {"weights in bf16": float(2 * trained) if cast else 0.0}

    def rollout_bytes(self) -> dict[str, float]:
        m, work = self.model, self.work
        if not work.own_rollout:
            return {}
        # Rotary positions are in fp32, and the keys with them; a shared prompt's are kept in the dtype of the forward.
        token, shared_token = m.key_width * (4 + work.width), m.key_width * 2 * work.width
        if work.share_prompt:
            P, N = self.prompt_tokens, work.response
            groups = min(work.prompts_per_gpu, max(1, work.rollout_tokens // (P + work.responses * N)))
            rows = min(groups * work.responses, max(1, (work.rollout_tokens - P) // N))
            prompts, growing = groups * P * shared_token, rows * N * token
        else:
            rows = min(work.prompts_per_gpu * work.responses, max(1, work.rollout_tokens // self.sequence))
            prompts, growing = 0, rows * self.sequence * token
        cache = m.layers * (prompts + growing) + growing  # a layer's cache is copied when it grows
        sampling = SAMPLING_COPIES * 4 * rows * m.vocabulary
        # Gathering goes through buffers, before there is a cache: what is in no layer, then two layers.
        buffers = work.width * (self.root_parameters + 2 * m.layer_parameters)
        gathering = max(0, buffers - cache - sampling) if work.sharded else 0
        return {
            "whole model": float(work.width * m.parameters) if work.sharded else 0.0,
            "gathering": float(gathering),
            "cache": float(cache),
            "sampling": float(sampling),
        }

    def gathered_bytes(self) -> float:
        """Bytes of the model that are whole during an update with shards, in the dtype of the forward."""
        m, work = self.model, self.work
        layers = min(2, m.layers)  # one in use, the next on its way
        return float(work.width * (self.root_parameters + layers * m.layer_parameters)) if work.sharded else 0.0

    def update_workspace(self) -> float:
        """Bytes beside activations: of the loss, or later of the backward; with shards also of whole gradients."""
        m, work = self.model, self.work
        if not work.sharded or work.lora_rank:
            return max(self.backward_workspace(), self.head_workspace())
        # The head's gradient and a layer's, whose activations are gone unless it has just computed them again.
        gone = 0.0 if self.checkpointed[-1] else self.micro_tokens * self.layer_activations()
        reduced = 4 * m.layer_parameters if work.mixed else 0  # once more, in fp32, on its way
        gradients = max(0.0, work.width * (m.head_parameters + m.layer_parameters) + reduced - gone)
        # At the end those of all that is in no layer, and in fp32 once more, on their way; no activations are left.
        root = self.root_parameters - (m.vision.parameters if work.freeze_vision else 0)
        end = (work.width + 4) * root - self.activations()
        return max(self.head_workspace(), self.backward_workspace() + gradients, end)

    def update_bytes(self) -> dict[str, float]:
        return {
            "gathered": self.gathered_bytes(),
            "gradients": self.gradient_bytes(),
            "activations": self.activations(),
            "at work": self.update_workspace(),
        }

    def gradient_bytes(self) -> float:
        return 0.0 if self.work.offload else 4 * self.trained / self.work.shards

    def optimizer_bytes(self) -> dict[str, float]:
        return {"gradients": (2 if self.work.foreach else 1) * self.gradient_bytes()}

    def host_bytes(self) -> float:
        """Bytes of the host's memory that a GPU's shards and the inputs of its checkpointed layers are in."""
        inputs = self.layer_input() * self.micro_tokens * self.checkpointed.count(True)
        if not (self.work.freeze_vision or self.work.lora_rank):
            inputs += self.micro_patches * self.model.vision.hidden * self.work.width * self.tower_layers_again
        found = inputs if self.work.checkpoint_offload else 0.0
        if not self.work.offload:
            return found
        whole = replace(self, work=replace(self.work, offload=False))
        return found + sum(whole.standing().values()) + whole.gradient_bytes()

    def memory(self) -> dict[str, dict[str, float]]:
        """Phase -> part -> bytes."""
        standing, cast = self.standing(), self.cast_bytes()
        return {
            "rollout": standing | cast | self.rollout_bytes(),
            "update": standing | cast | self.update_bytes(),
            "optimizer step": standing | self.optimizer_bytes(),
        }

    def peak(self) -> float:
        return max(sum(parts.values()) for parts in self.memory().values())

    def eager_bytes(self) -> float:
        """Attention matrices that the released trainer keeps of one group: one row of keys for each token and head."""
        return float(
            self.work.responses * self.model.layers * self.model.heads * self.work.response * self.sequence * 2
        )
