"""`keye-kernels bench --report`: writes one HTML page with plots and tables of benchmark results."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keye_kernels.triton.launch_config import write_atomically

from . import counted
from .results import BenchmarkResult, Timing, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
FIGURE_WIDTH_INCHES, BAR_HEIGHT_INCHES, LINES_HEIGHT_INCHES = 9.0, 0.3, 2.4
# The palette of Okabe and Ito without yellow, which is hard to see on white; also distinct for colour-blind readers
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
MARKERS = "os^Dv<>PX*"
HATCHES = ("", "///", "...", "xxx")
OUTSIDE = {"fontsize": 7, "frameon": False, "loc": "upper left", "bbox_to_anchor": (1, 1)}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { width: 100%; height: auto } figure { margin: 1rem 0 } figcaption, footer { color: #555; font-size: 0.9rem }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left }
.warning { background: #fff3cd; border-left: 4px solid #d39e00; padding: 0.6rem 1rem }
"""


def write_report(
    folder: str, results: Sequence[BenchmarkResult], counted_work: dict[str, Any] | None, force: bool = False
) -> Path:
    """Writes `folder`/index.html, with one timed result or two to compare, and returns its path.

    Raises ImportError if matplotlib is not installed, and FileExistsError if the page exists and `force` is False.
    """
    path = Path(folder) / PAGE
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: choose another folder, or overwrite it with --force")
    write_atomically(path, to_html(results, counted_work))
    return path


def to_html(results: Sequence[BenchmarkResult], counted_work: dict[str, Any] | None) -> str:
    """The page. It contains all its plots and loads no other file."""
    first = results[0]
    parts = [f"<h1>Keye kernels: benchmarks</h1>\n<p>{html.escape(_introduction(first))}</p>"]
    parts += [f'<p class="warning">Warning: {html.escape(text)}.</p>' for text in warnings(results)]
    parts.append("<h2>Machine and versions</h2>" + _environment(results))
    parts.append("<h2>Speedup by shape</h2>" + _plot("speedup", plot_speedup(first), _speedup_caption(first)))
    if len(results) == 2:
        text = f"Median time in {results[1].file} / median time in {first.file}; below 1 is faster."
        parts.append("<h2>Comparison</h2>" + _plot("comparison", plot_comparison(*results), text))
    if busy := _busy(first):
        parts.append("<h2>GPU busy and share of the floor</h2>" + busy)
    parts.append("<h2>Share of the roofline</h2>" + _roofline(first))
    parts.append("<h2>Peak memory by number of tokens</h2>" + _memory(first))
    parts.append("<h2>Counted work</h2>" + _counted(counted_work))
    parts.append("<h2>All timings</h2>" + _timings(results))
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Keye kernels: benchmarks</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def warnings(results: Sequence[BenchmarkResult]) -> list[str]:
    """Warnings that the page shows before the plots."""
    texts = differences(*results) if len(results) == 2 else []
    for result in results:
        if result.interpreted:
            number = len(result.interpreted)
            texts.append(f"{number} cases of {result.file} ran in Triton's interpreter; their times are not reported")
        texts += [f"{result.file}: {text}" for text in result.missing]
    return texts


def _introduction(result: BenchmarkResult) -> str:
    if result.has_gpu:
        return f"Timed on {result.machine['GPU']}."
    return "CPU timings. They say nothing about the speed of the kernels on a GPU."


def plot_speedup(result: BenchmarkResult) -> "Figure":
    """Bars by group: median time of the baseline / median time of the implementation."""
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, base.seconds / timing.seconds)
        for timing in result.timings
        if (base := result.baseline(timing)) is not None and base is not timing
    ]
    return _bars(result, rows, "speedup over the baseline", "no case has a timed baseline")


def _speedup_caption(result: BenchmarkResult) -> str:
    names = sorted({base.impl for timing in result.timings if (base := result.baseline(timing))})
    return f"Ratio of median times. Baseline: {', '.join(names) or 'none'}."


def plot_comparison(one: BenchmarkResult, other: BenchmarkResult) -> "Figure":
    """Bars by group: median time in the second file / median time in the first file."""
    before = {timing.key: timing for timing in one.timings}
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, timing.seconds / before[timing.key].seconds)
        for timing in other.timings
        if timing.key in before
    ]
    return _bars(one, rows, f"time in {other.file} / time in {one.file}", "no case is in both files")


