"""Frames of prompt tokens: by hand for made-up prompts, and as the processors of tiny models lay them out."""

from types import SimpleNamespace

import models
import pytest
import torch

from appo.recording.frame_ids import FrameIds, frame_ids

VIDEO, IMAGE, PAD = 7, 6, 0
QWEN25 = SimpleNamespace(
    model_type="qwen2_5_vl", video_token_id=VIDEO, vision_config=SimpleNamespace(spatial_merge_size=2)
)
QWEN3 = SimpleNamespace(
    model_type="qwen3_vl", video_token_id=VIDEO, vision_config=SimpleNamespace(spatial_merge_size=2)
)


def check(got: FrameIds, ids: list[list[int]], num_frames: list[int]) -> None:
    assert got.ids.dtype == torch.int32
    assert got.ids.tolist() == ids
    assert got.num_frames.tolist() == num_frames


def test_contiguous_frames() -> None:
    tokens = torch.tensor([[PAD, 1, *[VIDEO] * 6, 2], [PAD, PAD, PAD, 1, *[VIDEO] * 4, 2]])
    grids = torch.tensor([[3, 2, 4], [2, 4, 2]])  # 3 frames of 2 tokens; 2 frames of 2
    want = [[-1, -1, 0, 0, 1, 1, 2, 2, -1], [-1, -1, -1, -1, 0, 0, 1, 1, -1]]
    check(frame_ids(tokens, QWEN25, video_grid_thw=grids), want, [3, 2])


def test_videos_of_different_sizes_are_numbered_on_and_images_stay_out() -> None:
    tokens = torch.tensor([[1, VIDEO, VIDEO, 2, *[VIDEO] * 4, 2, IMAGE, IMAGE, 3]])
    grids = torch.tensor([[2, 2, 2], [2, 2, 4]])  # 2 frames of 1 token; 2 frames of 2
    check(frame_ids(tokens, QWEN25, video_grid_thw=grids), [[-1, 0, 1, -1, 2, 2, 3, 3, -1, -1, -1, -1]], [4])


def test_timestamps_between_frames() -> None:
    tokens = torch.tensor([[1, VIDEO, VIDEO, 9, VIDEO, VIDEO, 2, PAD], [9, 9, 9, 9, VIDEO, VIDEO, 2, 2]])
    want = [[-1, 0, 0, -1, 1, 1, -1, -1], [-1, -1, -1, -1, 0, 0, -1, -1]]
    check(frame_ids(tokens, QWEN3, video_grid_thw=torch.tensor([[2, 2, 4], [1, 2, 4]])), want, [2, 1])
    check(frame_ids(tokens, QWEN3, video_grid_thw=torch.tensor([[1, 2, 4]] * 3)), want, [2, 1])  # split per frame
    check(frame_ids(tokens, QWEN3), want, [2, 1])


def test_frames_shown_as_images() -> None:
    tokens = torch.tensor(
        [[1, 9, 5, IMAGE, IMAGE, 5, 9, 5, IMAGE, IMAGE, 5, 2], [PAD] * 6 + [1, 5, IMAGE, IMAGE, 5, 2]]
    )
    want = [[-1, -1, -1, 0, 0, -1, -1, -1, 1, 1, -1, -1], [-1] * 8 + [0, 0, -1, -1]]
    for model_type in ("internvl", "smolvlm", "gemma3"):
        config = SimpleNamespace(model_type=model_type, image_token_id=IMAGE)
        check(frame_ids(tokens, config), want, [2, 1])
        with pytest.raises(ValueError, match=f"video_grid_thw.*None for {model_type}"):
            frame_ids(tokens, config, video_grid_thw=torch.tensor([[2, 2, 4]]))


def test_the_mark_before_an_image_is_not_taken_for_it() -> None:
    """To Gemma 3's processor ``image_token_id`` is the mark, and its tokenizer's the pixels."""
    inner = SimpleNamespace(image_token_id=IMAGE)
    processor = type("Gemma3Processor", (), {"image_token_id": 5, "tokenizer": inner})()
    check(
        frame_ids(torch.tensor([[5, IMAGE, IMAGE, 4, 5, IMAGE, IMAGE, 4]]), processor),
        [[-1, 0, 0, -1] + [-1, 1, 1, -1]],
        [2],
    )


