"""The small Keye, asked about a bundled picture and a bundled clip."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from keye_kernels.model import Keye
from keye_kernels.ops.implementation import resolve
from keye_kernels.processing import KeyeProcessor
from keye_kernels.small import small_model, small_processor

ASSETS = Path(__file__).parents[1] / "assets"
KINDS = {".png": "image", ".mp4": "video"}
LONGEST_ANSWER = 32


class Clock:
    """A streamer that notes when tokens arrive: the prompt first, then each new one."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        tokens.cpu()  # waits for the device
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ask(model: Keye, processor: KeyeProcessor, file: Path, question: str) -> tuple[str, float, list[float]]:
    """The answer, the seconds from the question (file unread) to the first token, and those each later token took."""
    kind, start, clock = KINDS[file.suffix], time.perf_counter(), Clock()
    content = [{"type": kind, kind: str(file)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True)
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=LONGEST_ANSWER, streamer=clock)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    first, *later = clock.times[1:]
    return answer, first - start, [end - begin for begin, end in zip([first, *later], later, strict=False)]


def run_demo(options: argparse.Namespace) -> None:
    """Asks every bundled question and prints the answers, whether they are right, and how long they took."""
    device = torch.device(options.device or torch.get_default_device())
    interpreted = resolve(options.impl, "rope_2d", device) == "triton" and device.type == "cpu"
    if interpreted and options.dtype not in (None, "float32", "float16"):
        raise ValueError(
            f"dtype must be float32 or float16 in Triton's interpreter, whose bf16 is wrong, got {options.dtype}"
        )
    model = small_model(dtype=options.dtype or ("float32" if interpreted else None), device=device, impl=options.impl)
    processor, firsts, steps, hits = small_processor(), [], [], []
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"The small Keye, {size / 1e6:.1f} million parameters, {model.dtype} on {model.device}, impl {options.impl!r}"
    )
    for name, questions in json.loads((ASSETS / "questions.json").read_text(encoding="utf-8")).items():
        print(f"\n{ASSETS / name}")
        for question, right in questions:
            answer, first, later = ask(model, processor, ASSETS / name, question)
            hits.append(answer == right)
            firsts.append(first)
            steps += later
            print(f"  {question:34} {answer}   [{'right' if hits[-1] else f'wrong: {right}'}]", flush=True)
    print(f"\n{sum(hits)} of {len(hits)} right.")
    if interpreted:
        print("Triton's interpreter ran the kernels: it shows that they are right and nothing about their speed.")
    else:
        print(
            f"Time to first token (median, reading and resizing included): {1000 * statistics.median(firsts):.0f} ms; "
            f"after it {1 / statistics.median(steps):.0f} tokens a second."
        )
