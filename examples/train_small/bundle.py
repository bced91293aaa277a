"""Creates the image and the clip of `keye-kernels demo`: `python -m examples.train_small.bundle`."""

import json
import random
from pathlib import Path

import av

from . import world

ASSETS = Path(__file__).parents[2] / "keye_kernels" / "assets"
FRAME_RATE = 2  # equal to the sampling rate of Preview, so that every frame is sampled


def write_clip(clip: world.Clip, file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"crf": "12"})
        stream.width, stream.height = clip.frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main() -> None:
    rng = random.Random("bundled")
    clip = world.random_clip(rng, (168, 168))
    scene = world.random_scene(rng, (224, 168), count=3)
    while len({obj.shape for obj in scene.objects}) < 3:  # so that each object has a question about its colour
        scene = world.random_scene(rng, (224, 168), count=3)
    scene.image.save(ASSETS / "image.png", optimize=True)
    write_clip(clip, ASSETS / "clip.mp4")
    questions = {"image.png": scene.questions(), "clip.mp4": clip.questions()}
    (ASSETS / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
