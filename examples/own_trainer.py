"""APPO inside a training loop of your own: the operators and four functions, with no trainer of ours.

Runs as it is, on a tiny random model. In your trainer, `responses`, `rewards` and the optimizer are there already.
"""

import torch

from appo import frame_ids, group_advantages, perception_slots, record_frame_mass, select_frames, token_weights
from appo.tasks.tiny import build_tiny
from appo_kernels import group_divergence, linear_weighted_surrogate, token_logprobs

torch.manual_seed(0)
model, processor = build_tiny(seed=0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

# One prompt with a video of 16 frames, and G = 4 responses of N = 20 tokens to it.
G, N = 4, 20
chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Which colour is the flash?"}]}]
text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
video = torch.randint(0, 256, (16, 3, 28, 28), dtype=torch.uint8)
prompt = processor(text=[text] * G, videos=[video] * G, videos_kwargs={"do_sample_frames": False}, return_tensors="pt")
responses = torch.randint(10, 40, (G, N))
mask = torch.arange(N) < torch.tensor([[20], [17], [20], [9]])
rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])

P = prompt["input_ids"].shape[1]
ids = torch.cat([prompt["input_ids"], responses], 1)
inputs = {
    "input_ids": ids,
    "attention_mask": torch.cat([prompt["attention_mask"], mask.long()], 1),
    "mm_token_type_ids": torch.nn.functional.pad(prompt["mm_token_type_ids"], (0, N)),
    "pixel_values_videos": prompt["pixel_values_videos"],
    "video_grid_thw": prompt["video_grid_thw"],
    "second_per_grid_ts": torch.as_tensor(prompt["second_per_grid_ts"]),
}
rows = slice(P - 1, P + N - 1)  # the positions whose logits predict the response


def hidden_states() -> torch.Tensor:
    """(G, N, D): no logits are made."""
    return model.model(**inputs, use_cache=False).last_hidden_state[:, rows]


# 1. Score: what did each token look at, and how likely was it?
frames = frame_ids(ids, model.config, video_grid_thw=prompt["video_grid_thw"])
with torch.no_grad(), record_frame_mass(model, frames, rows=rows, layers=3) as recorder:
    hidden = hidden_states()
weight = model.lm_head.weight
scored = token_logprobs(hidden.flatten(0, 1), weight, responses.flatten())
old_logprobs, lse = scored.logprobs.detach().view(G, N), scored.lse.detach().view(G, N)

# 2. Which frames decide, which tokens look at them, and how much do these tokens disagree?
target = select_frames(recorder.mass, mask, rewards, strategy="soft", top_tokens=5, top_frames=2)
slots = perception_slots(recorder.mass, mask, target, top_tokens=8)
divergence = group_divergence(hidden, weight, lse, slots)
weights = token_weights(divergence, slots, mask, alpha=1.7)

# 3. Update: the weighted, clipped loss, straight from hidden states.
loss, metrics = linear_weighted_surrogate(
    hidden_states(), weight, responses, old_logprobs, group_advantages(rewards), mask, token_weights=weights
)
loss.backward()
optimizer.step()
print(f"frames {target.tolist()}, loss {loss:.4f}, mean weight {metrics['weight_mean']:.3f}")
