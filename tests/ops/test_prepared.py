"""Prepared calls: a call with known metadata skips the checks, and everything else takes the general path.

They are for GPUs. These tests allow them on a CPU, where the kernels run in Triton's interpreter.
"""

from importlib import import_module

import pytest
import torch

from keye_kernels import ops
from keye_kernels.geometry import VisionBatch
from keye_kernels.ops import prepared
from keye_kernels.segments import Segments
from keye_kernels.triton import launch_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def prepare_on_cpu(monkeypatch):
    monkeypatch.setattr(prepared, "DEVICE_TYPES", ("cuda", "cpu"))
    prepared.PREPARED.clear()
    yield
    prepared.PREPARED.clear()


@pytest.fixture
def checked(monkeypatch):
    """The operators whose arguments were checked."""
    names = []
    files = (
        "cache_attention", "elementwise", "linear_few_rows", "patch_merge", "position_embedding_2d", "rope", "rope_cache",
        "varlen_attention",
    )  # fmt: skip
    for module in map(import_module, (f"keye_kernels.ops.{name}" for name in files)):
        check = module.check_impl
        monkeypatch.setattr(module, "check_impl", lambda impl, name, check=check: names.append(name) or check(impl, name))
    return names


def heads(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rotate_2d(seed=0, tokens=6, impl="triton", x=None, positions=torch.int32):
    q = heads(tokens, 2, 16, seed=seed) if x is None else x
    ids = torch.arange(2 * len(q)).view(2, -1).to(positions) + seed
    return q, ids, ops.rope_2d(q, q, ids, torch.linspace(1, 0.1, 4) + seed, impl=impl)


def rotate_3d(seed=0, sections=(2, 2, 4), eps=1e-6, norm=True, impl="triton"):
    q, k = heads(6, 4, 16, seed=seed), heads(6, 2, 16, seed=seed + 1)
    ids = torch.arange(18).view(3, 6) + seed
    weights = {"q_norm_weight": heads(16, seed=seed), "k_norm_weight": heads(16, seed=seed)} if norm else {}
    return ops.rope_3d(q, k, ids, torch.linspace(1, 0.1, 8), list(sections), **weights, eps=eps, impl=impl)


def attend(seed=0, lengths=(3, 5), causal=False, scale=None, lse=False, impl="triton", raw=False, segments=None):
    q, k, v = (heads(sum(lengths), 2, 16, seed=seed + i) for i in range(3))
    segments = segments or Segments.from_lengths(lengths, CPU)
    where = (segments.cu_seqlens, segments.max_seqlen) if raw else (segments,)
    out = ops.varlen_attention(q, k, v, *where, causal=causal, softmax_scale=scale, return_lse=lse, impl=impl)
    return out if lse else (out,)


def add_norm(seed=0, eps=1e-6, impl="triton", **_):
    x, residual, weights = heads(5, 24, seed=seed), heads(5, 24, seed=seed + 1), heads(2, 24, seed=seed + 2)
    return ops.add_norm(x, residual, *weights.unbind(0), eps=eps, impl=impl)


def silu_mul(seed=0, impl="triton", **_):
    return (ops.silu_mul(heads(5, 24, seed=seed), heads(5, 24, seed=seed + 1), impl=impl),)


def few_rows(seed=0, silu_mul=False, residual=True, impl="triton", **_):
    x, weight, bias = heads(3, 24, seed=seed), heads(10, 24, seed=seed + 1), heads(10, seed=seed + 2)
    added = heads(3, 5 if silu_mul else 10, seed=seed + 3) if residual else None
    return (ops.linear_few_rows(x, weight, bias, residual=added, silu_mul=silu_mul, impl=impl),)


def rotate_to_cache(seed=0, cache_slots=5, slots=(4, 0, 2), sections=(2, 2, 4), impl="triton", **options):
    q, k, v = (heads(6, count, 16, seed=seed + i) for i, count in enumerate((4, 2, 2)))
    caches = [torch.zeros(2, cache_slots, 2, 16) for _ in range(2)]
    options |= {name: heads(16, seed=seed) for name in ("q_norm_weight", "k_norm_weight")}
    rotation = torch.arange(18).view(3, 6) + seed, torch.linspace(1, 0.1, 8), list(sections)
    return ops.rope_3d_to_cache(q, k, v, *rotation, *caches, torch.tensor(slots), **options, impl=impl), *caches


GRID = torch.tensor([(1, 4, 6)])


def add_positions(seed=0, side=5, impl="triton", **_):
    batch = VisionBatch.build(GRID, 24, table_side=side)
    return (ops.position_embedding_2d(heads(24, 16, seed=seed), heads(side**2, 16, seed=seed + 1), batch, impl=impl),)


def project(seed=0, eps=1e-5, order="raster", impl="triton", **_):
    batch = VisionBatch.build(GRID, 24, table_side=5, order=order)
    shapes = (16,), (16,), (32, 64), (32,), (24, 32), (24,)
    weights = [heads(*shape, seed=seed + number) for number, shape in enumerate(shapes)]
    return (ops.patch_merge_projection(heads(24, 16, seed=seed), batch, *weights, eps=eps, impl=impl),)


def attend_to_cache(seed=0, slots=(2, 3), scale=None, impl="triton", **_):
    caches = [heads(2, 5, 2, 16, seed=seed + i) for i in range(2)]
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 0] = seed > 0
    where = torch.tensor(slots)
    return (ops.cache_attention(heads(4, 4, 16, seed=seed), *caches, valid, where, softmax_scale=scale, impl=impl),)


