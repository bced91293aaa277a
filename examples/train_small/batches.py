"""Batches: scenes drawn, cut into patches by Keye's processor, and their questions packed into rows of tokens."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

import keye_kernels as kk
from keye_kernels.model.positions import rope_index
from keye_kernels.processing.images import fetch_image

from . import world

FRAMES_A_SECOND = (2.0, 2.0, 2.0, 1.0, 3.0, 4.0)
LENGTH_STEP = 8  # rows are padded to multiples of it
SYSTEM_TURNS = ([], [{"role": "system", "content": ""}])  # the template's own, or an empty one


class Batch(NamedTuple):
    """P patches of all pictures, M = P/4 merged ones; T tokens of all questions with their answers, packed."""

    pixel_values: Tensor  # [P, 3, 14, 14]
    grid_thw: Tensor  # [n, 3]
    looks: Tensor  # [M, 5]: size, colour and shape of what a merged patch shows (0 = nothing), its row and its column
    coverage: Tensor  # [P, 16]: how much of a patch, in four by four parts, objects cover; patches in the tower's order
    input_ids: Tensor  # [T]
    position_ids: Tensor  # [3, T]
    cu_seqlens: Tensor  # [questions + 1]
    placeholders: Tensor  # which of the T tokens stand for a merged patch
    feature_index: Tensor  # and for which of the M
    targets: Tensor  # which of the T places predict a token of an answer
    labels: Tensor  # and which token
    weights: Tensor  # and how much it counts


@dataclass(frozen=True)
class Recipe:
    """What batches hold, in two stages.

    For `perception` steps: `crowds` pictures full of objects, for the readouts alone. Then: `scenes` pictures, every fourth of
    them a crowd of up to six, each asked several questions, and a clip that is watched forwards and backwards. All kinds of
    questions come from the start: a decoder that first learns to describe has a hard time to learn to look up.
    """

    seed: int = 0
    perception: int = 1700
    crowds: int = 16
    scenes: int = 16


class Batches(Dataset):
    """The batches of a run: number i is a function of the recipe and i alone, whichever process makes it."""

    def __init__(self, processor: kk.KeyeProcessor, config: kk.KeyeConfig, recipe: Recipe):
        self.processor, self.config, self.recipe = processor, config, recipe

    def __getitem__(self, index: int) -> Batch:
        recipe = self.recipe
        rng = random.Random(f"training {recipe.seed} {index}")
        if index < recipe.perception:
            return self.pack([(world.random_crowd(rng), []) for _ in range(recipe.crowds)], rng)
        samples = [world.random_scene(rng) if i % 4 else world.random_crowd(rng, 6) for i in range(recipe.scenes)]
        samples.append(world.random_clip(rng))
        return self.pack([(sample, _choose(sample, rng)) for sample in samples], rng)

    def pack(self, asked: list[tuple[world.Scene | world.Clip, list[tuple[str, str]]]], rng: random.Random) -> Batch:
        """A batch of pictures and clips, each with the questions, and their answers, that it is asked."""
        packed = [(*pair, *self._patches(pair[0])) for pair in asked]
        # Pictures of one size and rows of one length stand together: attention takes each such run at once
        packed.sort(key=lambda entry: len(entry[2]))
        counts = torch.tensor([len(patches) // 4 for *_, patches, _ in packed])
        rows = []
        for (sample, pairs, _, grid), end, count in zip(packed, counts.cumsum(0), counts, strict=True):
            features = torch.arange(end - count, end)
            indexed = [(*pair, features) for pair in pairs]
            if isinstance(sample, world.Clip):
                # The tower does not know the order of frames, so the clip backwards has the same features
                backwards = features.view(grid[0], -1).flip(0).flatten()
                indexed += [(question, world.OPPOSITE[answer], backwards) for question, answer in pairs]
            kind = "video" if isinstance(sample, world.Clip) else "image"
            rows += [(*self._row(kind, int(count), *pair, rng), kind, grid, index) for *pair, index in indexed]
        rows.sort(key=lambda row: len(row[0]))
        # An empty row first, so that a batch without questions needs no care
        nothing = torch.zeros(0, dtype=torch.int64)
        input_ids, labels = (torch.cat([nothing, *(row[i] for row in rows)]) for i in (0, 1))
        kinds = torch.tensor([self.config.image_token_id, self.config.video_token_id])
        return Batch(
            pixel_values=torch.cat([patches for *_, patches, _ in packed]),
            grid_thw=torch.tensor([grid for *_, grid in packed]),
            looks=torch.cat([_looks(sample, grid) for sample, *_, grid in packed]),
            coverage=torch.cat([_coverage(sample, grid) for sample, *_, grid in packed]),
            input_ids=input_ids,
            position_ids=self._positions(rows, rng) if rows else nothing.expand(3, 0),
            cu_seqlens=torch.tensor([0, *(len(row[0]) for row in rows)]).cumsum(0).int(),
            placeholders=torch.isin(input_ids, kinds).nonzero()[:, 0],
            feature_index=torch.cat([nothing, *(row[-1] for row in rows)]),
            targets=(labels >= 0).nonzero()[:, 0],
            labels=labels[labels >= 0],
            weights=torch.cat([nothing.float(), *(_weights(*row[1:3]) for row in rows)]),
        )

    def _positions(self, rows: list[tuple], rng: random.Random) -> Tensor:
        """[3, T] of the packed rows."""
        padded = pad_sequence([row[0] for row in rows], True, -1)
        grids = {kind: [grid for *_, own, grid, _ in rows if own == kind] for kind in ("image", "video")}
        images, videos = (torch.tensor(grid) if grid else None for grid in grids.values())
        seconds = None if videos is None else torch.tensor([1 / rng.choice(FRAMES_A_SECOND) for _ in videos])
        return rope_index(self.config, padded, images, videos, seconds, padded >= 0)[0][:, padded >= 0]

    def _patches(self, sample: world.Scene | world.Clip) -> tuple[Tensor, tuple[int, int, int]]:
        pictures = [fetch_image({"image": frame}) for frame, *_ in _frames(sample)]
        if isinstance(sample, world.Clip):
            inputs = self.processor(text="<|video_pad|>", videos=[pictures])
            return inputs["pixel_values_videos"], tuple(inputs["video_grid_thw"][0].tolist())
        inputs = self.processor(text="<|image_pad|>", images=pictures)
        return inputs["pixel_values"], tuple(inputs["image_grid_thw"][0].tolist())

    def _row(self, kind: str, count: int, question: str, answer: str, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Tokens [S] of a prompt with its answer, and labels [S]: at each place the answer's token that follows, or -1.

        A question that names an object is answered a first time where it ends (nobody reads that): its last two tokens, the
        object's shape and "?", must find the object without a detour over the turn's start, which is learnt far sooner.
        """
        content = [{"type": kind, kind: ""}, {"type": "text", "text": question}]
        messages = [*rng.choice(SYSTEM_TURNS), {"role": "user", "content": content}]
        pad = f"<|{kind}_pad|>"
        text = self.processor.apply_chat_template(messages).replace(pad, pad * count)
        tokenizer = self.processor.tokenizer
        prompt, reply = tokenizer.encode(text), [*tokenizer.encode(answer), tokenizer.eos_token_id]
        tokens, labels = prompt + reply[:-1], [-1] * (len(prompt) - 1) + reply
        if question.startswith(world.LOOK_UP):
            shape = len(tokenizer.encode(text[: text.index(question) + len(question)])) - 2
            labels[shape : shape + len(reply) - 1] = reply[:-1]
        # What follows the answer is never seen
        extra = -len(tokens) % LENGTH_STEP
        return (
            torch.tensor(tokens + [tokenizer.pad_token_id] * extra),
            torch.tensor(labels + [-1] * extra),
        )


