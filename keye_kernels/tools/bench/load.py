"""Throughput under load: a queue of mixed requests in batches packed by FLOPs, beside the same queue first come, first served.

Served for real by the small trained model; for many devices the real model's FLOPs are added up, nothing is run.
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
from .packing import Bins, imbalance, pack_first_come, pack_longest_first

PACKERS: dict[str, Callable[[Sequence[float], int], Bins]] = {
    "packed by FLOPs": pack_longest_first,
    "first come": pack_first_come,
}
ROWS = 8  # requests of a served batch, on average
REQUESTS_A_ROUND = 32  # of a device, on average, in the simulation
ROUNDS = 8
MARKERS = 2  # tokens around a picture or a clip


@dataclass(frozen=True)
class Mix:
    """What a stream of requests is made of: each range is (least, most), both included. Sizes are in 28-pixel tokens a side."""

    picture_side: tuple[int, int]
    pictures: tuple[int, int]
    clip_side: tuple[int, int]
    frames: tuple[int, int]
    text_tokens: tuple[int, int]
    new_tokens: int
    clips: float = 0.25  # share of the requests


# Pictures of 224 to 1,344 pixels a side, clips of up to 48 frames
REAL = Mix((8, 48), (1, 4), (8, 16), (4, 48), (20, 400), new_tokens=64)
SMALL = Mix((2, 12), (1, 3), (2, 5), (2, 8), (4, 24), new_tokens=8)


@dataclass(frozen=True)
class Request:
    """Pictures, or one clip (frames > 1), and a text of so many tokens."""

    grids: tuple[Grid, ...]
    text_tokens: int
    new_tokens: int

    @property
    def is_clip(self) -> bool:
        return self.grids[0][0] > 1

    @property
    def prompt_tokens(self) -> int:
        return self.text_tokens + sum(t * h * w // 4 + MARKERS for t, h, w in self.grids)

    def flops(self, config: KeyeConfig) -> int:
        return estimate_flops(config, self.grids, self.prompt_tokens, self.new_tokens).total


def draw_requests(mix: Mix, number: int, seed: int) -> list[Request]:
    """The first `number` requests of the stream `seed`."""
    draw = random.Random(f"load {seed}")

    def grid(frames: int, sides: tuple[int, int]) -> Grid:
        # Log-uniform: as many small pictures as large ones
        height, width = (round(sides[0] * (sides[1] / sides[0]) ** draw.random()) for _ in range(2))
        return frames, 2 * height, 2 * width

    requests = []
    for _ in range(number):
        if draw.random() < mix.clips:
            grids = (grid(draw.randint(*mix.frames) // 2 * 2, mix.clip_side),)
        else:
            grids = tuple(grid(1, mix.picture_side) for _ in range(draw.randint(*mix.pictures)))
        requests.append(Request(grids, draw.randint(*mix.text_tokens), mix.new_tokens))
    return requests


def simulate(config: KeyeConfig, devices: int, seed: int, mix: Mix = REAL) -> dict[str, Any]:
    """Rounds in which each device takes its share of the next requests and waits for the slowest, by estimated FLOPs."""
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    window = devices * REQUESTS_A_ROUND
    requests = draw_requests(mix, window * ROUNDS, seed)
    costs = [request.flops(config) for request in requests]
    rounds = [costs[start : start + window] for start in range(0, len(costs), window)]
    found: dict[str, Any] = {}
    for name, pack in PACKERS.items():
        loads = [[sum(part[i] for i in places) for places in pack(part, devices)] for part in rounds]
        waited_for = sum(map(max, loads)) * devices / sum(costs)
        found[name] = {
            "imbalance": waited_for - 1,
            "worst_round": max(map(imbalance, loads)),
            "share_of_ideal_throughput": 1 / waited_for,
        }
    return {
        "devices": devices,
        "requests": len(requests),
        "rounds": ROUNDS,
        "prompt_tokens": sum(request.prompt_tokens for request in requests),
        "tflop_a_request": {"median": statistics.median(costs) / 1e12, "largest": max(costs) / 1e12},
        "packing": found,
    }


@dataclass(frozen=True)
class Served:
    """One way of packing, measured. Latency counts from the arrival of the whole queue to the end of a request's batch."""

    batches: int
    tokens_per_second: float  # of prompts and answers, padding left out
    new_tokens_per_second: float
    latency_p50: float
    latency_p95: float
    imbalance_estimated: float  # of the batches' FLOPs
    imbalance_measured: float  # of their seconds
    padding: float  # share of the slots of all prompts


