"""What `bench --counted` reports: floors and budgets of small cases, machine code from a listing, the tables."""

import os
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.tools.bench import counted, counting, machine_code, peers
from keye_kernels.tools.bench.counting import count_case, counted_cases
from keye_kernels.triton.registry import kernel_names
from keye_kernels.triton.spec import CountedCase

LISTING = """
        /*0100*/                   LDGSTS.E.BYPASS.128 [R8], [R2.64] ;
        /*0110*/                   LDG.E.U16 R4, [R2.64] ;
        /*0120*/                   IMAD.WIDE R2, R0, 0x2, R2 ;
        /*0130*/              @!P0 IADD3 R5, R5, 0x1, RZ ;
        /*0140*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0150*/                   STS.128 [R9], R4 ;
.L_x_1:
""".splitlines()


def row(**changes):
    found = {"target": "sm_90", "stack_bytes": 0, "instructions_per_score": None, "integer_per_score": None}
    return {**found, "blocks": 1, "warps": 8, "narrowest_access": 16, **changes}


def test_the_projector_of_16_images_meets_its_budget():
    found = count_case("patch_merge_projection")
    assert found["launches"] <= 3 and found["idle"] == found["eager_operators"] == 0 and found["above"] == []
    assert 1.0 <= found["unique"] <= 1.05 and found["multiplies"] == 1.0
    width, rows = 4 * 128, 64
    tensors = rows * width + 2 * 128 + width * width + width + 512 * width + 512 + rows * 512
    # The normalized merged rows and the hidden activation are written and read once
    assert found["floor_bytes"] == 2 * (tensors + 2 * 2 * rows * width)


@pytest.mark.parametrize("name", ["attention ragged, 64 rows", "attention ragged, 128 rows"])
def test_attention_of_ragged_segments_meets_its_budget_with_both_block_sizes(name):
    found = count_case(name)
    assert found["launches"] == 1 and found["eager_operators"] == 0 and found["above"] == []
    assert 1.0 <= found["unique"] < 1.001 and 1.0 < found["multiplies"] <= counted_cases()[name].limits["multiplies"]


@pytest.fixture
def case(monkeypatch):
    """Adds a case of an operator that rounds to float16 and back; returns it."""
    x = torch.ones(64)
    made = CountedCase("round", "rounding", "round", {"x": x}, [x], {"requested": 1.2, "launches": 0})
    monkeypatch.setattr(counting, "counted_cases", lambda: {"round": made})
    monkeypatch.setattr(counting.ops, "round", lambda x, impl: x.half().float(), raising=False)
    return made


def test_an_exceeded_budget_is_named(case):
    found = count_case("round")
    # float32 to float16 and back: 256 + 128 + 128 + 256 bytes instead of 256 + 256
    assert found["requested"] == 1.5 and found["eager_operators"] == 2 and found["above"] == ["requested"]


def test_a_peer_with_other_results_is_rejected(case, monkeypatch):
    def peer(factor):
        return peers.Peer("a peer", "math", "round", lambda case: lambda: (case.arguments["x"] * factor,))

    monkeypatch.setattr(counting, "PEERS", [peer(1)])
    assert count_case("round", "a peer")["by"] == "a peer"
    monkeypatch.setattr(counting, "PEERS", [peer(3)])
    with pytest.raises(ValueError, match="a peer does not compute rounding"):
        count_case("round", "a peer")


def test_every_peer_has_a_case_of_this_package():
    assert {peer.case for peer in peers.PEERS} <= counted_cases().keys()


def test_a_loop_is_analysed_from_its_listing():
    assert machine_code.analyse_loop(LISTING) == {"instructions": 6, "integer": 2, "narrowest_access": 2}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        ({"stack_bytes": 8}, ["stack"]),
        ({"narrowest_access": 2}, ["narrowest_access"]),
        ({"instructions_per_score": 9.1, "integer_per_score": 1.2}, ["instructions_per_score"]),
        ({"instructions_per_score": 9.1, "integer_per_score": 1.6, "target": "sm_80"}, ["integer_per_score"]),
        ({"instructions_per_score": 8.0, "integer_per_score": 1.0, "warps": 4}, ["occupancy"]),
        ({"instructions_per_score": 8.0, "integer_per_score": 1.0, "warps": 4, "blocks": 2}, []),
    ],
)
def test_machine_code_above_a_limit_is_named(changes, expected):
    assert machine_code.above(row(**changes)) == expected


