"""Images in several threads: results and errors are those of one thread, and threads end and stay within their limit."""

import contextvars
import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from keye_kernels.editions import EDITIONS
from keye_kernels.processing import process_vision_info, threads, vision_info
from keye_kernels.processing.images import decode_repeated, load_image
from keye_kernels.processing.patches import PatchConfig
from keye_kernels.processing.threads import MAX_HELPER_THREADS, map_in_threads
from keye_kernels.small import small_processor
from tests.helpers.messages import IMAGE, VIDEO, random_image, user
from tests.helpers.patches import cut_patches, normalize

SIZES = [(64, 90), (57, 85), (140, 30), (56, 56), (200, 210), (61, 75)]


@pytest.fixture
def four_threads(monkeypatch):
    """Four threads, also in workers of pytest-xdist, which have one."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


def wait_for(condition):
    """Fails after ten seconds in which `condition()` was false."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_results_are_in_the_order_of_the_items(four_threads):
    names = set()

    def slow_if_even(item):
        names.add(threading.current_thread().name)
        time.sleep(0.01 if item % 2 == 0 else 0)
        return item * item

    assert map_in_threads(slow_if_even, range(40)) == [item * item for item in range(40)]
    assert 1 < len(names) <= 4 and threading.current_thread().name in names
    assert map_in_threads(slow_if_even, []) == []


