"""The perception task: it can be loaded, and the deciding moment, and only that, shows the answer."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from appo.data.load import check_media, load_records
from appo.data.video import read_video
from appo.tasks import DIFFICULTIES, KINDS, Difficulty, dataset, make_task, response_text, think_text
from appo.tasks.questions import DIRECTIONS, MARK, NUMBERS
from appo.tasks.render import COLOURS, NEUTRAL
from appo.tasks.warmup import time_marked

# Every kind four times, on the easiest split and the hardest. Distractors would fool the simple rules used
# here.
SIZES = {"warmup": 4 * len(KINDS), "ood": 4 * len(KINDS)}
STILL = {"ood": replace(DIFFICULTIES["ood"], distractors=0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("task")
    make_task(root, seed=1, sizes=SIZES, kinds=tuple(KINDS), difficulties=STILL)
    return root


def decoded(record):
    """(T, 3, H, W) fp32 frames at full size, their times, and whether each shows a deciding moment."""
    clip = read_video(record.media[0].path, fps=8.0, max_frames=32, max_pixels=56 * 56, factor=2)
    times = clip.timestamps
    inside = torch.zeros(len(times), dtype=torch.bool)
    for start, end in record.time_spans:
        inside |= (times >= start - 1e-6) & (times < end - 1e-6)
    return clip.frames.float(), times, inside


def colour_of(frames, others):
    """The colour that the pixels which differ most between the frames and the others have turned to."""
    difference = frames.mean(0) - others.mean(0)  # (3, H, W)
    most = difference.abs().sum(0).flatten().topk(20).indices
    change = difference.flatten(1)[:, most].mean(1)
    hues = {name: torch.tensor(rgb, dtype=torch.float32) - torch.tensor(NEUTRAL) for name, rgb in COLOURS.items()}
    return max(hues, key=lambda name: float(torch.cosine_similarity(change, hues[name], dim=0)))


def oracle(record):
    """The answer's text, worked out from the decoded pixels and the known moments."""
    frames, times, inside = decoded(record)
    difference = (frames[inside].mean(0) - frames[~inside].mean(0)).mean(0)  # (H, W) brightness
    grid = torch.linspace(-1, 1, len(difference))
    task = record.meta["task"]
    if task in ("colour", "cue"):
        return colour_of(frames[inside], frames[~inside])
    if task == "order":
        start, end = record.time_spans[0]
        return colour_of(frames[(times >= start - 1e-6) & (times < end - 1e-6)], frames[~inside])
    if task == "count":
        where = difference.flatten().topk(20).indices
        brightness = frames.mean(1).flatten(1)[:, where].mean(1)
        bright = brightness > (brightness.min() + brightness.max()) / 2
        return NUMBERS[sum(key for key, _ in itertools.groupby(bright.tolist())) - 1]
    if task == "direction":
        gain, loss = difference.clamp(min=0), (-difference).clamp(min=0)
        strong = max(float(gain.max()), float(loss.max())) / 2
        gain, loss = gain * (gain > strong), loss * (loss > strong)
        down = (gain.sum(1) * grid).sum() / gain.sum() - (loss.sum(1) * grid).sum() / loss.sum()
        right = (gain.sum(0) * grid).sum() / gain.sum() - (loss.sum(0) * grid).sum() / loss.sum()
        return max(DIRECTIONS, key=lambda name: DIRECTIONS[name][0] * down + DIRECTIONS[name][1] * right)
    left, right = (float((-half).flatten().topk(20).values.mean()) for half in difference.chunk(2, dim=1))
    if min(left, right) > 0.6 * max(left, right):
        return "both"
    return "left" if left > right else "right"


@pytest.mark.parametrize("split", SIZES)
def test_the_answer_is_in_the_pixels(folder, split):
    records = load_records(folder / f"{split}.json")
    wrong = [r.id for r in records if oracle(r) != r.options["ABCD".index(r.answer)].split(". ")[1]]
    assert not wrong


def test_outside_its_moments_a_clip_shows_no_change(folder):
    for record in load_records(folder / "warmup.json"):
        if record.meta["task"] == "cue":
            continue  # its shape changes all the time
        frames, _, inside = decoded(record)
        # 8 grey levels of noise, of which averaging over cells and colours leaves little.
        change = torch.nn.functional.avg_pool2d(frames, 8)
        change = (change - change[~inside].median(0).values).abs().amax((1, 2, 3))
        assert change[~inside].max() < 18 < 28 < change[inside].min(), record.id


@pytest.mark.parametrize("split", SIZES)
def test_a_cue_points_at_its_time_and_every_time_shows_its_colour(folder, split):
    records = [r for r in load_records(folder / f"{split}.json") if r.meta["task"] == "cue"]
    assert records
    for record in records:
        frames, times, _ = decoded(record)
        # Brightness of each column near the lower edge, where nothing is but the mark: in every frame of the clip.
        columns = frames[:, :, 50:53].mean((1, 2))  # (T, W)
        columns = torch.nn.functional.avg_pool1d(columns.view(8, -1, 56).mean(1), 5, 1)
        places = ((columns.argmax(1) + 2.5) / 56 - 0.5) / MARK[1] + 1.5
        assert [round(place) for place in places.tolist()] == [time_marked(record)] * 8, record.id
        start, end, word = record.meta["seen"][time_marked(record)]
        assert record.time_spans == ((start, end),)
        assert word == record.options["ABCD".index(record.answer)][3:]
        assert sorted(word for _, _, word in record.meta["seen"]) == sorted(COLOURS)
        for start, end, word in record.meta["seen"]:
            inside = (times >= start - 1e-6) & (times < end - 1e-6)
            assert colour_of(frames[inside], frames[~inside]) == word


