"""Attention by other libraries, with stubs in their place: what they are called with, and which calls they cannot run."""

import sys
from types import SimpleNamespace

import pytest
import torch

from keye_kernels.ops import attention_libraries as module
from keye_kernels.ops.attention_libraries import flash_attn_attention, torch_attention, why_not_flash
from keye_kernels.reference.varlen_attention import varlen_attention as reference
from tests.helpers.packed import offsets, packed


class OnGpu(torch.Tensor):
    device = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch):
    """Stubs of flash-attn and of torch's FlashAttention that compute the reference and leave other rows uninitialized (NaN)."""
    made = []

    def run(q, k, v, cu_q, cu_k, longest_q, longest_k, causal, scale):
        made.append((cu_q.tolist(), cu_k.tolist(), longest_q, longest_k, causal, scale))
        assert cu_q.is_contiguous() and cu_k.is_contiguous()
        out, lse = reference(q.float(), k.float(), v.float(), cu_q, scale, causal, True)
        out, token = out.to(q.dtype), torch.arange(len(q))
        outside = (token < cu_q[0]) | (token >= cu_q[-1])
        out[outside], lse[:, outside] = torch.nan, torch.nan
        return out.transpose(0, 1).contiguous().transpose(0, 1), lse

    def flash_attn(q, k, v, *segments, softmax_scale, causal, return_attn_probs):
        assert return_attn_probs
        return *run(q, k, v, *segments, causal, softmax_scale), None

    def torch_flash(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        assert (dropout, debug) == (0.0, False)
        return *run(q, k, v, cu_q, cu_k, longest_q, longest_k, causal, scale), None, None, None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn))
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", torch_flash)
    monkeypatch.setattr(module, "why_not_flash", lambda *_: None)
    return made


@pytest.mark.parametrize("run", [torch_attention, flash_attn_attention])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("return_lse", [False, True])
def test_a_library_gets_the_call_and_its_gaps_are_filled(run, causal, return_lse, calls):
    q, k, v, _ = packed([40, 30], heads=4, key_heads=2, extra=7)
    for cu_seqlens, covers in (([3, 40, 70], False), ([0, 40, 77], True)):
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
        out, lse = run(q, k, v, cu_seqlens, 40, 0.3, causal, return_lse, covers)
        assert calls.pop() == (cu_seqlens.tolist(), cu_seqlens.tolist(), 40, 40, causal, 0.3) and not calls
        expected, expected_lse = reference(q.float(), k.float(), v.float(), cu_seqlens, 0.3, causal, return_lse)
        assert out.is_contiguous() and torch.equal(out, expected.half())
        assert lse.shape == expected_lse.shape and torch.equal(lse, expected_lse)


def test_torch_gets_contiguous_offsets(calls):
    q, k, v, cu_seqlens = packed([40, 30])
    strided = torch.stack((cu_seqlens, cu_seqlens), dim=1)[:, 0]
    torch_attention(q, k, v, strided, 40, 0.3, False, False, True)
    assert calls[0][0] == [0, 40, 70]


def test_flash_attn_that_cannot_be_imported_says_how_to_install_it(monkeypatch):
    q, k, v, cu_seqlens = packed([40])
    monkeypatch.setattr(module, "why_not_flash", lambda *_: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"cannot import flash-attn \(ModuleNotFoundError: .*pip install flash-attn"):
        flash_attn_attention(q, k, v, cu_seqlens, 40, 0.3, False, False, True)


@pytest.mark.parametrize("run", [torch_attention, flash_attn_attention])
def test_a_call_that_a_library_cannot_run_is_refused(run):
    q, k, v, cu_seqlens = packed([40])
    name = "torch" if run is torch_attention else "flash_attn"
    with pytest.raises(ValueError, match=f"impl='{name}' cannot run this varlen_attention: it needs float16 or bfloat16"):
        run(q, k, v, cu_seqlens, 40, 0.3, False, False, True)


def on_gpu(tokens=8, heads=2, head_dim=72, dtype=torch.float16):
    return torch.zeros(tokens, heads, head_dim, dtype=dtype).as_subclass(OnGpu)


@pytest.mark.parametrize("position", range(3), ids=["q", "k", "v"])
def test_each_of_q_k_and_v_must_be_aligned(position):
    cu = offsets([8])
    views = {
        "aligned": (on_gpu(head_dim=80)[..., 8:], None),
        "address": (on_gpu(head_dim=80)[..., 4:76], "aligned to 16 bytes"),
        "head stride": (on_gpu(head_dim=76)[..., :72], "strides"),
        "token stride": (
            torch.zeros(8 * 148, dtype=torch.float16).as_subclass(OnGpu).as_strided((8, 2, 72), (148, 72, 1)),
            "strides",
        ),
    }
    for name, (view, reason) in views.items():
        tensors = [on_gpu() for _ in range(3)]
        tensors[position] = view
        found = why_not_flash(*tensors, cu, 8, 0.1)
        assert found is None if reason is None else reason in found, name


def test_boundaries_of_a_call_that_flash_attention_can_run():
    q, cu = on_gpu(), offsets([8])
    assert why_not_flash(q, q, q, cu, 2, 1e-9) is None
    assert "at least 2, got 1" in why_not_flash(q, q, q, cu, 1, 0.1)
    assert "positive softmax_scale, got 0" in why_not_flash(q, q, q, cu, 2, 0)
    assert "at least one segment" in why_not_flash(q, q, q, cu[:1], 8, 0.1)
    for dtype in (torch.float32, torch.float64):
        assert "float16 or bfloat16" in why_not_flash(on_gpu(dtype=dtype), q, q, cu, 8, 0.1)
    on_cpu = torch.zeros(8, 2, 72, dtype=torch.float16)
    assert "got torch.float16 on cpu" in why_not_flash(on_cpu, on_cpu, on_cpu, cu, 8, 0.1)
