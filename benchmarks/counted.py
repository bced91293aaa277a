"""What the kernels ask of memory and tensor cores, counted without a GPU. Prints the tables of docs/performance.md.

    python benchmarks/counted.py --tools ../shared/tools [--projection-patches 1024]

`traffic.py` in that folder counts bytes and multiplies in Triton's interpreter, `sass.py` reads the machine code of
ahead-of-time compilation. One process cannot do both, so each half runs in one of its own.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

TOKENS = 1024
RAGGED = (576, 252, 112, 84)
# Ratios do not depend on the number of heads; the interpreter's time does
ATTENTION_HEADS = 2
OPERATORS = {"rope", "varlen_attention", "patch_merge_projection", "position_embedding_2d"}


def count_traffic(tools: str, projection_patches: int) -> None:
    sys.path.insert(0, tools)
    import torch
    from traffic import count, tensor_bytes

    import keye_kernels as kk
    from keye_kernels.geometry import VisionBatch

    def row(name, call, inputs, needed_flops=None, extra=0):
        with count() as counted:
            outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total, floor = counted.total, tensor_bytes(*inputs, *outputs) + extra
        flops = f"{total.dot_flops / needed_flops:.3f}" if needed_flops else "-"
        # The registered operator itself passes the counter of eager operators; what it launches is counted already
        by_op = counted.eager.bytes_by_op
        eager = sum(size for op, size in by_op.items() if op not in OPERATORS)
        print(
            f"| {name} | {total.launches} | {(total.load_bytes + total.store_bytes + eager) / floor:.3f} "
            f"| {(total.unique_load + total.unique_store + eager) / floor:.3f} | {flops} | {total.idle_programs} |",
            flush=True,
        )

    half = torch.float16
    torch.manual_seed(0)
    print("| operator | launches | requested / floor | unique / floor | multiplies / needed | idle programs |")
    print("|---|---|---|---|---|---|")
    qkv = torch.randn(TOKENS, 48, 128, dtype=half)
    q, k = qkv[:, :32], qkv[:, 32:40]
    positions = torch.randint(0, 4000, (3, TOKENS), dtype=torch.int32)
    frequencies = 1e6 ** -(torch.arange(64) / 64)
    weights = {"q_norm_weight": torch.rand(128, dtype=half), "k_norm_weight": torch.rand(128, dtype=half)}
    row(
        "norm + `rope_3d`, 32 + 8 heads x 128",
        lambda: kk.ops.rope_3d(q, k, positions, frequencies, [16, 24, 24], **weights, impl="triton"),
        [q, k, positions, *weights.values()],
    )
    q, k, _ = torch.randn(TOKENS, 3, 16, 72, dtype=half).unbind(1)
    frequencies = 1e4 ** -(torch.arange(18) / 18)
    row(
        "`rope_2d`, 16 + 16 heads x 72",
        lambda: kk.ops.rope_2d(q, k, positions[:2], frequencies, impl="triton"),
        [q, k, positions[:2]],
    )
    for lengths in ((TOKENS,), RAGGED):
        q, k, v = torch.randn(TOKENS, 3, ATTENTION_HEADS, 72, dtype=half).unbind(1)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        for bound in (max(lengths), 4096):  # the bound chooses the tile
            row(
                f"`varlen_attention`, {' + '.join(map(str, lengths))}, max_seqlen {bound}",
                lambda q=q, k=k, v=v, c=cu_seqlens, m=bound: kk.ops.varlen_attention(q, k, v, c, m, impl="triton"),
                [q, k, v],
                needed_flops=sum(4 * 72 * n * n * ATTENTION_HEADS for n in lengths),
            )
    patches = projection_patches
    grid = torch.tensor([[1, 32, patches // 16 // 32]] * 16)
    features = torch.randn(patches, 1152, dtype=half)
    sizes = (1152,), (1152,), (4608, 4608), (4608,), (4096, 4608), (4096,)
    weights = [torch.randn(size, dtype=half) * size[-1] ** -0.5 for size in sizes]
    row(
        f"`patch_merge_projection`, {patches} patches in 16 images (practical floor)",
        lambda: kk.ops.patch_merge_projection(features, grid, *weights, impl="triton"),
        [features, *weights],
        needed_flops=2 * (patches // 4) * 4608 * (4608 + 4096),
        extra=2 * (patches // 4) * 4608 * 2,
    )
    grid, table = torch.tensor([[1, 8, 8]] * 16), torch.randn(729, 1152, dtype=half)
    batch = VisionBatch.build(grid, TOKENS, table_side=27)
    features = features[:TOKENS]
    row(
        "`position_embedding_2d`, 16 images",
        lambda: kk.ops.position_embedding_2d(features, table, batch, impl="triton"),
        [features, table, batch.corner_index, batch.corner_weight],
    )


def read_machine_code(tools: str) -> None:
    sys.path.insert(0, tools)
    from sass import analyse

    from keye_kernels.triton import matmul, patch_merge, position_embedding, rope, varlen_attention

    wide = "registers / stack / shared / blocks on an SM x warps"
    print(f"| kernel | arch | {wide} | in the loop: instructions a score, integer | narrowest access |")
    print("|---|---|---|---|---|")
    for module in (rope, position_embedding, varlen_attention, patch_merge, matmul):
        for arch in (80, 90, 100):
            for spec in module.compile_specs(arch):
                if "fp32" in spec.label or "fp16" in spec.label:
                    continue
                report = analyse(spec.kernel, spec.signature, arch, spec.num_warps, spec.num_stages)
                scores = "-"
                if module is varlen_attention:
                    sizes = spec.signature
                    a_thread = sizes["BLOCK_M"] * sizes["BLOCK_N"] / (32 * spec.num_warps)
                    loop = report.loops[0]
                    scores = f"{len(loop) / a_thread:.2f}, {report.loop_mix[0]['integer'] / a_thread:.2f}"
                memory = report.mix[1]
                narrow = min((name for name in memory if name.startswith(("LDG.", "STG."))), key=_bits, default="-")
                blocks, _ = report.occupancy
                print(
                    f"| {module.__name__.rpartition('.')[2]}: {spec.label} | sm_{arch} "
                    f"| {report.registers} / {report.stack} / {report.smem} / {blocks}x{report.warps} | {scores} | {narrow} |",
                    flush=True,
                )


def _bits(name: str) -> int:
    return int(name.partition(".")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="../shared/tools", help="folder of traffic.py and sass.py")
    parser.add_argument(
        "--projection-patches", type=int, default=1024, help="in 16 images; takes minutes, 16384 most of an hour"
    )
    parser.add_argument("--half", choices=("traffic", "sass"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.half == "traffic":
        count_traffic(options.tools, options.projection_patches)
    elif options.half == "sass":
        read_machine_code(options.tools)
    else:
        if not Path(options.tools, "traffic.py").is_file():
            parser.error(f"--tools must be the folder of traffic.py and sass.py, got {options.tools}")
        for half, interpret in (("traffic", "1"), ("sass", "0")):
            command = [sys.executable, __file__, *sys.argv[1:], "--half", half]
            subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": interpret}, check=True)


if __name__ == "__main__":
    main()
