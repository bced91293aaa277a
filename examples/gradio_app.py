"""A web page that answers questions about an image or a clip.

    pip install -e ".[app]"
    python examples/gradio_app.py
    python examples/gradio_app.py --model Keye-VL-1_5-8B --port 7860

The answer appears while it is generated, and the model's thinking appears in its own panel. For a clip the page also
shows the sampled frames on a time line, with slow and fast frames marked. Requests run one at a time.
"""

import argparse
import html
import queue
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import torch
from PIL import Image

import keye_kernels as kk
from keye_kernels.processing.inspect import inspect_video, plot_inspection
from keye_kernels.small import SMALL

MAX_NEW_TOKENS = 2048
THINKING_MODES = [("Model decides", "auto"), ("Think first", "think"), ("Answer directly", "no_think")]
EXAMPLES = [
    [str(SMALL.parent / "image.png"), None, "what is in the picture?"],
    [None, str(SMALL.parent / "clip.mp4"), "which way does it move?"],
]


class Stopped(Exception):
    """Ends `generate` after the user pressed Stop or closed the page."""


def stream_text(model: kk.Keye, processor: kk.KeyeProcessor, inputs: dict) -> Iterator[str]:
    """Runs `generate` in a thread and yields the whole text so far, each time it grows."""
    pieces: queue.Queue[str | None] = queue.Queue()
    stop = threading.Event()

    def write(piece: str) -> None:
        if stop.is_set():
            raise Stopped
        pieces.put(piece)

    def generate() -> None:
        streamer = kk.TextStreamer(lambda ids: processor.decode(ids, skip_special_tokens=True), write)
        try:
            model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, streamer=streamer)
        finally:
            pieces.put(None)

    text = ""
    # Leaving the `with` block waits for the thread: the next request starts after this one has ended.
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(generate)
        try:
            for piece in iter(pieces.get, None):
                text += piece
                yield text
            running.result()  # raises what `generate` raised
        finally:
            stop.set()


def draw_time_line(processor: kk.KeyeProcessor, clip: str) -> Image.Image:
    """The sampled frames and their token counts over time, slow and fast frames in different colours."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "time_line.png")
        plot_inspection(inspect_video(clip, processor), file)
        return Image.open(file).convert("RGB")


def build_page(model: kk.Keye, processor: kk.KeyeProcessor) -> gr.Blocks:
    with gr.Blocks(title="Keye-VL", analytics_enabled=False) as page:
        gr.Markdown("# Keye-VL\nAdd an image or a clip, then ask a question about it.")
        with gr.Row():
            with gr.Column(scale=3):
                with gr.Row():
                    image = gr.Image(
                        label="Image", type="filepath", image_mode=None, sources=["upload"], height=260, elem_id="image"
                    )
                    clip = gr.Video(label="Clip", sources=["upload"], height=260, elem_id="clip")
                question = gr.Textbox(label="Question", placeholder="What is shown here?")
                thinking = gr.Radio(THINKING_MODES, value="auto", label="Thinking mode")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=2):
                with gr.Accordion("Thinking", visible=False) as thought_panel:
                    thought = gr.Markdown(elem_id="thought")
                with gr.Accordion("Answer"):
                    answer = gr.Markdown(elem_id="answer", min_height=320)
        with gr.Accordion("Frames that the model receives", visible=False) as time_line_panel:
            time_line = gr.Image(show_label=False, container=False, buttons=["fullscreen"], elem_id="time_line")
        gr.Examples(EXAMPLES, [image, clip, question])

        def respond(image_file: str | None, clip_file: str | None, question_text: str, mode: str) -> Iterator[dict]:
            if not (image_file or clip_file):
                raise gr.Error("Add an image or a clip first.", print_exception=False)
            if not question_text.strip():
                raise gr.Error("Enter a question first.", print_exception=False)
            vision = {"type": "video", "video": clip_file} if clip_file else {"type": "image", "image": image_file}
            messages = [{"role": "user", "content": [vision, {"type": "text", "text": question_text}]}]
            hidden = gr.update(visible=False)
            yield {thought_panel: hidden, time_line_panel: hidden, answer: ""}
            try:
                inputs = processor.apply_chat_template(
                    messages,
                    thinking=mode,
                    tokenize=True,
                    processor_kwargs={"pixel_dtype": "uint8"},
                    allow_special_tokens=False,
                ).to(model.device)
                if clip_file:
                    yield {time_line_panel: gr.update(visible=True), time_line: draw_time_line(processor, clip_file)}
                for text in stream_text(model, processor, inputs):
                    parts = kk.split_thinking(text)
                    thoughts = f"{parts.analysis}\n\n{parts.thought}".strip()
                    panel = gr.update(visible=bool(thoughts))
                    yield {thought_panel: panel, thought: thoughts, answer: parts.answer}
            except (ValueError, OSError) as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from error

        # A question is about one file: a new image removes the clip, and a new clip removes the image.
        image.upload(lambda: None, outputs=clip)
        clip.upload(lambda: None, outputs=image)
        running = gr.on(
            [ask.click, question.submit],
            respond,
            inputs=[image, clip, question, thinking],
            outputs=[thought_panel, thought, answer, time_line_panel, time_line],
            show_progress_on=answer,
            concurrency_limit=1,
        )
        stop.click(None, cancels=running)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="A web page that answers questions about an image or a clip.")
    parser.add_argument("--model", default=SMALL, help="checkpoint folder; default: the bundled small model")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kk.Keye.from_pretrained(options.model, device=device)
    processor = kk.KeyeProcessor.from_pretrained(options.model)
    build_page(model, processor).launch(server_port=options.port, show_error=True)


if __name__ == "__main__":
    main()
