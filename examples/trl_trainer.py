"""The demo's task, trained by TRL: videos, frame mass and token weights in a GRPOTrainer.

appo demo                                       # clips and a warm start, in demo/
pip install 'appo[train,trl]'
python examples/trl_trainer.py demo [STEPS]
"""

import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import GRPOConfig

from appo.config import APPOConfig
from appo.data.load import load_records
from appo.data.video import read_video
from appo.integrations.trl import APPOTrainer
from appo.rollout.rewards import accuracy as score

folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 24
records = load_records(folder / "data" / "train.json")


def prompts(rows):
    """Chat messages with decoded frames; TRL's own key "prompt", and "index" for the reward."""
    clips = [read_video(records[i].media[0].path, fps=4.0, max_frames=16, max_pixels=28 * 28) for i in rows["index"]]
    texts = ["\n".join((records[i].question, *records[i].options)) for i in rows["index"]]
    contents = [
        [{"type": "video", "video": clip.frames.numpy()}, {"type": "text", "text": text}]
        for clip, text in zip(clips, texts, strict=True)
    ]
    return {"prompt": [[{"role": "user", "content": content}] for content in contents], "index": rows["index"]}


def accuracy(completions, index, **_):
    return score([answer[0]["content"] for answer in completions], [records[i] for i in index])


# Of a step: 16 questions with 8 answers each. Every clip is 16 frames, 4 a second; without this, 24 are assumed.
ROWS = 128
CLIP = {"total_num_frames": 16, "fps": 4.0, "frames_indices": list(range(16))}
data = Dataset.from_dict({"index": list(range(len(records)))})
data.set_transform(prompts)
trainer = APPOTrainer(
    AutoModelForImageTextToText.from_pretrained(folder / "warm"),
    reward_funcs=[accuracy],
    args=GRPOConfig(
        output_dir=folder / "run-trl",
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=8,
        num_generations=8,
        max_completion_length=24,
        learning_rate=1e-4,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        epsilon_high=0.28,
        report_to="none",
        chat_template_kwargs={"processor_kwargs": {"videos_kwargs": {"video_metadata": [CLIP] * ROWS}}},
    ),
    train_dataset=data,
    processing_class=AutoProcessor.from_pretrained(folder / "warm"),
    appo=APPOConfig(layers=2, strategy="soft", top_tokens=1, top_frames=1, slot_tokens=8),
)
trainer.train()