def test_frames_of_one_size_and_a_line_break() -> None:
    """Two prompts: videos of two frames and of one, and none."""
    tower = SimpleNamespace(image_size=27, patch_size=9)  # 3 x 3 patches, pooled to 2 x 2
    config = SimpleNamespace(model_type="llava_onevision", video_token_id=VIDEO, vision_config=tower)
    processor = type("LlavaOnevisionProcessor", (), {"video_token_id": VIDEO, "num_image_tokens": 9})()
    tokens = torch.tensor([[PAD, 1, *[VIDEO] * 9, 2, *[VIDEO] * 5, IMAGE], [1] * 18])
    want = [[-1, -1, *[0] * 4, *[1] * 4, -1, -1, *[2] * 4, -1, -1], [-1] * 18]
    for source in (config, processor):
        check(frame_ids(tokens, source), want, [3, 0])
        for wrong in ([VIDEO] * 14, [VIDEO] * 8, [VIDEO]):  # two videos side by side, a truncated one, no frame
            with pytest.raises(ValueError, match=f"frames of 4 tokens.*{len(wrong)} video tokens in a row at token 1"):
                frame_ids(torch.tensor([[1, *wrong, 2]]), source)
    with pytest.raises(ValueError, match=r"video_grid_thw.*None for llava_onevision"):
        frame_ids(tokens, config, video_grid_thw=torch.tensor([[2, 2, 4]]))
    with pytest.raises(ValueError, match="num_image_tokens"):
        frame_ids(tokens, SimpleNamespace(model_type="llava_onevision", video_token_id=VIDEO))


def test_video_at_both_ends() -> None:
    check(frame_ids(torch.tensor([[VIDEO, 1, VIDEO]]), QWEN3), [[0, -1, 1]], [2])


def test_text_alone() -> None:
    check(frame_ids(torch.tensor([[1, 2], [3, 4]]), QWEN25), [[-1, -1], [-1, -1]], [0, 0])
    check(frame_ids(torch.tensor([[1, 2]]), QWEN25, video_grid_thw=torch.zeros(0, 3).long()), [[-1, -1]], [0])
    check(frame_ids(torch.zeros(2, 0).long(), QWEN3), [[], []], [0, 0])


@pytest.mark.parametrize("build", [models.qwen2_5_vl, models.qwen3_vl])
def test_processor_and_config_agree_with_what_the_processor_made(build) -> None:
    tiny = build()
    # 28 x 28 and 28 x 42 pixels: both families give 4 and 6 tokens a frame. The second prompt has no video.
    videos = [models.random_video(3, 28, 28), None, models.random_video(2, 28, 42)]
    batch = tiny.inputs(videos, ["What?", "No video here", "And here, after a longer question?"])
    found = [
        frame_ids(batch["input_ids"], source, video_grid_thw=batch["video_grid_thw"])
        for source in (tiny.config, tiny.processor)
    ]
    assert torch.equal(found[0].ids, found[1].ids)
    assert found[0].num_frames.tolist() == [3, 0, 2]
    assert torch.equal(found[0].ids >= 0, batch["input_ids"] == tiny.config.video_token_id)
    for sequence, (steps, size) in enumerate([(3, 4), (0, 0), (2, 6)]):
        assert (
            torch.bincount(found[0].ids[sequence].clamp_min(-1) + 1, minlength=4)[1 : steps + 1].tolist()
            == [size] * steps
        )
    if build is models.qwen3_vl:
        assert torch.equal(frame_ids(batch["input_ids"], tiny.config).ids, found[0].ids)
        assert torch.equal(frame_ids(batch["input_ids"], tiny.processor).ids, found[0].ids)


# Too few and too many rows; rows of more tokens than are left, across a gap, of no whole patches; another shape.
@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[2, 2, 4]], r"row 1 for the remaining 2 video tokens of sequence 0"),
        ([[4, 2, 4]], r"row 0 \(4, 2, 4\), 4 x 2 tokens, to fit"),
        ([[3, 2, 4], [1, 2, 2]], r"2 rows: row 1 \(1, 2, 2\) has no tokens"),
        ([[3, 3, 4]], "row 0 to have t >= 1 and h, w positive multiples of the merge size 2"),
        ([[0, 2, 4], [3, 2, 4]], r"row 0 to have t >= 1"),
        ([[2, 2, 6]], r"row 0 \(2, 2, 6\) to give frames of 3 adjacent video tokens"),
        ([3, 2, 4], r"shape \(number of videos, 3\)"),
    ],
)
def test_grids_that_do_not_account_for_the_tokens(grids: list, message: str) -> None:
    tokens = torch.tensor([[1, VIDEO, VIDEO, 9, VIDEO, VIDEO, 9, VIDEO, VIDEO, 2]])
    with pytest.raises(ValueError, match="video_grid_thw.*" + message):
        frame_ids(tokens, QWEN25, video_grid_thw=torch.tensor(grids))


def test_what_is_missing_is_named() -> None:
    tokens = torch.tensor([[1, VIDEO]])
    with pytest.raises(ValueError, match=r"video_grid_thw.*qwen2_5_vl"):
        frame_ids(tokens, QWEN25)
    with pytest.raises(ValueError, match=r"video_token_id.*qwen2, which has none"):
        frame_ids(tokens, SimpleNamespace(model_type="qwen2"))
    with pytest.raises(ValueError, match=r"spatial_merge_size.*merge_size"):
        frame_ids(tokens, SimpleNamespace(video_token_id=VIDEO), video_grid_thw=torch.tensor([[1, 2, 2]]))
    with pytest.raises(ValueError, match=r"input_ids.*2 dimensions"):
        frame_ids(tokens[0], QWEN25)
    with pytest.raises(ValueError, match=r"input_ids.*int32 or int64"):
        frame_ids(tokens.float(), QWEN25)
