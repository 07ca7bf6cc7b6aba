"""Images as they come from cameras and programs, clips of single frames, and prompts made of them."""

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training
from PIL import Image

from appo.config import APPOConfig
from appo.data.locate import locate
from appo.data.messages import prompt_messages
from appo.data.pictures import ImageError, read_image
from appo.data.prompt_batch import collate
from appo.data.prompts import PromptBuilder
from appo.data.records import DataError, Media, Record

FACTOR = 28


def image(size: tuple[int, int] = (56, 84), colour: Any = (200, 30, 90), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def saved(folder: Path, picture: Image.Image, name: str = "x.png", **options: Any) -> Path:
    picture.save(folder / name, **options)
    return folder / name


def mean(pixels: torch.Tensor) -> list[int]:
    return [round(value) for value in pixels.float().mean((1, 2)).tolist()]


# Modes whose plain conversion to RGB is right, clips to white, or uncovers what was transparent.
@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (image(), [200, 30, 90]),
        (image(mode="L", colour=77), [77, 77, 77]),
        (image(mode="1", colour=1), [255, 255, 255]),
        (Image.fromarray(np.full((84, 56), 25_700, np.uint16)), [100, 100, 100]),
        (image(mode="I", colour=51_400), [200, 200, 200]),
        (image(mode="RGBA", colour=(200, 30, 90, 0)), [255, 255, 255]),
        (image(mode="RGBA", colour=(200, 30, 90, 255)), [200, 30, 90]),
        (image(mode="LA", colour=(0, 0)), [255, 255, 255]),
        (image().quantize(4), [200, 30, 90]),
        (image().convert("CMYK").convert("RGB"), [200, 30, 90]),
    ],
    ids=["RGB", "L", "1", "I;16", "I", "RGBA, clear", "RGBA", "LA", "P", "CMYK"],
)
def test_images_of_every_mode(tmp_path: Path, picture: Image.Image, expected: list[int]) -> None:
    name = "x.tif" if picture.mode == "I" else "x.png"
    pixels = read_image(saved(tmp_path, picture, name), 10**6, FACTOR)
    assert (pixels.shape, pixels.dtype, mean(pixels)) == ((3, 84, 56), torch.uint8, expected)
    assert torch.equal(pixels, read_image((tmp_path / name).read_bytes(), 10**6, FACTOR))


def test_a_transparent_colour_of_a_palette(tmp_path: Path) -> None:
    pixels = read_image(saved(tmp_path, image().quantize(4), "x.gif", transparency=0), 10**6, FACTOR)
    assert mean(pixels) == [255, 255, 255]


# All values of EXIF's orientation.
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((84, 56, 3), np.uint8)
    upright[:42, :28] = 255  # white above on the left
    # What EXIF asks to be done to the stored image, undone.
    turns = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (1, 0), 7: (3, 1), 8: (3, 0)}
    quarter, mirrored = turns[orientation]
    stored = np.rot90(np.fliplr(upright) if mirrored else upright, quarter)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), "x.jpg", exif=exif, quality=95)
    pixels = read_image(path, 10**6, FACTOR)
    assert pixels.shape == (3, 84, 56)
    assert (pixels.float() - torch.from_numpy(upright).permute(2, 0, 1)).abs().mean() < 4


def test_max_pixels_holds_for_images(tmp_path: Path) -> None:
    path = saved(tmp_path, image((4000, 3000)), "x.jpg")
    height, width = read_image(path, 50_176, FACTOR).shape[1:]
    assert height * width <= 50_176 and height % FACTOR == width % FACTOR == 0
    assert width / height == pytest.approx(4 / 3, rel=0.1)


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    frames = [image(colour=(i, 0, 0)) for i in (1, 100)]
    huge = io.BytesIO()
    Image.new("1", (13_500, 13_500)).save(huge, "PNG")
    files = {
        "thin": (saved(tmp_path, image((3000, 10)), "thin.png"), "3000 x 10 pixels: one side more than 200 times"),
        "huge": (huge.getvalue(), r"pixels; at most|too many pixels"),
        "animated": (saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:]), "an animation"),
        "float": (saved(tmp_path, image(mode="F", colour=0.5), "f.tif"), "floating-point pixels"),
        "cut": (saved(tmp_path, image((560, 560)), "c.jpg").read_bytes()[:900], "broken"),
        "text": (b"hello", "no image"),
        "empty": (b"", "no image"),
    }
    for source, message in files.values():
        with pytest.raises(ImageError, match=message):
            read_image(source, 10**6, FACTOR)


