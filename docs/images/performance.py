"""Draws performance.png from performance.json: the speed of keye_kernels relative to the strongest peer measured.

Run in the root of the repository: python docs/images/performance.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
FASTER, FASTER_LIGHT, EQUAL, SLOWER, TEXT = "#1f77b4", "#9ecae1", "#8c8c8c", "#d98032", "#333333"
PEER_COLUMN = 3.5


def draw(groups: list[dict]) -> plt.Figure:
    heights = [len(group["rows"]) for group in groups]
    figure, axes = plt.subplots(len(groups), sharex=True, figsize=(9, 5.4), height_ratios=heights, layout="constrained")
    for axis, group in zip(axes, groups, strict=True):
        _draw_group(axis, group)
    axes[-1].set_xlabel("speed relative to the strongest peer measured (1 = equal, higher is better)", color=TEXT)
    return figure


def _draw_group(axis: plt.Axes, group: dict) -> None:
    rows = group["rows"]
    for y, row in enumerate(rows):
        speedups = row.get("speedups") or [row["theirs"] / row["ours"]]
        height = 0.7 / len(speedups)
        for index, speedup in enumerate(speedups):
            center = y + (index - (len(speedups) - 1) / 2) * height
            color = (FASTER, FASTER_LIGHT)[index]
            if speedup < 1.01:
                color = EQUAL if speedup > 0.99 else SLOWER
            axis.barh(center, speedup, height, color=color)
            size = 8 if len(speedups) == 1 else 7
            axis.text(speedup + 0.03, center, f"{speedup:.2f}", va="center", fontsize=size, color=TEXT)
        axis.text(PEER_COLUMN, y, f"vs. {row['peer']}", va="center", fontsize=8, color=TEXT)
    axis.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5, color=TEXT)
    axis.invert_yaxis()
    axis.set_xlim(0, 5.25)
    axis.set_xticks([0, 0.5, 1, 1.5, 2, 2.5, 3])
    axis.tick_params(axis="both", length=0)
    axis.axvline(1, color=TEXT, linewidth=0.8)
    axis.set_title(group["title"], loc="left", fontsize=9.5, fontweight="bold", color=TEXT)
    axis.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    data = json.loads((FOLDER / "performance.json").read_text())
    draw(data["groups"]).savefig(FOLDER / "performance.png", dpi=130)
