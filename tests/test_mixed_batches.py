"""A training step whose groups are about clips, images and nothing but text, in one batch."""

import torch
import training
from PIL import Image

from appo.data.records import Media, Record
from appo.train.groups import whole_groups
from appo.train.trainer import Trainer


def test_groups_without_frames_weigh_one_beside_groups_with_frames(tmp_path):
    model, processor = training.tiny()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "x.png")
    picture = Media("image", tmp_path / "x.png")
    records = [
        *training.records()[:2],
        Record("image", "what colour is it?", "red", "free-form", media=(picture,)),
        Record("text", "what is red?", "a colour", "free-form"),
    ]
    trainer = Trainer(model, processor, records, config=training.config(tmp_path, micro_groups=4, alpha=50.0))
    groups = trainer.reward(trainer.rollout(4))
    trainer.score(whole_groups(groups))
    trainer.select(groups)
    trainer.weigh(groups)
    trainer.advantage(groups)
    weights = {group.prompt.record.id: group.weights for group in groups}
    assert len(weights) == 4
    for name in ("image", "text"):
        values = weights.pop(name)
        assert values is None or (values == 1).all()
    assert all((values >= 1).all() for values in weights.values())
    loss = trainer.loss(whole_groups(groups), sum(group.tokens for group in groups), 16.0)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