CALLS = {
    "cache_attention": attend_to_cache,
    "patch_merge_projection": project,
    "position_embedding_2d": add_positions,
    "add_norm": add_norm,
    "silu_mul": silu_mul,
    "linear_few_rows": few_rows,
    "rope_2d": lambda **options: rotate_2d(**options)[2],
    "rope_3d": rotate_3d,
    "rope_3d_to_cache": rotate_to_cache,
    "varlen_attention": attend,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_skips_the_checks_and_computes_with_the_new_values(name, checked):
    segments = {"segments": Segments.from_lengths((3, 5), CPU)} if name == "varlen_attention" else {}
    with torch.no_grad():
        CALLS[name](seed=0, **segments)
        assert checked == [name]
        found = CALLS[name](seed=7, **segments)
        assert checked == [name]
        expected = CALLS[name](seed=7, impl="reference", **segments)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_results_of_repeated_calls_are_new_tensors():
    segments = Segments.from_lengths((3, 5), CPU)
    with torch.no_grad():
        for call in (lambda: attend(segments=segments, lse=True), rotate_2d_outputs, add_norm, silu_mul, few_rows):
            first, second = call(), call()
            assert {x.data_ptr() for x in first}.isdisjoint(x.data_ptr() for x in second)


def rotate_2d_outputs():
    return rotate_2d()[2]


@pytest.mark.parametrize(
    "change",
    [
        dict(tokens=7), dict(positions=torch.int64), dict(x=heads(6, 3, 16)), dict(x=heads(6, 4, 16)[:, ::2]),
        dict(x=heads(6, 2, 32)[..., :16]), dict(x=heads(6, 2, 16, dtype=torch.float16)),
    ],
    ids=["tokens", "positions", "heads", "head stride", "token stride", "dtype"],
)  # fmt: skip
def test_other_metadata_is_another_call(change, checked):
    with torch.no_grad():
        rotate_2d()
        q, ids, found = rotate_2d(**change)
        expected = ops.rope_2d(q, q, ids, torch.linspace(1, 0.1, 4), impl="reference")
    assert checked.count("rope_2d") == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change", [dict(sections=(4, 2, 2)), dict(eps=0.5), dict(norm=False)], ids=["sections", "eps", "no norm"]
)  # fmt: skip
def test_options_of_rope_are_part_of_the_call(change):
    with torch.no_grad():
        rotate_3d()
        for one, other in zip(rotate_3d(**change), rotate_3d(**change, impl="reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [dict(slots=(1, 2, 3)), dict(cache_slots=7), dict(eps=0.5), dict(sections=(4, 2, 2))], ids=lambda x: next(iter(x))
)
def test_slots_caches_and_options_of_a_repeated_call_are_used(change):
    with torch.no_grad():
        rotate_to_cache()
        for one, other in zip(rotate_to_cache(**change), rotate_to_cache(**change, impl="reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_more_heads_with_the_same_strides_are_another_call():
    wide = heads(6, 4, 16)
    with torch.no_grad():
        for count in (2, 3):
            q, ids, found = rotate_2d(x=wide[:, :count])
        expected = ops.rope_2d(q, q, ids, torch.linspace(1, 0.1, 4), impl="reference")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_eps_of_add_norm_is_part_of_the_call():
    with torch.no_grad():
        add_norm()
        for one, other in zip(add_norm(eps=1.0), add_norm(eps=1.0, impl="reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [dict(scale=0.5), dict(slots=(0, 4))], ids=["scale", "slots"])
def test_scale_and_slots_of_attention_to_the_cache_are_used(change):
    with torch.no_grad():
        attend_to_cache()
        torch.testing.assert_close(attend_to_cache(**change), attend_to_cache(**change, impl="reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [dict(eps=1.0), dict(order="block")], ids=["eps", "order"])
def test_options_of_the_projector_are_part_of_the_call(change):
    with torch.no_grad():
        project()
        for _ in range(2):
            torch.testing.assert_close(project(**change), project(**change, impl="reference"), rtol=1e-5, atol=5e-5)


def test_autocast_of_the_projector_takes_the_general_path(checked):
    with torch.no_grad():
        project()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            project()
    assert len(checked) == 2


def test_a_geometry_for_another_table_or_batch_raises_after_a_prepared_call():
    features, table = heads(24, 16), heads(25, 16)
    weights = [heads(*shape) for shape in ((16,), (16,), (32, 64), (32,), (24, 32), (24,))]
    batch = VisionBatch.build(GRID, 24, table_side=5)
    with torch.no_grad():
        ops.position_embedding_2d(features, table, batch, impl="triton")
        ops.patch_merge_projection(features, batch, *weights, impl="triton")
        with pytest.raises(ValueError, match="table must have 36 rows"):
            ops.position_embedding_2d(features, table, VisionBatch.build(GRID, 24, table_side=6), impl="triton")
        other = VisionBatch.build(torch.tensor([(1, 4, 8)]), 32, table_side=5)
        with pytest.raises(ValueError, match="describes 32 patches"):
            ops.position_embedding_2d(features, table, other, impl="triton")
        with pytest.raises(ValueError, match="describes 32 patches"):
            ops.patch_merge_projection(features, other, *weights, impl="triton")
        with pytest.raises(ValueError, match="linear_1_weight must have shape"):
            ops.patch_merge_projection(features, batch, *weights, merge_size=1, impl="triton")


@pytest.mark.parametrize(
    "change",
    [dict(causal=True), dict(scale=0.5), dict(scale=-0.5), dict(lse=True), dict(lengths=(5, 3)), dict(raw=True)],
    ids=["causal", "scale", "negative scale", "lse", "other segments of the same total", "offsets"],
)  # fmt: skip
def test_options_and_segments_of_attention_are_part_of_the_call(change):
    if "lengths" not in change:  # one object, which keeps the prepared calls
        change = {"segments": Segments.from_lengths((3, 5), CPU), **change}
    with torch.no_grad():
        attend(segments=change.get("segments"))
        for one, other in zip(attend(**change), attend(**change, impl="reference"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_offsets_in_a_tensor_are_read_in_every_call():
    with torch.no_grad():
        attend(raw=True)
        torch.testing.assert_close(attend(raw=True, lengths=(5, 3)), attend(raw=True, lengths=(5, 3), impl="reference"))


def test_segments_that_leave_tokens_out_are_another_call():
    """Rows of no segment are 0 then."""
    q = heads(8, 2, 16)
    offsets = torch.tensor([0, 5], dtype=torch.int32)
    with torch.no_grad():
        ops.varlen_attention(q, q, q, Segments(torch.tensor([0, 8], dtype=torch.int32), 8), impl="triton")
        for segments in (Segments(offsets, 8, covers_all_tokens=False), Segments(torch.tensor([0, 8], dtype=torch.int32), 8)):
            out = ops.varlen_attention(q, q, q, segments, impl="triton")
            assert out[5:].any() == segments.covers_all_tokens
        assert len(prepared.PREPARED) == 2


def test_gradients_take_the_general_path():
    with torch.no_grad():
        rotate_2d()
    x = heads(6, 2, 16).requires_grad_()
    rotate_2d(x=x)[2][0].sum().backward()
    assert x.grad is not None
    # Without inputs that require gradients, gradients may be enabled
    assert rotate_2d()[2][0].requires_grad is False


def test_forward_mode_still_raises():
    rotate_2d()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(heads(6, 2, 16), torch.ones(6, 2, 16))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            rotate_2d(x=x)


def test_modes_and_subclasses_take_the_general_path(checked):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with torch.no_grad():
        rotate_2d()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(heads(6, 2, 16))
            outputs = ops.rope_2d(fake, fake, torch.zeros(2, 6, dtype=torch.int32), torch.ones(4), impl="triton")
        assert all(isinstance(x, FakeTensor) for x in outputs)
    assert len(checked) == 2


def test_the_implementation_is_part_of_the_call(checked, monkeypatch):
    with torch.no_grad():
        with ops.use_impl("triton"):
            rotate_2d(impl="auto")
            rotate_2d(impl="auto")
        assert len(checked) == 1
        rotate_2d(impl="auto")
        monkeypatch.setenv("KEYE_KERNELS_IMPL", "reference")
        rotate_2d(impl="auto")
        assert len(checked) == 3, "the reference is never prepared"
        with pytest.raises(ValueError, match="impl must be one of"):
            rotate_2d(impl="flash_attn")


def test_other_launch_configs_are_used_after_clear_cache(checked):
    with torch.no_grad():
        rotate_2d()
        launch_config.clear_cache()
        rotate_2d()
    assert len(checked) == 2


def test_wrong_arguments_raise_after_a_prepared_call():
    with torch.no_grad():
        rotate_3d()
        with pytest.raises(ValueError, match="mrope_section must be three numbers"):
            rotate_3d(sections=(2, 2, 3))
        with pytest.raises(TypeError, match="mrope_section must be a list of three integers"):
            rotate_3d(sections=([2], 2, 4))
        with pytest.raises(ValueError, match="eps"):
            rotate_3d(eps=-1.0)
        attend()
        with pytest.raises(TypeError, match="cu_seqlens must be a tensor"):
            ops.varlen_attention(*[heads(8, 2, 16)] * 3, [0, 8], 8, impl="triton")


def test_the_number_of_prepared_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(prepared, "MAX_PREPARED_CALLS", 3)
    with torch.no_grad():
        for tokens in range(1, 9):
            rotate_2d(tokens=tokens)
            assert len(prepared.PREPARED) <= 3


def test_segments_without_lengths_share_prepared_calls(checked):
    """Their calls depend on metadata only: every layer of a patched model makes its own object."""
    q, k, v = (heads(8, 2, 16, seed=i) for i in range(3))
    for offsets, lengths in (([0, 3, 8], (3, 5)), ([0, 5, 8], (5, 3))):
        segments = Segments(torch.tensor(offsets, dtype=torch.int32), 8)
        expected = ops.varlen_attention(q, k, v, Segments.from_lengths(lengths, CPU), impl="reference")
        torch.testing.assert_close(ops.varlen_attention(q, k, v, segments, impl="triton"), expected, atol=1e-5, rtol=1e-5)
        assert not segments.prepared_calls
    assert checked == ["varlen_attention"] * 3, "one of the calls with the kernel is checked"
    ops.varlen_attention(q, k, v, segments.cu_seqlens, 8, impl="triton")
    assert len(checked) == 4, "plain offsets may leave out tokens, whose output must be 0"
