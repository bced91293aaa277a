"""The synthetic data of the small Keye: labelled scenes, their questions and answers, and clips of one moving object.

Anti-aliasing, the proportions of star, cross, ring and square, and the path of a clip's object are random in each image, so that
the model also understands scenes from another renderer.
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
# (width, height) of images that training never uses. They test whether the model generalises to new sizes.
HELD_OUT_SIZES = frozenset({(140, 84), (84, 140), (196, 112), (112, 196), (168, 168)})
# In a clip, minimum distance along the main axis / distance along the other one, in pixels and relative to the image size
MIN_AXIS_RATIO = 1.25

WHAT, COUNT = "what is in the picture?", "how many objects are there?"
WHICH_WAY = "which way does it move?"
LOOK_UP = ("what colour is the ", "where is the ")  # questions about one object; they end in a shape and "?"


@dataclass(frozen=True)
class SceneObject:
    """One object: its attributes, its centre relative to width and height, its radius relative to the shorter side."""

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def place(self) -> str:
        """Row and column of the centre in a 3 x 3 grid."""
        return f"{ROWS[int(self.y * 3)]} {COLUMNS[int(self.x * 3)]}"

    @property
    def text(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} at {self.place}"


@dataclass(frozen=True)
class Scene:
    """An image, its objects in reading order, and a greyscale image of the area of each pixel that they cover."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    coverage: Image.Image

    def questions(self) -> list[tuple[str, str]]:
        """All questions with their answers. Scenes of more than three objects have no description and no count."""
        pairs = []
        if len(self.objects) <= len(NUMBERS):
            pairs = [(WHAT, " and ".join(obj.text for obj in self.objects)), (COUNT, NUMBERS[len(self.objects) - 1])]
        shapes = [obj.shape for obj in self.objects]
        colours_and_shapes = [(obj.colour, obj.shape) for obj in self.objects]
        for obj in self.objects:
            if shapes.count(obj.shape) == 1:
                pairs.append((f"what colour is the {obj.shape}?", obj.colour))
            if colours_and_shapes.count((obj.colour, obj.shape)) == 1:
                pairs.append((f"where is the {obj.colour} {obj.shape}?", obj.place))
        return pairs


