"""The `KernelSpec` of rope."""

from types import ModuleType

import torch
from torch import Tensor

from . import spec
from .device import Arch
from .launch_config import Config, ConfigKey
from .rope import config_key, cover_pairs, heuristic, rope, rope_kernel
from .rope_cases import SIZES, inverse_frequencies

COUNTED_TOKENS = 128  # the ratios do not depend on the number of tokens, the interpreter's time does


class RopeSpec(spec.KernelSpec):
    name = "rope"

    def shapes(self, workload: spec.Workload) -> list[spec.TuningShape]:
        text = [*([1, batch] for batch in workload.get("decode", [])), *workload.get("prompts", [])]
        vision = [*workload.get("images", []), *workload.get("frames", [])]
        return [spec.TuningShape(self.name, part, *use) for part, uses in (("text", text), ("vision", vision)) for use in uses]

    def config_key(self, shape: spec.TuningShape, dtype: str) -> ConfigKey:
        return config_key(spec.TORCH_DTYPES[dtype], SIZES[shape.part].head_dim, shape.total)

    def part_of(self, key: ConfigKey) -> str:
        return "text" if key["head_dim"] == SIZES["text"].head_dim else "vision"

    def heuristic(self, shape: spec.TuningShape, dtype: str, arch: Arch) -> Config:
        return heuristic(SIZES[shape.part].head_dim, arch)

    def candidates(self, shape: spec.TuningShape, arch: Arch, heuristic: Config) -> list[Config]:
        # Tokens, heads and threads
        tiles = [(1, 8, 64), (1, 8, 128), (4, 8, 256), (2, 8, 64), (2, 4, 64), (4, 4, 128), (8, 4, 256)]
        if shape.part == "vision":
            tiles = [(2, 16, 128), (4, 16, 128), (8, 8, 128), (2, 16, 64), (4, 8, 64), (8, 16, 128), (1, 16, 64)]
        return [{"BLOCK_T": t, "BLOCK_H": h, "num_warps": threads // arch.warp_size} for t, h, threads in tiles]

    def tuning_problem(
        self, shape: spec.TuningShape, dtype: str, device: torch.device, reference: ModuleType
    ) -> spec.TuningProblem:
        sizes, normal = SIZES[shape.part], spec.random_inputs(dtype, device)
        q, k = (normal(shape.total, heads, sizes.head_dim) for heads in sizes.heads)
        weights = (normal(sizes.head_dim), normal(sizes.head_dim)) if shape.part == "text" else (None, None)
        inv_freq, sections = inverse_frequencies(sizes, device), list(sizes.sections)
        position = torch.arange(shape.total, device=device).remainder(shape.size)
        position_ids = position.expand(len(sections), -1).contiguous()
        rows = spec.first_and_last(shape.total, device)

        def expect(dtype: torch.dtype) -> tuple[Tensor, ...]:
            norms = (None if weight is None else weight.to(dtype) for weight in weights)
            return reference.rope(q[rows].to(dtype), k[rows].to(dtype), position_ids[:, rows], inv_freq, sections, *norms)

        def launch(config: Config) -> tuple[Tensor, ...]:
            return rope(q, k, position_ids, inv_freq, sections, *weights, config=config)

        return spec.TuningProblem(launch, expect, rows)

    def variants(self, part: str, dtype: str, arch: Arch, config: Config) -> list[spec.CompileVariant]:
        # (dtype of the norm weights, backward rotation, k and v into a cache)
        kinds = [(None, False, False), (None, True, False)]
        if part == "text":
            kinds = [(weight, False, to_cache) for weight in (dtype, "fp32") for to_cache in (True, False)] + kinds
        return [_variant(part, dtype, config, *kind) for kind in dict.fromkeys(kinds)]

    def shipped_variants(self, arch: Arch) -> list[spec.CompileVariant]:
        return [
            variant
            for part, sizes in SIZES.items()
            for dtype in spec.TORCH_DTYPES
            for variant in self.variants(part, dtype, arch, heuristic(sizes.head_dim, arch))
        ]

    def counted_cases(self, vision_batch: spec.BuildBatch) -> list[spec.CountedCase]:
        half, text, vision = torch.float16, SIZES["text"], SIZES["vision"]
        # q and k as views of a fused projection
        heads = (*text.heads, text.heads[1])
        q, k, v = torch.randn(COUNTED_TOKENS, sum(heads), text.head_dim, dtype=half).split(heads, dim=1)
        positions = torch.randint(0, 4000, (3, COUNTED_TOKENS), dtype=torch.int32)
        norms = {f"{name}_norm_weight": torch.rand(text.head_dim, dtype=half) + 0.5 for name in "qk"}
        rope_3d = {"q": q, "k": k, "position_ids": positions, "inv_freq": inverse_frequencies(text)}
        rope_3d |= {"mrope_section": list(text.sections), **norms}
        caches = [torch.zeros(2, COUNTED_TOKENS // 2, heads[1], text.head_dim, dtype=half) for _ in range(2)]
        slots = torch.arange(COUNTED_TOKENS // 2)
        to_cache = {**rope_3d, "v": v, "key_cache": caches[0], "value_cache": caches[1], "slots": slots}
        q, k, _ = torch.randn(COUNTED_TOKENS, 3, vision.heads[0], vision.head_dim, dtype=half).unbind(1)
        grid = torch.stack((torch.arange(COUNTED_TOKENS) // 32, torch.arange(COUNTED_TOKENS) % 32)).int()
        rope_2d = {"q": q, "k": k, "position_ids": grid, "inv_freq": inverse_frequencies(vision)}
        inputs_3d, inputs_2d = [rope_3d["q"], rope_3d["k"], positions, *norms.values()], [q, k, grid]
        inputs_to_cache = [*inputs_3d, v, slots]
        limits_3d, limits_2d = {"launches": 1, "requested": 1.07, "unique": 1.02}, {"launches": 1, "requested": 1.05}
        return [
            spec.CountedCase("rope_3d", "norm + rope_3d, 32 + 8 heads x 128", "rope_3d", rope_3d, inputs_3d, limits_3d),
            spec.CountedCase(
                "rope_3d_to_cache", "norm + rope_3d, k and v into a cache", "rope_3d_to_cache", to_cache, inputs_to_cache,
                limits_3d, written=caches,
            ),
            spec.CountedCase("rope_2d", "rope_2d, 16 + 16 heads x 72", "rope_2d", rope_2d, inputs_2d, limits_2d),
        ]  # fmt: skip


def _variant(
    part: str, dtype: str, config: Config, weight: str | None, conjugate: bool, to_cache: bool
) -> spec.CompileVariant:  # fmt: skip
    sizes, data, weights = SIZES[part], f"*{dtype}:16", weight and f"*{weight}:16"
    values, slots = (data, "*i64:16") if to_cache else (None, None)
    signature = {
        "q_out_ptr": data, "k_out_ptr": data, "v_out_ptr": values, "q_ptr": data, "k_ptr": data, "v_ptr": values,
        "q_weight_ptr": weights, "k_weight_ptr": weights, "inv_freq_ptr": "*fp32:16", "position_ptr": "*i64:16",
        "slot_ptr": slots, "num_tokens": "i32", "eps": "fp32", "stride_q_token": "i32", "stride_q_head": "i32",
        "stride_k_token": "i32", "stride_k_head": "i32", "stride_v_token": "i32", "stride_v_head": "i32",
        "stride_p_axis": "i32", "stride_p_token": "i32", "num_slots": "i32", "cache_slots": "i32",
        "Q_HEADS": sizes.heads[0], "K_HEADS": sizes.heads[1], "HEAD_DIM": sizes.head_dim,
        "NUM_FREQUENCIES": sizes.num_frequencies, "SECTIONS": sizes.sections, "CONJUGATE": conjugate,
        "STRIDE_UNIT": 8, "INT64_OFFSETS": False,
        **cover_pairs(sizes.head_dim, weight is not None), "BLOCK_T": config["BLOCK_T"], "BLOCK_H": config["BLOCK_H"],
    }  # fmt: skip
    norm = "" if weight is None else " norm" if weight == dtype else f" norm with {weight} weights"
    label = f"{part} {dtype}{norm}{' backward' if conjugate else ''}{' to cache' if to_cache else ''}"
    in_forward = dtype == "bf16" and not conjugate and (weight == dtype or part == "vision")
    return spec.CompileVariant(rope_kernel, label, signature, config["num_warps"], 3, False, in_forward)


SPEC = RopeSpec()
