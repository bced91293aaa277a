"""Limits of `bench --counted` at their exact values, and what is compared with them."""

from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.tools.bench import counted, counting, machine_code, peers
from keye_kernels.tools.bench.counting import count_case
from keye_kernels.triton import launch_config
from keye_kernels.triton.spec import CountedCase

# The limits of docs/benchmarks.md
SCORES = {"sm_80": (11, 1.5), "sm_90": (9, 1.5), "sm_100": (9, 1.5)}


def row(target, instructions=1.0, integer=1.0, **changes):
    found = {"target": target, "stack_bytes": 0, "instructions_per_score": instructions, "integer_per_score": integer}
    return {**found, "blocks": 2, "warps": 4, "narrowest_access": 4, **changes}


@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_values_equal_to_a_limit_of_machine_code_are_met(target):
    instructions, integer = SCORES[target]
    assert machine_code.above(row(target, instructions, integer)) == []
    assert machine_code.above(row(target, instructions + 0.01, integer)) == ["instructions_per_score"]
    assert machine_code.above(row(target, instructions, integer + 0.01)) == ["integer_per_score"]
    assert machine_code.above(row(target, narrowest_access=3)) == ["narrowest_access"]
    assert machine_code.above(row(target, narrowest_access=None)) == []
    for blocks, warps, expected in ((1, 8, []), (1, 7, ["occupancy"]), (2, 1, []), (0, 16, ["occupancy"])):
        assert machine_code.above(row(target, blocks=blocks, warps=warps)) == expected
    # Occupancy matters where attention scores are computed
    assert machine_code.above(row(target, None, None, blocks=0)) == []


