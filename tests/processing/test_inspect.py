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


def test_the_limits_of_the_processor_are_used(tmp_path):
    processor = KeyeProcessor.from_pretrained(write_processor_files(tmp_path, "preview", max_pixels=56 * 56))
    inspection = inspect_video([Image.new("RGB", (560, 560))] * 2, processor)
    assert (inspection.frame_sizes, inspection.frame_tokens) == ([(56, 56)] * 2, [4, 4])


def flashing(count):
    """A gray image and then red ones: one slow frame after another, then fast frames."""
    return [Image.new("RGB", (120, 60), (128, 128, 128) if index == 0 else (230, 30, 40)) for index in range(count)]


def test_slow_and_fast_frames_are_counted():
    inspection = inspect_video(flashing(5), "1.5", {"fps": 2})
    assert inspection.frame_types == [0, 0, 1, 1, 1]
    assert inspection.to_text().splitlines()[-1].startswith("5 frames (2 slow, 3 fast): ")
    # "<|frame|>0.0" is 1 + 3 tokens, and a fast frame has 2 markers more
    assert inspection.text_tokens == 5 * 4 + 3 * 2


@pytest.mark.parametrize(("count", "shown"), [(5, [0, 1, 2, 3, 4]), (12, list(range(12))), (23, list(range(0, 23, 2)))])
def test_at_most_12_thumbnails_are_kept(count, shown):
    inspection = inspect_video(flashing(count), "1.5", {"fps": 2})
    assert list(inspection.thumbnails) == shown
    height, width = inspection.frame_sizes[0]
    assert {tuple(image.shape) for image in inspection.thumbnails.values()} == {(3, 90, round(90 * width / height))}


def test_the_plot_shows_the_tokens_of_slow_and_fast_frames(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: saved.append(figure))
    inspection = inspect_video(flashing(5), "1.5", {"fps": 2, "max_pixels": 60_000})
    plot_inspection(inspection, tmp_path / "plot.png", context_length=1000)
    images, bars = saved[0].axes[:2]
    points = {tuple(line.get_xdata()): list(line.get_ydata()) for line in bars.lines}
    assert points == {(0.0, 0.5): inspection.frame_tokens[:2], (1.0, 1.5, 2.0): inspection.frame_tokens[2:]}
    assert [text.get_text() for text in bars.get_legend().get_texts()] == ["slow (2 frames)", "fast (3 frames)"]
    assert bars.get_title() == f"Keye 1.5: {inspection.total_tokens} tokens of 1000 ({inspection.total_tokens / 1000:.1%})"
    assert [axes.get_title() for axes in images.child_axes] == ["0.0 s", "0.5 s", "1.0 s", "1.5 s", "2.0 s"]
