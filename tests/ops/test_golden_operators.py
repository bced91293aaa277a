"""The public operators on the reference implementation, against the kernel cases in tests/golden/preview."""

import torch

import keye_kernels as kk
from tests.helpers.golden import load_golden, load_projector_case

# The official bfloat16 path rounds every product
BFLOAT16_ROPE_3D_TOLERANCE = 0.03


def test_rope_3d_matches_the_official_numbers():
    case = load_golden("preview", "kernel_mrope.safetensors")

    def packed(x):  # [B, heads, S, D] to [T, heads, D]
        return x.transpose(1, 2).flatten(0, 1)

    arguments = case["position_ids"].flatten(1), case["inv_freq"], case["mrope_section"].tolist()
    for dtype, suffix, tolerance in (
        (torch.float32, "f64", 2e-6),
        (torch.bfloat16, "bf16", BFLOAT16_ROPE_3D_TOLERANCE),
    ):
        q, k = kk.ops.rope_3d(packed(case["q"]).to(dtype), packed(case["k"]).to(dtype), *arguments)
        for found, name in ((q, "q_out"), (k, "k_out")):
            expected = packed(case[f"{name}_{suffix}"]).double()
            torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0)


def test_rope_2d_matches_the_official_numbers():
    case = load_golden("preview", "kernel_vision_rope.safetensors")
    positions = torch.stack((case["height_position_ids"], case["width_position_ids"]))
    q, k = kk.ops.rope_2d(case["q"], case["k"], positions, case["inv_freq"])
    torch.testing.assert_close(q.double(), case["q_out_f64"], atol=2e-6, rtol=0)
    torch.testing.assert_close(k.double(), case["k_out_f64"], atol=2e-6, rtol=0)
    q, k = kk.ops.rope_2d(case["q"].bfloat16(), case["k"].bfloat16(), positions, case["inv_freq"])
    assert torch.equal(q, case["q_out_bf16"]) and torch.equal(k, case["k_out_bf16"])


def test_varlen_attention_matches_the_official_numbers():
    case = load_golden("preview", "kernel_varlen_attention.safetensors")
    scale = float(case["softmax_scale"])
    arguments = case["q"], case["k"], case["v"], case["cu_seqlens"], 54
    out, lse = kk.ops.varlen_attention(*arguments, softmax_scale=scale, return_lse=True)
    torch.testing.assert_close(out.double(), case["out_f64"], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), case["lse_f64"], atol=1e-5, rtol=0)


def test_projection_matches_the_official_numbers_at_tiny_size():
    features, grid_thw, weights, expected = load_projector_case("tiny")
    out = kk.ops.patch_merge_projection(features, grid_thw, *weights)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_projection_matches_the_official_numbers_at_real_size():
    features, grid_thw, weights, expected = load_projector_case("real")
    out = kk.ops.patch_merge_projection(features, grid_thw, *weights)
    torch.testing.assert_close(out.double(), expected, atol=3e-5, rtol=0)
