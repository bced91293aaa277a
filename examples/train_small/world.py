"""The world of the small Keye: labelled scenes, their questions and answers, and clips of one moving object.

Whatever the world's rules leave open (anti-aliasing, proportions of star, cross, ring and square, how a clip's object drifts)
is drawn at random for each picture, so that a model trained here understands scenes drawn by someone else.
"""

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 210, 40),
    "purple": (150, 60, 190),
    "orange": (240, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SIZES = {"large": (0.12, 0.145), "small": (0.065, 0.085)}  # radius as a share of the shorter side
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
NUMBERS = ("one", "two", "three")
DIRECTIONS = ("left", "right", "up", "down")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SIDES = (84, 224)
# Training draws no picture of these sizes (width, height), so that they show what the model makes of a new one
HELD_OUT_SIZES = frozenset({(140, 84), (84, 140), (196, 112), (112, 196), (168, 168)})
DOMINANCE = (
    1.25  # in a clip the main axis moves so many times as far as the other, in pixels and in shares of the picture
)

WHAT, COUNT = "what is in the picture?", "how many objects are there?"
WHICH_WAY = "which way does it move?"
LOOK_UP = ("what colour is the ", "where is the ")  # such a question ends in a shape and "?"


@dataclass(frozen=True)
class Thing:
    """One object: its words, its centre as shares of width and height, and its radius as a share of the shorter side."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        """The cell of the 3 x 3 grid that holds the centre."""
        return f"{ROWS[int(self.y * 3)]} {COLUMNS[int(self.x * 3)]}"

    @property
    def text(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at {self.place}"


@dataclass(frozen=True)
class Scene:
    """A picture, its objects in reading order, and how much of each pixel they cover (a grey picture)."""

    image: Image.Image
    things: tuple[Thing, ...]
    coverage: Image.Image

    def questions(self) -> list[tuple[str, str]]:
        """Every question with its answer, first the full description, then the number; neither for a crowded picture."""
        pairs = []
        if len(self.things) <= len(NUMBERS):
            pairs = [(WHAT, " and ".join(thing.text for thing in self.things)), (COUNT, NUMBERS[len(self.things) - 1])]
        shapes = [thing.shape for thing in self.things]
        looks = [(thing.colour, thing.shape) for thing in self.things]
        for thing in self.things:
            if shapes.count(thing.shape) == 1:
                pairs.append((f"what colour is the {thing.shape}?", thing.colour))
            if looks.count((thing.colour, thing.shape)) == 1:
                pairs.append((f"where is the {thing.colour} {thing.shape}?", thing.place))
        return pairs


@dataclass(frozen=True)
class Clip:
    """Frames of one moving object; `things` holds it as it stands in each of them."""

    frames: tuple[Image.Image, ...]
    things: tuple[Thing, ...]
    coverages: tuple[Image.Image, ...]
    direction: str

    def questions(self) -> list[tuple[str, str]]:
        return [(WHICH_WAY, self.direction)]


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height that training may use: half of them free, the others square."""
    while True:
        width, height = rng.randint(*SIDES), rng.randint(*SIDES)
        size = (width, height) if rng.random() < 0.6 else (width, width)
        if size not in HELD_OUT_SIZES:
            return size


def random_scene(rng: random.Random, size: tuple[int, int] | None = None, count: int | None = None) -> Scene:
    """A scene of `count` objects (one to three if None) in a picture of `size` (width, height)."""
    size = random_size(rng) if size is None else size
    things = []
    for cell in sorted(rng.sample(range(9), rng.randint(1, 3) if count is None else count)):
        centre = ((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3)
        things.append(_random_thing(rng, *(share + rng.uniform(-0.05, 0.05) for share in centre)))
    image, coverage = _Painter(rng, size).paint(things)
    return Scene(image, tuple(things), coverage)


def random_crowd(rng: random.Random, most: int = 9) -> Scene:
    """A picture with more objects than the world has, to learn their looks from, and to look one up among many."""
    return random_scene(rng, count=rng.randint(4, most))


def random_clip(rng: random.Random, size: tuple[int, int] | None = None) -> Clip:
    """A clip of 4 to 8 frames."""
    size = random_size(rng) if size is None else size
    thing, painter = _random_thing(rng, 0.5, 0.5), _Painter(rng, size)
    margins = [min(0.2, thing.radius * min(size) / side) for side in size]
    direction = rng.choice(DIRECTIONS)
    main = 0 if direction in ("left", "right") else 1
    sign = 1 if direction in ("right", "down") else -1
    # The other axis may move by no more than keeps the main one dominant under either way of measuring
    slant = min(1, size[main] / size[1 - main]) / DOMINANCE
    moves, starts = [0.0, 0.0], [0.0, 0.0]
    moves[main] = sign * rng.uniform(1 / 3, 1 - 2 * margins[main])
    moves[1 - main] = abs(moves[main]) * slant * rng.choice((0, rng.uniform(-1, 1)))
    room = 1 - 2 * margins[1 - main]
    moves[1 - main] = max(-room, min(room, moves[1 - main]))
    for axis, (move, margin) in enumerate(zip(moves, margins, strict=True)):
        starts[axis] = rng.uniform(margin - min(0, move), 1 - margin - max(0, move))
    number = rng.randint(4, 8)
    things = []
    for frame in range(number):
        x, y = (start + move * frame / (number - 1) for start, move in zip(starts, moves, strict=True))
        things.append(Thing(thing.size, thing.colour, thing.shape, x, y, thing.radius))
    frames, coverages = zip(*(painter.paint([thing]) for thing in things), strict=True)
    return Clip(frames, tuple(things), coverages, direction)


def _random_thing(rng: random.Random, x: float, y: float) -> Thing:
    size = rng.choice(tuple(SIZES))
    return Thing(size, rng.choice(tuple(COLOURS)), rng.choice(SHAPES), x, y, rng.uniform(*SIZES[size]))


class _Painter:
    """Draws things on one background in one style."""

    def __init__(self, rng: random.Random, size: tuple[int, int]):
        self.size = size
        self.background = tuple(rng.randint(90, 170) for _ in range(3))
        self.jitter = [rng.randint(-12, 12) for _ in range(27)]
        self.samples = rng.choice((1, 2, 4, 4))
        self.corner = rng.choice((1.0, math.sqrt(0.5), rng.uniform(0.7, 1.0)))  # half a square's side by its radius
        self.boxed = rng.random() < 0.5  # a triangle that fills its box, or an equilateral one
        self.star = rng.choice((0.382, rng.uniform(0.35, 0.52)))
        self.arm = rng.uniform(0.22, 0.4)
        self.hole = rng.uniform(0.45, 0.7)

    def paint(self, things: list[Thing]) -> tuple[Image.Image, Image.Image]:
        """The picture and its coverage."""
        image, coverage = Image.new("RGB", self.size, self.background), Image.new("L", self.size)
        for index, thing in enumerate(things):
            jitter = self.jitter[3 * index : 3 * index + 3]
            channels = zip(COLOURS[thing.colour], jitter, strict=True)
            colour = tuple(max(0, min(255, channel + change)) for channel, change in channels)
            corner, mask = self._mask(thing)
            image.paste(colour, corner, mask)
            coverage.paste(255, corner, mask)
        return image, coverage

    def _mask(self, thing: Thing) -> tuple[tuple[int, int], Image.Image]:
        """How much of each pixel a thing covers, and where the upper left one lies in the picture."""
        radius = thing.radius * min(self.size)
        x, y = thing.x * self.size[0], thing.y * self.size[1]
        left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
        side = math.ceil(2 * radius) + 4
        mask = Image.new("L", (side * self.samples,) * 2)
        self._outline(ImageDraw.Draw(mask), thing.shape, (x - left) * self.samples, (y - top) * self.samples, radius)
        return (left, top), mask.reduce(self.samples)

    def _outline(self, draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
        r = radius * self.samples

        def box(dx: float, dy: float) -> list[tuple[float, float]]:
            return [(x - dx, y - dy), (x + dx, y + dy)]

        def spokes(radii: tuple[float, ...]) -> list[tuple[float, float]]:
            """Corners around the centre, the first one straight up."""
            turn = 2 * math.pi / len(radii)
            return [(x + d * math.sin(i * turn), y - d * math.cos(i * turn)) for i, d in enumerate(radii)]

        if shape == "circle":
            draw.ellipse(box(r, r), fill=255)
        elif shape == "ring":
            draw.ellipse(box(r, r), fill=255)
            draw.ellipse(box(r * self.hole, r * self.hole), fill=0)
        elif shape == "square":
            draw.rectangle(box(r * self.corner, r * self.corner), fill=255)
        elif shape == "cross":
            draw.rectangle(box(r, r * self.arm), fill=255)
            draw.rectangle(box(r * self.arm, r), fill=255)
        elif shape == "star":
            draw.polygon(spokes((r, r * self.star) * 5), fill=255)
        elif self.boxed:
            draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
        else:
            draw.polygon(spokes((r, r, r)), fill=255)
