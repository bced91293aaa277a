"""The numbers on the report page, compared with those of the result files."""

import json
import re

import pytest

from keye_kernels.tools.bench import report
from keye_kernels.tools.bench.report import _bars, _counted, _memory, _roofline, _timings, plot_comparison, plot_speedup
from keye_kernels.tools.bench.results import BenchmarkResult, Timing, differences, read_results


def timing(impl, seconds, group="rope_3d", shape="1k", dtype="float32", **extra):
    return Timing(group, impl, shape, dtype, seconds, (0.9 * seconds, 1.2 * seconds), extra)


def result(*timings, file="a.json", has_gpu=True, machine=None, versions=None):
    return BenchmarkResult(file, list(timings), machine or {"GPU": "H100"}, versions or {}, has_gpu)


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figures that the page would contain, by name."""
    found = {}
    monkeypatch.setattr(report, "_plot", lambda name, figure, caption: found.update({name: figure.axes[0]}) or "")
    return found


def bars(axes):
    names = [label.get_text() for label in axes.get_yticklabels()]
    return {names[round(bar.get_y() + bar.get_height() / 2)]: pytest.approx(bar.get_width()) for bar in axes.patches}


def test_the_baseline_has_the_same_group_shape_and_dtype_and_the_official_one_comes_first():
    official, eager, ours = timing("official (eager)", 8.0), timing("reference", 4.0), timing("triton", 1.0)
    others = [
        timing("reference", 9.0, dtype="bfloat16"),
        timing("reference", 9.0, shape="2k"),
        timing("reference", 9.0, "linear"),
    ]
    for order in ([official, eager, ours], [ours, eager, official]):
        assert result(*others, *order).baseline(ours) is official
    assert result(*others, eager, ours).baseline(ours) is eager
    assert result(*others, ours).baseline(ours) is None
    assert bars(plot_speedup(result(*others, official, ours)).axes[0]) == {"1k float32  triton": 8.0}


def test_cases_of_another_dtype_are_not_compared():
    one = result(timing("triton", 2.0), timing("triton", 5.0, dtype="bfloat16"))
    other = result(timing("triton", 3.0, dtype="bfloat16"), timing("sdpa", 3.0), file="b.json")
    assert bars(plot_comparison(one, other).axes[0]) == {"1k bfloat16  triton": 0.6}
    assert differences(one, other) == ["2 cases are in only one of the two files and are not compared"]


@pytest.mark.parametrize("swap", [False, True])
def test_what_only_one_file_has_is_a_difference(swap):
    one = result(timing("triton", 1.0), versions={"torch": "2.13.0", "triton": "3.9.0"})
    other = result(timing("triton", 1.0), timing("sdpa", 1.0), file="b.json", versions={"torch": "2.13.0"})
    texts = differences(other, one) if swap else differences(one, other)
    values = ("None in b.json", "3.9.0 in a.json") if swap else ("3.9.0 in a.json", "None in b.json")
    assert texts[0] == f"different version: triton is {values[0]}, {values[1]}"
    assert texts[1] == "1 cases are in only one of the two files and are not compared"
    assert differences(one, one) == []


def test_bars_of_a_group_are_together_and_in_the_order_of_the_file():
    rows = [("a", "rope", 1.0), ("b", "linear", 2.0), ("c", "rope", 3.0)]
    axes = _bars(result(), rows, "label", "").axes[0]
    # Drawn from the bottom
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]
    assert bars(axes) == {"a": 1.0, "b": 2.0, "c": 3.0}
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["linear", "rope"]


def test_the_share_of_the_roofline(axes):
    _roofline(result(timing("triton", 1.0, roofline_share=0.25), timing("sdpa", 1.0, roofline_share=None), timing("x", 1.0)))
    assert bars(axes["roofline"]) == {"1k float32  triton": 0.25}


def test_the_peak_of_memory_in_mib_by_number_of_tokens(axes):
    rows = [(2048, 5 << 20), (1024, 3 << 20), (1024, 1 << 20), (1024, 2 << 20)]
    timings = [timing("triton", 1.0, shape=str(index), tokens=t, peak_memory_bytes=m) for index, (t, m) in enumerate(rows)]
    _memory(result(*timings, timing("sdpa", 1.0, tokens=10, peak_memory_bytes=0), timing("x", 1.0, tokens=10)))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes["memory"].lines}
    assert lines == {"triton": ([1024, 2048], [3.0, 5.0]), "sdpa": ([10], [0.0])}


def test_counted_bytes_are_shown_from_the_first_case_at_the_top(axes):
    numbers = {"launches": 1, "eager_operators": 0, "idle": 0, "multiplies": None, "limits": {}, "above": []}
    first = {"operator": "first", "by": "ours", "requested": 1.5, "unique": 1.25, **numbers}
    second = {"operator": "second", "by": "ours", "requested": 3.0, "unique": 2.0, **numbers}
    _counted({"traffic": [first, second], "machine_code": [], "versions": {}})
    shown = axes["counted"]
    assert [label.get_text() for label in shown.get_yticklabels()] == ["second, ours", "first, ours"]
    series = dict(zip((text.get_text() for text in shown.get_legend().get_texts()), shown.containers, strict=True))
    assert {name: [bar.get_width() for bar in drawn] for name, drawn in series.items()} == {
        "requested / floor": [3.0, 1.5],
        "unique / floor": [2.0, 1.25],
    }


def test_the_table_of_timings_has_milliseconds_quartiles_and_rates():
    table = _timings([
        result(timing("triton", 0.0125, gb_per_s=1234.5, tflop_per_s=0.5, config_source="table")),
        result(timing("sdpa", 2.0), file="b.json"),
    ])  # fmt: skip
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert rows == [
        ["file", "group", "shape", "dtype", "impl", "median, ms", "quartiles", "GB/s", "TFLOP/s", "launch config"],
        ["a.json", "rope_3d", "1k", "float32", "triton", "12.500", "11.250 to 15.000", "1.23e+03", "0.5", "table"],
        ["b.json", "rope_3d", "1k", "float32", "sdpa", "2000.000", "1800.000 to 2400.000", "-", "-", "-"],
    ]


@pytest.mark.parametrize("gpu", [None, {"name": "H100"}])
def test_a_file_is_read_field_by_field(gpu, tmp_path):
    cases = [
        {
            "group": "rope_3d",
            "name": f"test[{impl}]",
            "params": {"impl": impl, "shape": "1k", "dtype": "float32"},
            "stats": {"median": 2.0, "q1": 1.0, "q3": 3.0},
            "extra_info": {"versions": {impl: "1.0", "absent": None}, "tokens": 7},
        }
        for impl in ("triton", "reference")
    ]
    machine = {"gpu": gpu, "cpu": {"brand_raw": "A processor", "count": 2}, "system": "Linux", "release": "6.1"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"benchmarks": cases, "machine_info": machine}))
    (found,), counted_work = read_results([str(path)])
    assert counted_work is None and found.has_gpu == bool(gpu) and found.file == "a.json"
    impls = ["triton", "reference"] if gpu else ["reference"]
    assert [one.impl for one in found.timings] == impls and found.interpreted == ([] if gpu else ["test[triton]"])
    last = found.timings[-1]
    assert (last.seconds, last.quartiles, last.extra["tokens"]) == (2.0, (1.0, 3.0), 7)
    assert last.key == ("rope_3d", "1k", "float32", "reference")
    assert found.versions == {"triton": "1.0", "reference": "1.0"}
    assert found.machine == {"GPU": "H100" if gpu else "none", "CPU": "A processor", "cores": "2", "system": "Linux 6.1"}
