"""Accuracy of a small Keye on new scenes and clips, with the processor and `generate`.

`python -m examples.train_small.evaluate [DIR]`. The default of DIR is the bundled checkpoint.
"""

import argparse
import random
import sys
import time
from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

import keye_kernels as kk
from keye_kernels.small import SMALL

from . import world

GOALS = {
    "counting": 0.98,
    "colour": 0.97,
    "place": 0.97,
    "one object": 0.95,
    "two objects": 0.88,
    "three objects": 0.78,
    "motion": 0.90,
}
BATCH_SIZE = 16
MAX_NEW_TOKENS = 32


def answer(model: kk.Keye, processor: kk.KeyeProcessor, asked: Sequence[tuple[dict, str]]) -> list[str]:
    """Greedy answers. Each question comes with the message part of its image or clip."""
    conversations = [[{"role": "user", "content": [part, {"type": "text", "text": text}]}] for part, text in asked]
    inputs = processor.apply_chat_template(conversations, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"}).to(
        model.device
    )
    tokens = model.generate(**inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluation_samples(
    kind: str, number: int, sizes: Sequence[tuple[int, int]] | None = None
) -> Iterable[tuple[str, dict, str, str]]:
    """(goal, message part, question, answer) of `number` scenes ("image") or clips ("video") that training never uses."""
    for index in range(number):
        rng = random.Random(f"evaluation {kind} {index}")
        size = rng.choice(sizes) if sizes else None
        if kind == "video":
            clip = world.random_clip(rng, size)
            yield "motion", {"type": "video", "video": list(clip.frames)}, world.WHICH_WAY, clip.direction
            continue
        scene = world.random_scene(rng, size, count=index % 3 + 1)
        for question, correct in scene.questions():
            goal = {world.WHAT: f"{world.NUMBERS[index % 3]} object{'s' if index % 3 else ''}", world.COUNT: "counting"}
            default = "colour" if question.startswith("what colour") else "place"
            yield goal.get(question, default), {"type": "image", "image": scene.image}, question, correct


def evaluate(
    model: kk.Keye, processor: kk.KeyeProcessor, samples: Iterable[tuple[str, dict, str, str]], progress: bool = False
) -> dict[str, tuple[int, int]]:
    """(correct answers, all answers) by goal. An answer must be exactly equal to the expected text."""
    samples = list(samples)
    found: dict[str, tuple[int, int]] = {}
    with tqdm(total=len(samples), unit="question", disable=not progress) as bar:
        for first in range(0, len(samples), BATCH_SIZE):
            batch = samples[first : first + BATCH_SIZE]
            answers = answer(model, processor, [(content, question) for _, content, question, _ in batch])
            for (goal, _, _, expected), text in zip(batch, answers, strict=True):
                correct, total = found.get(goal, (0, 0))
                found[goal] = correct + (text == expected), total + 1
            bar.update(len(batch))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.train_small.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=SMALL, help="folder of the checkpoint (default: the bundled one)")
    parser.add_argument("--scenes", type=int, default=200, help="number of scenes and of clips")
    parser.add_argument("--held-out-sizes", action="store_true", help="use only image sizes that training leaves out")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads")
    parser.add_argument("--dtype", default="float32", help="dtype of the weights")
    parser.add_argument(
        "--impl",
        default="auto",
        help="implementation of the operators; triton on a CPU needs TRITON_INTERPRET=1 and is slow",
    )
    options = parser.parse_args(arguments)
    try:
        _evaluate(options)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    if options.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, got {options.scenes}")
    torch.set_num_threads(options.threads)
    model = kk.Keye.from_pretrained(options.folder, dtype=options.dtype, impl=options.impl)
    processor = kk.KeyeProcessor.from_pretrained(options.folder)
    sizes = sorted(world.HELD_OUT_SIZES) if options.held_out_sizes else None
    start = time.perf_counter()
    found = evaluate(model, processor, evaluation_samples("image", options.scenes, sizes), progress=True)
    found |= evaluate(model, processor, evaluation_samples("video", options.scenes, sizes), progress=True)
    for goal, (correct, total) in found.items():
        required = GOALS[goal]
        print(
            f"{goal:14} {correct / total:6.1%} of {total:4}   goal {required:.0%}"
            f"{'' if correct >= required * total else '   missed'}"
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
