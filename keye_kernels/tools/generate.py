"""Command `generate`: answers a question about images and videos with a checkpoint."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from keye_kernels.model import Keye, TextStreamer
from keye_kernels.model.checks import check_device
from keye_kernels.processing import KeyeProcessor

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "seed")


def run(options: argparse.Namespace) -> None:
    """Answers the question and prints the answer, all at once, as a stream or as JSON."""
    video_options = {} if options.fps is None else {"fps": options.fps}
    content: list[dict[str, Any]] = [{"type": "image", "image": file} for file in options.image]
    content += [{"type": "video", "video": file, **video_options} for file in options.video]
    content.append({"type": "text", "text": options.question})
    is_streaming = options.stream and not options.json
    answer = answer_question(content, options, _write if is_streaming else None)
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("" if is_streaming else answer["answer"])


def answer_question(
    content: list[dict[str, Any]], options: argparse.Namespace, write: Callable[[str], object] | None
) -> dict[str, Any]:
    """Loads the checkpoint and answers one turn with these parts. `write` receives each new part of the answer.

    Returns `answer`, `prompt_tokens`, `new_tokens`, and `seconds` of the generation.
    """
    if not options.question.strip():
        raise ValueError("question must not be empty")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, got {options.seed}")
    ignored = [f"--{name.replace('_', '-')}" for name in SAMPLING_OPTIONS if getattr(options, name) is not None]
    if ignored and not options.sample:
        print(f"keye-kernels generate: warning: {', '.join(ignored)} ignored without --sample", file=sys.stderr)
    device = None if options.device is None else check_device(options.device)
    # Before the model is loaded, which takes long, so that an unreadable image is reported at once
    processor = KeyeProcessor.from_pretrained(options.model, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages,
        thinking=options.thinking,
        tokenize=True,
        processor_kwargs={"pixel_dtype": "uint8"},
        allow_special_tokens=not options.no_special_tokens,
    )
    model = Keye.from_pretrained(
        options.model,
        dtype=options.dtype,
        device=device,
        impl=options.impl,
        progress=sys.stderr.isatty() and not options.json,
    )
    streamer = None
    if write is not None:
        streamer = TextStreamer(lambda ids: processor.decode(ids, skip_special_tokens=True), write)
    start = time.perf_counter()
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=options.max_new_tokens,
        do_sample=options.sample,
        streamer=streamer,
        prompt_lookup=options.prompt_lookup,
        **{name: getattr(options, name) if options.sample else None for name in SAMPLING_OPTIONS},
    )
    seconds = time.perf_counter() - start
    prompt_tokens = inputs["input_ids"].shape[1]
    new_ids = tokens[0, prompt_tokens:]
    return {
        "answer": processor.decode(new_ids, skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new_ids),
        "seconds": round(seconds, 3),
    }


def _write(text: str) -> None:
    print(text, end="", flush=True)
