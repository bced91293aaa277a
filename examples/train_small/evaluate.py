"""Accuracy of a small Keye on fresh scenes, through the ordinary path from a conversation to an answer.

`python -m examples.train_small.evaluate [DIR]`; without DIR the checkpoint that comes with the package.
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
ROWS = 16  # questions answered at once
LONGEST_ANSWER = 32


def answer(model: kk.Keye, processor: kk.KeyeProcessor, asked: Sequence[tuple[dict, str]]) -> list[str]:
    """Greedy answers to questions, each with the message part of its picture or clip."""
    conversations = [[{"role": "user", "content": [part, {"type": "text", "text": text}]}] for part, text in asked]
    inputs = processor.apply_chat_template(conversations, tokenize=True).to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER)
    return processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def fresh(
    kind: str, number: int, sizes: Sequence[tuple[int, int]] | None = None
) -> Iterable[tuple[str, dict, str, str]]:
    """`number` scenes ("image") or clips ("video") that no training run draws: goal, message part, question, answer."""
    for index in range(number):
        rng = random.Random(f"evaluation {kind} {index}")
        size = rng.choice(sizes) if sizes else None
        if kind == "video":
            clip = world.random_clip(rng, size)
            yield "motion", {"type": "video", "video": list(clip.frames)}, world.WHICH_WAY, clip.direction
            continue
        scene = world.random_scene(rng, size, count=index % 3 + 1)
        for question, right in scene.questions():
            goal = {world.WHAT: f"{world.NUMBERS[index % 3]} object{'s' if index % 3 else ''}", world.COUNT: "counting"}
            default = "colour" if question.startswith("what colour") else "place"
            yield goal.get(question, default), {"type": "image", "image": scene.image}, question, right


def evaluate(
    model: kk.Keye, processor: kk.KeyeProcessor, samples: Iterable[tuple[str, dict, str, str]], progress: bool = False
) -> dict[str, tuple[int, int]]:
    """Right and all answers of each goal; an answer counts only if it is right to the letter."""
    samples = list(samples)
    found: dict[str, tuple[int, int]] = {}
    with tqdm(total=len(samples), unit="question", disable=not progress) as bar:
        for first in range(0, len(samples), ROWS):
            part = samples[first : first + ROWS]
            answers = answer(model, processor, [(picture, question) for _, picture, question, _ in part])
            for (goal, _, _, right), given in zip(part, answers, strict=True):
                hits, all_of_them = found.get(goal, (0, 0))
                found[goal] = hits + (given == right), all_of_them + 1
            bar.update(len(part))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.train_small.evaluate", description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=SMALL, help="the checkpoint")
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--held-out-sizes", action="store_true", help="only picture sizes that training leaves out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--impl", default="auto", help="triton runs on a CPU with TRITON_INTERPRET=1, slowly")
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
    found = evaluate(model, processor, fresh("image", options.scenes, sizes), progress=True)
    found |= evaluate(model, processor, fresh("video", options.scenes, sizes), progress=True)
    for goal, (hits, number) in found.items():
        wanted = GOALS[goal]
        print(
            f"{goal:14} {hits / number:6.1%} of {number:4}   goal {wanted:.0%}{'' if hits >= wanted * number else '   missed'}"
        )
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    raise SystemExit(main())
