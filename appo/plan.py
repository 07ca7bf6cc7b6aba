"""Memory and work of a training step, before anything is loaded: `appo plan`. docs/performance.md has the model.

Everything follows from the sizes of a model (`Architecture`) and of the work (`Workload`). FLOPs are counted as
torch.utils.flop_counter does: two per multiply-add of matrix products, attention as the full square of a
padded sequence, or as the pairs that a group behind one prompt has. Memory is that of
`Trainer`: fp32 master weights, AdamW, autocast to bf16, attention that keeps no matrix, no logits of whole responses.
Times are no measurements: FLOPs over a rate and bytes over a bandwidth that the user states.
"""

from dataclasses import dataclass, replace
from typing import Any

from appo.config import APPOConfig
from appo.models.architectures import find_architecture
from appo.planned_tokens import PlannedTokens
from appo.workload import STATE_BYTES
from appo.workload import Machine as Machine
from appo.workload import Workload as Workload

GIB = float(1 << 30)
# Backward products per forward one: two for a matrix; attention kernels compute the scores again.
MATRIX_BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5
# Tiles of logits on a GPU: bytes, whatever the number of tokens, and tokens (`appo_kernels.vocabulary.output_head`).
HEAD_TILE, HEAD_TILE_ROWS = 512 << 20, 4096
# Copies of (B, V) fp32 alive while a token is sampled: logits, scores, allowed scores, probabilities, noise.
SAMPLING_COPIES = 5


@dataclass(frozen=True)
class Plan(PlannedTokens):
    """The costs of one step of ``Trainer``; bytes and FLOPs are those of one GPU."""

    # FLOPs

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
        again = 1.0 if work.checkpointing else 0.0
        matrix_backward = MATRIX_BACKWARD / 2 if work.lora_rank else MATRIX_BACKWARD
        layers = matrices * (1 + again + matrix_backward) + attention * (1 + again + ATTENTION_BACKWARD)
        frozen_tower = work.freeze_vision or work.lora_rank
        vision = work.prompts_per_gpu * self.pieces * self.vision_flop() * (1.0 if frozen_tower else 3.0 + again)
        return vision + layers + (2 if work.lora_rank else 3) * self.head_flop(rows * work.response)

    # Memory

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

    def activations(self) -> float:
        """Bytes kept by the forward of one micro-batch."""
        m, work = self.model, self.work
        ends = 4 * m.hidden * 3  # embeddings, and the last norm's input and normalised input
        passed = work.width if work.lora_rank else 4  # a frozen model's hidden states have its dtype
        layer = passed * m.hidden if work.checkpointing else self.layer_activations()
        return self.micro_tokens * (m.layers * layer + ends)

    def layer_workspace(self) -> float:
        """Bytes that the backward of the last feed-forward layer adds: two gradients of its hidden units beyond what it
        has set free. The gradients of the residual take the place of what the last norm kept."""
        return 2.0 * self.micro_tokens * self.model.intermediate * self.work.width

    def backward_workspace(self) -> float:
        """Bytes that the backward of a layer adds; with checkpointing its activations are made for it."""
        again = self.micro_tokens * self.layer_activations() if self.work.checkpointing else 0.0
        return again + self.layer_workspace()

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
        """What is in no decoder layer: with shards it is whole from an update's forward to its backward."""
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
        return {"weights in bf16": float(2 * m.layers * m.layer_parameters) if cast else 0.0}

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
        gone = 0.0 if work.checkpointing else self.micro_tokens * self.layer_activations()
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
        """Bytes of the host's memory that a GPU's shards are in."""
        whole = replace(self, work=replace(self.work, offload=False))
        return sum(whole.standing().values()) + whole.gradient_bytes() if self.work.offload else 0.0

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

    def flop(self) -> dict[str, float]:
        """Phase -> FLOPs."""
        return {"rollout": self.rollout_flop(), "score": self.score_flop(), "update": self.update_flop()}

    def eager_bytes(self) -> float:
        """Attention matrices that the released trainer keeps of one group: one row of keys for each token and head."""
        return float(
            self.work.responses * self.model.layers * self.model.heads * self.work.response * self.sequence * 2
        )

    # Time

    def seconds(self, rate: float, bandwidth: float) -> dict[str, float]:
        """Phase -> seconds at ``rate`` FLOP/s; decoding also reads weights and cache at ``bandwidth`` bytes/s."""
        found = {phase: flop / rate for phase, flop in self.flop().items()}
        weights = self.model.text_parameters * self.work.width
        found["rollout"] += self.work.response * (weights + self.rollout_bytes().get("cache", 0.0) / 2) / bandwidth
        return found

    def text(self, *, memory: float, rate: float, bandwidth: float) -> str:
        """The plan for people. memory: bytes of a GPU."""
        m, work = self.model, self.work
        sharing = f"{work.gpus} GPUs, weights and optimizer sharded" if work.gpus > 1 else "1 GPU"
        lines = [
            f"{m.name}: {m.parameters / 1e9:.2f} G parameters, {self.trained / 1e9:.2f} G trained; {sharing}",
            f"{work.prompts} prompts x {work.responses} responses a step; {work.frames} frames x {work.frame_tokens} "
            f"tokens, prompt {self.prompt_tokens:,}, response {work.response:,}",
            f"{self.micro_responses} responses in one forward and backward, {self.micro_tokens:,} tokens",
            "",
            "Memory of a GPU, GiB",
        ]
        for phase, parts in self.memory().items():
            shown = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts.items() if value / GIB >= 0.05)
            lines.append(f"  {phase:15s} {sum(parts.values()) / GIB:6.1f}   {shown}")
        verdict = "fits" if self.peak() <= memory else "does not fit"
        lines.append(
            f"  peak            {self.peak() / GIB:6.1f}   {verdict} in {memory / GIB:.0f} GiB{self._advice(memory)}"
        )
        lines.append(f"  not made: attention matrices of one group's generation, {self.eager_bytes() / GIB:.1f} GiB")
        lines += ["", f"Work of a GPU in a step, and time at {rate / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.1f} TB/s"]
        seconds = self.seconds(rate, bandwidth)
        for phase, flop in self.flop().items():
            lines.append(f"  {phase:15s} {flop / 1e12:10,.0f} TFLOP  {seconds[phase]:8.1f} s")
        extra = self.recording_flop() + self.divergence_flop()
        share = extra / sum(self.flop().values())
        lines.append(f"  of which APPO   {extra / 1e12:10,.0f} TFLOP  {100 * share:7.1f} % (frame mass and divergence)")
        lines.append(f"  step            {'':18s}{sum(seconds.values()):8.1f} s (an estimate: no GPU was asked)")
        return "\n".join(lines)

    @property
    def least_tokens(self) -> int:
        """Of micro-batches of one response."""
        return self.prompt_tokens + self.work.response

    def _advice(self, memory: float) -> str:
        if self.peak() <= memory:
            return ""
        if not self.work.checkpointing:
            return "; try --gradient-checkpointing"
        if self.work.micro_groups > 1:
            return "; try --micro-groups 1"
        if self.pieces < self.work.responses:
            return f"; try --micro-tokens {self.least_tokens}"
        return "; use more GPUs, fewer frames or shorter responses, or let --fit look"


