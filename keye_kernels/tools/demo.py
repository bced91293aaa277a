"""Command `demo`: asks the small model about the bundled image and the bundled clip."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from keye_kernels.model import Keye
from keye_kernels.model.checks import check_device
from keye_kernels.ops.implementation import resolve
from keye_kernels.processing import KeyeProcessor
from keye_kernels.small import ASSETS, small_model, small_processor

MODALITY_BY_SUFFIX = {".png": "image", ".mp4": "video"}
MAX_NEW_TOKENS = 32


class TokenTimer:
    """A streamer that records when the prompt and each new token arrive."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        tokens.cpu()  # synchronizes with the device
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ask(model: Keye, processor: KeyeProcessor, file: Path, question: str) -> tuple[str, float, list[float]]:
    """Returns the answer, the seconds to the first token (reading the file included), and the seconds of each later token."""
    modality, start, timer = MODALITY_BY_SUFFIX[file.suffix], time.perf_counter(), TokenTimer()
    content = [{"type": modality, modality: str(file)}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"})
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, streamer=timer)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    first, *later = timer.times[1:]
    return answer, first - start, [end - begin for begin, end in zip([first, *later], later, strict=False)]


def run(options: argparse.Namespace) -> None:
    """Asks all bundled questions, and prints the answers, whether they are right, and the speed."""
    device = check_device(torch.get_default_device() if options.device is None else options.device)
    is_interpreted = resolve(options.impl, "rope_2d", device) == "triton" and device.type == "cpu"
    dtype = options.dtype or ("float32" if is_interpreted else None)
    model, processor = small_model(dtype=dtype, device=device, impl=options.impl), small_processor()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Small Keye model, {parameters / 1e6:.1f} million parameters, {model.dtype}, "
        f"device {model.device}, impl {options.impl!r}"
    )
    is_right: list[bool] = []
    first_token_seconds: list[float] = []
    later_token_seconds: list[float] = []
    for name, questions in json.loads((ASSETS / "questions.json").read_text(encoding="utf-8")).items():
        print(f"\n{ASSETS / name}")
        for question, expected in questions:
            answer, first, later = ask(model, processor, ASSETS / name, question)
            is_right.append(answer == expected)
            first_token_seconds.append(first)
            later_token_seconds += later
            verdict = "right" if is_right[-1] else f"wrong, expected: {expected}"
            print(f"  {question:34} {answer}   [{verdict}]", flush=True)
    print(f"\n{sum(is_right)} of {len(is_right)} right.")
    if is_interpreted:
        print("The kernels ran in Triton's interpreter, which checks the results but says nothing about the speed.")
    else:
        print(
            f"Median time to first token, preprocessing included: {1000 * statistics.median(first_token_seconds):.0f} ms; "
            f"then {1 / statistics.median(later_token_seconds):.0f} tokens per second."
        )
