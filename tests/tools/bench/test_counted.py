"""What `bench --counted` reports: floors and limits of small cases, machine code read from a listing, the tables."""

import os

import pytest
import torch

from keye_kernels.cli import main
from keye_kernels.tools.bench import counted
from keye_kernels.tools.bench.cases import CASES, Case, count_case

pytest.importorskip("triton")

from keye_kernels.tools.bench import machine_code

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
    found = {"target": "sm_90", "stack_bytes": 0, "instructions_a_score": None, "integer_a_score": None}
    return {**found, "blocks": 1, "warps": 8, "narrowest_access": 16, **changes}


def test_the_projector_of_16_images_keeps_its_limits():
    found = count_case("patch_merge")
    assert found["launches"] <= 3 and found["idle"] == found["eager_operators"] == 0 and found["above"] == []
    assert 1.0 <= found["unique"] <= 1.05 and found["multiplies"] == 1.0
    width, rows = 4 * 128, 64
    tensors = rows * width + 2 * 128 + width * width + width + 512 * width + 512 + rows * 512
    assert found["floor_bytes"] == 2 * (tensors + 2 * rows * width)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("attention ragged")])
def test_attention_of_ragged_segments_keeps_its_limits_in_tiles_of_either_height(name):
    found = count_case(name)
    assert found["launches"] == 1 and found["eager_operators"] == 0 and found["above"] == []
    assert 1.0 <= found["unique"] < 1.001 and 1.0 < found["multiplies"] <= CASES[name][0]().limits["multiplies"]


def test_a_limit_that_is_exceeded_is_named(monkeypatch):
    x = torch.zeros(64)
    case = Case("twice", "ours", lambda: x.half().float(), [x], limits={"requested": 1.2, "launches": 0})
    monkeypatch.setitem(CASES, "twice", (lambda: case, None))
    found = count_case("twice")
    # float32 to float16 and back: 256 + 128 + 128 + 256 bytes where 256 + 256 would do
    assert found["requested"] == 1.5 and found["eager_operators"] == 2 and found["above"] == ["requested"]


def test_a_peer_that_computes_something_else_is_refused(monkeypatch):
    x = torch.ones(8)
    case = Case("double", "a peer", lambda: x + x, [x], expected=lambda: x * 3)
    monkeypatch.setitem(CASES, "double", (lambda: case, None))
    with pytest.raises(ValueError, match="a peer computes something else than double"):
        count_case("double")


def test_a_loop_is_read_from_its_listing():
    assert machine_code.read_loop(LISTING) == {"instructions": 6, "integer": 2, "narrowest_access": 2}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, []),
        ({"stack_bytes": 8}, ["stack"]),
        ({"narrowest_access": 2}, ["narrowest_access"]),
        ({"instructions_a_score": 9.1, "integer_a_score": 1.2}, ["instructions_a_score"]),
        ({"instructions_a_score": 9.1, "integer_a_score": 1.6, "target": "sm_80"}, ["integer_a_score"]),
        ({"instructions_a_score": 8.0, "integer_a_score": 1.0, "warps": 4}, ["occupancy"]),
        ({"instructions_a_score": 8.0, "integer_a_score": 1.0, "warps": 4, "blocks": 2}, []),
    ],
)
def test_machine_code_above_a_limit_is_named(changes, expected):
    assert machine_code.above(row(**changes)) == expected


@pytest.mark.parametrize("target", machine_code.TARGETS)
def test_every_kernel_has_a_variant_in_the_table(target):
    assert {kernel for kernel, _ in machine_code.variants(target)} == machine_code.VARIANTS.keys()


def test_triton_interprets_in_one_process_and_compiles_in_another():
    found = [counted._in_process(value, None, [(os.getenv, ("TRITON_INTERPRET",))]) for value in "01"]
    assert found == [["0"], ["1"]]


@pytest.fixture
def counts(monkeypatch):
    """Counts stand in for the two slow halves; gives the calls."""
    calls = []

    def in_process(interpret, label, made):
        calls.append((interpret, [arguments for _, arguments in made]))
        if label is None:
            return [[("sm_90", "rope", "vision bf16")]]
        case = {
            "operator": "an operator",
            "by": "ours",
            "launches": 1,
            "eager_operators": 2,
            "requested": 1.5,
            "idle": 0,
        }
        case |= {"unique": 1.0, "multiplies": 1.056, "limits": {"requested": 1.2}, "above": ["requested"]}
        code = row(kernel="rope", variant="vision bf16", registers=80, shared_bytes=0, above=["stack"])
        return [case if interpret == "1" else code for _ in made]

    monkeypatch.setattr(counted, "_in_process", in_process)
    return calls


def test_the_command_prints_both_tables_and_fails_above_a_limit(counts, capsys, monkeypatch):
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda name: name == "triton" or None)
    assert main(["bench", "--counted", "--target", "sm_90"]) == 1
    out = capsys.readouterr().out
    assert "| an operator | ours | 1 + 2 ops | 1.500" in out and "requested ABOVE 1.2" in out
    assert "rope: vision bf16" in out and "ABOVE: stack" in out
    assert "Not installed, so not counted: flash_attn, liger_kernel." in out
    interpreted = counts[0]
    assert interpreted == ("1", [(name,) for name, (_, package) in CASES.items() if package is None])


def test_unknown_cases_and_missing_triton_say_what_to_do(counts, monkeypatch):
    with pytest.raises(ValueError, match="no case matches 'rope_9d': choose from rope_3d"):
        counted.count([], ["rope_9d"])
    monkeypatch.setattr(counted.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        counted.count([])


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match="target must be of sm_80, sm_90, sm_100, got sm_7"):
        counted._variants(["sm_7"])