def planned(config: APPOConfig, gpus: int) -> Plan:
    """The plan of a run's settings. Tokens of a frame are those of ``max_pixels`` at 28 x 28 pixels a token, and a
    temporal grid step is two frames, as in Qwen2.5-VL. Raises ConfigError for a model whose sizes are not known."""
    return Plan(
        find_architecture(config.model),
        Workload(
            frames=max(1, config.max_frames // 2),
            frame_tokens=max(1, config.max_pixels // 28**2),
            response=config.max_new_tokens,
            responses=config.group_size,
            prompts=config.prompts_per_step,
            micro_groups=config.micro_groups,
            micro_tokens=config.micro_tokens,
            layers=config.layers,
            target_frames=config.top_frames,
            slots=config.slot_tokens,
            gpus=gpus,
            mixed=config.dtype != "float32",
            checkpointing=config.gradient_checkpointing,
            freeze_vision=config.freeze_vision,
            share_prompt=config.share_prompt != "off" and "flash" not in config.attn_implementation,
            lora_rank=config.lora_rank,
            optimizer=config.optimizer,
            shard_group=1 if config.shard == "none" else config.shard_group,
            offload=config.offload,
            reference=config.beta > 0,
            rollout_tokens=config.rollout_tokens,
            own_rollout=config.engine == "transformers",
        ),
    )


def fit(plan: Plan, memory: float) -> tuple[Plan, list[str]] | None:
    """The plan with the fewest changes that fits in ``memory`` bytes a GPU, and these as options; None if none does.

    In this order: activations once more in the backward, a group behind one prompt, one group at a time, one response
    at a time, fewer tokens sampled at a time (none of which changes what is learned), where the model is in shards
    another engine that samples, then LoRA, then up to 64 times the GPUs.
    """
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--gradient-checkpointing", {"checkpointing": True}),
        ("--share-prompt", {"share_prompt": True}),
        ("--micro-groups 1", {"micro_groups": 1}),
        (f"--micro-tokens {plan.least_tokens}", {"micro_tokens": plan.least_tokens}),
        ("--rollout-tokens 32768", {"rollout_tokens": min(32_768, plan.work.rollout_tokens)}),
    ]
    apart, lora = ("--other-engine", {"own_rollout": False}), ("--lora-rank 64", {"lora_rank": 64})
    ways = [changes[:count] for count in range(len(changes) + 1)]
    gpus = plan.work.gpus
    for factor in (1, 2, 4, 8, 16, 32, 64):
        more = []
        if factor > 1:
            prompts = -(-plan.work.prompts // (gpus * factor)) * gpus * factor
            more = [(f"--gpus {gpus * factor} --prompts {prompts}", {"gpus": gpus * factor, "prompts": prompts})]
        tried = [way + more for way in ways]
        if gpus * factor > 1:
            tried.append([*changes, apart, *more])
        for way in [*tried, [*changes, lora, *more]]:
            new = {name: value for _, values in way for name, value in values.items()}
            found = replace(plan, work=replace(plan.work, **new))
            if found.peak() <= memory:
                used = [option for option, values in way if any(getattr(plan.work, k) != v for k, v in values.items())]
                return found, used
    return None
