"""The processor with videos of both editions: inputs, keyword arguments, and parallel loading."""

import contextlib
import json
import os

import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info
from tests.helpers.golden import golden, load_golden
from tests.helpers.messages import VIDEO, random_image, text_part, user, user_videos
from tests.helpers.patches import normalize
from tests.helpers.video_clips import decode_clip, encode_clip

# The golden pixels are float32; x * (1 / 255) and x / 255 differ by one rounding.
PIXEL_ATOL = 1e-6
# Same 8-bit resize as the reference, so only float32 rounding remains (tolerance of the golden README).
PACKED_ATOL = 1e-5


@pytest.fixture(scope="module")
def clip():
    return encode_clip(60, fps=10)


def test_process_vision_info_returns_what_the_preview_package_does():
    messages = user({"type": "image", "image": random_image()}, {"type": "video", "video": [random_image()] * 3, "fps": 4.0})
    images, videos = process_vision_info(messages)
    assert len(images) == 1
    assert [len(video) for video in videos] == [4]
    assert process_vision_info(messages, return_video_kwargs=True)[2] == {"fps": [4.0]}
    assert process_vision_info(user(text_part("x"))) == (None, None)
    assert process_vision_info(user(text_part("x")), True) == (None, None, {"fps": []})
    batch = process_vision_info([messages, messages])
    assert [len(found) for found in batch] == [2, 2]


def test_process_vision_info_of_1_5_always_returns_three_values():
    images, videos, kwargs = process_vision_info(user({"image": random_image()}), edition="1.5")
    assert len(images) == 1
    assert videos is None
    assert set(kwargs) == {"height", "width", "fast_height", "fast_width", "timestamps", "frame_types"}


def test_a_list_of_images_is_a_preview_video(preview):
    frames = [random_image(40, 58, seed) for seed in range(3)]
    messages = user({"type": "video", "video": frames, "fps": 3.0}, text_part("What happens?"))
    text = preview.apply_chat_template(messages)
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True)
    inputs = preview(text=text, images=images, videos=videos, **kwargs)
    assert inputs.video_grid_thw.tolist() == [[4, 4, 6]]
    assert inputs.pixel_values_videos.shape == (96, 3, 14, 14)
    assert (inputs.input_ids == preview.video_token_id).sum() == 24
    torch.testing.assert_close(inputs.second_per_grid_ts, torch.tensor([1 / 3]))
    last, repeated = inputs.pixel_values_videos.view(4, 24, -1)[2:]
    assert torch.equal(last, repeated)


def test_frames_of_a_video_equal_the_official_ones(preview):
    tensors = load_golden("preview", "image_processing.safetensors")
    video = tensors["video0.uint8"].permute(0, 3, 1, 2)
    for same in (video, video.float()):
        inputs = preview(text=VIDEO, videos=[same])
        assert torch.equal(inputs.video_grid_thw, tensors["video0.video_grid_thw"])
        torch.testing.assert_close(inputs.pixel_values_videos, tensors["video0.pixel_values"], atol=PIXEL_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("fps", "expected"),
    [(None, [0.5, 0.5]), (4, [0.25, 0.25]), ([1.0, 3.0], [1.0, 1 / 3]), (torch.tensor([1.0, 2.0]), [1.0, 0.5])],
)
def test_seconds_per_grid_come_from_fps(preview, fps, expected):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8)] * 2
    seconds = preview(text=VIDEO * 2, videos=videos, **({} if fps is None else {"fps": fps})).second_per_grid_ts
    assert seconds.dtype == torch.float32
    torch.testing.assert_close(seconds, torch.tensor(expected))


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf"), [1.0, 2.0]])
def test_an_invalid_fps_is_rejected(preview, fps):
    with pytest.raises(ValueError, match="fps"):
        preview(text=VIDEO, videos=[torch.zeros(2, 3, 56, 56, dtype=torch.uint8)], fps=fps)
    if not isinstance(fps, list):
        with pytest.raises(ValueError, match="fps"):
            process_vision_info(user({"type": "video", "video": [random_image()], "fps": fps}))


def test_keywords_of_the_other_edition_are_rejected(preview, v1_5):
    with pytest.raises(TypeError, match=r"'height'.*edition='preview'"):
        preview(text="a", height=[28])
    with pytest.raises(TypeError, match=r"'fps'.*edition='1\.5'"):
        v1_5(text="a", fps=[2.0])


