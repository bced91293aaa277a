"""Reading a 60 s 1280x720 clip for Keye-VL-1.5: keye_kernels beside the official keye-vl-utils 1.5.2, in one run.

Both read the same file, each in a fresh process; printed are seconds, peak memory above that of the imports, and
whether the frame types agree. The official package needs an environment of its own:

    python -m venv official
    official/bin/pip install torch torchvision keye-vl-utils==1.5.2 decord opencv-python-headless einops requests
    python benchmarks/bench_video.py --official official/bin/python

keye-vl-utils 1.5.2 imports torchvision without calling it here; where torchvision does not load, an empty module
stands in for it. ``--clip`` takes a file of your own. Linux only: the peak is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS, FPS, HEIGHT, WIDTH = 60, 30, 720, 1280

CHILD = """
import json, sys, time
from pathlib import Path

path, name, threads = sys.argv[1:]
import torch
torch.set_num_threads(int(threads))
if name == "official":
    try:
        import torchvision
    except Exception:
        from unittest.mock import MagicMock
        for module in ("torchvision", "torchvision.io", "torchvision.transforms"):
            sys.modules[module] = MagicMock()
    import decord
    from keye_vl_utils import process_vision_info
    options = {}
else:
    import av
    from keye_kernels import process_vision_info
    options = {"edition": "1.5"}
messages = [{"role": "user", "content": [{"type": "video", "video": path}]}]
# The first interpolation loads torch's kernels.
torch.nn.functional.interpolate(torch.zeros(1, 3, 56, 56, dtype=torch.uint8), (28, 28), mode="bilinear", antialias=True)

def status(field):
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024

Path("/proc/self/clear_refs").write_text("5")
before, start = status("VmRSS"), time.perf_counter()
_, videos, kwargs = process_vision_info(messages, **options)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak_mib": status("VmHWM") - before,
    "frame_types": kwargs["frame_types"][0].tolist(),
    "sizes": [kwargs[name][0] for name in ("height", "width", "fast_height", "fast_width")],
}))
"""


def write_clip(path: Path) -> None:
    """Scenes of 4 seconds with a moving, textured square; h264 with the defaults of a phone or a site."""
    import av
    import numpy as np

    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "g": "250"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        rows, columns = np.mgrid[:HEIGHT, :WIDTH]
        for index in range(SECONDS * FPS):
            if index % (4 * FPS) == 0:
                random = np.random.default_rng(index)
                slopes = random.random((3, 2)) * 0.4
                scene = np.stack([(rows * a + columns * b + random.integers(256)) % 256 for a, b in slopes], axis=-1)
                if index % (8 * FPS):
                    # Without colour, which is what the similarity notices.
                    scene = scene.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
                scene = scene.astype(np.uint8)
                texture = random.integers(0, 256, (240, 240, 3), dtype=np.uint8)
            picture = scene.copy()
            left = index * 4 % (WIDTH - 240)
            picture[200:440, left : left + 240] = texture
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))


def measure(python: str, name: str, clip: Path, threads: int) -> dict[str, object]:
    """One run in a fresh process."""
    command = [python, "-c", CHILD, str(clip), name, str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, help="python of the environment with keye-vl-utils 1.5.2")
    parser.add_argument("--clip", type=Path, help="video file; by default one is encoded")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; decoders choose their own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = arguments.clip
        if clip is None:
            clip = Path(folder) / "clip.mp4"
            write_clip(clip)
        pythons = {"official": arguments.official, "keye_kernels": sys.executable}
        # Alternating, so that other load on the machine meets both.
        runs = [
            {name: measure(python, name, clip, arguments.threads) for name, python in pythons.items()}
            for _ in range(arguments.runs)
        ]
    medians = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in ("seconds", "peak_mib")}
        for name in pythons
    }
    for name, values in medians.items():
        print(f"{name:12}  {values['seconds']:7.2f} s  {values['peak_mib']:7.0f} MiB")
    official, ours = medians.values()
    types = [runs[0][name]["frame_types"] for name in pythons]
    print(f"{official['seconds'] / ours['seconds']:.2f} times faster")
    print(f"{ours['peak_mib'] / official['peak_mib']:.2f} of the peak memory")
    print(
        f"frame types {'equal' if types[0] == types[1] else 'DIFFER'}: {types[0].count(0)} slow, {sum(types[0])} fast"
    )
    print(f"sizes {'equal' if runs[0]['official']['sizes'] == runs[0]['keye_kernels']['sizes'] else 'DIFFER'}")


if __name__ == "__main__":
    main()