@pytest.mark.parametrize(
    ("instruction", "found"),
    [
        ("LDG.E R4, [R2.64]", ("LDG", 32)),
        ("LDG.E.64 R4, [R2.64]", ("LDG", 64)),
        ("LDG.E.LTC128B.128 R4, [R2.64]", ("LDG", 128)),
        ("LDG.E.S8 R4, [R2.64]", ("LDG", 8)),
        ("STG.E.U16 [R2.64], R4", ("STG", 16)),
        ("STG.E.ENL2.256 [R2.64], R4, R8", ("STG", 256)),
        ("STS.128 [R9], R4", ("STS", 128)),
        ("LDGSTS.E [R8], [R2.64]", ("LDGSTS", 32)),
    ],
)
def test_the_width_of_each_memory_access(instruction, found):
    lines = [f"        /*0100*/              @!P0 {instruction} ;"]
    assert machine_code.access_widths(lines) == {found: 1}
    assert machine_code.analyse_loop(lines) == {"instructions": 1, "integer": 0, "narrowest_access": found[1] // 8}


@pytest.mark.parametrize("opcode", ["IMAD.WIDE", "UIADD3", "IADD3.X", "VIADD", "LOP3.LUT", "ISETP.GE", "SHF.R", "LEA.HI", "PRMT"])
def test_integer_instructions(opcode):
    assert machine_code.analyse_loop([f"        /*0100*/   {opcode} R1, R2, R3 ;"])["integer"] == 1


@pytest.mark.parametrize("opcode", ["FFMA", "HMMA.16816.F32", "MUFU.EX2", "LDS.128", "BRA", "F2FP.BF16"])
def test_other_instructions_are_not_integer(opcode):
    found = machine_code.analyse_loop([f"        /*0100*/   {opcode} R1, R2, R3 ;", ".L_x_1:"])
    assert found == {"instructions": 1, "integer": 0, "narrowest_access": None}


def test_the_hot_loop_is_analysed_and_without_one_the_whole_listing(monkeypatch):
    listing = [f"        /*0{index}00*/   FFMA R1, R2, R3, R4 ;" for index in range(10)]
    variant = SimpleNamespace(label="v", num_warps=2, scores_per_iteration=64)
    monkeypatch.setattr(machine_code, "kernel_spec", lambda name: SimpleNamespace(shipped_variants=lambda arch: [variant]))
    report = SimpleNamespace(registers=1, stack_bytes=0, shared_bytes=0, resident_blocks=2, failures=[], instructions=10)
    for name, result in (("check", report), ("compile_variant", None), ("analyse_nvidia", listing)):
        monkeypatch.setattr(machine_code, name, lambda *_, result=result: result)
    for loop, count in ((listing[:3], 3.0), ([], 10.0)):
        monkeypatch.setattr(machine_code, "hot_loop", lambda lines, vendor, loop=loop: loop)
        assert machine_code.analyse_variant("sm_90", "k", "v")["instructions_per_score"] == count
    report.instructions = 0  # did not compile
    assert machine_code.analyse_variant("sm_90", "k", "v")["instructions_per_score"] is None


@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_only_variants_of_the_bf16_forward_are_shown(target):
    from keye_kernels.triton.device import Arch
    from keye_kernels.triton.registry import kernel_spec

    for kernel, label in machine_code.variants(target):
        [variant] = [one for one in kernel_spec(kernel).shipped_variants(Arch(target)) if one.label == label]
        assert variant.in_bf16_forward and "bf16" in label


def counted_case(monkeypatch, limits, *, needed_flops=0, config=None, factor=1.0, **traffic):
    """A case that moves 400 bytes at least, with given counts; a peer computes `factor` times the result."""
    x = torch.ones(50)
    made = CountedCase("double", "doubling", "double", {"x": x}, [x], limits, needed_flops=needed_flops, config=config)
    seen = []

    def double(x, impl):
        seen.append(launch_config._look_up("kernel", "device", "key"))
        return 2 * x

    @contextmanager
    def count():
        zero = {"launches": [], "eager_operators": [], "requested": 0, "unique": 0, "dot_flops": 0, "idle_programs": 0}
        yield SimpleNamespace(**zero | traffic)

    monkeypatch.setattr(launch_config, "_look_up", cache(lambda *_: "the table"))
    monkeypatch.setattr(counting, "counted_cases", lambda: {"double": made})
    monkeypatch.setattr(counting.ops, "double", double, raising=False)
    monkeypatch.setattr(counting, "count_traffic", count)
    peer = peers.Peer("a peer", "math", "double", lambda case: lambda: (2 * factor * case.arguments["x"],))
    monkeypatch.setattr(counting, "PEERS", [peer])
    return seen


@pytest.mark.parametrize("count, above", [(420, []), (421, ["requested"])])
def test_a_count_equal_to_its_limit_is_met(count, above, monkeypatch):
    counted_case(monkeypatch, {"requested": 1.05, "unique": 1.0}, requested=count, unique=400)
    found = count_case("double")
    assert found["above"] == above and found["floor_bytes"] == 400 and found["limits"] == {"requested": 1.05, "unique": 1.0}


def test_every_kind_of_limit_is_checked(monkeypatch):
    limits = {"requested": 1.0, "unique": 1.0, "multiplies": 1.0, "idle": 0, "launches": 1, "eager_operators": 0}
    counted_case(
        monkeypatch, limits, needed_flops=100, requested=800, unique=600, dot_flops=150, idle_programs=2,
        launches=[1, 2], eager_operators=["add"],
    )  # fmt: skip
    found = count_case("double")
    assert found["above"] == list(limits)
    assert [found[name] for name in limits] == [2.0, 1.5, 1.5, 2, 2, 1]


def test_the_limits_are_those_of_this_package_and_not_of_peers(monkeypatch):
    counted_case(monkeypatch, {"requested": 1.0}, requested=800)
    assert count_case("double")["above"] == ["requested"]
    assert (count_case("double", "a peer")["above"], count_case("double", "a peer")["limits"]) == ([], {})


@pytest.mark.parametrize("factor, same", [(1.0, True), (1.019, True), (0.981, True), (1.021, False), (0.979, False)])
def test_a_peer_may_differ_by_two_percent(factor, same, monkeypatch):
    counted_case(monkeypatch, {}, factor=factor)
    if same:
        assert count_case("double", "a peer")["multiplies"] is None
    else:
        with pytest.raises(ValueError, match="a peer does not compute doubling"):
            count_case("double", "a peer")


@pytest.mark.parametrize("config, used", [({"BLOCK": 64}, {"BLOCK": 64}), (None, "the table")])
def test_a_case_runs_with_its_own_launch_config(config, used, monkeypatch):
    seen = counted_case(monkeypatch, {}, config=config)
    count_case("double")
    assert seen == [used]


@pytest.mark.parametrize(
    "arguments, targets",
    [([], ["sm_80", "sm_90", "sm_100"]), (["--target", "none"], []), (["--target", "sm_90,sm_80"], ["sm_90", "sm_80"])],
)
def test_the_targets_of_the_command(arguments, targets, monkeypatch, capsys):
    asked = []
    nothing = {"versions": {}, "traffic": [], "machine_code": [], "absent_peers": []}
    monkeypatch.setattr(counted, "count", lambda found: asked.append(found) or nothing)
    assert main(["bench", "--counted", *arguments]) == 0
    assert asked == [targets]


def test_without_targets_nothing_is_compiled(monkeypatch):
    processes = []

    def in_process(interpret, label, calls):
        processes.append(interpret)
        return [([("rope_2d", "keye_kernels")], [])] if label is None else [{"above": []} for _ in calls]

    monkeypatch.setattr(counted, "_in_process", in_process)
    found = counted.count([])
    assert processes == ["1", "1"] and found["machine_code"] == [] and found["traffic"] == [{"above": []}]