@pytest.fixture(scope="module")
def reader() -> tuple[Any, Any]:
    model, processor = training.tiny()
    return processor, model.config


def builder(reader: tuple[Any, Any], **settings: Any) -> PromptBuilder:
    values = {"output": "x", "max_frames": 4, "max_pixels": 4 * FACTOR * FACTOR} | settings
    return PromptBuilder(*reader, APPOConfig(**values))


def record(folder: Path, name: str, *media: Media, **values: Any) -> Record:
    place = {"file": str(folder / "records.json"), "index": values.pop("index", 0)}
    return Record(name, "what?", "A", "free-form", media=media, meta=place | values.pop("meta", {}), **values)


def frames(folder: Path, count: int, size: tuple[int, int] = (56, 56)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        saved(folder, image(size, (i, 0, 0)), f"f{i}.png")
    return folder


def test_a_clip_of_single_frames(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    folder = frames(tmp_path / "v", 12)
    whole = record(tmp_path, "q", Media("video", folder, fps=2.0))
    (clip,) = builder(reader, max_frames=4).clips(whole)
    # In the order of their numbers (f10 behind f9), spread over all: 0, 3, 6, 9 of 12, two a second.
    assert clip.frames[:, 0, 0, 0].tolist() == [0, 3, 6, 9]
    assert clip.timestamps.tolist() == [0.0, 1.5, 3.0, 4.5] and clip.duration == 6.0
    listed = tuple(folder / f"f{i}.png" for i in (5, 4))
    (clip,) = builder(reader).clips(record(tmp_path, "q", Media("video", listed[0], frames=listed), duration=4.0))
    assert clip.frames[:, 0, 0, 0].tolist() == [5, 4] and clip.timestamps.tolist() == [0.0, 2.0]
    (clip,) = builder(reader).clips(record(tmp_path, "q", Media("video", folder, fps=2.0, start=2.0, end=4.0)))
    assert clip.frames[:, 0, 0, 0].tolist() == [4, 6] and clip.timestamps.tolist() == [2.0, 3.0]
    prompt = builder(reader)(whole)
    assert prompt.num_frames == 2 and set(prompt.frame_ids.tolist()) == {-1, 0, 1}
    saved(folder, image((84, 56)), "f3.png")
    with pytest.raises(DataError, match=r"record 0 \(id 'q'\): field `path`: video .*f3.png of another shape"):
        builder(reader)(whole)


def test_broken_media_name_record_field_and_file(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for medium, message in (
        (Media("image", tmp_path / "x.png"), "image .*x.png': no image"),
        (Media("image", tmp_path / "gone.png"), "expected a image file, got .* does not exist"),
        (Media("image", Path("row"), data=b"?"), "image 'row': no image"),
        (Media("video", tmp_path / "empty"), "a folder of none"),
        (Media("video", tmp_path / "x.png"), "video "),
    ):
        with pytest.raises(DataError, match=rf"records.json: record 7 \(id 'q'\): field `path`: .*{message}"):
            builder(reader)(record(tmp_path, "q", medium, index=7))


def test_records_of_one_id_are_not_taken_for_each_other(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    one, two = frames(tmp_path / "1", 2), frames(tmp_path / "2", 4)
    build = builder(reader)
    first = record(tmp_path / "train", "0", Media("video", one))
    second = record(tmp_path / "validation", "0", Media("video", two))
    third = record(tmp_path / "train", "0", Media("video", one), meta={"task": "other"})
    for _ in range(2):
        assert [build(r).record.media[0].path for r in (first, second)] == [one, two]
        assert [build(r).num_frames for r in (first, second)] == [1, 2]
    assert build(third).record.meta["task"] == "other" and "task" not in build(first).record.meta
    by_hand = [Record("0", question, "A", "free-form") for question in ("one?", "two?")]
    assert not torch.equal(build(by_hand[0]).input_ids, build(by_hand[1]).input_ids)


def test_the_cache_is_bounded_by_bytes(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    records = [record(tmp_path, str(i), Media("video", frames(tmp_path / "v", 4)), index=i) for i in range(8)]
    size = builder(reader)(records[0]).nbytes
    assert size > 4 * 56 * 56
    build = builder(reader, prompt_cache_gib=3.5 * size / 2**30)
    calls: list[str] = []
    original, lock = build._build, threading.Lock()

    def counted(which: Record) -> Any:
        with lock:
            calls.append(which.id)
        return original(which)

    build._build = counted  # type: ignore[method-assign]
    build.prefetch(records)  # waits when the cache is full of what nobody has taken
    taken = [build(which) for which in records]
    assert [prompt.record.id for prompt in taken] == [str(i) for i in range(8)] == calls
    assert build.held_bytes <= 3.5 * size
    assert build(records[-1]) is taken[-1] and len(calls) == 8
    build(records[0])
    assert calls[8:] == ["0"]


def test_prompts_that_nobody_takes_make_room(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    records = [record(tmp_path, str(i), Media("video", frames(tmp_path / "v", 4)), index=i) for i in range(9)]
    size = builder(reader)(records[0]).nbytes
    build = builder(reader, prompt_cache_gib=3.5 * size / 2**30)
    for start in (0, 3, 6):
        build.prefetch(records[start : start + 3])
        assert build(records[start + 2]).record.id == str(start + 2)  # and not the two before it
    build.prefetch([])
    assert build.held_bytes <= 3.5 * size


def test_images_text_and_clips_side_by_side(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    picture = saved(tmp_path, image((112, 112)))
    media = [
        (Media("video", frames(tmp_path / "v", 4)),),
        (Media("image", picture),),
        (),
        (Media("image", picture), Media("image", Path("row"), data=picture.read_bytes())),
    ]
    prompts = [builder(reader)(record(tmp_path, str(i), *m, index=i)) for i, m in enumerate(media)]
    assert [prompt.num_frames for prompt in prompts] == [2, 0, 0, 0]
    batch = collate(prompts, 0)
    assert batch.rows["video_grid_thw"] == [1, 0, 0, 0] and batch.rows["image_grid_thw"] == [0, 1, 0, 2]
    assert batch.num_frames == 2
    assert (batch.frame_ids[1:] == -1).all()


def test_marks_in_a_question_place_its_media(tmp_path: Path) -> None:
    pair = (Media("image", Path("1.png")), Media("image", Path("2.png")))
    placed = Record("q", "<image> against <image>, which?", "A", "free-form", media=pair)
    content = prompt_messages(placed, instructions=False)[0]["content"]
    assert [part.get("image", part.get("text")) for part in content] == ["1.png", " against ", "2.png", ", which?"]
    other = Record("q", "what does <image> mean?", "A", "free-form", media=pair)
    assert [part["type"] for part in prompt_messages(other, instructions=False)[0]["content"]] == [
        "image",
        "image",
        "text",
    ]


def test_what_the_text_may_not_hold(tmp_path: Path, reader: tuple[Any, Any]) -> None:
    token = reader[0].video_token
    with pytest.raises(DataError, match=r"`question`: expected text, got the model's own token"):
        builder(reader)(Record("q", f"what is {token}?", "A", "free-form"))
    with pytest.raises(DataError, match=r"`answer`: expected a number or expression, got '\?\?'"):
        builder(reader)(Record("q", "what?", "??", "math"))
    spans = record(tmp_path, "q", Media("video", frames(tmp_path / "v", 4), fps=1.0), time_spans=((90.0, 95.0),))
    with pytest.raises(DataError, match="`time_spans`: expected spans within the clip of 4 s, got"):
        builder(reader)(spans)


def test_a_frame_that_leaves_the_root_by_a_link(tmp_path: Path) -> None:
    saved(tmp_path, image(), "outside.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "f.png").symlink_to(tmp_path / "outside.png")
    medium = Media("video", root / "f.png", frames=(root / "f.png",), root=root)
    with pytest.raises(DataError, match="a link that leaves it"):
        locate(medium, record(tmp_path, "q", medium))