def test_one_item_and_one_thread_need_no_helper(monkeypatch, four_threads):
    monkeypatch.setattr(threads._helpers, "submit", lambda *_: pytest.fail("used a helper"))
    assert map_in_threads(str, [1]) == ["1"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert map_in_threads(str, [1, 2, 3]) == ["1", "2", "3"]


def test_the_error_of_the_first_item_that_fails_is_raised(four_threads):
    started = []

    def fail(item):
        started.append(item)
        if item == 1:
            wait_for(lambda: 3 in started)  # the error of item 3 comes first
            time.sleep(0.02)
        if item in (1, 3):
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 1"):
        map_in_threads(fail, range(1000))
    # Nothing is started after an error
    assert len(started) < 900


def test_an_interrupt_has_precedence_over_errors(four_threads):
    together = threading.Barrier(3)

    def fail(item):
        together.wait(timeout=10)
        if item == 2:
            raise KeyboardInterrupt
        raise ValueError(f"item {item}")

    with pytest.raises(KeyboardInterrupt):
        map_in_threads(fail, range(3))


def test_nothing_runs_when_the_call_returns(four_threads):
    running = set()

    def work(item):
        running.add(item)
        time.sleep(0.002 * item)
        running.discard(item)
        return 1 // (item - 5)

    for items in ([1, 2, 3, 4] * 4, [1, 5, 6, 7, 8, 9]):
        with suppress(ZeroDivisionError):
            map_in_threads(work, items)
        assert not running


def test_all_calls_together_have_a_limited_number_of_helpers(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 100)
    before, most, lock = threading.active_count(), [0, 0], threading.Lock()

    def work(_):
        with lock:
            most[0] += 1
            most[1] = max(most)
        time.sleep(0.01)
        with lock:
            most[0] -= 1

    callers = [threading.Thread(target=map_in_threads, args=(work, range(40))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert 3 < most[1] <= MAX_HELPER_THREADS + 3
    assert threading.active_count() <= before + MAX_HELPER_THREADS


def test_a_caller_does_not_wait_for_helpers_that_are_busy(monkeypatch, four_threads):
    end = threading.Event()
    monkeypatch.setattr(threads, "_helpers", ThreadPoolExecutor(1))
    busy = threads._helpers.submit(end.wait, 5)
    assert set(map_in_threads(lambda _: threading.get_ident(), range(20))) == {threading.get_ident()}
    assert not busy.done()
    # A number of threads that the user passed is not limited
    together = threading.Barrier(MAX_HELPER_THREADS + 3)
    before = threading.active_count()
    map_in_threads(lambda _: together.wait(timeout=10), range(MAX_HELPER_THREADS + 3), threads=MAX_HELPER_THREADS + 3)
    assert threading.active_count() == before
    end.set()


def test_nested_calls_end(four_threads):
    def inner(item):
        return sum(map_in_threads(lambda value: value + item, range(10)))

    assert map_in_threads(inner, range(20)) == [45 + 10 * item for item in range(20)]


def test_without_new_threads_the_caller_does_the_work(monkeypatch, four_threads):
    def refuse(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(threads._helpers, "submit", refuse)
    assert map_in_threads(str, range(5)) == list("01234")


def test_helpers_have_the_context_variables_of_the_caller(four_threads):
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(3)
    barrier = threading.Barrier(2)  # each of two threads has one item
    assert map_in_threads(lambda _: (barrier.wait(timeout=10), variable.get())[1], range(2)) == [3, 3]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_has_its_own_helpers(four_threads):
    end = threading.Event()
    busy = [threads._helpers.submit(end.wait, 20) for _ in range(2 * MAX_HELPER_THREADS)]
    child = os.fork()
    if child == 0:
        found = set(map_in_threads(lambda _: time.sleep(0.05) or threading.get_ident(), range(8)))
        os._exit(0 if len(found) > 1 else 1)
    end.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(future.result() for future in busy)


# Images


def sources():
    return [random_image(*size, seed=index) for index, size in enumerate(SIZES)]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("edition", EDITIONS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_patches_equal_those_of_single_images(four_threads, edition, mode):
    config, images = (
        PatchConfig.from_dict({"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}, edition),
        sources(),
    )
    expected = []
    for image in images:
        height, width = config.resized_size(image.height, image.width)
        resized = np.array(image.resize((width, height), config.resample))
        expected.append(cut_patches(torch.from_numpy(resized).permute(2, 0, 1)))
    with mode():
        patches, grids = config.images_to_patches(images, edition)
        floats, same = config.images_to_patches(images, edition, "float32")
        videos, video_grids = config.videos_to_patches([images[:1] * 3, images[1:2] * 2], edition)
    assert torch.equal(patches, torch.cat(expected))
    assert torch.equal(floats, normalize(torch.cat(expected), config.norm))
    assert grids == same and [h * w for _, h, w in grids] == [len(part) for part in expected]
    assert torch.equal(videos, torch.cat([*expected[:1] * 3, *expected[1:2] * 2]))
    assert [t for t, _, _ in video_grids] == [3, 2]


@pytest.mark.parametrize("first", [1, 4])
def test_the_first_bad_image_is_reported(four_threads, first):
    images = [png(image) for image in sources()]
    images[first] = b"bad" * first
    images[5] = b"worse"
    processor = small_processor()
    message = f"image <{3 * first} bytes> is not in a format"
    for _ in range(3):
        with pytest.raises(ValueError, match=message):
            processor(IMAGE * 6, images=images)
        with pytest.raises(ValueError, match=message):
            process_vision_info(user(*({"type": "image", "image": image} for image in images)))
        with pytest.raises(ValueError, match=message):
            process_vision_info(user({"type": "video", "video": images}))
        with pytest.raises(ValueError, match=message):
            processor(VIDEO, videos=[images])


def test_one_video_is_read_at_a_time_by_default(monkeypatch, four_threads):
    running, most = [0], [0]

    def read(part, **_):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.01)
        running[0] -= 1
        if part["video"] == "last":
            raise ValueError("end")

    monkeypatch.setattr(vision_info, "fetch_video", read)
    messages = user(*({"type": "video", "video": name} for name in ("a", "b", "c", "d", "last")))
    with pytest.raises(ValueError, match="end"):
        process_vision_info(messages)
    assert most[0] == 1


def test_an_image_that_occurs_several_times_is_decoded_once(four_threads, tmp_path):
    random_image(300, 400).save(tmp_path / "image.jpg", quality=95)
    expected, _ = PatchConfig().images_to_patches([str(tmp_path / "image.jpg")], "preview")
    for _ in range(5):
        image = Image.open(tmp_path / "image.jpg")
        patches, _ = PatchConfig().images_to_patches([image] * 8, "preview")
        assert torch.equal(patches, expected.repeat(8, 1, 1, 1))
        image = Image.open(tmp_path / "image.jpg")
        parts = [
            {"type": "image", "image": image},
            {"type": "video", "video": [image] * 4},
            {"type": "image_url", "image_url": image},
        ]
        found, videos = process_vision_info(user(*parts))
        assert len({item.tobytes() for item in [*found, *videos[0]]}) == 1


def test_repeated_images_are_decoded_before_the_threads_start(tmp_path):
    random_image().save(tmp_path / "image.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:200])
    single, twice, shared = (Image.open(tmp_path / "image.png") for _ in range(3))
    other = Image.open(tmp_path / "image.png")
    other.fp = shared.fp
    broken = Image.open(tmp_path / "broken.png")
    decode_repeated([single, twice, {"image": twice}, shared, other, broken, broken, "path", np.zeros(3), None])
    assert single.tile and not twice.tile and not shared.tile


def test_pillow_loads_its_plugins_while_another_thread_opens_an_image(monkeypatch):
    """Image.open does not see the formats that another thread registers between its first and its second look."""
    encoded, calls, original = png(random_image()), [], Image.open

    def open_once_without_plugins(file):
        calls.append(file)
        if len(calls) == 1:
            file.read()
            raise UnidentifiedImageError("cannot identify image file")
        return original(file)

    monkeypatch.setattr(Image, "open", open_once_without_plugins)
    assert load_image(encoded).size == (84, 56) and len(calls) == 2