@dataclass(frozen=True)
class Clip:
    """Frames of one moving object, which `objects` describes for each frame."""

    frames: tuple[Image.Image, ...]
    objects: tuple[SceneObject, ...]
    coverages: tuple[Image.Image, ...]
    direction: str

    def questions(self) -> list[tuple[str, str]]:
        return [(WHICH_WAY, self.direction)]


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of a training image: any ratio with probability 0.6, else a square."""
    while True:
        width, height = rng.randint(*SIDES), rng.randint(*SIDES)
        size = (width, height) if rng.random() < 0.6 else (width, width)
        if size not in HELD_OUT_SIZES:
            return size


def random_scene(rng: random.Random, size: tuple[int, int] | None = None, count: int | None = None) -> Scene:
    """A scene of `count` objects (default: one to three) in an image of `size` (width, height; default: random)."""
    size = random_size(rng) if size is None else size
    objects = []
    for cell in sorted(rng.sample(range(9), rng.randint(1, 3) if count is None else count)):
        centre = ((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3)
        objects.append(_random_object(rng, *(position + rng.uniform(-0.05, 0.05) for position in centre)))
    image, coverage = _Painter(rng, size).paint(objects)
    return Scene(image, tuple(objects), coverage)


def random_crowd(rng: random.Random, most: int = 9) -> Scene:
    """A scene of 4 to `most` objects. It is used to train vision, and to find one object among many."""
    return random_scene(rng, count=rng.randint(4, most))


def random_clip(rng: random.Random, size: tuple[int, int] | None = None) -> Clip:
    """A clip of 4 to 8 frames."""
    size = random_size(rng) if size is None else size
    obj, painter = _random_object(rng, 0.5, 0.5), _Painter(rng, size)
    margins = [min(0.2, obj.radius * min(size) / side) for side in size]
    direction = rng.choice(DIRECTIONS)
    main = 0 if direction in ("left", "right") else 1
    sign = 1 if direction in ("right", "down") else -1
    # Keeps MIN_AXIS_RATIO in pixels and in relative units
    max_slant = min(1, size[main] / size[1 - main]) / MIN_AXIS_RATIO
    moves, starts = [0.0, 0.0], [0.0, 0.0]
    moves[main] = sign * rng.uniform(1 / 3, 1 - 2 * margins[main])
    moves[1 - main] = abs(moves[main]) * max_slant * rng.choice((0, rng.uniform(-1, 1)))
    room = 1 - 2 * margins[1 - main]
    moves[1 - main] = max(-room, min(room, moves[1 - main]))
    for axis, (move, margin) in enumerate(zip(moves, margins, strict=True)):
        starts[axis] = rng.uniform(margin - min(0, move), 1 - margin - max(0, move))
    number = rng.randint(4, 8)
    objects = []
    for frame in range(number):
        x, y = (start + move * frame / (number - 1) for start, move in zip(starts, moves, strict=True))
        objects.append(SceneObject(obj.size, obj.colour, obj.shape, x, y, obj.radius))
    frames, coverages = zip(*(painter.paint([obj]) for obj in objects), strict=True)
    return Clip(frames, tuple(objects), coverages, direction)


def _random_object(rng: random.Random, x: float, y: float) -> SceneObject:
    size = rng.choice(tuple(SIZES))
    return SceneObject(size, rng.choice(tuple(COLOURS)), rng.choice(SHAPES), x, y, rng.uniform(*SIZES[size]))


class _Painter:
    """Draws objects on one background, in one style."""

    def __init__(self, rng: random.Random, size: tuple[int, int]):
        self.size = size
        self.background = tuple(rng.randint(90, 170) for _ in range(3))
        self.jitter = [rng.randint(-12, 12) for _ in range(27)]
        self.samples = rng.choice((1, 2, 4, 4))
        self.corner = rng.choice((1.0, math.sqrt(0.5), rng.uniform(0.7, 1.0)))  # half the side of a square / its radius
        self.boxed = rng.random() < 0.5  # a triangle that fills its box, or an equilateral triangle
        self.star = rng.choice((0.382, rng.uniform(0.35, 0.52)))
        self.arm = rng.uniform(0.22, 0.4)
        self.hole = rng.uniform(0.45, 0.7)

    def paint(self, objects: list[SceneObject]) -> tuple[Image.Image, Image.Image]:
        """The image and its coverage."""
        image, coverage = Image.new("RGB", self.size, self.background), Image.new("L", self.size)
        for index, obj in enumerate(objects):
            jitter = self.jitter[3 * index : 3 * index + 3]
            channels = zip(COLOURS[obj.colour], jitter, strict=True)
            colour = tuple(max(0, min(255, channel + change)) for channel, change in channels)
            corner, mask = self._mask(obj)
            image.paste(colour, corner, mask)
            coverage.paste(255, corner, mask)
        return image, coverage

    def _mask(self, obj: SceneObject) -> tuple[tuple[int, int], Image.Image]:
        """The upper left corner of an object's mask in the image, and the mask: the covered area of each pixel."""
        radius = obj.radius * min(self.size)
        x, y = obj.x * self.size[0], obj.y * self.size[1]
        left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
        side = math.ceil(2 * radius) + 4
        mask = Image.new("L", (side * self.samples,) * 2)
        self._outline(ImageDraw.Draw(mask), obj.shape, (x - left) * self.samples, (y - top) * self.samples, radius)
        return (left, top), mask.reduce(self.samples)

    def _outline(self, draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float) -> None:
        r = radius * self.samples

        def box(dx: float, dy: float) -> list[tuple[float, float]]:
            return [(x - dx, y - dy), (x + dx, y + dy)]

        def spokes(radii: tuple[float, ...]) -> list[tuple[float, float]]:
            """Corners around the centre, clockwise from the top."""
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
