"""The plots of the report: all bars and lines of one plot look different, and no text covers another text or a bar."""

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from keye_kernels.tools.bench import report
from keye_kernels.tools.bench.results import read_results
from tests.tools.bench.test_report import case, write  # noqa: F401 - a fixture

GROUPS = [f"operator_with_a_long_name_{letter}" for letter in "abcdefghijkl"]
IMPLS = ["official (eager)", "torch.compile", "sdpa per segment", "flash_attn", "reference", "triton", "liger"]


@pytest.fixture
def figures(write, monkeypatch):  # noqa: F811
    """All figures of a page, drawn, by name."""
    cases = []
    for number, group in enumerate(GROUPS):
        for shape, tokens in (("1_image_1024", 1024), ("video_768_frames_slow_fast", 65536)):
            for seconds, impl in enumerate(IMPLS, 1):
                cases.append(case(impl, 1e-3 * seconds**2 * (1 + number), shape, group, roofline=0.1 * seconds))
                cases[-1]["extra_info"] |= {"tokens": tokens, "peak_memory_bytes": tokens * 1024 * seconds}
    found = {}
    monkeypatch.setattr(report, "_plot", lambda name, figure, caption: found.update({name: figure}) or "")
    results, _ = read_results([write("a.json", cases, gpu={"name": "NVIDIA H100"}), write("b.json", cases)])
    traffic = [{"operator": f"operator_{i}", "by": "ours", "requested": 1 + i, "unique": 1} for i in range(9)]
    monkeypatch.setattr(report.counted, "traffic_rows", lambda rows: [])
    report.to_html(results, {"traffic": traffic, "machine_code": [], "versions": {}})
    for figure in found.values():
        FigureCanvasAgg(figure).draw()
    return found


def looks(axes):
    """Colour with hatch or marker of each labelled bar series or line."""
    bars = [(str(bar.patches[0].get_facecolor()), bar.patches[0].get_hatch()) for bar in axes.containers]
    return bars + [(str(line.get_color()), line.get_marker()) for line in axes.lines if not line.get_label().startswith("_")]


def test_bars_and_lines_of_a_plot_look_different(figures):
    assert set(figures) == {"speedup", "comparison", "roofline", "memory", "counted"}
    numbers = {name: [len(looks(axes)) for axes in figure.axes] for name, figure in figures.items()}
    assert numbers["speedup"] == numbers["roofline"] == [len(GROUPS)] and numbers["counted"] == [2]
    assert numbers["memory"] == [len(IMPLS)] * len(GROUPS)
    for name, figure in figures.items():
        for axes in figure.axes:
            assert len(set(looks(axes))) == len(looks(axes)), name
    for axes in figures["memory"].axes:
        colors, markers = zip(*looks(axes), strict=True)
        assert len(set(colors)) == len(set(markers)) == len(IMPLS)


def test_adjacent_colours_differ_in_lightness_or_hue_for_colour_blind_readers():
    """The palette of Okabe and Ito, simulated for the most common kind (deuteranopia, matrix of Machado et al. 2009)."""
    from matplotlib.colors import to_rgb

    matrix = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    seen = [[sum(a * b for a, b in zip(row, to_rgb(color), strict=True)) for row in matrix] for color in report.COLORS]
    distances = [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) ** 0.5 for pair in combinations(seen, 2)]
    assert min(distances) > 0.2


def test_texts_cover_neither_each_other_nor_bars(figures):
    for name, figure in figures.items():
        renderer, boxes = figure.canvas.get_renderer(), []
        for axes in figure.axes:
            ticks = [(tick, axis.get_view_interval()) for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
            labels = [tick.label1 for tick, (low, high) in ticks if low <= tick.get_loc() <= high]
            labels += [*axes.texts, axes.xaxis.label, axes.yaxis.label, axes.title]
            boxes += [(text.get_text(), text.get_window_extent(renderer)) for text in labels if text.get_text()]
            boxes.append(("legend", axes.get_legend().get_window_extent(renderer)))
            bars = [bar.get_window_extent(renderer) for bar in axes.patches]
            legend = boxes[-1][1]
            assert not any(legend.overlaps(bar) for bar in bars), name
        for (first, one), (second, other) in combinations(boxes, 2):
            assert not one.shrunk(0.9, 0.8).overlaps(other.shrunk(0.9, 0.8)), (name, first, second)
        page = figure.bbox
        outside = [text for text, box in boxes if box.x0 < page.x0 or box.x1 > page.x1 or box.y0 < page.y0 or box.y1 > page.y1]
        assert not outside, (name, outside)
