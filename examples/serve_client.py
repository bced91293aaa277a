"""Send an image and a clip to an OpenAI-compatible server, for instance vLLM with this package's plugin.

    pip install openai
    python examples/serve_client.py --base-url http://127.0.0.1:8000/v1

To start a server, see docs/serving.md. The files are sent inside the request as data URLs, so the server needs no access to
the client's disk.
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI

from keye_kernels.small import SMALL


def data_url(file: Path) -> str:
    media_type = mimetypes.guess_type(file)[0]
    return f"data:{media_type};base64,{base64.b64encode(file.read_bytes()).decode()}"


def ask(client: OpenAI, model: str, part: dict, question: str) -> str:
    content = [part, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=512)
    return reply.choices[0].message.content


def main() -> None:
    parser = argparse.ArgumentParser(description="Send an image and a clip to an OpenAI-compatible server.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="name of the model on the server; default: the first model it lists")
    parser.add_argument("--image", type=Path, default=SMALL.parent / "image.png")
    parser.add_argument("--image-question", default="how many objects are there?")
    parser.add_argument("--video", type=Path, default=SMALL.parent / "clip.mp4")
    parser.add_argument("--video-question", default="which way does it move?")
    options = parser.parse_args()

    client = OpenAI(base_url=options.base_url, api_key="none")
    model = options.model or client.models.list().data[0].id
    image = {"type": "image_url", "image_url": {"url": data_url(options.image)}}
    video = {"type": "video_url", "video_url": {"url": data_url(options.video)}}
    print(ask(client, model, image, options.image_question))
    print(ask(client, model, video, options.video_question))


if __name__ == "__main__":
    main()