def test_records_are_loaded_and_spans_are_known(folder):
    for split, size in SIZES.items():
        records = load_records(folder / f"{split}.json")
        check_media(records)
        assert len(records) == size and len({r.id for r in records}) == size
        assert [r.meta["task"] for r in records] == list(itertools.islice(itertools.cycle(KINDS), size))
        for record in records:
            length = DIFFICULTIES[split].length
            assert record.kind == "multiple choice" and record.answer in "ABCD"[: len(record.options)]
            assert record.duration == 4.0
            moments = {"order": 2, "count": "ABCD".index(record.answer) + 1}.get(record.meta["task"], 1)
            assert len(record.time_spans) == moments
            edges = list(itertools.chain(*record.time_spans))
            assert edges[0] >= 0 and edges[-1] <= 4.0
            assert all(b - a >= min(length, 0.5) - 1e-6 for a, b in itertools.pairwise(edges)), "too short or too close"


def test_every_answer_occurs():
    for kind, build in KINDS.items():
        questions = [build(np.random.default_rng([3, i]), Difficulty(), 4.0, 8) for i in range(200)]
        counts = np.bincount([q.answer for q in questions], minlength=len(questions[0].options))
        expected = 200 / len(questions[0].options)
        assert (np.abs(counts - expected) < 5 * expected**0.5).all(), (kind, counts)
        starts = {q.spans[0][0] for q in questions}
        assert len(starts) > 10 or (kind == "cue" and starts == {0.0, 1.0, 2.0, 3.0}), f"{kind}: always at one time"


def files(root):
    return {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def encodings(root, sizes):
    """The files of five times the same clips; the frames are drawn anew as well."""
    written = []
    for time in range(5):
        make_task(root / str(time), sizes=sizes)
        written.append(files(root / str(time)))
    return written


def test_clips_of_the_demo_are_the_same_bytes_five_times(tmp_path):
    # x264 takes decisions by sums of float32 unless told otherwise: every second clip then has several encodings.
    first, *others = encodings(tmp_path, dict.fromkeys(DIFFICULTIES, 4))
    assert all(other == first for other in others)


@pytest.mark.slow
def test_all_clips_of_the_demo_are_the_same_bytes_five_times(tmp_path):
    first, *others = encodings(tmp_path, None)
    assert len(first) == sum(dataset.SIZES.values()) + len(DIFFICULTIES)
    assert all(other == first for other in others)


def test_deterministic_by_seed(tmp_path):
    first, again, other = (
        make_task(tmp_path / name, seed=seed, sizes={"train": 6}, workers=workers) and files(tmp_path / name)
        for name, seed, workers in (("a", 0, 1), ("b", 0, 2), ("c", 1, 2))
    )
    assert first == again
    assert first.keys() == other.keys() and first != other


def test_a_larger_split_keeps_the_clips_of_a_smaller(tmp_path):
    small = json.loads(make_task(tmp_path / "a", sizes={"train": 3})["train"].read_text())
    large = json.loads(make_task(tmp_path / "b", sizes={"train": 5, "ood": 1})["train"].read_text())
    assert large[:3] == small
    for record in small:
        assert (tmp_path / "a" / record["path"]).read_bytes() == (tmp_path / "b" / record["path"]).read_bytes()


def test_shuffled_options_keep_their_meaning(tmp_path):
    plain, shuffled = (
        json.loads(
            make_task(tmp_path / str(s), sizes={"train": 8}, kinds=["colour"], shuffle_options=s)["train"].read_text()
        )
        for s in (False, True)
    )
    assert len({tuple(r["options"]) for r in plain}) == 1 and len({tuple(r["options"]) for r in shuffled}) > 3
    for one, other in zip(plain, shuffled, strict=True):
        texts = [{o[0]: o[3:] for o in r["options"]}[r["solution"][len("<answer>")]] for r in (one, other)]
        assert texts[0] == texts[1] and one["time_spans"] == other["time_spans"]


def test_response_texts():
    think = think_text("order", [1, 4], "red")
    assert think == "i see red at step two then five so the order is red"
    assert think_text("cue", [2], "red") == "i see at time three red so the cue is red"
    assert response_text(think, "A") == f"<think> {think}</think><answer>A</answer>"


# A kind that is none, no kind, a split that is none or empty, a frame cut through, a difficulty without room.
@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kinds": ["smell"]}, "kinds"),
        ({"kinds": []}, "kinds"),
        ({"sizes": {"holdout": 3}}, "sizes"),
        ({"sizes": {"train": 0}}, "sizes"),
        ({"side": 57}, "side"),
        ({"sizes": {"train": 2}, "kinds": ["order"], "difficulties": {"train": Difficulty(length=2.0)}}, "length"),
    ],
)
def test_tasks_that_cannot_be_made(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"make_task: `{named}`: expected"):
        make_task(tmp_path, **options)
