"""Training batches: random scenes as patches, and their questions and answers as packed token sequences."""

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

FRAME_RATES = (2.0, 2.0, 2.0, 1.0, 3.0, 4.0)
LENGTH_MULTIPLE = 8  # sequences are padded to multiples of it
SYSTEM_MESSAGES = ([], [{"role": "system", "content": ""}])  # the default of the chat template, or an empty one


class Batch(NamedTuple):
    """P patches of all images, M = P/4 merged patches, T tokens of all packed sequences (a question and its answer each)."""

    pixel_values: Tensor  # [P, 3, 14, 14]
    grid_thw: Tensor  # [n, 3]
    attributes: Tensor  # [M, 5]: size, colour and shape of the object at a merged patch (0 = none), row, column
    coverage: Tensor  # [P, 16]: covered area of each cell of a 4 x 4 grid in a patch; patches in block order
    input_ids: Tensor  # [T]
    position_ids: Tensor  # [3, T]
    cu_seqlens: Tensor  # [questions + 1]
    placeholders: Tensor  # indices of the tokens that are replaced by image features
    feature_index: Tensor  # [len(placeholders)]: index of the feature, 0 to M - 1
    targets: Tensor  # indices of the tokens that predict a token of an answer
    labels: Tensor  # [len(targets)]: the token to predict
    weights: Tensor  # [len(targets)]: weight in the loss


@dataclass(frozen=True)
class Recipe:
    """The content of the batches, in two stages.

    The first `perception` steps train only the vision tower, with the auxiliary losses, on `crowds` crowded images. Each later
    batch has `scenes` images (every fourth is a crowd of up to six objects), several questions per image, and one clip, forwards
    and backwards. All kinds of questions are used from the start: a decoder that learns to describe first is slow to learn to
    find objects.
    """

    seed: int = 0
    perception: int = 1700
    crowds: int = 16
    scenes: int = 16