@pytest.mark.parametrize("failures", [(), ("spills inside a loop",)])
def test_the_row_of_a_variant_names_its_failures_and_the_limits_above_which_it_is(failures, monkeypatch):
    """The listing has an access of 2 bytes. The variant computes one score per thread with 6 instructions and 2 integer ones."""
    variant = SimpleNamespace(label="vision bf16", num_warps=4, scores_per_iteration=4 * 32)
    monkeypatch.setattr(machine_code, "kernel_spec", lambda name: SimpleNamespace(shipped_variants=lambda arch: [variant]))
    found = SimpleNamespace(registers=80, stack_bytes=8, shared_bytes=0, resident_blocks=1, failures=failures, instructions=6)
    monkeypatch.setattr(machine_code, "check", lambda *_: found)
    monkeypatch.setattr(machine_code, "compile_variant", lambda *_: None)
    monkeypatch.setattr(machine_code, "analyse_nvidia", lambda *_: LISTING)
    monkeypatch.setattr(machine_code, "hot_loop", lambda *_: LISTING)
    row = machine_code.analyse_variant("sm_90", "a kernel", "vision bf16")
    assert row["above"] == [*failures, "stack", "integer_per_score", "occupancy", "narrowest_access"]
    assert (row["instructions_per_score"], row["integer_per_score"], row["narrowest_access"]) == (6.0, 2.0, 2)
    monkeypatch.setattr(machine_code, "SCORE_LIMITS", {"sm_90": (5.9, 2.0)})
    assert "instructions_per_score" in machine_code.analyse_variant("sm_90", "a kernel", "vision bf16")["above"]


@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_every_kernel_has_a_variant_in_the_table(target):
    assert {kernel for kernel, _ in machine_code.variants(target)} == set(kernel_names())


def test_triton_interprets_in_one_process_and_compiles_in_another():
    found = [counted._in_process(value, None, [(os.getenv, ("TRITON_INTERPRET",))]) for value in "01"]
    assert found == [["0"], ["1"]]


@pytest.fixture
def counts(monkeypatch):
    """Replaces the processes that count and compile; returns the calls."""
    calls = []

    def in_process(interpret, label, made):
        if label is None and made[0][0] is counted._rows:
            return [counted._rows(*made[0][1])]
        calls.append((interpret, [arguments for _, arguments in made]))
        if label is None:
            return [[("sm_90", "rope", "vision bf16")]]
        case = {"operator": "an operator", "by": "keye_kernels", "launches": 1, "eager_operators": 2, "requested": 1.5}
        case |= {"idle": 0, "unique": 1.0, "multiplies": 1.056, "limits": {"requested": 1.2}, "above": ["requested"]}
        code = row(kernel="rope", variant="vision bf16", registers=80, shared_bytes=0, above=["stack"])
        return [case if interpret == "1" else code for _ in made]

    monkeypatch.setattr(counted, "_in_process", in_process)
    return calls


def test_the_command_prints_both_tables_and_fails_above_a_budget(counts, capsys, monkeypatch):
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert main(["bench", "--counted", "--target", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "| an operator | keye_kernels | 1 + 2 ops | 1.500" in out and "requested ABOVE 1.2" in out
    assert "rope: vision bf16" in out and "ABOVE: stack" in out
    assert "Not installed, and not counted: Liger-Kernel, flash-attn." in out
    assert counts[0] == ("1", [(name, "keye_kernels") for name in counted_cases()])


@pytest.mark.parametrize("traffic, code, expected", [([], [], 0), (["requested"], [], 1), ([], ["stack"], 1)])
def test_either_table_above_a_limit_fails_the_command(traffic, code, expected, counts, monkeypatch, capsys):
    case = {"operator": "", "by": "", "launches": 1, "eager_operators": 0, "requested": 1.5, "idle": 0, "unique": 1.0}
    case |= {"multiplies": None, "limits": {}, "above": traffic}
    one = row(kernel="rope", variant="vision bf16", registers=80, shared_bytes=0, above=code)
    found = {"versions": {}, "traffic": [case], "machine_code": [one], "absent_peers": []}
    monkeypatch.setattr(counted, "count", lambda targets: found)
    assert main(["bench", "--counted"]) == expected
    assert ("ABOVE: stack" in capsys.readouterr().out) == bool(code)


def test_installed_peers_are_counted_after_our_kernels(monkeypatch):
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda name: name == "liger_kernel" or None)
    assert counted._rows(["rope_3d"]) == ([("rope_3d", "keye_kernels"), ("rope_3d", "Liger-Kernel")], [])
    assert counted._rows(["rope_2d"]) == ([("rope_2d", "keye_kernels")], ["flash-attn"])


def test_unknown_cases_and_missing_triton_say_what_to_do(counts, monkeypatch):
    with pytest.raises(ValueError, match=r"case must be one of .*rope_3d.*, got 'rope_9d'"):
        counted.count([], ["rope_9d"])
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        counted.count([])


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match="target must be one of sm_80, sm_90, sm_100, got sm_7"):
        counted._variants(["sm_7"])
