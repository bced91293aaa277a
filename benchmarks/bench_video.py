"""Times `process_vision_info` of Keye-VL-1.5 on a 60 s 1280x720 clip: keye_kernels and the official keye-vl-utils 1.5.2.

Both read the same file, each in a new process. Printed are the time, the peak memory above that of the imports, and whether
the frame types and sizes are equal. The official package needs a virtual environment of its own:

    python -m venv official
    official/bin/pip install torch torchvision keye-vl-utils==1.5.2 decord opencv-python-headless einops requests
    python benchmarks/bench_video.py --official official/bin/python

keye-vl-utils 1.5.2 imports torchvision but does not call it here. If torchvision cannot be imported, a mock module replaces
it. `--clip` measures another file. Linux only: the peak is read from /proc.
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
# Warm-up: the first interpolation initializes torch.
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
    """Writes a clip with scenes of 4 seconds, each with a moving textured square, as h264."""
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
                    # Every second scene is grey, so that the frame similarity detects a scene change
                    scene = scene.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
                scene = scene.astype(np.uint8)
                texture = random.integers(0, 256, (240, 240, 3), dtype=np.uint8)
            frame = scene.copy()
            left = index * 4 % (WIDTH - 240)
            frame[200:440, left : left + 240] = texture
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def measure(python: str, name: str, clip: Path, threads: int) -> dict[str, object]:
    """Runs CHILD once in a new process."""
    command = [python, "-c", CHILD, str(clip), name, str(threads)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, help="Python executable of the environment with keye-vl-utils 1.5.2")
    parser.add_argument("--clip", type=Path, help="video file (default: a generated clip)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each package (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads; video decoders choose their own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clip = arguments.clip
        if clip is None:
            clip = Path(folder) / "clip.mp4"
            write_clip(clip)
        pythons = {"official": arguments.official, "keye_kernels": sys.executable}
        # The packages take turns, so that background load affects both
        runs = [
            {name: measure(python, name, clip, arguments.threads) for name, python in pythons.items()}
            for _ in range(arguments.runs)
        ]
    medians = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in ("seconds", "peak_mib")} for name in pythons
    }
    for name, values in medians.items():
        print(f"{name:12}  {values['seconds']:7.2f} s  {values['peak_mib']:7.0f} MiB")
    official, ours = medians.values()
    types = [runs[0][name]["frame_types"] for name in pythons]
    print(f"speedup {official['seconds'] / ours['seconds']:.2f}x")
    print(f"peak memory of keye_kernels / official: {ours['peak_mib'] / official['peak_mib']:.2f}")
    print(f"frame types {'equal' if types[0] == types[1] else 'DIFFER'}: {types[0].count(0)} slow, {sum(types[0])} fast")
    print(f"sizes {'equal' if runs[0]['official']['sizes'] == runs[0]['keye_kernels']['sizes'] else 'DIFFER'}")


if __name__ == "__main__":
    main()
