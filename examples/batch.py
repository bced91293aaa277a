"""Answer several conversations about images and videos in one batch.

    python examples/batch.py
    python examples/batch.py --model Keye-VL-8B-Preview

All images are packed into one sequence for the vision tower, and so are all videos; neither is padded. Prompts of
different length are padded on the left.
"""

import argparse

import torch

import keye_kernels as kk
from keye_kernels.small import SMALL

IMAGE = {"type": "image", "image": str(SMALL.parent / "image.png")}
VIDEO = {"type": "video", "video": str(SMALL.parent / "clip.mp4")}


def ask(*parts: dict | str) -> list[dict]:
    """A conversation of one user turn."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer several conversations in one batch.")
    parser.add_argument("--model", default=SMALL, help="checkpoint folder; default: the bundled small model")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kk.Keye.from_pretrained(options.model, device=device)
    processor = kk.KeyeProcessor.from_pretrained(options.model)

    conversations = [
        ask(IMAGE, "how many objects are there?"),
        ask(IMAGE, "where is the black star?"),
        ask(VIDEO, "which way does it move?"),
    ]
    inputs = processor.apply_chat_template(conversations, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"}).to(device)
    output = model.generate(**inputs, max_new_tokens=512)
    # The prompts end at the same column, because the padding is on the left.
    new_tokens = output[:, inputs.input_ids.shape[1] :]
    answers = processor.batch_decode(new_tokens, skip_special_tokens=True)
    for conversation, answer in zip(conversations, answers, strict=True):
        question = conversation[0]["content"][-1]["text"]
        print(question, answer)


if __name__ == "__main__":
    main()
