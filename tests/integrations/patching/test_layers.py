"""The layers for the Hub's `kernels` package: its requirements, their outputs, and the example."""

import inspect

import pytest
import torch
from torch import nn

from keye_kernels import layers, ops

FLOAT32 = {"atol": 1e-5, "rtol": 1e-5}
LAYERS = pytest.mark.parametrize("name", layers.__all__)


@LAYERS
def test_layers_have_no_constructor_and_one_method(name):
    layer = getattr(layers, name)
    assert issubclass(layer, nn.Module) and layer.__init__ is nn.Module.__init__
    members = {member for member, _ in inspect.getmembers(layer)} - {m for m, _ in inspect.getmembers(nn.Module)}
    assert members == {"has_backward", "can_torch_compile"}


def test_rope_and_attention_layers_equal_the_operators():
    q, k, v = torch.randn(3, 10, 2, 16).unbind(0)
    ids_2d, ids_3d, cu_seqlens = (
        torch.randint(0, 9, (2, 10)),
        torch.randint(0, 9, (3, 10)),
        torch.tensor([0, 4, 10]).int(),
    )
    inv_freq, sections = torch.rand(8), [2, 3, 3]
    found = layers.KeyeRope2D()(q, k, ids_2d, inv_freq[:4]), layers.KeyeRope3D()(q, k, ids_3d, inv_freq, sections)
    expected = ops.rope_2d(q, k, ids_2d, inv_freq[:4]), ops.rope_3d(q, k, ids_3d, inv_freq, sections)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    attended = layers.KeyeVarlenAttention()(q, k, v, cu_seqlens, 6)
    torch.testing.assert_close(attended, ops.varlen_attention(q, k, v, cu_seqlens, 6), rtol=0, atol=0)


@pytest.mark.parametrize("norm_width", [8, 32], ids=["norm-before-merge", "norm-after-merge"])
def test_projector_layer_uses_the_weights_of_the_module(norm_width):
    module = nn.Module()
    module.pre_norm, module.linear_1, module.linear_2 = nn.LayerNorm(norm_width), nn.Linear(32, 32), nn.Linear(32, 6)
    features, grids = torch.randn(16 + 12, 8), torch.tensor([[1, 4, 4], [1, 2, 6]])
    found = layers.KeyeProjector.forward(module, features, grids)
    images = (features[:16].view(2, 2, 2, 2, 8), features[16:].view(1, 2, 3, 2, 8))
    blocks = [image.transpose(1, 2) for image in images]
    rows = torch.cat([block.reshape(-1, norm_width) for block in blocks])
    expected = module.linear_2(nn.functional.gelu(module.linear_1(module.pre_norm(rows).view(-1, 32))))
    torch.testing.assert_close(found, expected, **FLOAT32)


@pytest.mark.parametrize("name", [name for name in layers.__all__ if getattr(layers, name).can_torch_compile])
def test_layers_with_can_torch_compile_compile_into_one_graph(name):
    module, forward = nn.Module(), getattr(layers, name).forward
    module.ln_q = module.norm = nn.LayerNorm(8)
    module.mlp = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 6))
    module.linear_fc1, module.linear_fc2 = module.mlp[0], module.mlp[2]
    q, position_ids, inv_freq = torch.randn(8, 2, 16), torch.randint(0, 9, (3, 8)), torch.rand(8)
    arguments = {
        "KeyeRope2D": (q, q, position_ids[:2], inv_freq[:4]),
        "KeyeRope3D": (q, q, position_ids, inv_freq, [2, 3, 3]),
        "KeyeVarlenAttention": (q, q, q, torch.tensor([0, 3, 8]).int(), 5),
        "Qwen2VLPatchMerger": (torch.randn(8, 8),),
        "Qwen3VLPatchMerger": (torch.randn(8, 8),),
    }[name]
    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(module, *arguments), forward(module, *arguments), **FLOAT32)


def test_example_replaces_the_forward(capsys):
    pytest.importorskip("kernels")
    from examples import hub_layers

    hub_layers.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the forward of Projector is now KeyeProjector.forward"
    assert float(lines[1].rpartition(" ")[2]) < 1e-5
