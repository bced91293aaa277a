"""Run Keye-VL through transformers' Auto classes, with this package's kernels and without `trust_remote_code`.

    pip install -e ".[transformers]"
    python examples/drop_in_transformers.py
    python examples/drop_in_transformers.py --model Keye-VL-8B-Preview --image photo.jpg --question "Describe this image."

Compared with a script that uses transformers alone, only `import keye_kernels.auto` and `attn_implementation="keye"`
are new.
"""

import argparse

import torch
from transformers import AutoModel, AutoProcessor

import keye_kernels.auto  # noqa: F401  registers the Keye classes with the Auto classes
from keye_kernels.small import SMALL


def main() -> None:
    parser = argparse.ArgumentParser(description="Run Keye-VL through transformers' Auto classes.")
    parser.add_argument("--model", default=SMALL, help="checkpoint folder; default: the bundled small model")
    parser.add_argument("--image", default=SMALL.parent / "image.png", help="file path or URL")
    parser.add_argument("--question", default="what is in the picture?")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(options.model, dtype="auto", attn_implementation="keye").to(device)
    processor = AutoProcessor.from_pretrained(options.model)

    content = [{"type": "image", "image": str(options.image)}, {"type": "text", "text": options.question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    output = model.generate(**inputs, max_new_tokens=512)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    print(processor.batch_decode(new_tokens, skip_special_tokens=True)[0])


if __name__ == "__main__":
    main()
