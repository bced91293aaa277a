"""Plots the loss curve of a run with Pillow."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE, LEFT, RIGHT, TOP, BOTTOM = (960, 540), 70, 70, 50, 50
TEXT, GRID, BLUE, ORANGE, GREEN = "#222222", "#dddddd", "#2a6fbb", "#d9822b", "#3a9150"
LOSS_TICKS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)  # of the left axis, which is logarithmic


def draw_curve(history: Sequence[Sequence[float]], file: Path) -> None:
    """Writes a PNG. `history` has a row per step: loss of the answers, auxiliary loss, token accuracy."""
    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM

    def left_axis(loss: float) -> float:
        loss = min(max(loss, LOSS_TICKS[0]), LOSS_TICKS[-1])
        return TOP + height * math.log(LOSS_TICKS[-1] / loss) / math.log(LOSS_TICKS[-1] / LOSS_TICKS[0])

    def right_axis(share: float) -> float:
        return TOP + height * (1 - share)

    for loss in LOSS_TICKS:
        draw.line([(LEFT, left_axis(loss)), (LEFT + width, left_axis(loss))], GRID)
        draw.text((LEFT - 8, left_axis(loss)), f"{loss:g}", TEXT, font, "rm")
    for tenth in range(0, 11, 2):
        draw.text((LEFT + width + 8, right_axis(tenth / 10)), f"{tenth * 10} %", GREEN, font, "lm")
    for quarter in range(5):
        x = LEFT + width * quarter / 4
        draw.line([(x, TOP), (x, TOP + height)], GRID)
        draw.text((x, TOP + height + 8), str(len(history) * quarter // 4), TEXT, font, "mt")
    draw.text((LEFT + width / 2, SIZE[1] - 8), "step", TEXT, font, "mb")
    lines: tuple[tuple[str, str, Callable[[float], float]], ...] = (
        ("loss of the answers", BLUE, left_axis),
        ("auxiliary loss", ORANGE, left_axis),
        ("token accuracy", GREEN, right_axis),
    )
    for column, (name, colour, axis) in enumerate(lines):
        means = _running_mean([row[column] for row in history])
        known = [(i, mean) for i, mean in enumerate(means) if not math.isnan(mean)]
        points = [(LEFT + width * (i + 1) / len(means), axis(mean)) for i, mean in known]
        if len(points) > 1:
            draw.line(points, colour, 2)
        draw.text((LEFT + 40 + column * 260, TOP / 2), name, colour, font, "lm")
        draw.line([(LEFT + column * 260, TOP / 2), (LEFT + 30 + column * 260, TOP / 2)], colour, 3)
    image.save(file)


def _running_mean(values: Sequence[float], window: int = 50) -> list[float]:
    """Mean of the last `window` values that are not NaN; NaN if there is none."""
    means = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    return means
