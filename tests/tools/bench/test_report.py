"""The report page: plots, warnings, errors. One test opens it in Chromium if it is installed."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from keye_kernels.cli import main
from keye_kernels.tools.bench.counted import exceeds_limits

PLOTS = ["speedup", "roofline", "memory", "counted"]
GPU = {"name": "NVIDIA H100", "target": "sm_90"}
COUNTED = {
    "versions": {"keye_kernels": "0.1.0", "triton": "3.9.0"},
    "traffic": [
        {
            **{"operator": "rope_2d", "by": "ours", "launches": 1, "eager_operators": 0, "floor_bytes": 100, "idle": 0},
            **{
                "requested": 1.005,
                "unique": 1.0,
                "multiplies": None,
                "limits": {"requested": 1.0},
                "above": ["requested"],
            },
        }
    ],
    "machine_code": [],
    "absent_peers": ["liger_kernel"],
}


def case(impl, median, shape="1k", group="rope_3d", version="0.1.0", roofline=None):
    return {
        "group": group,
        "name": f"test_{group}[{shape}-{impl}]",
        "params": {"impl": impl, "shape": shape, "dtype": "float32"},
        "stats": {"median": median, "q1": median * 0.9, "q3": median * 1.1},
        "extra_info": {
            "tokens": 1024,
            "gb_per_s": 1.5,
            "tflop_per_s": 0.1,
            "roofline_share": roofline,
            "peak_memory_bytes": 3 << 20,
            "config_source": None,
            "versions": {"keye_kernels": version, "torch": "2.13.0", "triton": None},
        },
    }


@pytest.fixture
def write(tmp_path):
    def write(name, cases, gpu=None, **machine):
        info = {"cpu": {"brand_raw": "A processor", "count": 2}, "system": "Linux", "gpu": gpu, **machine}
        path = tmp_path / name
        path.write_text(json.dumps({"machine_info": info, "benchmarks": cases}))
        return str(path)

    return write


@pytest.fixture
def report(tmp_path, capsys):
    """Runs the command. Returns the exit code, the page or None, and stderr."""

    def report(*arguments, folder="out"):
        code = main(["bench", "--report", str(tmp_path / folder), *arguments])
        page = tmp_path / folder / "index.html"
        return code, page.read_text() if page.is_file() else None, capsys.readouterr().err

    return report


CASES = [case("official (eager)", 0.004), case("reference", 0.002), case("sdpa", 0.001, "4_images", "varlen_attention")]


def test_browser_displays_every_plot(write, tmp_path, report):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    counted = tmp_path / "counted.json"
    counted.write_text(json.dumps(COUNTED))
    code, page, error = report(write("a.json", CASES), write("b.json", CASES), str(counted))
    assert code == 0, error
    # The script records the decoded width and the displayed height of each image
    script = (
        "<script>onload = () => { for (const i of document.images) "
        "i.dataset.shown = i.naturalWidth + ' ' + Math.round(i.getBoundingClientRect().height) }</script></body>"
    )
    opened = tmp_path / "opened.html"
    opened.write_text(page.replace("</body>", script))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path / 'profile'}"
    command = [browser, *flags.split(), "--dump-dom", opened.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    images = dict(re.findall(r'<img id="plot-([\w-]+)"[^>]*data-shown="(\d+ \d+)"', dom))
    assert sorted(images) == sorted([*PLOTS, "comparison"])
    assert all(int(width) > 300 and int(height) > 60 for width, height in map(str.split, images.values())), images


def test_page_loads_no_other_file(write, report):
    _, page, _ = report(write("a.json", CASES))
    assert "<script" not in page and "<link" not in page
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/svg+xml;base64"}


def test_cpu_timings_are_labelled(write, report):
    assert "CPU timings" in report(write("a.json", CASES))[1]
    assert "CPU timings" not in report(write("b.json", CASES, gpu=GPU), folder="gpu")[1]


def test_interpreter_times_are_not_reported(write, report):
    code, page, error = report(write("a.json", [*CASES, case("triton", 7.77)]))
    assert code == 0 and "7770" not in page
    assert "1 cases of a.json ran in Triton" in error
    code, _, error = report(write("b.json", [case("triton", 7.77)]), folder="other")
    assert code == 2 and "which are not reported" in error


def test_speedup_is_the_median_of_the_baseline_over_the_median(write):
    from keye_kernels.tools.bench.report import plot_speedup
    from keye_kernels.tools.bench.results import read_results

    (result,), _ = read_results([write("a.json", CASES)])
    bars = [bar.get_width() for bar in plot_speedup(result).axes[0].patches]
    # The attention case has no baseline
    assert bars == [pytest.approx(2.0)]


def test_the_comparison_is_the_time_of_the_second_file_over_that_of_the_first(write, report):
    from keye_kernels.tools.bench.report import plot_comparison
    from keye_kernels.tools.bench.results import read_results

    slower = [case("official (eager)", 0.012), case("reference", 0.001)]
    (one, other), _ = read_results([write("a.json", CASES[:2]), write("b.json", slower)])
    axes = plot_comparison(one, other).axes[0]
    # The first case is at the top
    assert [bar.get_width() for bar in axes.patches] == [pytest.approx(0.5), pytest.approx(3.0)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1k float32  reference", "1k float32  official (eager)"]
    assert axes.get_xlabel() == "time in b.json / time in a.json"
    _, page, _ = report(write("a.json", CASES), write("b.json", CASES))
    assert "Median time in b.json / median time in a.json; below 1 is faster." in page


def test_different_machine_and_version_are_reported_on_the_page_and_on_stderr(write, report):
    first = write("a.json", CASES)
    second = write("b.json", [case("official (eager)", 0.004, version="0.2.0")], gpu=GPU)
    code, page, error = report(first, second)
    assert code == 0
    for text in (
        "different machine: GPU is none in a.json, NVIDIA H100 in b.json",
        "different version: keye_kernels is 0.1.0 in a.json, 0.2.0 in b.json",
        "2 cases are in only one of the two files",
    ):
        assert f'<p class="warning">Warning: {text}' in page
        assert f"warning: {text}" in error


def test_equal_machine_and_version_give_no_warning(write, report):
    code, page, error = report(write("a.json", CASES), write("b.json", CASES))
    assert code == 0 and error == "" and 'id="plot-comparison"' in page and 'class="warning"' not in page


@pytest.mark.parametrize(
    "cases, arguments, message",
    [
        ([], [], "a.json contains no timed case: pytest's -k or paths selected no case"),
        (
            CASES,
            ["--select", "projector"],
            "--select 'projector' matched nothing in .*a.json, its groups are rope_3d",
        ),
    ],
)
def test_empty_result_names_the_selection(write, report, cases, arguments, message):
    code, page, error = report(write("a.json", cases), *arguments)
    assert code == 2 and page is None and re.search(message, error)


def test_select_keeps_only_matching_groups(write, report):
    _, page, _ = report(write("a.json", CASES), "--select", "varlen")
    assert "<td>varlen_attention</td>" in page and "<td>rope_3d</td>" not in page


def test_existing_page_is_overwritten_only_with_force(write, report, tmp_path):
    one, other = write("a.json", CASES), write("b.json", CASES)
    report(one)
    code, page, error = report(other)
    assert code == 2 and "--force" in error and "another folder" in error and "a.json" in page and "b.json" not in page
    code, page, _ = report(other, "--force")
    assert code == 0 and "b.json" in page


@pytest.mark.parametrize("content, message", [("{", "not valid JSON"), ("[]", "is not a result"), ("{}", "is not a result")])
def test_other_json_files_are_errors(tmp_path, report, content, message):
    (tmp_path / "a.json").write_text(content)
    code, _, error = report(str(tmp_path / "a.json"))
    assert code == 2 and message in error


def changed(value, *path):
    """A result file in which the field at `path` of the first case has another value; None removes it."""
    content = {"benchmarks": [case("reference", 0.002)], "machine_info": {"gpu": None}}
    parent = content
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = value
    return content


CASE = ("benchmarks", 0)


@pytest.mark.parametrize(
    "content, message",
    [
        (changed({}, "benchmarks"), "a.json: benchmarks must be a list"),
        (changed(["x"], "benchmarks"), "benchmarks[0] must be an object, got 'x'"),
        (changed([], "machine_info"), "a.json: machine_info must be an object"),
        (changed("H100", "machine_info", "gpu"), "machine_info: gpu must be an object"),
        (changed(None, *CASE, "stats"), "benchmarks[0].stats must be an object, got 'None'"),
        (changed({}, *CASE, "stats"), "benchmarks[0].stats: median must be a positive number"),
        (changed(0, *CASE, "stats", "median"), "stats: median must be a positive number, got '0'"),
        (changed(True, *CASE, "stats", "median"), "stats: median must be a positive number"),
        (changed(float("nan"), *CASE, "stats", "median"), "stats: median must be a positive number"),
        (changed(float("inf"), *CASE, "stats", "q3"), "stats: q3 must be a positive number"),
        (changed("1e999", *CASE, "stats", "q3"), "stats: q3 must be a positive number, got 'inf'"),
        (changed("fast", *CASE, "stats", "q1"), "stats: q1 must be a positive number, got 'fast'"),
        (changed(None, *CASE, "name"), "benchmarks[0]: name must be a string"),
        (changed(7, *CASE, "group"), "benchmarks[0]: group must be a string"),
        (changed([], *CASE, "params"), "benchmarks[0]: params must be an object"),
        (changed("no", *CASE, "extra_info"), "benchmarks[0]: extra_info must be an object"),
        (changed([], *CASE, "extra_info", "versions"), "extra_info: versions must be an object"),
        (changed("many", *CASE, "extra_info", "tokens"), "extra_info: tokens must be a positive number"),
        (changed([1], *CASE, "extra_info", "gb_per_s"), "extra_info: gb_per_s must be a positive number"),
        ({"traffic": "none"}, "KeyError: 'versions'"),
        ({**COUNTED, "traffic": [{"operator": "rope_2d"}]}, "KeyError: 'eager_operators'"),
        ({**COUNTED, "traffic": [{**COUNTED["traffic"][0], "unique": "low"}]}, "ValueError: "),
        ({**COUNTED, "machine_code": [1]}, "TypeError: "),
        ({**COUNTED, "versions": []}, "AttributeError: "),
    ],
)
def test_results_of_the_wrong_shape_name_the_file_and_the_field(content, message, tmp_path, write, report):
    (tmp_path / "a.json").write_text(json.dumps(content).replace('"1e999"', "1e999"))
    code, page, error = report(str(tmp_path / "a.json"), *([write("b.json", CASES)] if "traffic" in content else []))
    assert code == 2 and page is None and error.count("\n") == 1
    assert f"{tmp_path / 'a.json'}" in error and message in error


def test_a_deeply_nested_file_is_an_error(tmp_path, report):
    (tmp_path / "a.json").write_text(100_000 * "[")
    code, _, error = report(str(tmp_path / "a.json"))
    assert code == 2 and "a.json is not valid JSON" in error


def test_number_of_results_must_be_one_or_two(write, report):
    assert "one or two files" in report()[2]
    assert "one or two files" in report(*(write(f"{name}.json", CASES) for name in "abc"))[2]


def test_missing_matplotlib_error_names_the_install_command(write, report, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, page, error = report(write("a.json", CASES))
    assert code == 2 and page is None and "pip install 'keye_kernels[bench]'" in error


def test_counted_table_marks_exceeded_limits(write, report, tmp_path):
    counted = tmp_path / "counted.json"
    counted.write_text(json.dumps(COUNTED))
    _, page, _ = report(write("a.json", CASES), str(counted))
    assert "<td>requested ABOVE 1</td>" in page and exceeds_limits(COUNTED)


def test_result_files_without_report_are_an_error(capsys):
    assert main(["bench", "--load", "a.json"]) == 2
    assert "--report DIR" in capsys.readouterr().err
