"""`cache_attention`: the definition, registration, torch.compile, and wrong arguments."""

from importlib import import_module

import pytest
import torch
from torch.library import opcheck

from keye_kernels import ops
from keye_kernels.ops import cache_attention as module_function

module = import_module("keye_kernels.ops.cache_attention")  # the package has a function of the same name
IMPLEMENTATIONS = ["reference", "triton"]


def arguments(dtype=torch.float32):
    """Two sequences of three new tokens, in the last used slots of a cache with seven."""
    torch.manual_seed(0)
    caches = torch.randn(2, 2, 7, 2, 16).to(dtype).unbind(0)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :2] = False
    q = torch.randn(6, 4, 16).to(dtype)
    return {"q": q, "key_cache": caches[0], "value_cache": caches[1], "valid": valid, "slots": torch.tensor([3, 4, 5])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_is_causal_attention_of_each_sequence(impl, dtype):
    given = arguments(dtype)
    found = module_function(**given, impl=impl)
    assert found.dtype == dtype and found.shape == (6, 4, 16)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for sequence in range(2):
        for token, slot in enumerate(given["slots"].tolist()):
            seen = torch.arange(slot + 1)[given["valid"][sequence, : slot + 1]]
            for head in range(4):
                keys, values = (given[name][sequence, seen, head // 2].float() for name in ("key_cache", "value_cache"))
                q = given["q"][3 * sequence + token, head].float()
                expected = (keys @ q * 16**-0.5).softmax(0) @ values
                torch.testing.assert_close(found[3 * sequence + token, head].float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_scale(impl):
    given = arguments()
    doubled = given | {"q": given["q"] * 2}
    torch.testing.assert_close(module_function(**given, softmax_scale=0.5, impl=impl), module_function(**doubled, impl=impl))


def test_float64_needs_the_reference():
    given = arguments(torch.float64)
    assert module_function(**given, impl="reference").dtype == torch.float64
    with pytest.raises(TypeError, match="impl='triton' of cache_attention takes float32"):
        module_function(**given, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck_and_compile(impl):
    given = arguments()
    opcheck(module._cache_attention_op, (*given.values(), 0.25, impl))
    compiled = torch.compile(module_function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(**given, impl=impl), module_function(**given, impl=impl))


def test_no_host_values_are_read():
    meta = {name: x.to("meta") for name, x in arguments().items()}
    assert module_function(**meta, impl="reference").shape == (6, 4, 16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("slot", [-1, 7])
def test_slots_that_do_not_exist_raise_on_a_cpu(slot, impl):
    with pytest.raises(ValueError, match=r"slots must be from 0 to 6, got"):
        module_function(**arguments() | {"slots": torch.tensor([3, 4, slot])}, impl=impl)


CACHE = torch.zeros(2, 7, 2, 16)
WRONG = [
    ("q", torch.zeros(6, 4, 12), ValueError, "q must have a head dim that is a multiple of 8 up to 256, got 12"),
    ("q", torch.zeros(6, 0, 16), ValueError, "key_cache must have a number of heads that divides the 0 of q, got 2"),
    ("q", torch.zeros(6, 3, 16), ValueError, "divides the 3 of q, got 2"),
    ("q", torch.zeros(5, 4, 16), ValueError, "q must have the tokens of 2 sequences of key_cache x 3 slots, got 5 tokens"),
    ("key_cache", CACHE.half(), TypeError, "key_cache must be float32"),
    ("key_cache", CACHE[0], ValueError, "key_cache must have shape"),
    ("key_cache", CACHE[:, :6], ValueError, r"value_cache must have shape \[2, 6, 2, 16\]"),
    ("value_cache", CACHE.bfloat16(), TypeError, "value_cache must be float32"),
    ("valid", torch.ones(2, 7), TypeError, "valid must be bool"),
    ("valid", torch.ones(2, 6).bool(), ValueError, "valid must have shape"),
    ("slots", torch.arange(3).int(), TypeError, "slots must be int64"),
    ("softmax_scale", "1", TypeError, "softmax_scale"),
    ("impl", "torch", ValueError, "impl must be one of 'auto', 'reference', 'triton'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), WRONG, ids=[message for *_, message in WRONG])
def test_wrong_arguments_raise(name, value, error, message):
    with pytest.raises(error, match=message):
        module_function(**{**arguments(), name: value})


@pytest.mark.parametrize("name", ["key_cache", "value_cache", "valid"])
def test_what_the_kernel_reads_must_be_contiguous(name):
    given = arguments()
    given[name] = torch.stack([given[name]] * 2, dim=-1)[..., 0]
    with pytest.raises(ValueError, match=f"{name} must be contiguous, got strides"):
        module_function(**given)


@pytest.mark.parametrize("name", ["q", "key_cache", "value_cache"])
def test_gradients_are_refused(name):
    given = arguments()
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient: cache_attention has none"):
        module_function(**given)
    with torch.no_grad():
        assert module_function(**given).shape == (6, 4, 16)


def test_the_public_name():
    assert ops.cache_attention is module_function