class Batches(Dataset):
    """The batches of a run. Batch i depends only on the recipe and i, so that a resumed run continues with the same batches."""

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
        """A batch of images and clips, each with a list of questions and answers."""
        packed = [(*pair, *self._patches(pair[0])) for pair in asked]
        # Sorted, because attention on a CPU computes neighbouring segments of equal length together
        packed.sort(key=lambda entry: len(entry[2]))
        counts = torch.tensor([len(patches) // 4 for *_, patches, _ in packed])
        sequences = []
        for (sample, pairs, _, grid), end, count in zip(packed, counts.cumsum(0), counts, strict=True):
            features = torch.arange(end - count, end)
            indexed = [(*pair, features) for pair in pairs]
            if isinstance(sample, world.Clip):
                # The vision tower does not use the order of frames, so the reversed clip has the same features
                backwards = features.view(grid[0], -1).flip(0).flatten()
                indexed += [(question, world.OPPOSITE[answer], backwards) for question, answer in pairs]
            kind = "video" if isinstance(sample, world.Clip) else "image"
            sequences += [(*self._sequence(kind, int(count), *pair, rng), kind, grid, index) for *pair, index in indexed]
        sequences.sort(key=lambda sequence: len(sequence[0]))
        # Keeps torch.cat valid in a batch without questions
        empty = torch.zeros(0, dtype=torch.int64)
        input_ids, labels = (torch.cat([empty, *(sequence[i] for sequence in sequences)]) for i in (0, 1))
        kinds = torch.tensor([self.config.image_token_id, self.config.video_token_id])
        return Batch(
            pixel_values=torch.cat([patches for *_, patches, _ in packed]),
            grid_thw=torch.tensor([grid for *_, grid in packed]),
            attributes=torch.cat([_attributes(sample, grid) for sample, *_, grid in packed]),
            coverage=torch.cat([_coverage(sample, grid) for sample, *_, grid in packed]),
            input_ids=input_ids,
            position_ids=self._positions(sequences, rng) if sequences else empty.expand(3, 0),
            cu_seqlens=torch.tensor([0, *(len(sequence[0]) for sequence in sequences)]).cumsum(0).int(),
            placeholders=torch.isin(input_ids, kinds).nonzero()[:, 0],
            feature_index=torch.cat([empty, *(sequence[-1] for sequence in sequences)]),
            targets=(labels >= 0).nonzero()[:, 0],
            labels=labels[labels >= 0],
            weights=torch.cat([empty.float(), *(_weights(*sequence[1:3]) for sequence in sequences)]),
        )

    def _positions(self, sequences: list[tuple], rng: random.Random) -> Tensor:
        """Position ids [3, T] of the packed sequences."""
        padded = pad_sequence([sequence[0] for sequence in sequences], True, -1)
        grids = {kind: [grid for *_, own, grid, _ in sequences if own == kind] for kind in ("image", "video")}
        images, videos = (torch.tensor(grid) if grid else None for grid in grids.values())
        seconds = None if videos is None else torch.tensor([1 / rng.choice(FRAME_RATES) for _ in videos])
        return rope_index(self.config, padded, images, videos, seconds, padded >= 0)[0][:, padded >= 0]

    def _patches(self, sample: world.Scene | world.Clip) -> tuple[Tensor, tuple[int, int, int]]:
        images = [fetch_image({"image": frame}) for frame, *_ in _frames(sample)]
        if isinstance(sample, world.Clip):
            inputs = self.processor(text="<|video_pad|>", videos=[images])
            return inputs["pixel_values_videos"], tuple(inputs["video_grid_thw"][0].tolist())
        inputs = self.processor(text="<|image_pad|>", images=images)
        return inputs["pixel_values"], tuple(inputs["image_grid_thw"][0].tolist())

    def _sequence(self, kind: str, count: int, question: str, answer: str, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Tokens [S] of a question and its answer, and labels [S]: the next token of the answer, or -1.

        For a question about one object, the last two tokens of the question (the shape and "?") predict the answer as well. These
        predictions are used in training only. Finding the object is learnt much earlier there than at the start of the answer.
        """
        content = [{"type": kind, kind: ""}, {"type": "text", "text": question}]
        messages = [*rng.choice(SYSTEM_MESSAGES), {"role": "user", "content": content}]
        pad = f"<|{kind}_pad|>"
        text = self.processor.apply_chat_template(messages).replace(pad, pad * count)
        tokenizer = self.processor.tokenizer
        prompt, reply = tokenizer.encode(text), [*tokenizer.encode(answer), tokenizer.eos_token_id]
        tokens, labels = prompt + reply[:-1], [-1] * (len(prompt) - 1) + reply
        if question.startswith(world.LOOK_UP):
            shape = len(tokenizer.encode(text[: text.index(question) + len(question)])) - 2
            labels[shape : shape + len(reply) - 1] = reply[:-1]
        # Attention is causal, so padding after the answer changes nothing
        padding = -len(tokens) % LENGTH_MULTIPLE
        return (
            torch.tensor(tokens + [tokenizer.pad_token_id] * padding),
            torch.tensor(labels + [-1] * padding),
        )


def _choose(sample: world.Scene | world.Clip, rng: random.Random) -> list[tuple[str, str]]:
    """The description of a scene in 70 % of the cases, and up to three other questions."""
    pairs = sample.questions()
    described = [pair for pair in pairs if pair[0] == world.WHAT and rng.random() < 0.7]
    others = [pair for pair in pairs if pair[0] != world.WHAT]
    return described + rng.sample(others, min(3, len(others)))


def _weights(labels: Tensor, kind: str) -> Tensor:
    """Loss weights [n] of the n target tokens of a sequence: 1 / sqrt(n), and three times that for clips, which are rare."""
    count = int((labels >= 0).sum())
    return torch.full((count,), count**-0.5 * (3 if kind == "video" else 1))


def _frames(sample: world.Scene | world.Clip) -> list[tuple[Image.Image, tuple[world.SceneObject, ...], Image.Image]]:
    """(image, objects, coverage) of each frame. As in process_vision_info, the last frame of an odd clip is repeated."""
    if isinstance(sample, world.Scene):
        return [(sample.image, sample.objects, sample.coverage)]
    objects = ((obj,) for obj in sample.objects)
    frames = list(zip(sample.frames, objects, sample.coverages, strict=True))
    return frames + frames[len(frames) - len(frames) % 2 :]


def _coverage(sample: world.Scene | world.Clip, grid: tuple[int, int, int]) -> Tensor:
    """Coverage labels [P, 16] of one image or clip, in block order."""
    frames, rows, columns = grid
    images = (image.resize((4 * columns, 4 * rows), Image.Resampling.BOX) for *_, image in _frames(sample))
    cells = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float() / 255
    cells = cells.view(frames, rows // 2, 2, 4, columns // 2, 2, 4)
    return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 16)


def _attributes(sample: world.Scene | world.Clip, grid: tuple[int, int, int]) -> Tensor:
    """Attribute labels [M, 5] of the merged patches of one image or clip."""
    rows, columns = grid[1] // 2, grid[2] // 2
    y = (torch.arange(rows) + 0.5)[:, None].expand(rows, columns).flatten() / rows
    x = (torch.arange(columns) + 0.5).repeat(rows) / columns
    labels = torch.zeros(grid[0], rows * columns, 5, dtype=torch.int64)
    sizes, colours = tuple(world.SIZES), tuple(world.COLOURS)
    labels[..., 3], labels[..., 4] = (3 * y).long(), (3 * x).long()
    for frame, (_, objects, _) in zip(labels, _frames(sample), strict=True):
        classes = torch.tensor(
            [[sizes.index(obj.size) + 1, colours.index(obj.colour) + 1, world.SHAPES.index(obj.shape) + 1] for obj in objects]
        )
        dx = (x - torch.tensor([[obj.x] for obj in objects])).abs()
        dy = (y - torch.tensor([[obj.y] for obj in objects])).abs()
        distance, nearest = torch.maximum(dx, dy).min(0)
        frame[:, :3] = classes[nearest] * (distance < 1 / 6)[:, None]
    return labels.flatten(0, 1)
