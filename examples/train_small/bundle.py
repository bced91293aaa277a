"""Draws the picture and the clip that `keye-kernels demo` asks about: `python -m examples.train_small.bundle`."""

import json
import random
from pathlib import Path

import av

from . import world

ASSETS = Path(__file__).parents[2] / "keye_kernels" / "assets"
FRAMES_A_SECOND = 2  # what Preview's rules sample, so that every frame is seen


def write_clip(clip: world.Clip, file: Path) -> None:
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND, options={"crf": "12"})
        stream.width, stream.height = clip.frames[0].size
        stream.pix_fmt = "yuv420p"
        for picture in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def main() -> None:
    rng = random.Random("bundled")
    clip = world.random_clip(rng, (168, 168))
    scene = world.random_scene(rng, (224, 168), count=3)
    while len({thing.shape for thing in scene.things}) < 3:  # so that a colour can be asked of each
        scene = world.random_scene(rng, (224, 168), count=3)
    scene.image.save(ASSETS / "image.png", optimize=True)
    write_clip(clip, ASSETS / "clip.mp4")
    questions = {"image.png": scene.questions(), "clip.mp4": clip.questions()}
    (ASSETS / "questions.json").write_text(json.dumps(questions, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
