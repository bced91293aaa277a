"""`keye-kernels bench --report`: one HTML page with every plot in it, from the JSON of the benchmarks."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import counted
from .results import Result, Timing, differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "index.html"
WIDTH, ROW = 9.0, 0.3  # inches: a figure's width, and the height of a bar
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { width: 100%; height: auto } figure { margin: 1rem 0 } figcaption, footer { color: #555; font-size: 0.9rem }
table { border-collapse: collapse; font-size: 0.85rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; text-align: left }
.warning { background: #fff3cd; border-left: 4px solid #d39e00; padding: 0.6rem 1rem }
"""


def write_report(folder: str, results: Sequence[Result], found: dict[str, Any] | None, force: bool = False) -> Path:
    """Writes `folder`/index.html from one result, or two to compare, and the counted table if there is one.

    Raises: ImportError without matplotlib; FileExistsError where a page is there already, unless `force`.
    """
    path = Path(folder) / PAGE
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists: name another folder, or pass --force to write over it")
    page = to_html(results, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def to_html(results: Sequence[Result], found: dict[str, Any] | None) -> str:
    """The whole page; nothing in it is loaded from elsewhere."""
    first = results[0]
    kind = _kind(first)
    parts = [f"<h1>Keye kernels: benchmarks</h1>\n<p>{html.escape(kind)}</p>"]
    parts += [_warning(text) for text in warnings(results)]
    parts.append("<h2>Machine and versions</h2>" + _environment(results))
    parts.append("<h2>Speed-up by shape</h2>" + _plot("speed-up", plot_speedup(first), speedup_caption(first)))
    if len(results) == 2:
        text = f"Median seconds in {results[1].file} over those in {first.file}: below 1 is faster."
        parts.append("<h2>Comparison</h2>" + _plot("comparison", plot_comparison(*results), text))
    parts.append("<h2>Share of the roofline</h2>" + _roofline(first))
    parts.append("<h2>Memory by tokens</h2>" + _memory(first))
    parts.append("<h2>Counted work</h2>" + _counted(found))
    parts.append("<h2>All timings</h2>" + _timings(results))
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Keye kernels: benchmarks</title>'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def warnings(results: Sequence[Result]) -> list[str]:
    """What a reader must know before the numbers."""
    found = differences(*results) if len(results) == 2 else []
    for result in results:
        if result.interpreted:
            number = len(result.interpreted)
            found.append(
                f"{number} cases of {result.file} ran in Triton's interpreter; their times are no speed, left out"
            )
    return found


def _kind(result: Result) -> str:
    if result.has_gpu:
        return f"Timed on {result.machine['GPU']}."
    return "CPU smoke timings: they show that the suite runs, and nothing about the kernels' speed on a GPU."


def plot_speedup(result: Result) -> "Figure":
    """Bars a group: the baseline's median over each implementation's."""
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, base.seconds / timing.seconds)
        for timing in result.timings
        if (base := result.baseline(timing)) is not None and base is not timing
    ]
    return _bars(result, rows, "times as fast as the baseline", line=1.0, missing="no case has a baseline beside it")


def speedup_caption(result: Result) -> str:
    names = sorted({base.impl for timing in result.timings if (base := result.baseline(timing))})
    return f"Baseline: {', '.join(names) or 'none'}. Medians."


def plot_comparison(one: Result, other: Result) -> "Figure":
    """Bars a group: the second file's median over the first's."""
    before = {timing.key: timing for timing in one.timings}
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, timing.seconds / before[timing.key].seconds)
        for timing in other.timings
        if timing.key in before
    ]
    return _bars(one, rows, f"seconds in {other.file} / {one.file}", line=1.0, missing="no case is in both files")


def _roofline(result: Result) -> str:
    rows = [
        (f"{timing.shape} {timing.dtype}  {timing.impl}", timing.group, timing.extra["roofline_share"])
        for timing in result.timings
        if timing.extra.get("roofline_share") is not None
    ]
    missing = "the peaks of this machine are not known"
    figure = _bars(result, rows, "share of what the device's peaks allow", line=1.0, missing=missing)
    return _plot("roofline", figure, "The time that bandwidth and arithmetic peaks would allow, over the median.")