def _busy(result: BenchmarkResult) -> str:
    """Empty if no case has the GPU's busy time."""
    busy, floor = (
        [
            (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, value)
            for timing in result.timings
            if (value := share(timing)) is not None
        ]
        for share in (_busy_share, lambda timing: timing.extra.get("share_of_floor"))
    )
    if not busy:
        return ""
    texts = (
        "Time in which the GPU works, from torch's profiler / median time. Below 1, the GPU waits for the CPU.",
        "Time of the floor (the same matmuls by torch alone; in decode, reading the weights and the cache) / median time.",
    )
    shown = [("busy", _bars(result, busy, "GPU busy / wall time", ""), texts[0])]
    if floor:
        shown.append(("floor", _bars(result, floor, "share of the floor", ""), texts[1]))
    return "".join(_plot(*plot) for plot in shown)


def _busy_share(timing: Timing) -> float | None:
    busy = timing.extra.get("gpu_busy_seconds")
    return None if busy is None else busy / timing.seconds


def _roofline(result: BenchmarkResult) -> str:
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, timing.extra["roofline_share"])
        for timing in result.timings
        if timing.extra.get("roofline_share") is not None
    ]
    figure = _bars(result, rows, "share of the roofline", "the peak rates of this machine are not known")
    return _plot("roofline", figure, "Time at peak bandwidth or peak FLOP/s, whichever is longer / median time.")


