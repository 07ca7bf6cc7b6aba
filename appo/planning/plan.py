"""A training step before anything is loaded: `appo plan`. docs/performance.md has the model.

Everything follows from the sizes of a model (`Architecture`) and of the work (`Workload`). Times are no measurements:
FLOPs over a rate and bytes over a bandwidth that the user states.
"""

from dataclasses import dataclass

from appo.config import APPOConfig
from appo.models.sizes import find_architecture
from appo.planning.flops import PlannedFlops
from appo.planning.memory import PlannedMemory
from appo.planning.workload import Workload, spelled

GIB = float(1 << 30)


@dataclass(frozen=True)
class Plan(PlannedFlops, PlannedMemory):
    """The costs of one step of ``Trainer``; bytes and FLOPs are those of one GPU."""

    def seconds(self, rate: float, bandwidth: float) -> dict[str, float]:
        """Phase -> seconds at ``rate`` FLOP/s; decoding also reads weights and cache at ``bandwidth`` bytes/s."""
        found = {phase: flop / rate for phase, flop in self.flop().items()}
        weights = self.model.text_parameters * self.work.width
        found["rollout"] += self.work.response * (weights + self.rollout_bytes().get("cache", 0.0) / 2) / bandwidth
        return found

    def text(self, *, memory: float, rate: float, bandwidth: float, settings: bool = False) -> str:
        """The plan for people. memory: bytes of a GPU; settings: advice names settings of a run, not options."""
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
        peak, room = self.peak(), f"in {memory / GIB:.0f} GiB"
        verdict = f"fits {room}" if peak <= memory else f"does not fit {room}; {self._advice(settings)}"
        lines.append(f"  peak            {peak / GIB:6.1f}   {verdict}")
        if self.host_bytes():
            lines.append(f"  of the host     {self.host_bytes() / GIB:6.1f}")
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

    def _advice(self, settings: bool) -> str:
        """The next thing to try for a plan that does not fit."""
        if not self.work.checkpointing:
            change = spelled("checkpointing", True, settings=settings)
        elif self.work.micro_groups > 1:
            change = spelled("micro_groups", 1, settings=settings)
        elif self.pieces < self.work.responses:
            change = spelled("micro_tokens", self.least_tokens, settings=settings)
        else:
            return "use more GPUs, fewer frames or shorter responses, or let --fit look"
        return f"try {change}"


def planned(config: APPOConfig, gpus: int) -> Plan:
    """The plan of a run's settings. Tokens of a frame are those of ``max_pixels`` (at 28 x 28 pixels a token in
    Qwen2.5-VL, where a grid step is two frames), unless the model has frames of one size. Raises ConfigError for a
    model whose sizes are not known."""
    model = find_architecture(config.model)
    vision = model.vision
    return Plan(
        model,
        Workload(
            frames=max(1, config.max_frames // vision.temporal_patch),
            frame_tokens=model.frame_tokens or max(1, config.max_pixels // (vision.patch * vision.merge) ** 2),
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
            checkpoint_every=config.checkpoint_every,
            checkpoint_offload=config.checkpoint_offload,
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
