"""Ask a question about a video, and print which frames the model receives.

    python examples/video.py
    python examples/video.py --model Keye-VL-1_5-8B --video clip.mp4 --question "What happens?" --fps 1

Without options the small model that comes with the package answers a question about a bundled clip.
"""

import argparse

import torch

import keye_kernels as kk
from keye_kernels.processing.inspect import inspect_video
from keye_kernels.small import SMALL


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a question about a video.")
    parser.add_argument("--model", default=SMALL, help="checkpoint folder; default: the bundled small model")
    parser.add_argument("--video", default=SMALL.parent / "clip.mp4", help="file path or URL")
    parser.add_argument("--question", default="which way does it move?")
    parser.add_argument("--fps", type=float, default=2.0, help="frames to sample per second of video")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kk.Keye.from_pretrained(options.model, device=device)
    processor = kk.KeyeProcessor.from_pretrained(options.model)

    # A table of the sampled frames: time, slow or fast, size, vision tokens.
    print(inspect_video(str(options.video), processor, {"fps": options.fps}).to_text())

    video = {"type": "video", "video": str(options.video), "fps": options.fps}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": options.question}]}]
    # Preview and 1.5 sample frames differently; apply_chat_template uses the edition of the checkpoint.
    inputs = processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"pixel_dtype": "uint8"}).to(device)
    output = model.generate(**inputs, max_new_tokens=512)
    new_tokens = output[0, inputs.input_ids.shape[1] :]
    print(processor.decode(new_tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
