"""Ask a question about an image.

    python examples/inference.py
    python examples/inference.py --model Keye-VL-8B-Preview --image photo.jpg --question "Describe this image."

Without options the small model that comes with the package answers a question about a bundled image.
"""

import argparse

import torch

import keye_kernels as kk
from keye_kernels.small import SMALL


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a question about an image.")
    parser.add_argument("--model", default=SMALL, help="checkpoint folder; default: the bundled small model")
    parser.add_argument("--image", default=SMALL.parent / "image.png", help="file path or URL")
    parser.add_argument("--question", default="what is in the picture?")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kk.Keye.from_pretrained(options.model, device=device)
    processor = kk.KeyeProcessor.from_pretrained(options.model)

    content = [{"type": "image", "image": str(options.image)}, {"type": "text", "text": options.question}]
    messages = [{"role": "user", "content": content}]
    # Renders the prompt, loads the image, and returns input_ids, pixel_values and image_grid_thw.
    inputs = processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"}).to(device)
    output = model.generate(**inputs, max_new_tokens=512)
    new_tokens = output[0, inputs.input_ids.shape[1] :]
    print(processor.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
