"""`rope_3d_to_cache`: the definition, registration, torch.compile, and wrong arguments."""

import pytest
import torch
from torch.library import opcheck

from keye_kernels import ops
from keye_kernels.ops import rope_cache
from tests.helpers.operator_calls import rope_3d_arguments

IMPLEMENTATIONS = ["reference", "triton"]


def arguments(dtype=torch.float32):
    """Two sequences of three tokens, in slots of a cache with five."""
    (q, k, positions, inv_freq, sections), weights = rope_3d_arguments(dtype, tokens=6, norm=True)
    caches = torch.randn(2, 2, 5, 2, 16).to(dtype).unbind(0)
    named = {"q": q, "k": k, "v": torch.randn(6, 2, 16).to(dtype), "position_ids": positions, "inv_freq": inv_freq}
    named |= {"mrope_section": sections, "key_cache": caches[0], "value_cache": caches[1], "slots": torch.tensor([4, 0, 2])}
    return named | weights


def run(function=ops.rope_3d_to_cache, /, **changes):
    """q and both caches after a call."""
    given = {"impl": "reference", **arguments(), **changes}
    given |= {name: given[name].clone() for name in ("key_cache", "value_cache") if isinstance(given[name], torch.Tensor)}
    return function(**given), given["key_cache"], given["value_cache"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_rope_3d_and_two_copies(impl, dtype):
    given = arguments(dtype)
    q, keys, values = run(impl=impl, **given)
    rotation = {name: x for name, x in given.items() if name not in ("v", "key_cache", "value_cache", "slots")}
    q_expected, k = ops.rope_3d(**rotation, impl=impl)
    assert torch.equal(q, q_expected) and q.dtype == dtype
    for found, old, new in ((keys, given["key_cache"], k), (values, given["value_cache"], given["v"])):
        assert torch.equal(found[:, given["slots"]], new.view(2, 3, 2, 16)) and torch.equal(found[:, [1, 3]], old[:, [1, 3]])


def test_float64_needs_the_reference():
    q, keys, _ = run(**arguments(torch.float64))
    assert q.dtype == keys.dtype == torch.float64
    mixed = arguments(torch.float64) | {"q": arguments()["q"]}
    for given in (arguments(torch.float64), mixed):
        with pytest.raises(TypeError, match="impl='triton' of rope_3d_to_cache takes float32"):
            run(impl="triton", **given)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    """The schema declares what is modified."""
    given = arguments()
    tensors = [given.pop(name) for name in ("key_cache", "value_cache", "slots", "q_norm_weight", "k_norm_weight")]
    opcheck(rope_cache._rope_to_cache_op, (*given.values(), *tensors, 1e-6, impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compiled_calls_write_the_caches(impl):
    compiled = torch.compile(ops.rope_3d_to_cache, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for found, expected in zip(run(compiled, impl=impl), run(impl=impl), strict=True):
            assert torch.equal(found, expected)


def test_no_host_values_are_read():
    """Meta tensors have none."""
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments().items()}
    assert ops.rope_3d_to_cache(**meta, impl="reference").shape == (6, 4, 16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("slot", [-1, 5])
def test_slots_that_do_not_exist_raise_on_a_cpu(slot, impl):
    with pytest.raises(ValueError, match=r"slots must be from 0 to 4, got"):
        run(impl=impl, slots=torch.tensor([4, slot, 2]))


CACHE, LONG = torch.zeros(2, 5, 2, 16), torch.zeros(3, dtype=torch.int64)
WRONG = [
    ("v", torch.zeros(6, 3, 16), ValueError, "v must have shape"),
    ("v", torch.zeros(6, 2, 16).half(), TypeError, "v must be float32"),
    ("v", torch.zeros(6, 2, 32)[..., ::2], ValueError, "v must be contiguous along its last axis"),
    ("key_cache", CACHE[:, :, :1], ValueError, "key_cache must have shape"),
    ("key_cache", CACHE.half(), TypeError, "key_cache must be float32"),
    ("key_cache", [CACHE], TypeError, "key_cache must be a tensor"),
    ("key_cache", CACHE[:1], ValueError, r"value_cache must have shape \[1, 5, 2, 16\]"),
    ("value_cache", CACHE[:, :4], ValueError, "value_cache must have shape"),
    ("value_cache", CACHE.bfloat16(), TypeError, "value_cache must be float32"),
    ("slots", LONG.int(), TypeError, "slots must be int64"),
    ("slots", torch.arange(4), ValueError, "q must have the tokens of 2 sequences of key_cache x 4 slots, got 6 tokens"),
    ("slots", LONG[:, None], ValueError, "slots must have shape"),
    ("slots", None, TypeError, "slots must be a tensor"),
    ("q_norm_weight", None, ValueError, "q_norm_weight must be given"),
    ("k_norm_weight", torch.ones(8), ValueError, "k_norm_weight must have shape"),
    ("mrope_section", [1, 1, 1], ValueError, "mrope_section must be three numbers"),
    ("eps", -1.0, ValueError, "eps must be"),
    ("impl", "torch", ValueError, "impl must be one of 'auto', 'reference', 'triton'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_raise(name, value, error, message):
    with pytest.raises(error, match=message):
        run(**{name: value})


@pytest.mark.parametrize("name", ["key_cache", "value_cache"])
def test_caches_must_be_contiguous(name):
    given = arguments()
    given[name] = torch.zeros(2, 2, 5, 16).transpose(1, 2)
    with pytest.raises(ValueError, match=f"{name} must be contiguous, got strides"):
        ops.rope_3d_to_cache(**given)


@pytest.mark.parametrize("name", ["q", "k", "v", "key_cache", "value_cache", "q_norm_weight", "k_norm_weight"])
def test_gradients_are_refused(name):
    given = arguments()
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient: rope_3d_to_cache has none"):
        ops.rope_3d_to_cache(**given)
    with torch.no_grad():
        assert ops.rope_3d_to_cache(**given).shape == given["q"].shape
