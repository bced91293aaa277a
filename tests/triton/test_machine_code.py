"""Machine code of the kernels on architectures that need not be present: access widths, instructions, occupancy."""

from tests.helpers.machine_code import analyse_machine_code


def test_attention_keeps_its_budget():
    rows = analyse_machine_code(*((f"sm_{arch}", "varlen_attention", "vision bf16") for arch in (80, 90, 100)))
    for row in rows:
        is_sm_80 = row["target"] == "sm_80"
        assert row["stack_bytes"] == 0
        assert row["instructions_per_score"] <= (11 if is_sm_80 else 9) and row["integer_per_score"] <= 1.5
        assert row["blocks"] * row["warps"] >= 8 or row["blocks"] >= 2
        assert row["shared_bytes"] <= (80 if is_sm_80 else 100) * 1024
        assert not {"LDG.16", "STG.16", "STS.16"} & row["accesses"].keys()
        assert row["loop_accesses"]["LDGSTS.128"] >= 9 and "LDG.128" not in row["loop_accesses"]


def test_elementwise_kernels_access_memory_in_wide_vectors():
    labels = {"rope": ("text bf16 norm", "vision bf16", "vision fp32"), "position_embedding_2d": ("bf16",)}
    for row in analyse_machine_code(*(("sm_90", kernel, label) for kernel in labels for label in labels[kernel])):
        kernel, label = row["kernel"], row["variant"]
        assert not any(name.endswith((".8", ".16")) for name in row["accesses"]), label
        stores = {int(name.split(".")[1]) for name in row["accesses"] if name.startswith("STG")}
        # The second half of a head of 72 channels starts at byte 72, so 16-bit channels are stored 8 bytes at a time
        assert stores == {64 if label == "vision bf16" else 128}, (kernel, label)