def _memory(result: Result) -> str:
    series: dict[tuple[str, str], dict[int, float]] = {}
    for timing in result.timings:
        tokens, peak = timing.extra.get("tokens"), timing.extra.get("peak_memory_bytes")
        if tokens and peak is not None:
            points = series.setdefault((timing.group, timing.impl), {})
            points[tokens] = max(peak / 2**20, points.get(tokens, 0.0))

    def draw(axes: Any) -> None:
        for (group, impl), points in sorted(series.items()):
            axes.plot(*zip(*sorted(points.items()), strict=True), "o-", label=f"{group}, {impl}", markersize=4)
        axes.set(xlabel="tokens or patches", ylabel="MiB above what was held before", xscale="log")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    figure = _figure(result, 3.5, draw if series else None, missing="no case has a peak of its memory")
    return _plot("memory", figure, "Most memory held during one call; of shapes with as many tokens, the largest.")


def _counted(found: dict[str, Any] | None) -> str:
    if found is None:
        return (
            "<p>None given. <code>keye-kernels bench --counted --json &gt; counted.json</code> makes it; name that file "
            "beside the result.</p>"
        )

    def draw(axes: Any) -> None:
        rows = found["traffic"][::-1]
        for shift, name in ((0.2, "requested"), (-0.2, "unique")):
            places = [place + shift for place in range(len(rows))]
            axes.barh(places, [row[name] for row in rows], 0.4, label=f"{name} / floor")
        axes.set_yticks(range(len(rows)), [f"{row['operator']}, {row['by']}" for row in rows], fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlabel="bytes over the floor")
        axes.legend(fontsize=7, frameon=False)

    figure = _figure(None, 1 + 2 * ROW * len(found["traffic"]), draw)
    plot = _plot("counted", figure, "Counted in Triton's interpreter, not timed.")
    tables = _table(counted.TRAFFIC_HEAD, counted.traffic_rows(found["traffic"]))
    if found["machine_code"]:
        tables += _table(counted.CODE_HEAD, counted.code_rows(found["machine_code"]))
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    return f"{plot}{tables}<p>{html.escape(versions)}. {html.escape(counted.NOTES)}</p>"


def _bars(result: Result, rows: Sequence[tuple[str, str, float]], label: str, line: float, missing: str) -> "Figure":
    """Horizontal bars of (name, group, value), group by group."""
    groups = sorted({group for _, group, _ in rows})
    ordered = [row for group in groups for row in rows if row[1] == group][::-1]

    def draw(axes: Any) -> None:
        for number, group in enumerate(groups):
            places = [place for place, row in enumerate(ordered) if row[1] == group]
            bars = axes.barh(places, [ordered[place][2] for place in places], label=group, color=f"C{number}")
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axes.set_yticks(range(len(ordered)), [name for name, _, _ in ordered], fontsize=7)
        axes.axvline(line, color="black", linewidth=0.8)
        axes.margins(x=0.1)
        axes.set(xlabel=label)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    return _figure(result, 1.2 + ROW * len(rows), draw if rows else None, missing)


def _figure(result: Result | None, height: float, draw: Callable[[Any], None] | None, missing: str = "") -> "Figure":
    """A figure with one pair of axes, titled by what was timed; a sentence in place of a plot that has no data."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'keye_kernels[bench]'") from error
    figure = Figure(figsize=(WIDTH, max(height, 1.5) if draw else 1.0), layout="constrained")
    axes = figure.subplots()
    if draw is None:
        axes.axis("off")
        axes.text(0.5, 0.5, f"Nothing to plot: {missing}.", ha="center", va="center")
        return figure
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    if result is not None and not result.has_gpu:
        axes.set_title("CPU smoke timings", fontsize=9, loc="left")
    return figure


def _plot(name: str, figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    # Without the date, the same input gives the same page
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    image = f'<img id="plot-{name}" alt="{text}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _warning(text: str) -> str:
    return f'<p class="warning">Warning: {html.escape(text)}.</p>'


def _environment(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for r in results for name in (*r.machine, *r.versions)))
    rows = [(name, *((r.machine | r.versions).get(name, "-") for r in results)) for name in names]
    return _table(("", *(result.file for result in results)), rows)


def _timings(results: Sequence[Result]) -> str:
    def cells(result: Result, timing: Timing) -> tuple[str, ...]:
        low, high = timing.quartiles
        rates = (timing.extra.get(name) for name in ("gb_per_s", "tflop_per_s"))
        return (
            result.file,
            timing.group,
            timing.shape,
            timing.dtype,
            timing.impl,
            f"{1e3 * timing.seconds:.3f}",
            f"{1e3 * low:.3f} to {1e3 * high:.3f}",
            *("-" if rate is None else f"{rate:.3g}" for rate in rates),
            str(timing.extra.get("tile_source") or "-"),
        )

    head = ("file", "group", "shape", "dtype", "impl", "median, ms", "quartiles", "GB/s", "TFLOP/s", "tiles")
    return _table(head, [cells(result, timing) for result in results for timing in result.timings])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