@pytest.mark.parametrize("case", ["pack_slow_fast", "pack_all_slow_no_timestamps"])
@pytest.mark.parametrize("as_lists", [True, False], ids=["lists", "tensors"])
def test_packing_equals_the_reference(v1_5, case, as_lists):
    settings = json.loads(golden("v1_5", "packing.json").read_text())[case]
    tensors = load_golden("v1_5", "cases.safetensors")
    names = ("height", "width", "fast_height", "fast_width", "frame_types", "timestamps")
    kwargs = {name: [settings[name]] for name in names if settings[name] is not None}
    if not as_lists:
        for name in ("frame_types", "timestamps"):
            if name in kwargs:
                kwargs[name] = [tensors[f"{case}.in.{name}"]]
    inputs = v1_5(text=settings["text_in"], videos=[tensors[f"{case}.in.frames"]], **kwargs)
    assert v1_5.decode(inputs.input_ids[0]) == settings["text_out"]
    assert torch.equal(inputs.video_grid_thw, tensors[f"{case}.out.video_grid_thw"].long())
    assert torch.equal(inputs.num_frames, tensors[f"{case}.out.num_frames"].long())
    torch.testing.assert_close(inputs.pixel_values_videos, tensors[f"{case}.out.pixel_values_videos"], atol=PACKED_ATOL, rtol=0)
    assert "second_per_grid_ts" not in inputs


def test_grids_never_span_two_videos_and_each_video_has_its_own_options(v1_5):
    videos = [torch.zeros(2, 3, 56, 56, dtype=torch.uint8), torch.zeros(3, 3, 56, 56, dtype=torch.uint8)]
    inputs = v1_5(
        text=[f"a{VIDEO}", f"b{VIDEO}"],
        videos=videos,
        height=[56, 56],
        width=[56, 56],
        fast_height=[28, 28],
        fast_width=[28, 28],
        frame_types=[[0, 1], [0, 0, 0]],
        timestamps=[[0.0, 0.5], None],
    )
    assert inputs.video_grid_thw.tolist() == [[1, 4, 4], [1, 2, 2], [3, 4, 4]]
    assert inputs.num_frames.tolist() == [2, 3]
    first, second = v1_5.batch_decode(inputs.input_ids)
    assert "<|frame|>0.5<|fast_start|><|video_pad|><|fast_end|>" in first
    assert second.count("<|frame|>" + "<|video_pad|>" * 4) == 3


def test_a_video_without_options_has_slow_frames_of_the_processors_size(v1_5):
    inputs = v1_5(text=VIDEO, videos=[torch.zeros(3, 3, 60, 90, dtype=torch.uint8)])
    assert inputs.video_grid_thw.tolist() == [[3, 4, 6]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frame_types": [[0, 1]]}, "frame_types must hold"),
        ({"frame_types": [[0, 1, 2]]}, "frame_types must hold"),
        ({"timestamps": [[0.0]]}, "timestamps must hold"),
        ({"height": [56, 56]}, "height must hold one entry for each of the 1 videos, got 2"),
        ({"height": [56]}, "height and width must be given together"),
        ({"height": [50], "width": [56]}, "multiples of 28, got 50x56"),
        ({"height": [0], "width": [56]}, "multiples of 28, got 0x56"),
    ],
)
def test_video_options_that_do_not_match_the_video_are_rejected(v1_5, kwargs, message):
    with pytest.raises(ValueError, match=message):
        v1_5(text=VIDEO, videos=[torch.zeros(3, 3, 56, 56, dtype=torch.uint8)], **kwargs)


@pytest.mark.parametrize("edition", EDITIONS)
def test_official_calls_with_a_clip_give_the_models_inputs(processors, clip, edition):
    processor = processors[edition]
    messages = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, kwargs = process_vision_info(messages, return_video_kwargs=True, edition=edition)
    inputs = processor(text=text, images=images, videos=videos, padding=True, return_tensors="pt", **kwargs)
    grids = inputs.video_grid_thw
    assert len(inputs.pixel_values_videos) == grids.prod(1).sum()
    assert (inputs.input_ids == processor.video_token_id).sum() == grids.prod(1).sum() // 4
    if edition == "preview":
        torch.testing.assert_close(inputs.second_per_grid_ts, torch.tensor([0.5]))
        assert grids[:, 0].tolist() == [12]
    else:
        assert inputs.num_frames.tolist() == [12]
        assert "<|frame|>0.5<|fast_start|><|video_pad|>" in processor.decode(inputs.input_ids[0])
    again = processor.apply_chat_template(messages, tokenize=True)
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_float_frames_give_the_pixels_of_uint8_frames(processors):
    """The official Preview package returns float frames and a list of frame rates."""
    frames = torch.randint(0, 256, (4, 3, 56, 84), generator=torch.Generator().manual_seed(0)).float()
    inputs = processors["preview"](VIDEO, videos=[frames], fps=[1.7])
    assert torch.equal(inputs.pixel_values_videos, processors["preview"](VIDEO, videos=[frames.byte()]).pixel_values_videos)


