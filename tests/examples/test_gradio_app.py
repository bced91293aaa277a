"""examples/gradio_app.py in headless Chromium, with the small model and with a scripted one."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch

from keye_kernels.processing import KeyeProcessor
from keye_kernels.small import SMALL, small_model, small_processor
from tests.helpers.small_tokenizer import write_processor_files

pytest.importorskip("gradio", reason="needs Gradio: pip install -e '.[app]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium: apt-get install chromium", allow_module_level=True)

from examples import gradio_app  # noqa: E402  imports Gradio

IMAGE, CLIP = str(SMALL.parent / "image.png"), str(SMALL.parent / "clip.mp4")
ANSWERS = {name: dict(pairs) for name, pairs in json.loads((SMALL.parent / "questions.json").read_text()).items()}
IMAGE_QUESTION, CLIP_QUESTION = "what is in the picture?", "which way does it move?"
SLOW_COLOUR, FAST_COLOUR = (31, 119, 180), (255, 127, 14)
TIMEOUT_MS = 60_000


class ScriptedModel:
    """Generates `text`, one token every `seconds_per_token`, and records how many calls run at the same time."""

    device = "cpu"

    def __init__(self, processor: KeyeProcessor):
        self.tokenizer = processor.tokenizer
        self.text, self.seconds_per_token = "", 0.0
        self.running = self.most_running = self.started = self.completed = 0

    def generate(self, input_ids, max_new_tokens, streamer, **vision_inputs):
        self.started += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            streamer.put(input_ids)
            for token in self.tokenizer.encode(self.text):
                streamer.put(torch.tensor([token]))
                time.sleep(self.seconds_per_token)
            streamer.end()
            self.completed += 1
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def browser():
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def small_url():
    app = gradio_app.build_page(small_model(), small_processor())
    yield app.launch(prevent_thread_lock=True, quiet=True, show_error=True)[1]
    app.close()


@pytest.fixture
def scripted(tmp_path):
    """(model, URL) of a page with a scripted model and a processor of edition 1.5."""
    processor = KeyeProcessor.from_pretrained(write_processor_files(tmp_path / "processor", "1.5"))
    model = ScriptedModel(processor)
    app = gradio_app.build_page(model, processor)
    yield model, app.launch(prevent_thread_lock=True, quiet=True, show_error=True)[1]
    app.close()


@pytest.fixture
def open_page(browser):
    """Opens the page at a URL; closes all opened pages at the end."""
    with browser.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(TIMEOUT_MS)

        def open_url(url):
            page = context.new_page()
            page.goto(url)
            page.get_by_role("button", name="Ask").wait_for()
            return page

        yield open_url


def upload(page, file: str) -> None:
    component, shown = ("#clip", "video") if file.endswith(".mp4") else ("#image", "img")
    page.locator(f"{component} input[type=file]").set_input_files(file)
    page.locator(f"{component} {shown}").first.wait_for()


def ask(page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()


def expect_text(page, selector: str, text: str) -> None:
    playwright.expect(page.locator(selector)).to_have_text(text, timeout=TIMEOUT_MS)


def expect_error(page, text: str) -> None:
    """Expects an error message that contains `text` and no traceback."""
    toast = page.get_by_test_id("toast-body").filter(has_text=text)
    toast.first.wait_for()
    assert "Traceback" not in toast.first.inner_text()


def wait_until(condition) -> None:
    end = time.monotonic() + TIMEOUT_MS / 1000
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.05)


def test_uploaded_image_is_answered(small_url, open_page):
    page = open_page(small_url)
    upload(page, IMAGE)
    ask(page, IMAGE_QUESTION)
    expect_text(page, "#answer", ANSWERS["image.png"][IMAGE_QUESTION])
    assert not page.locator("#thought").is_visible() and not page.locator("#time_line").is_visible()


def test_uploaded_clip_is_answered_with_a_time_line(small_url, open_page):
    page = open_page(small_url)
    upload(page, IMAGE)
    upload(page, CLIP)
    page.locator("#image img").wait_for(state="detached")  # a clip replaces the image
    ask(page, CLIP_QUESTION)
    expect_text(page, "#answer", ANSWERS["clip.mp4"][CLIP_QUESTION])
    image = page.locator("#time_line img")
    image.wait_for()
    wait_until(lambda: image.evaluate("image => image.naturalWidth") > 1000)


def test_example_row_fills_the_form(small_url, open_page):
    page = open_page(small_url)
    page.locator("td", has_text=CLIP_QUESTION).click()
    page.locator("#clip video").wait_for()
    page.get_by_label("Question").press("Enter")
    expect_text(page, "#answer", ANSWERS["clip.mp4"][CLIP_QUESTION])


def test_thinking_is_streamed_into_its_own_panel(scripted, open_page):
    model, url = scripted
    model.text = "<analysis>Easy.</analysis><think>It starts low.</think><answer>It moves **up**.</answer>"
    model.seconds_per_token = 0.05
    page = open_page(url)
    upload(page, CLIP)
    page.get_by_label("Think first").check()
    ask(page, CLIP_QUESTION)
    page.locator("#thought").wait_for()
    assert model.completed == 0, "the panel must appear before generation ends"
    expect_text(page, "#answer", "It moves up.")
    assert page.locator("#thought").inner_text() == "Easy.\n\nIt starts low."
    assert page.locator("#answer strong").inner_text() == "up"


def test_time_line_marks_slow_and_fast_frames(tmp_path):
    def has_colour(processor, colour):
        pixels = np.asarray(gradio_app.draw_time_line(processor, CLIP)).astype(int)
        return bool((np.abs(pixels - colour).max(-1) < 8).any())

    # The shape in the clip is blue, so only the colour of fast frames decides.
    with_fast_frames = KeyeProcessor.from_pretrained(write_processor_files(tmp_path / "1.5", "1.5"))
    assert has_colour(with_fast_frames, SLOW_COLOUR) and has_colour(with_fast_frames, FAST_COLOUR)
    assert not has_colour(small_processor(), FAST_COLOUR)


@pytest.mark.parametrize("how", ["stop_button", "closed_page"])
def test_generation_ends_early(scripted, open_page, how):
    model, url = scripted
    model.text, model.seconds_per_token = "word " * 2000, 0.02
    page = open_page(url)
    upload(page, IMAGE)
    ask(page, "?")
    page.get_by_text("word word").wait_for()
    if how == "stop_button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.close()
    wait_until(lambda: model.running == 0)
    assert (model.started, model.completed) == (1, 0)

    model.text = "The next answer."
    page = open_page(url)
    upload(page, IMAGE)
    ask(page, "?")
    expect_text(page, "#answer", "The next answer.")


def test_requests_run_one_at_a_time(scripted, open_page):
    model, url = scripted
    model.text, model.seconds_per_token = "An answer of some length.", 0.05
    pages = [open_page(url), open_page(url)]
    for page in pages:
        upload(page, IMAGE)
    for page in pages:
        ask(page, "?")
    for page in pages:
        expect_text(page, "#answer", model.text)
    assert (model.completed, model.most_running) == (2, 1)


def test_missing_input_is_one_sentence(scripted, open_page):
    _, url = scripted
    page = open_page(url)
    ask(page, "what is this?")
    expect_error(page, "Add an image or a clip first.")

    page = open_page(url)
    upload(page, IMAGE)
    ask(page, "  ")
    expect_error(page, "Enter a question first.")


def test_unreadable_clip_is_an_error_without_traceback(scripted, open_page, tmp_path, capfd):
    _, url = scripted
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    page = open_page(url)
    page.locator("#clip input[type=file]").set_input_files(broken)
    page.locator("#clip video").wait_for(state="attached")
    ask(page, CLIP_QUESTION)
    expect_error(page, "broken.mp4")
    assert "Traceback" not in capfd.readouterr().err
