"""The requests of the load test. Each maps a `Service` to an answer that is the same in every run, as JSON values."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import keye_kernels as kk
from keye_kernels.small import ASSETS
from tests.helpers.http_answers import answer
from tests.helpers.messages import IMAGE, VIDEO, random_image, text_part, user
from tests.helpers.video_clips import encode_clip

MAX_NEW_TOKENS = 24
CLIP = ASSETS / "clip.mp4"


@dataclass(frozen=True)
class Service:
    """One model and one processor, shared by all threads; a folder with `write_files`, and a server with `routes`."""

    model: kk.Keye
    processor: kk.KeyeProcessor
    folder: Path
    address: str


Request = Callable[[Service], Any]


class Cancelled(Exception):
    pass


class Tokens:
    """A streamer that passes each new token on, and ends `generate` by an exception after `limit` tokens."""

    def __init__(self, put: Callable[[int], object], limit: int) -> None:
        self.accept, self.left = put, limit + 1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:
            self.accept(int(value))
        self.left -= 1
        if self.left == 0:
            raise Cancelled

    def end(self) -> None:
        pass


def write_files(folder: Path) -> None:
    (folder / "images").mkdir()
    for seed, (height, width) in enumerate(((56, 84), (84, 56), (112, 112), (28, 168))):
        random_image(height, width, seed).save(folder / "images" / f"{seed}.png")
    random_image(60, 90, seed=9, mode="RGBA").save(folder / "images" / "alpha.png")
    (folder / "scenes.mkv").write_bytes(encode_clip(36, container="mkv"))
    (folder / "truncated.mp4").write_bytes(CLIP.read_bytes()[:-400])
    (folder / "fake.png").write_bytes(b"not an image")


def routes() -> dict[str, Callable]:
    image, clip = (ASSETS / "image.png").read_bytes(), CLIP.read_bytes()
    return {
        "/image.png": answer(image),
        "/clip.mp4": answer(clip),
        "/moved": answer(b"", 302, Location="/image.png"),
        "/cut.png": answer(image, **{"Content-Length": str(len(image) + 8)}),
        "/missing.png": answer(b"", 404),
    }


def requests() -> dict[str, Request]:
    """All requests by name."""
    questions = json.loads((ASSETS / "questions.json").read_text(encoding="utf-8"))
    found: dict[str, Request] = {}
    for question, _ in questions["image.png"]:
        found[f"image: {question}"] = partial(ask, source=lambda s: ASSETS / "image.png", question=question)
    for name in ("0.png", "1.png", "2.png", "3.png", "alpha.png"):
        found[f"image {name}"] = partial(ask, source=lambda s, name=name: s.folder / "images" / name)
    for name in ("image.png", "moved"):
        found[f"URL {name}"] = partial(ask, source=lambda s, name=name: f"{s.address}/{name}")
    clips = {"path": CLIP, "bytes": CLIP.read_bytes()}
    for name, clip in clips.items():
        found[f"video as {name}"] = partial(
            ask, source=lambda s, clip=clip: clip, kind="video", question="which way does it move?"
        )
    found["video with fps"] = partial(ask, source=lambda s: s.folder / "scenes.mkv", kind="video", options={"fps": 5})
    found["video as URL"] = partial(ask, source=lambda s: f"{s.address}/clip.mp4", kind="video", options={"nframes": 4})
    for name in ("cut.png", "missing.png"):
        found[f"failing URL {name}"] = partial(fail, source=lambda s, name=name: f"{s.address}/{name}")
    found["broken image"] = partial(fail, source=lambda s: s.folder / "fake.png")
    found["truncated video"] = partial(fail, source=lambda s: s.folder / "truncated.mp4", kind="video")
    for seed in range(2):
        sampling = {"do_sample": True, "temperature": 8.0, "top_k": 50, "seed": seed}
        found[f"sampled with seed {seed}"] = partial(ask, source=lambda s: ASSETS / "image.png", sampling=sampling)
    others = {"second turn": second_turn, "padded batch": padded_batch, "cancelled stream": cancel, "abandoned iterator": abandon}
    return {**found, **others, "slow and fast frames": slow_fast, "kernels in the interpreter": kernels}


def ask(
    service: Service,
    source: Callable[[Service], Any],
    question: str = "what is in the picture?",
    kind: str = "image",
    options: dict[str, Any] | None = None,
    sampling: dict[str, Any] | None = None,
) -> list[int]:
    given = source(service)
    part = {"type": kind, kind: str(given) if isinstance(given, Path) else given, **(options or {})}
    inputs = service.processor.apply_chat_template(user(part, text_part(question)), tokenize=True)
    return service.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **(sampling or {}))[0].tolist()


def fail(service: Service, **options: Any) -> str:
    try:
        ask(service, **options)
    except ValueError as error:
        # The folder and the port differ between runs
        return str(error).replace(str(service.folder), "").replace(service.address, "")
    return "no error"


def second_turn(service: Service) -> list[int]:
    """Two turns with one cache, the second with an image of its own."""
    first = service.processor.apply_chat_template(
        user({"image": str(ASSETS / "image.png")}, text_part("how many objects are there?")), tokenize=True
    )
    second = service.processor(text=f"{IMAGE}what is in the picture?", images=[str(service.folder / "images" / "1.png")])
    cache, ids = service.model.new_cache(1, 512), []
    with torch.no_grad():
        for turn in (first, second):
            logits = service.model(**turn, cache=cache, logits_to_keep=1).logits
            for _ in range(8):
                ids.append(int(logits[0, -1].argmax()))
                logits = service.model(torch.tensor([ids[-1:]]), cache=cache).logits
    return ids


def padded_batch(service: Service) -> list[list[int]]:
    parts = [{"image": str(service.folder / "images" / "0.png")}, {"video": str(CLIP), "nframes": 4}]
    batch = [user(parts[0], text_part("what colour is the star?")), user(parts[1], text_part("which way does it move?"))]
    inputs = service.processor.apply_chat_template(batch, tokenize=True)
    return service.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS).tolist()


def cancel(service: Service) -> list[int]:
    """Ends a stream after four tokens, by an exception in the streamer."""
    ids: list[int] = []
    inputs = service.processor.apply_chat_template(
        user({"image": str(ASSETS / "image.png")}, text_part("what is in the picture?")), tokenize=True
    )
    try:
        service.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, streamer=Tokens(ids.append, 4))
    except Cancelled:
        return ids
    raise AssertionError("the stream was not cancelled")


def abandon(service: Service) -> list[int]:
    """Reads three tokens of an iterator over the tokens of a generating thread, and closes it."""
    tokens, ids = iterate(service), []
    for token in tokens:
        ids.append(token)
        if len(ids) == 3:
            break
    tokens.close()
    return ids


def iterate(service: Service) -> Iterator[int]:
    text = f"<|im_start|>user\n{VIDEO}which way does it move?<|im_end|>\n<|im_start|>assistant\n"
    _, videos, options = kk.process_vision_info(user({"video": str(CLIP)}), True)
    inputs = service.processor(text=text, videos=videos, **options)
    pieces: queue.Queue[int | None] = queue.Queue(maxsize=1)
    stop = threading.Event()

    def accept(token: int) -> None:
        while not stop.is_set():
            try:
                return pieces.put(token, timeout=0.05)
            except queue.Full:
                continue
        raise Cancelled

    def generate() -> None:
        with suppress(Cancelled):
            service.model.generate(**inputs, max_new_tokens=200, eos_token_id=(), streamer=Tokens(accept, 201))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        while True:
            yield pieces.get()
    finally:
        stop.set()
        thread.join()


def slow_fast(service: Service) -> list[Any]:
    """A 1.5 video, loaded with the other sources of its message in parallel."""
    parts = [{"video": str(service.folder / "scenes.mkv"), "fps": 5}, {"video": str(CLIP)}, {"image": str(ASSETS / "image.png")}]
    _, videos, options = kk.process_vision_info(user(*parts), edition="1.5", workers=2)
    sums = [[int(frame.long().sum()) for frame in video] for video in videos]
    return [sums, *([torch.as_tensor(value).tolist() for value in options[name]] for name in sorted(options))]


def kernels(service: Service) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(20, 2, 16, generator=generator)
    offsets = torch.tensor([0, 5, 20], dtype=torch.int32)
    with kk.use_impl("triton"):
        out = kk.ops.varlen_attention(q, q, q, offsets, 15)
        rotated, _ = kk.ops.rope_2d(out, out, torch.arange(40).view(2, 20), torch.ones(4))
    return rotated.flatten().tolist()