@pytest.mark.parametrize("edition", EDITIONS)
def test_uint8_pixels_normalized_with_patch_config_equal_the_float_pixels(processors, clip, edition):
    processor = processors[edition]
    _, videos, kwargs = process_vision_info(user_videos({"video": clip}), True, edition=edition)
    image = Image.fromarray(decode_clip(clip)[0])
    text = "<|image_pad|>" + VIDEO
    float_inputs = processor(text, images=image, videos=videos, **kwargs)
    inputs = processor(text, images=image, videos=videos, pixel_dtype="uint8", **kwargs)
    for name in ("pixel_values", "pixel_values_videos"):
        assert inputs[name].dtype == torch.uint8
        assert inputs[name].shape[1:] == (3, 14, 14)
        assert torch.equal(normalize(inputs[name], processor.patch_config.norm), float_inputs[name])
    with pytest.raises(ValueError, match="pixel_dtype must be"):
        processor(text, images=image, videos=videos, pixel_dtype="int8", **kwargs)


def test_repeating_placeholder_ids_equals_encoding_the_expanded_text(processors):
    processor = processors["1.5"]
    frames = torch.zeros(3, 3, 56, 112, dtype=torch.uint8)
    inputs = processor(f"a <|image_pad|> b{VIDEO}c", images=frames[0], videos=[frames], timestamps=[[0.0, 1.5, 12.25]])
    whole = f"a {'<|image_pad|>' * 8} b<|vision_start|>" + "".join(
        f"<|frame|>{time}{'<|video_pad|>' * 8}" for time in ("0.0", "1.5", "12.2")
    )
    assert inputs.input_ids[0].tolist() == processor.tokenizer.encode(f"{whole}<|vision_end|>c")


def test_timestamps_belong_to_the_right_video_if_another_has_none(processors):
    images = [Image.new("RGB", (60, 60), (index * 40, 0, 0)) for index in range(3)]
    message = user_videos({"video": images}, {"video": images[:2], "fps": 4.0})
    _, videos, kwargs = process_vision_info(message, edition="1.5")
    assert kwargs["timestamps"][0] is None
    assert kwargs["timestamps"][1].tolist() == [0.0, 0.25]
    inputs = processors["1.5"](VIDEO * 2, videos=videos, **kwargs)
    assert inputs.num_frames.tolist() == [3, 2]
    # The official package leaves the None out; the lengths show which video has no times.
    official = {**kwargs, "timestamps": kwargs["timestamps"][1:]}
    assert torch.equal(processors["1.5"](VIDEO * 2, videos=videos, **official).input_ids, inputs.input_ids)
    same_length = [videos[0][:2], videos[1]]
    official["frame_types"] = [official["frame_types"][0][:2], official["frame_types"][1]]
    with pytest.raises(ValueError, match="timestamps must hold one entry"):
        processors["1.5"](VIDEO * 2, videos=same_length, **official)


@pytest.mark.parametrize("edition", EDITIONS)
def test_parallel_loading_returns_the_same_videos_in_the_same_order(clip, capfd, edition):
    clips = [clip, encode_clip(20, fps=10, height=80), encode_clip(30, fps=10, width=128)]
    messages = user_videos(*({"video": content} for content in clips))
    messages[0]["content"].insert(1, {"type": "image", "image": Image.new("RGB", (30, 40))})
    images, videos, kwargs = process_vision_info(messages, True, edition=edition)
    same_images, same_videos, same_kwargs = process_vision_info(messages, True, edition=edition, workers=3, progress=True)
    assert "4/4" in capfd.readouterr().err
    assert len(images) == len(same_images) == 1
    assert all(torch.equal(a, b) for a, b in zip(videos, same_videos, strict=True))
    assert str(kwargs) == str(same_kwargs)


def test_an_error_in_one_of_several_videos_is_raised(clip):
    with pytest.raises(ValueError, match="<4 bytes>"):
        process_vision_info(user_videos({"video": clip}, {"video": b"junk"}, {"video": clip}), workers=2)
    with pytest.raises(ValueError, match="workers must be"):
        process_vision_info(user_videos({"video": clip}), workers=0)


def open_descriptors():
    found = []
    for descriptor in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            found.append(descriptor)
    return found


def test_all_files_are_closed(tmp_path, clip):
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip)
    (tmp_path / "half.mp4").write_bytes(clip[: len(clip) // 2])
    before = open_descriptors()
    process_vision_info(user_videos({"video": str(path)}), edition="1.5")
    for _ in range(3):
        with pytest.raises(ValueError, match=r"half\.mp4"):
            process_vision_info(user_videos({"video": str(tmp_path / "half.mp4")}))
    assert open_descriptors() == before
