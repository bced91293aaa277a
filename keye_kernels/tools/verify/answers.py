"""The answers of the small model: the kernels must give the tokens of the reference, and the right answers."""

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from keye_kernels.small import small_model, small_processor

from .checks import CheckResult

IMAGE_FILE = Path(__file__).parents[2] / "assets" / "image.png"
COUNT = "how many objects are there?"
MAX_NEW_TOKENS = 16


def questions() -> list[tuple[Image.Image, str, str]]:
    """Images of several sizes with a question each, and the first MAX_NEW_TOKENS tokens of the right answer."""
    bundled = Image.open(IMAGE_FILE).convert("RGB")
    return [
        (bundled, "what is in the picture?", "a small black star at top right and a large yellow square at middle left and"),
        (_draw((112, 112), {1: "circle"}), COUNT, "one"),
        (_draw((168, 112), {0: "circle", 2: "square"}), COUNT, "two"),
        (_draw((140, 140), {0: "triangle", 1: "circle", 2: "square"}), COUNT, "three"),
    ]


def check_answers(device: torch.device, impl: str) -> list[CheckResult]:
    """One result per question: `error` is the number of tokens that differ from the reference, or 1 for a wrong answer."""
    processor = small_processor()
    models = [small_model(dtype=torch.float32, device=device, impl=name) for name in (impl, "reference")]
    results = []
    for image, question, right in questions():
        start = time.perf_counter()
        message = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": message}])
        inputs = processor(text=prompt, images=[image]).to(device)
        length = inputs["input_ids"].shape[1]
        tokens, expected = (model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[0, length:].tolist() for model in models)
        answer = processor.decode(tokens, skip_special_tokens=True)
        differ = abs(len(tokens) - len(expected)) + sum(a != b for a, b in zip(tokens, expected, strict=False))
        seconds = round(time.perf_counter() - start, 2)
        label = f"{question} {answer if question == COUNT else ''}".strip()
        error = float(max(differ, answer != right))
        results.append(CheckResult("small model", label, "fp32", error, 0.0, 1, 0, "ok", seconds))
    return results


def _draw(size: tuple[int, int], shapes: dict[int, str]) -> Image.Image:
    """A gray image with large shapes in the left (0), middle (1) and right (2) third, in red, blue and yellow."""
    image = Image.new("RGB", size, (132, 128, 120))
    draw, colours = ImageDraw.Draw(image), ((220, 40, 40), (50, 80, 220), (235, 210, 40))
    radius = 0.13 * min(size)
    for third, shape in shapes.items():
        x, y = size[0] * (third + 0.5) / 3, size[1] / 2
        if shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colours[third])
        else:
            draw.regular_polygon((x, y, 1.2 * radius), {"square": 4, "triangle": 3}[shape], fill=colours[third])
    return image