def _memory(result: BenchmarkResult) -> str:
    series: dict[str, dict[str, dict[int, float]]] = {}  # by group, implementation and tokens
    for timing in result.timings:
        tokens, peak = timing.extra.get("tokens"), timing.extra.get("peak_memory_bytes")
        if tokens and peak is not None:
            points = series.setdefault(timing.group, {}).setdefault(timing.impl, {})
            points[tokens] = max(peak / 2**20, points.get(tokens, 0.0))

    def draw(*all_axes: Any) -> None:
        for axes, (group, lines) in zip(all_axes, sorted(series.items()), strict=True):
            for number, (impl, points) in enumerate(sorted(lines.items())):
                style = {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
                axes.plot(*zip(*sorted(points.items()), strict=True), label=impl, **style)
            axes.set(title=group, xlabel="tokens or patches", ylabel="MiB", xscale="log")
            axes.set_ylim(bottom=0)
            axes.legend(**OUTSIDE)

    rows = len(series)
    figure = _figure(result, LINES_HEIGHT_INCHES * rows, draw if series else None, "no case has a peak of memory", rows)
    caption = (
        "Peak of allocated memory during a call, without inputs and weights. For shapes with equal token counts: the maximum."
    )
    return _plot("memory", figure, caption)


def _counted(counted_work: dict[str, Any] | None) -> str:
    if counted_work is None:
        command = "<code>keye-kernels bench --counted --json &gt; counted.json</code>"
        return f"<p>Not given. Run {command} and pass that file together with the result.</p>"

    def draw(axes: Any) -> None:
        rows = counted_work["traffic"][::-1]
        for shift, name, color in ((0.2, "requested", COLORS[0]), (-0.2, "unique", COLORS[1])):
            positions = [index + shift for index in range(len(rows))]
            axes.barh(positions, [row[name] for row in rows], 0.4, label=f"{name} / floor", color=color)
        axes.set_yticks(range(len(rows)), [f"{row['operator']}, {row['by']}" for row in rows], fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="bytes / floor")
        axes.legend(**OUTSIDE)

    figure = _figure(None, 1 + 2 * BAR_HEIGHT_INCHES * len(counted_work["traffic"]), draw)
    plot = _plot("counted", figure, "Counted in Triton's interpreter.")
    tables = _table(counted.TRAFFIC_HEAD, counted.traffic_rows(counted_work["traffic"]))
    if counted_work["machine_code"]:
        tables += _table(counted.CODE_HEAD, counted.code_rows(counted_work["machine_code"]))
    versions = ", ".join(f"{name} {text}" for name, text in counted_work["versions"].items())
    return f"{plot}{tables}<p>{html.escape(versions)}. {html.escape(counted.NOTES)}</p>"


def _bars(result: BenchmarkResult, rows: Sequence[tuple[str, str, float]], label: str, missing: str) -> "Figure":
    """Horizontal bars of rows (name, group, value), sorted by group, with a line at 1."""
    groups = sorted({group for _, group, _ in rows})
    ordered = [row for group in groups for row in rows if row[1] == group][::-1]

    def draw(axes: Any) -> None:
        for number, group in enumerate(groups):
            positions = [index for index, row in enumerate(ordered) if row[1] == group]
            style = {"color": COLORS[number % len(COLORS)], "hatch": HATCHES[number // len(COLORS) % len(HATCHES)]}
            bars = axes.barh(positions, [ordered[i][2] for i in positions], label=group, edgecolor="white", **style)
            # The background hides the line at 1 behind the number
            background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, bbox=background)
        axes.set_yticks(range(len(ordered)), [name for name, _, _ in ordered], fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(x=0.1)
        axes.set(xlabel=label, ylim=(-1, len(ordered)))
        axes.legend(**OUTSIDE)

    return _figure(result, 1.2 + BAR_HEIGHT_INCHES * len(rows), draw if rows else None, missing)


def _figure(
    result: BenchmarkResult | None, height: float, draw: Callable[..., None] | None, missing: str = "", rows: int = 1
) -> "Figure":
    """A figure with axes one below the other. Without data (`draw` is None) it shows a sentence instead of a plot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'keye_kernels[bench]'") from error
    figure = Figure(figsize=(FIGURE_WIDTH_INCHES, max(height, 1.5) if draw else 1.0), layout="constrained")
    all_axes = figure.subplots(max(rows, 1), squeeze=False)[:, 0]
    if draw is None:
        all_axes[0].axis("off")
        all_axes[0].text(0.5, 0.5, f"Nothing to plot: {missing}.", ha="center", va="center")
        return figure
    draw(*all_axes)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
    if result is not None and not result.has_gpu:
        all_axes[0].set_title("CPU timings", fontsize=9, loc="left")
    return figure


def _plot(name: str, figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    # Without the date, equal results give an equal page
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    image = f'<img id="plot-{name}" alt="{text}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _environment(results: Sequence[BenchmarkResult]) -> str:
    names = list(dict.fromkeys(name for r in results for name in (*r.machine, *r.versions)))
    rows = [(name, *((r.machine | r.versions).get(name, "-") for r in results)) for name in names]
    return _table(("", *(result.file for result in results)), rows)


def _timings(results: Sequence[BenchmarkResult]) -> str:
    def cells(result: BenchmarkResult, timing: Timing) -> tuple[str, ...]:
        low, high = timing.quartiles
        names = result.file, timing.group, timing.shape, timing.dtype, timing.impl
        times = f"{1e3 * timing.seconds:.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}"
        shown = (_number(timing.extra.get(name), factor, spec) for name, factor, spec in columns.values())
        return (*names, *times, *shown, str(timing.extra.get("config_source") or "-"))

    columns = {
        "GPU busy, ms": ("gpu_busy_seconds", 1e3, ".3f"),
        "CPU, ms": ("cpu_seconds", 1e3, ".3f"),
        "kernels": ("kernels", 1, ".0f"),
        "launches": ("launches", 1, ".0f"),
        "share of floor": ("share_of_floor", 1, ".2f"),
        "GB/s": ("gb_per_s", 1, ".3g"),
        "TFLOP/s": ("tflop_per_s", 1, ".3g"),
    }
    timings = [(result, timing) for result in results for timing in result.timings]
    columns = {
        title: column
        for title, column in columns.items()
        if title in ("GB/s", "TFLOP/s") or any(timing.extra.get(column[0]) is not None for _, timing in timings)
    }
    head = ("file", "group", "shape", "dtype", "impl", "median, ms", "quartiles", *columns, "launch config")
    return _table(head, [cells(*pair) for pair in timings])


def _number(value: float | None, factor: float, spec: str) -> str:
    return "-" if value is None else format(factor * value, spec)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
