"""torch.compile of the whole forward: no graph breaks, no recompilation between steps or sizes, the same logits."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.tiny import prompt, tiny_model


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_and_count_graphs(compiled, counter, inputs, expected):
    """Checks the logits of a call. Returns the output and the number of graphs it compiled."""
    before = counter.frame_count
    with torch.no_grad():
        output = compiled(**inputs)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    return output, counter.frame_count - before


@pytest.mark.parametrize("edition", ["Keye", "KeyeVL1_5"])
def test_sizes_and_steps_compile_once(edition):
    """With dynamic=True, one graph is used for all image sizes and prompt lengths."""
    model = tiny_model(model_type=edition)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for i, (grid, lead) in enumerate([((1, 4, 6), 3), ((1, 8, 2), 5), ((1, 6, 10), 9)]):
        inputs = prompt([grid], lead=lead, seed=i)
        with torch.no_grad():
            expected = model(**inputs)
        output, num_compiled = run_and_count_graphs(compiled, counter, inputs, expected.logits)
        assert (num_compiled > 0) == (i == 0), f"image {grid}"
        for step in range(4):
            token = {"input_ids": output.logits[:, -1:].argmax(-1)}
            with torch.no_grad():
                expected = model(**token, cache=expected.cache)
            output, num_compiled = run_and_count_graphs(compiled, counter, token | {"cache": output.cache}, expected.logits)
            assert (num_compiled > 0) == (i == step == 0), f"step {step} after image {grid}"


def test_changing_shapes_recompile_once():
    model = tiny_model()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled_graphs = []
    for i, grid in enumerate([(1, 4, 6), (1, 8, 2), (1, 6, 10), (1, 2, 12)]):
        inputs = prompt([grid], lead=3 + i, seed=i)
        with torch.no_grad():
            expected = model(**inputs).logits
        compiled_graphs.append(run_and_count_graphs(compiled, counter, inputs, expected)[1])
    assert compiled_graphs[0] and compiled_graphs[1:] == [1, 0, 0]


def test_batches_with_padding_and_several_images():
    model = tiny_model()
    inputs = prompt([(1, 4, 4), (1, 2, 6)], lead=4)
    ids = torch.stack((inputs["input_ids"][0], torch.randint(0, 100, inputs["input_ids"].shape[1:])))
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][1, :5] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(found, expected)


def test_inductor_gives_the_same_logits():
    model = tiny_model(num_hidden_layers=1)
    inputs = prompt([(1, 4, 6)])
    with torch.no_grad():
        expected = model(**inputs)
        model.compile(fullgraph=True, dynamic=True)
        found = model(**inputs)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_invalid_grids_raise_inside_a_graph_too():
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = prompt([(1, 4, 6)]) | {"image_grid_thw": torch.tensor([[1, 8, 3]])}
    with torch.no_grad(), pytest.raises(ValueError, match="divisible by 2"):
        compiled(**inputs)
