"""The inspection of a video agrees with what the processor does."""

import sys

import pytest
from PIL import Image

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import KeyeProcessor, process_vision_info
from keye_kernels.processing.inspect import inspect_video, plot_inspection
from tests.helpers.messages import user_videos
from tests.helpers.small_tokenizer import write_processor_files
from tests.helpers.video_clips import encode_clip

VIDEO = "<|video_pad|>"


@pytest.fixture(scope="module")
def clip():
    return encode_clip(40, fps=5, height=240, width=320)


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("by_processor", [True, False], ids=["processor", "edition"])
def test_tokens_equal_those_of_the_processor(tmp_path, clip, edition, by_processor):
    processor = KeyeProcessor.from_pretrained(write_processor_files(tmp_path, edition))
    options = {"max_pixels": 60_000 if edition == "1.5" else 200_000}
    inspection = inspect_video(clip, processor if by_processor else edition, options)
    messages = user_videos({"video": clip, **options})
    _, videos, kwargs = process_vision_info(messages, True, edition=edition)
    inputs = processor(VIDEO, videos=videos, **kwargs)
    assert inspection.total_tokens == inputs.input_ids.shape[1]
    assert sum(inspection.frame_tokens) == (inputs.input_ids == processor.video_token_id).sum()
    assert inspection.seconds[:3] == pytest.approx([0.0, 0.6, 1.0])
    if edition == "1.5":
        assert inspection.frame_types == kwargs["frame_types"][0].tolist()
        assert len(set(inspection.frame_tokens)) == 2


def test_images_without_fps_have_their_index_as_time():
    images = [Image.new("RGB", (60, 60))] * 3
    assert inspect_video(images, "1.5").seconds == [0.0, 1.0, 2.0]
    assert inspect_video(images, "preview", {"fps": 2}).seconds == [0.0, 0.5, 1.0, 1.0]


def test_the_table_lists_each_frame_and_the_percentage_of_the_context(clip):
    inspection = inspect_video(clip, "1.5", {"max_pixels": 60_000})
    lines = inspection.to_text(10_000).splitlines()
    assert len(lines) == len(inspection.seconds) + 2
    assert lines[1].split() == ["0", "0.00", "slow", "196", "x", "280", "70"]
    assert f"{inspection.total_tokens / 10_000:.1%} of the context of 10000" in lines[-1]


def test_without_matplotlib_the_error_shows_the_install_command(monkeypatch, tmp_path, clip):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"keye_kernels\[bench\]"):
        plot_inspection(inspect_video(clip, "1.5", {"max_pixels": 60_000}), tmp_path / "plot.png")


def test_the_plot_is_written(tmp_path, clip):
    pytest.importorskip("matplotlib")
    inspection = inspect_video(clip, "1.5", {"max_pixels": 60_000})
    plot_inspection(inspection, tmp_path / "plot.png", context_length=131_072)
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > 1000
