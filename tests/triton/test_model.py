"""The whole model with the kernels in the interpreter: golden tokens, autograd, operator registration, torch.compile."""

import pytest
import torch
from torch.library import opcheck

import keye_kernels as kk
from examples.train_small import world
from examples.train_small.evaluate import answer, evaluation_samples
from keye_kernels import segments
from tests.helpers.golden import LOGITS_TOLERANCE, golden, load_case
from tests.helpers.tiny import prompt, tiny_model

IMPLEMENTATIONS = ("reference", "triton")


@pytest.mark.parametrize(
    ("edition", "name"),
    [("preview", "c_batch_left_pad"), ("preview", "d3_two_videos"), ("v1_5", "two_images")],
)
def test_kernels_give_the_golden_tokens(edition, name):
    inputs, outputs = load_case(edition, name)
    tokens = outputs["generated"][:, : 4 if edition == "preview" else 3]
    model = kk.Keye.from_pretrained(golden(edition), dtype=torch.float32, impl="triton")
    with torch.no_grad():
        output = model(**inputs)
        mask = inputs["attention_mask"].bool()
        torch.testing.assert_close(output.logits[mask], outputs["logits"][mask], atol=LOGITS_TOLERANCE[edition], rtol=0)
        for token in tokens.unbind(1):
            assert torch.equal(output.logits[:, -1].argmax(-1), token)
            output = model(token[:, None], cache=output.cache)


def operators():
    """(name, op, arguments, keyword arguments) in float32, sizes small enough for the interpreter."""
    torch.manual_seed(0)
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    positions, inv_freq = torch.randint(0, 50, (3, 9)), 1e4 ** -(torch.arange(8) / 8)
    norm = {"q_norm_weight": torch.rand(16) + 0.5, "k_norm_weight": torch.rand(16) + 0.5}
    yield "rope_3d", kk.ops.rope_3d, (q, k, positions, inv_freq, [2, 3, 3]), {}
    yield "rope_3d-norm", kk.ops.rope_3d, (q, k, positions, inv_freq, [2, 3, 3]), norm
    yield "rope_2d", kk.ops.rope_2d, (q, k, positions[:2], inv_freq[:4]), {}
    qkv, cu_seqlens = torch.randn(11, 3, 2, 24).unbind(1), torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    yield "attention", kk.ops.varlen_attention, (*qkv, cu_seqlens, 7), {}
    yield "attention-causal", kk.ops.varlen_attention, (*qkv, cu_seqlens, 7), {"causal": True, "return_lse": True}
    shared = segments.Segments.from_lengths([4, 0, 7], qkv[0].device)
    yield "attention-segments", kk.ops.varlen_attention, (*qkv, shared, 7), {"return_lse": True}
    grid = torch.tensor([[1, 4, 2], [2, 2, 2]])
    features, table = torch.randn(16, 16), torch.randn(9, 16)
    for name, norm_size in (("before", 16), ("after", 64)):
        sizes = (norm_size,), (norm_size,), (32, 64), (32,), (16, 32), (16,)
        weights = [torch.randn(size) for size in sizes]
        yield f"projection-{name}", kk.ops.patch_merge_projection, (features, grid, *weights), {}
    yield "positions", kk.ops.position_embedding_2d, (features, table, grid), {}


OPERATORS = list(operators())
IDS = [case[0] for case in OPERATORS]


def with_gradients(values):
    return [x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in values]


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), OPERATORS, ids=IDS)
def test_values_and_gradients_equal_the_reference(name, op, arguments, keywords):
    results = []
    for impl in ("reference", "triton"):
        leaves = with_gradients(arguments)
        named = dict(zip(keywords, with_gradients(keywords.values()), strict=True))
        if "rope" in name:
            leaves[3] = arguments[3]  # frequencies have no gradient
        outputs = op(*leaves, **named, impl=impl)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [x for x in (*leaves, *named.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
        generator = torch.Generator().manual_seed(1)
        loss = sum((torch.randn(o.shape, generator=generator) * o).sum() for o in outputs)
        results.append([*(o.detach() for o in outputs), *torch.autograd.grad(loss, wanted)])
    assert len(results[0]) > 2
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("name", "op", "arguments", "keywords"), OPERATORS, ids=IDS)
def test_opcheck_with_the_kernels(name, op, arguments, keywords, monkeypatch):
    calls = []
    module = __import__(op.__module__, fromlist=["_"])
    for attribute in [a for a in vars(module) if a.endswith("_op") and not a.startswith("_norm")]:
        registered = getattr(module, attribute)
        monkeypatch.setattr(module, attribute, lambda *args, r=registered: calls.append((r, args)) or r(*args))
    op(*arguments, **keywords, impl="triton")
    ((registered, args),) = calls
    frozen = {id(arguments[3])} if "rope" in name else set()
    frozen |= {id(a) for a in args if isinstance(a, torch.Tensor) and name == "positions" and a.shape[-1] == 4}
    for dtype in (torch.float32, torch.float16):
        cast = [
            a.to(dtype).requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and id(a) not in frozen else a
            for a in args
        ]
        opcheck(registered, cast, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compiles_at_two_sizes_without_recompiling():
    from torch._dynamo.testing import CompileCounterWithBackend

    def layer(qkv, position_ids, inv_freq, cu_seqlens, max_seqlen):
        q, k, v = qkv.unbind(1)
        q, k = kk.ops.rope_2d(q, k, position_ids, inv_freq, impl="triton")
        return kk.ops.varlen_attention(q, k, v, cu_seqlens, max_seqlen, impl="triton")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (12, 20):
        qkv, positions = torch.randn(tokens, 3, 2, 24), torch.randint(0, 9, (2, tokens))
        torch._dynamo.mark_dynamic(qkv, 0)
        torch._dynamo.mark_dynamic(positions, 1)
        arguments = qkv, positions, torch.rand(6), torch.tensor([0, 5, tokens], dtype=torch.int32), 32
        torch.testing.assert_close(compiled(*arguments), layer(*arguments))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_vision_tower_builds_its_schedule_once(monkeypatch, mode):
    """The layers share the batch's segments. A schedule per layer would make the GPU wait for the host 27 times."""
    lengths, build = [], segments.tile_schedule

    def count(cu_seqlens, *options):
        lengths.append(cu_seqlens.diff().tolist())
        return build(cu_seqlens, *options)

    monkeypatch.setattr(segments, "tile_schedule", count)
    model = tiny_model()
    assert len(model.visual.layers) == 2
    with mode(), kk.use_impl("triton"):
        for _ in range(2):
            model(**prompt([(1, 4, 2), (2, 2, 2)]))
    assert lengths == [[8, 8]] * 2  # one per forward


def test_the_small_model_gives_the_answers_of_the_reference():
    samples = [sample for sample in evaluation_samples("image", 2) if sample[2] == world.COUNT]
    questions = [(part, question) for _, part, question, _ in samples]
    answers = [answer(kk.small_model(dtype="float32", impl=impl), kk.small_processor(), questions) for impl in IMPLEMENTATIONS]
    assert answers[0] == answers[1] == [expected for *_, expected in samples]