def serve(
    model: Keye, processor: KeyeProcessor, requests: Sequence[Request], batches: Bins, pixels: Sequence[list]
) -> Served:
    """Answers each batch in turn, preprocessing included; `pixels` are the pictures (or frames) of each request."""
    finished, seconds = [], []
    tokens = new_tokens = padded = 0
    start = time.perf_counter()
    for places in tqdm(batches, desc="batches", leave=False, disable=None):
        begin = time.perf_counter()
        inputs = _prepare(processor, [requests[i] for i in places], [pixels[i] for i in places]).to(model.device)
        out = model.generate(**inputs, max_new_tokens=requests[places[0]].new_tokens, eos_token_id=())
        out.cpu()  # waits for the device
        end = time.perf_counter()
        seconds.append(end - begin)
        finished += [end - start] * len(places)
        mask = inputs["attention_mask"]
        made = len(places) * (out.shape[1] - mask.shape[1])
        tokens, new_tokens = tokens + int(mask.sum()) + made, new_tokens + made
        padded += int((mask == 0).sum())
    total = time.perf_counter() - start
    costs = [sum(requests[i].flops(model.config) for i in places) for places in batches]
    p50, p95 = np.percentile(finished, (50, 95)).tolist()
    slots = tokens - new_tokens + padded
    return Served(
        batches=len(batches),
        tokens_per_second=tokens / total,
        new_tokens_per_second=new_tokens / total,
        latency_p50=p50,
        latency_p95=p95,
        imbalance_estimated=imbalance(costs),
        imbalance_measured=imbalance(seconds),
        padding=padded / slots,
    )


def _prepare(processor: KeyeProcessor, requests: Sequence[Request], pixels: Sequence[list]) -> Any:
    kinds = ["video" if request.is_clip else "image" for request in requests]
    text = [
        f"<|vision_start|><|{kind}_pad|><|vision_end|>" * len(request.grids) + "what is in the picture? " * words
        for kind, request in zip(kinds, requests, strict=True)
        for words in [max(1, request.text_tokens // 6)]
    ]
    images = [picture for kind, some in zip(kinds, pixels, strict=True) if kind == "image" for picture in some]
    videos = [some for kind, some in zip(kinds, pixels, strict=True) if kind == "video"]
    return processor(text, images=images or None, videos=videos or None)


def draw_pixels(requests: Sequence[Request], seed: int) -> list[list]:
    """Noise of the right size: pictures, or the frames of a clip, as PIL images."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    return [
        [
            Image.fromarray(draw.integers(0, 256, (h * 14, w * 14, 3), dtype=np.uint8))
            for t, h, w in request.grids
            for _ in range(t)
        ]
        for request in requests
    ]


def measure(number: int, seed: int) -> dict[str, Any]:
    """The small trained model under a queue of `number` requests, all there at the start, once with each packer."""
    if number < 1:
        raise ValueError(f"requests must be at least 1, got {number}")
    model = small_model(dtype="float32")
    processor = small_processor(min_pixels=28 * 28, max_pixels=(28 * SMALL.picture_side[1]) ** 2)
    requests = draw_requests(SMALL, number, seed)
    pixels, costs = draw_pixels(requests, seed), [request.flops(model.config) for request in requests]
    batches = {name: [b for b in pack(costs, -(-number // ROWS)) if b] for name, pack in PACKERS.items()}
    serve(model, processor, requests, [[0]], pixels)  # first calls are slow
    found = {name: asdict(serve(model, processor, requests, bins, pixels)) for name, bins in batches.items()}
    where = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"{model.device}"
    return {"device": where, "threads": torch.get_num_threads(), "requests": number, "packing": found}


def to_text(served: dict[str, Any], simulated: dict[str, Any]) -> str:
    """Both tables."""
    names = list(PACKERS)
    rows = [
        ("tokens a second", "tokens_per_second", "{:.0f}"),
        ("new tokens a second", "new_tokens_per_second", "{:.0f}"),
        ("latency p50, s", "latency_p50", "{:.2f}"),
        ("latency p95, s", "latency_p95", "{:.2f}"),
        ("imbalance, seconds", "imbalance_measured", "{:.1%}"),
        ("imbalance, FLOPs", "imbalance_estimated", "{:.1%}"),
        ("padding", "padding", "{:.1%}"),
    ]
    batches = served["packing"][names[0]]["batches"]
    lines = [
        f"Served: the small model, float32 on {served['device']} ({served['threads']} threads), "
        f"{served['requests']} requests in {batches} batches, all waiting from the start",
        _table(served["packing"], rows),
        "",
        f"Simulated by FLOPs, nothing run: Keye-VL-8B on {simulated['devices']} devices, {simulated['requests']} requests "
        f"in {simulated['rounds']} rounds, {simulated['prompt_tokens']} prompt tokens; a request takes "
        f"{simulated['tflop_a_request']['median']:.0f} TFLOP (median), at most {simulated['tflop_a_request']['largest']:.0f}",
    ]
    rows = [
        ("imbalance", "imbalance", "{:.2%}"),
        ("worst round", "worst_round", "{:.2%}"),
        ("of ideal throughput", "share_of_ideal_throughput", "{:.1%}"),
    ]
    return "\n".join([*lines, _table(simulated["packing"], rows)])


def _table(packing: dict[str, dict[str, float]], rows: Sequence[tuple[str, str, str]]) -> str:
    lines = [" " * 22 + "".join(f"{name:>18}" for name in packing)]
    for label, key, form in rows:
        lines.append(f"  {label:20}" + "".join(f"{form.format(found[key]):>18}" for found in packing.values()))
    return "\n".join(lines)