def _choose(sample: world.Scene | world.Clip, rng: random.Random) -> list[tuple[str, str]]:
    """Mostly the description of a scene, which teaches most, and up to three other questions."""
    pairs = sample.questions()
    described = [pair for pair in pairs if pair[0] == world.WHAT and rng.random() < 0.7]
    others = [pair for pair in pairs if pair[0] != world.WHAT]
    return described + rng.sample(others, min(3, len(others)))


def _weights(labels: Tensor, kind: str) -> Tensor:
    """Weights of one row's tokens: a long answer counts more than a short one by its root only, the few clips three times."""
    count = int((labels >= 0).sum())
    return torch.full((count,), count**-0.5 * (3 if kind == "video" else 1))


def _frames(sample: world.Scene | world.Clip) -> list[tuple[Image.Image, tuple[world.Thing, ...], Image.Image]]:
    """Pictures, what each shows, and its coverage; an odd clip ends twice, as process_vision_info has it."""
    if isinstance(sample, world.Scene):
        return [(sample.image, sample.things, sample.coverage)]
    things = ((thing,) for thing in sample.things)
    frames = list(zip(sample.frames, things, sample.coverages, strict=True))
    return frames + frames[len(frames) - len(frames) % 2 :]


def _coverage(sample: world.Scene | world.Clip, grid: tuple[int, int, int]) -> Tensor:
    """[P, 16] of one picture or clip, patches of a merged one side by side."""
    frames, rows, columns = grid
    pictures = (picture.resize((4 * columns, 4 * rows), Image.Resampling.BOX) for *_, picture in _frames(sample))
    parts = torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).float() / 255
    parts = parts.view(frames, rows // 2, 2, 4, columns // 2, 2, 4)
    return parts.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 16)


def _looks(sample: world.Scene | world.Clip, grid: tuple[int, int, int]) -> Tensor:
    """[M, 5] labels of the merged patches of one picture or clip."""
    rows, columns = grid[1] // 2, grid[2] // 2
    y = (torch.arange(rows) + 0.5)[:, None].expand(rows, columns).flatten() / rows
    x = (torch.arange(columns) + 0.5).repeat(rows) / columns
    labels = torch.zeros(grid[0], rows * columns, 5, dtype=torch.int64)
    labels[..., 3], labels[..., 4] = (3 * y).long(), (3 * x).long()
    for frame, (_, things, _) in zip(labels, _frames(sample), strict=True):
        words = [(tuple(world.SIZES), t.size, tuple(world.COLOURS), t.colour, world.SHAPES, t.shape) for t in things]
        looks = torch.tensor([[w[i].index(w[i + 1]) + 1 for i in (0, 2, 4)] for w in words])
        across = (x - torch.tensor([[thing.x] for thing in things])).abs()
        down = (y - torch.tensor([[thing.y] for thing in things])).abs()
        distance, nearest = torch.maximum(across, down).min(0)
        frame[:, :3] = looks[nearest] * (distance < 1 / 6)[:, None]
    return labels.flatten(0, 1)
