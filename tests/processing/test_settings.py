"""Settings are honoured: fields of a checkpoint's files, and arguments of the processor and its parts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor
from keye_kernels.processing.batch import BatchFeature, pad_sequences
from keye_kernels.processing.packing import pack_video
from keye_kernels.processing.patches import PatchConfig
from keye_kernels.processing.prompts import render_chat_template
from keye_kernels.processing.tokenizer import KeyeTokenizer, build_byte_tokenizer
from tests.helpers.golden import golden
from tests.helpers.gpu_copies import Copies
from tests.helpers.messages import IMAGE, VIDEO, random_image, text_part, user
from tests.helpers.patches import cut_patches
from tests.helpers.small_tokenizer import write_processor_files

FRAMES = torch.randint(0, 256, (4, 3, 56, 84), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.parametrize(("edition", "folder"), [("preview", "preview"), ("1.5", "v1_5")])
def test_an_edition_has_the_values_of_its_released_configuration(edition, folder):
    config = json.loads(golden(folder, "config.json").read_text())
    found = EDITIONS[edition]
    assert (found.model_type, [found.architecture]) == (config["model_type"], config["architectures"])
    assert found.context_length == config["max_position_embeddings"]


def test_missing_settings_have_the_defaults_of_the_official_image_processor():
    for edition in EDITIONS:
        config = PatchConfig.from_dict({}, edition)
        assert (config.min_pixels, config.max_pixels, config.patch_size, config.merge_size) == (3136, 1003520, 14, 2)
        black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 56, 56)
        patches, _ = config.images_to_patches(list(black_and_white), edition, "float32")
        assert patches[[0, -1], :, 0, 0].tolist() == [[-1.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(
    "limits",
    [
        {"min_pixels": 6272, "max_pixels": 12544},
        {"size": {"min_pixels": 6272, "max_pixels": 12544}},
        {"size": {"shortest_edge": 6272, "longest_edge": 12544}},
        {"min_pixels": 6272, "max_pixels": 12544, "size": {"shortest_edge": 784, "longest_edge": 10**6}},
    ],
    ids=str,
)
def test_the_limits_of_the_area_have_three_places(limits):
    config = PatchConfig.from_dict(limits, "preview")
    assert (config.min_pixels, config.max_pixels) == (6272, 12544)


def test_the_rescale_factor_is_read_from_the_file():
    config = PatchConfig.from_dict({"rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]}, "preview")
    patches, _ = config.images_to_patches([torch.full((3, 56, 56), 255, dtype=torch.uint8)], "preview", "float32")
    torch.testing.assert_close(patches, torch.ones(16, 3, 14, 14))


@pytest.mark.parametrize(("patch_size", "merge_size"), [(14, 1), (14, 4), (7, 2)])
def test_patch_size_and_merge_size_are_read_from_the_file(tmp_path, patch_size, merge_size):
    factor = patch_size * merge_size
    for edition in EDITIONS:
        folder = write_processor_files(tmp_path / edition, edition, patch_size=patch_size, merge_size=merge_size)
        processor = KeyeProcessor.from_pretrained(folder)
        height, width = 5 * factor, 7 * factor
        image = random_image(height, width)
        video = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        inputs = processor(IMAGE + VIDEO, images=image, videos=[video])
        rows, columns = height // patch_size, width // patch_size
        assert inputs.image_grid_thw.tolist() == inputs.video_grid_thw.tolist() == [[1, rows, columns]]
        assert inputs.pixel_values.shape == (rows * columns, 3, patch_size, patch_size)
        for token_id in (processor.image_token_id, processor.video_token_id):
            assert (inputs.input_ids == token_id).sum() == 35


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_images_and_preview_videos_are_resized_with_the_filter_of_the_file(tmp_path, resample):
    processor = KeyeProcessor.from_pretrained(write_processor_files(tmp_path, "preview", resample=resample))
    image = random_image(61, 75)
    inputs = processor(IMAGE + VIDEO, images=image, videos=[[image]], pixel_dtype=torch.uint8)
    expected = torch.from_numpy(np.array(image.resize((84, 56), resample))).permute(2, 0, 1)
    for name in ("pixel_values", "pixel_values_videos"):
        assert torch.equal(inputs[name], cut_patches(expected))


def test_min_pixels_of_from_pretrained_enlarges_images(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    processor = KeyeProcessor.from_pretrained(folder, min_pixels=112 * 112)
    assert processor(IMAGE, images=random_image(56, 56)).image_grid_thw.tolist() == [[1, 8, 8]]


def test_the_dtype_of_pixels_may_be_a_torch_dtype(processor):
    image = random_image()
    for dtype in (torch.uint8, torch.float32):
        assert processor(IMAGE, images=image, pixel_dtype=dtype).pixel_values.dtype == dtype


def test_the_padding_token_defaults_to_the_end_token_and_one_of_them_is_needed():
    backend = build_byte_tokenizer()
    tokenizer = KeyeTokenizer(backend, eos_token="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert KeyeTokenizer(backend).pad_token_id is None
    options = {"padding": True, "padding_side": "left"}
    with pytest.raises(ValueError, match="padding needs pad_token or eos_token"):
        pad_sequences([[1], [2, 3]], None, **options)
    assert pad_sequences([[1, 4], [2, 3]], None, **options)[0].tolist() == [[1, 4], [2, 3]]


def test_the_configuration_of_the_tokenizer_is_optional(tmp_path):
    folder = write_processor_files(tmp_path, "preview")
    (folder / "tokenizer_config.json").unlink()
    processor = KeyeProcessor.from_pretrained(folder)
    assert processor.tokenizer.eos_token_id is processor.tokenizer.pad_token_id is None
    assert processor("ab").input_ids.tolist() == [[97, 98]]


def test_the_truncation_and_padding_of_a_tokenizer_file_are_turned_off():
    backend = build_byte_tokenizer()
    backend.enable_truncation(4)
    assert KeyeTokenizer(backend).encode("123456") == list(b"123456")
    backend = build_byte_tokenizer()
    backend.enable_padding(length=12)
    assert KeyeTokenizer(backend).encode("123456") == list(b"123456")


def test_decoding_passes_its_options_on(processor):
    ids = processor("a<|im_end|>").input_ids
    assert processor.batch_decode(ids) == ["a<|im_end|>"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a"]
    for decode, given in ((processor.decode, ids[0]), (processor.batch_decode, ids)):
        with pytest.raises(ValueError, match="clean_up_tokenization_spaces=True is not supported"):
            decode(given, clean_up_tokenization_spaces=True)


def test_videos_of_1_5_need_the_tokens_of_frames_and_images_do_not(tmp_path):
    folder = write_processor_files(tmp_path, "1.5")
    content = (folder / "tokenizer.json").read_text().replace("<|fast_end|>", "<|other|>")
    (folder / "tokenizer.json").write_text(content)
    processor = KeyeProcessor.from_pretrained(folder)
    assert processor(IMAGE, images=random_image()).image_grid_thw.tolist() == [[1, 4, 6]]
    with pytest.raises(ValueError, match=r"no token '<\|fast_end\|>'"):
        processor(VIDEO, videos=[FRAMES])


def test_a_prompt_ends_with_the_assistants_turn_only_if_asked(processor):
    messages = user(text_part("a"))
    end = "<|im_start|>assistant\n"
    with_end, without = (processor.apply_chat_template(messages, add_generation_prompt=value) for value in (True, False))
    assert with_end == without + end and not without.endswith(end)


def test_a_thinking_mode_is_appended_to_the_last_of_several_texts():
    messages = user(text_part("a"), {"image": "x.png"}, text_part("b"))
    template = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    assert render_chat_template(template, messages, thinking="think") == "[a][][b/think]"


def test_images_and_videos_may_be_one_array_or_a_list_of_frames(processor):
    inputs = processor(IMAGE * 4, images=FRAMES.permute(0, 2, 3, 1).numpy())
    for images in (FRAMES, list(FRAMES)):
        assert torch.equal(processor(IMAGE * 4, images=images).pixel_values, inputs.pixel_values)
    expected = processor(VIDEO * 2, videos=[FRAMES, FRAMES])
    stacked = processor(VIDEO * 2, videos=torch.stack([FRAMES, FRAMES]))
    assert torch.equal(stacked.pixel_values_videos, expected.pixel_values_videos)
    one = processor(VIDEO, videos=FRAMES)
    for frames in (list(FRAMES), tuple(FRAMES), [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in FRAMES]):
        assert torch.equal(processor(VIDEO, videos=frames).pixel_values_videos, one.pixel_values_videos)


def test_one_value_or_one_per_video_may_be_a_list_or_a_tensor(processors):
    preview, v1_5 = processors["preview"], processors["1.5"]
    for fps in ([None, 4.0], [2, 4]):
        seconds = preview(VIDEO * 2, videos=[FRAMES] * 2, fps=fps).second_per_grid_ts
        assert seconds.tolist() == [0.5, 0.25]
    assert preview(VIDEO, videos=[FRAMES], fps=torch.tensor(4.0)).second_per_grid_ts.tolist() == [0.25]
    times = [[0.0, 0.5, 1.0, 1.5], [2.0, 2.5, 3.0, 3.5]]
    expected = v1_5(VIDEO * 2, videos=[FRAMES] * 2, timestamps=times).input_ids
    assert "<|frame|>3.5" in v1_5.decode(expected[0])
    assert torch.equal(v1_5(VIDEO * 2, videos=[FRAMES] * 2, timestamps=torch.tensor(times)).input_ids, expected)
    single = v1_5(VIDEO, videos=[FRAMES], timestamps=[times[0]]).input_ids
    for same in (times[0], torch.tensor(times[0]), torch.tensor(times[:1])):
        assert torch.equal(v1_5(VIDEO, videos=[FRAMES], timestamps=same).input_ids, single)


def test_no_timestamps_are_an_empty_list_or_none(v1_5):
    """`keye_vl_utils` 1.5 leaves out the times of videos that have none."""
    expected = v1_5(VIDEO * 2, videos=[FRAMES] * 2).input_ids
    for timestamps in ([], (), None, [None, None]):
        assert torch.equal(v1_5(VIDEO * 2, videos=[FRAMES] * 2, timestamps=timestamps).input_ids, expected)


def test_as_many_timestamps_as_videos_belong_to_them_in_order(v1_5):
    """Even if their numbers do not fit: nothing is moved to another video."""
    with pytest.raises(ValueError, match="one time for each of the 2 frames, got 4"):
        v1_5(VIDEO * 2, videos=[FRAMES[:2], FRAMES], timestamps=[[0.0, 1.0, 2.0, 3.0], [0.0, 1.0]])


def test_missing_sizes_are_those_of_the_first_frame():
    frames = [torch.zeros(3, 56, 84, dtype=torch.uint8), torch.zeros(3, 112, 112, dtype=torch.uint8)]
    assert pack_video(frames, PatchConfig(), frame_types=[0, 1]).grid_thw == [(2, 4, 6)]
    assert pack_video(frames, PatchConfig(), frame_types=[0, 1], slow_size=(28, 28)).grid_thw == [(1, 2, 2), (1, 4, 6)]
    assert pack_video(frames, PatchConfig(), frame_types=[0, 1], fast_size=(28, 28)).grid_thw == [(1, 4, 6), (1, 2, 2)]


def test_moving_a_batch_passes_non_blocking_on(monkeypatch):
    seen = []
    move = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **options: seen.append((*args[1:], options)) or move(*args, **options))
    batch = BatchFeature(input_ids=torch.zeros(2, dtype=torch.int64), pixel_values=torch.zeros(2))
    batch.to("cpu", torch.float16, non_blocking=True)
    assert seen == [(torch.device("cpu"), dtype, {"non_blocking": True}) for dtype in (None, torch.float16)]


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda:0")])
def test_a_batch_is_copied_to_a_gpu_asynchronously_except_for_what_the_cpu_reads(monkeypatch, device):
    values = {
        "input_ids": torch.arange(6).view(2, 3),
        "pixel_values": torch.rand(2, 3, 14, 14),
        "pixel_values_videos": torch.randint(0, 256, (2, 3, 14, 14), dtype=torch.uint8),
        "image_grid_thw": torch.tensor([[1, 2, 1]]),
        "video_grid_thw": torch.tensor([[1, 2, 1]]),
        "second_per_grid_ts": torch.tensor([0.5]),
        "num_frames": torch.tensor([1]),
    }
    batch = BatchFeature(values, note="x")
    copies = Copies(monkeypatch)
    assert batch.to(device, torch.bfloat16) is batch
    monkeypatch.undo()
    assert copies.all_asynchronous() and copies.devices == [torch.device(device)] * 3
    for name, value in values.items():
        dtype = torch.bfloat16 if value.is_floating_point() else value.dtype
        assert torch.equal(batch[name], value.to(dtype)) and batch[name].dtype == dtype
        assert (batch[name] is value) == (name in ("image_grid_thw", "video_grid_thw", "num_frames"))
    assert batch.note == "x"
    assert batch.to("meta").input_ids.is_meta and not batch.image_grid_thw.is_meta
    # A grid on another device comes back
    with pytest.raises(NotImplementedError, match="meta"):
        BatchFeature(image_grid_thw=torch.empty(1, 3, device="meta")).to("cpu")
