"""`keye-kernels bench --load`: a queue of mixed requests, packed by FLOPs or in order of arrival.

The small trained model runs such a queue, one batch after another. For several devices with the full model, only the estimated
FLOPs of the devices are compared.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from keye_kernels.geometry import Grid
from keye_kernels.model import Keye, KeyeConfig
from keye_kernels.processing import KeyeProcessor
from keye_kernels.small import small_model, small_processor

from .flops import estimate_flops
from .packing import Bins, imbalance, pack_in_arrival_order, pack_longest_first

PACKERS: dict[str, Callable[[Sequence[float], int], Bins]] = {
    "packed by FLOPs": pack_longest_first,
    "order of arrival": pack_in_arrival_order,
}
REQUESTS_PER_BATCH = 8  # mean, for the small model
REQUESTS_PER_DEVICE = 32  # mean per round, in the simulation
ROUNDS = 8
MARKER_TOKENS = 2  # <|vision_start|> and <|vision_end|>


@dataclass(frozen=True)
class RequestMix:
    """The distribution of random requests. Ranges are inclusive. Sides are in merged patches of 28 pixels."""

    image_side: tuple[int, int]
    images: tuple[int, int]
    clip_side: tuple[int, int]
    frames: tuple[int, int]
    text_tokens: tuple[int, int]
    new_tokens: int
    clip_share: float = 0.25


# Images of 224 to 1344 pixels per side, clips of up to 48 frames
REAL = RequestMix((8, 48), (1, 4), (8, 16), (4, 48), (20, 400), new_tokens=64)
SMALL = RequestMix((2, 12), (1, 3), (2, 5), (2, 8), (4, 24), new_tokens=8)


@dataclass(frozen=True)
class Request:
    """The sizes of one request: images or one clip (frames > 1), and text."""

    grids: tuple[Grid, ...]
    text_tokens: int
    new_tokens: int

    @property
    def is_clip(self) -> bool:
        return self.grids[0][0] > 1

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + sum(t * h * w // 4 + MARKER_TOKENS for t, h, w in self.grids)

    def flops(self, config: KeyeConfig) -> int:
        return estimate_flops(config, self.grids, self.prompt_tokens, self.new_tokens).total


def draw_requests(mix: RequestMix, number: int, seed: int) -> list[Request]:
    """Draws `number` random requests. A longer list with the same seed starts with the same requests."""
    rng = random.Random(f"load {seed}")

    def grid(frames: int, sides: tuple[int, int]) -> Grid:
        # Log-uniform, so that small images are as frequent as large ones
        height, width = (round(sides[0] * (sides[1] / sides[0]) ** rng.random()) for _ in range(2))
        return frames, 2 * height, 2 * width

    requests = []
    for _ in range(number):
        if rng.random() < mix.clip_share:
            grids = (grid(rng.randint(*mix.frames) // 2 * 2, mix.clip_side),)
        else:
            grids = tuple(grid(1, mix.image_side) for _ in range(rng.randint(*mix.images)))
        requests.append(Request(grids, rng.randint(*mix.text_tokens), mix.new_tokens))
    return requests


def simulate(config: KeyeConfig, devices: int, seed: int, mix: RequestMix = REAL) -> dict[str, Any]:
    """Compares the packers by estimated FLOPs. In each round every device gets a bin, and all wait for the slowest device.

    Returns the numbers that `bench --load --json` prints under "simulated". Raises ValueError if `devices` is less than 1.
    """
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    per_round = devices * REQUESTS_PER_DEVICE
    requests = draw_requests(mix, per_round * ROUNDS, seed)
    costs = [request.flops(config) for request in requests]
    rounds = [costs[start : start + per_round] for start in range(0, len(costs), per_round)]
    found: dict[str, Any] = {}
    for name, pack in PACKERS.items():
        loads = [[sum(part[i] for i in indices) for indices in pack(part, devices)] for part in rounds]
        # The time of a round is that of its slowest device
        relative_time, worst = sum(map(max, loads)) * devices / sum(costs), max(map(imbalance, loads))
        found[name] = {"imbalance": relative_time - 1, "worst_round": worst, "share_of_ideal_throughput": 1 / relative_time}
    return {
        "devices": devices, "requests": len(requests), "rounds": ROUNDS,
        "prompt_tokens": sum(request.prompt_tokens for request in requests),
        "tflop_per_request": {"median": statistics.median(costs) / 1e12, "largest": max(costs) / 1e12},
        "packing": found,
    }  # fmt: skip


@dataclass(frozen=True)
class LoadResult:
    """Measurements of one packer. The latency of a request is the time from the start to the end of its batch, in seconds."""

    batches: int
    tokens_per_second: float  # prompts and answers, without padding
    new_tokens_per_second: float
    latency_p50: float
    latency_p95: float
    imbalance_estimated: float  # of the FLOPs of the batches
    imbalance_measured: float  # of the seconds of the batches
    padding: float  # share of padding in the prompts


def run_batches(
    model: Keye, processor: KeyeProcessor, requests: Sequence[Request], batches: Bins, pixels: Sequence[list]
) -> LoadResult:
    """Runs the batches one after another, including preprocessing. `pixels` are from `draw_pixels`."""
    finished, seconds = [], []
    tokens = new_tokens = padded = 0
    start = time.perf_counter()
    for indices in tqdm(batches, desc="batches", leave=False, disable=None):
        begin = time.perf_counter()
        inputs = _prepare(processor, [requests[i] for i in indices], [pixels[i] for i in indices]).to(model.device)
        out = model.generate(**inputs, max_new_tokens=requests[indices[0]].new_tokens, eos_token_id=())
        out.cpu()  # synchronizes
        end = time.perf_counter()
        seconds.append(end - begin)
        finished += [end - start] * len(indices)
        mask = inputs["attention_mask"]
        generated = len(indices) * (out.shape[1] - mask.shape[1])
        tokens, new_tokens = tokens + int(mask.sum()) + generated, new_tokens + generated
        padded += int((mask == 0).sum())
    total = time.perf_counter() - start
    costs = [sum(requests[i].flops(model.config) for i in indices) for indices in batches]
    p50, p95 = np.percentile(finished, (50, 95)).tolist()
    prompt_slots = tokens - new_tokens + padded
    return LoadResult(
        batches=len(batches), tokens_per_second=tokens / total, new_tokens_per_second=new_tokens / total,
        latency_p50=p50, latency_p95=p95, imbalance_estimated=imbalance(costs), imbalance_measured=imbalance(seconds),
        padding=padded / prompt_slots,
    )  # fmt: skip


def _prepare(processor: KeyeProcessor, requests: Sequence[Request], pixels: Sequence[list]) -> Any:
    kinds = ["video" if request.is_clip else "image" for request in requests]
    text = [
        f"<|vision_start|><|{kind}_pad|><|vision_end|>" * len(request.grids) + "what is in the picture? " * repeats
        for kind, request in zip(kinds, requests, strict=True)
        for repeats in [max(1, request.text_tokens // 6)]
    ]
    images = [image for kind, frames in zip(kinds, pixels, strict=True) if kind == "image" for image in frames]
    videos = [frames for kind, frames in zip(kinds, pixels, strict=True) if kind == "video"]
    return processor(text, images=images or None, videos=videos or None, pixel_dtype="uint8")


def draw_pixels(requests: Sequence[Request], seed: int) -> list[list]:
    """Random pixels for each request: its images, or the frames of its clip, as PIL images."""
    from PIL import Image

    rng = np.random.default_rng(seed)

    def image(h: int, w: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (h * 14, w * 14, 3), dtype=np.uint8))

    return [[image(h, w) for t, h, w in request.grids for _ in range(t)] for request in requests]


def measure(number: int, seed: int) -> dict[str, Any]:
    """Runs the small trained model on `number` requests, all waiting at the start, once with each packer.

    Returns the numbers that `bench --load --json` prints under "measured". Raises ValueError if `number` is less than 1.
    """
    if number < 1:
        raise ValueError(f"requests must be at least 1, got {number}")
    model = small_model(dtype="float32")
    processor = small_processor(min_pixels=28 * 28, max_pixels=(28 * SMALL.image_side[1]) ** 2)
    requests = draw_requests(SMALL, number, seed)
    pixels, costs = draw_pixels(requests, seed), [request.flops(model.config) for request in requests]
    batches = {name: [b for b in pack(costs, -(-number // REQUESTS_PER_BATCH)) if b] for name, pack in PACKERS.items()}
    run_batches(model, processor, requests, [[0]], pixels)  # warm-up
    found = {name: asdict(run_batches(model, processor, requests, bins, pixels)) for name, bins in batches.items()}
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{model.device}"
    return {"device": device, "threads": torch.get_num_threads(), "requests": number, "packing": found}


def to_text(measured: dict[str, Any], simulated: dict[str, Any]) -> str:
    """The tables of `bench --load`."""
    names = list(PACKERS)
    rows = [
        ("tokens per second", "tokens_per_second", "{:.0f}"), ("new tokens per second", "new_tokens_per_second", "{:.0f}"),
        ("latency p50, s", "latency_p50", "{:.2f}"), ("latency p95, s", "latency_p95", "{:.2f}"),
        ("imbalance, seconds", "imbalance_measured", "{:.1%}"), ("imbalance, FLOPs", "imbalance_estimated", "{:.1%}"),
        ("padding", "padding", "{:.1%}"),
    ]  # fmt: skip
    batches = measured["packing"][names[0]]["batches"]
    lines = [
        f"Measured: small model, float32 on {measured['device']} ({measured['threads']} threads), "
        f"{measured['requests']} requests in {batches} batches, all waiting at the start",
        _table(measured["packing"], rows),
        "",
        f"Estimated from FLOPs: Keye-VL-8B on {simulated['devices']} devices, {simulated['requests']} requests "
        f"in {simulated['rounds']} rounds, {simulated['prompt_tokens']} prompt tokens, "
        f"{simulated['tflop_per_request']['median']:.0f} TFLOP per request (median), "
        f"at most {simulated['tflop_per_request']['largest']:.0f}",
    ]
    rows = [
        ("imbalance", "imbalance", "{:.2%}"), ("worst round", "worst_round", "{:.2%}"),
        ("share of ideal", "share_of_ideal_throughput", "{:.1%}"),
    ]  # fmt: skip
    return "\n".join([*lines, _table(simulated["packing"], rows)])


def _table(packing: dict[str, dict[str, float]], rows: Sequence[tuple[str, str, str]]) -> str:
    lines = [" " * 22 + "".join(f"{name:>18}" for name in packing)]
    for label, key, form in rows:
        lines.append(f"  {label:20}" + "".join(f"{form.format(found[key]):>18}" for found in packing.values()))
    return "\n".join(lines)
