"""The stages of the whole model as benchmark cases: vision, prefill, decode, first token, loading.

`bench_model.py` runs them under pytest-benchmark, `compare.py` in rounds in which the implementations take turns.
Symbols: B sequences, S tokens, T patches, V vocabulary size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from keye_kernels.geometry import segment_lengths
from keye_kernels.model import Keye
from keye_kernels.model.step_graph import recorded_step

from .baseline import Baseline
from .clock import recorded
from .floors import Attention, Matmuls, decoder_weights, vision_weights
from .measuring import RequiredWork, nbytes
from .models import transformers_model
from .peers import COMPILED_TOWER, OFFICIAL, TRANSFORMERS, Unavailable, check_scores, compiled
from .shapes import Grid, num_patches

KEYE_KERNELS = "keye_kernels"
WITHOUT_GRAPHS = "keye_kernels, cuda_graphs=False"
Call = Callable[[], Tensor]
# Relative error of logits and features. float32: as in the golden data of the official code. In half precision, rounding
# differences accumulate over the layers
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}


@dataclass
class BenchmarkCase:
    """One workload and its implementations.

    Attributes:
        work: the minimum that every implementation must do.
        make: by implementation, a function that returns the call or raises `Unavailable`. All calls return the same tensor.
        floor: a function that returns a call with the least possible time, None if there is no such call.
        expected: a function that returns the right result. None: the result of the first implementation is right.
    """

    work: RequiredWork
    make: dict[str, Callable[[], Call]]
    floor: Callable[[], Call] | None = None
    expected: Callable[[], Tensor] | None = None


def without_graphs(model: Keye, call: Call) -> Callable[[], Call]:
    """The call of a model on a GPU whose images and prompts do not run as CUDA graphs."""

    def run() -> Tensor:
        enabled, model.cuda_graphs = model.cuda_graphs, False
        try:
            return call()
        finally:
            model.cuda_graphs = enabled

    def make() -> Call:
        if model.device.type != "cuda":
            raise Unavailable(f"{WITHOUT_GRAPHS}: a CPU has no CUDA graphs")
        return run

    return make


def vision(model: Keye, grids: list[Grid]) -> BenchmarkCase:
    """Vision tower and projector: pixels [T, 3, 14, 14] to features [T/4, hidden]."""
    tokens, config = num_patches(grids), model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(tokens, 3, 14, 14, generator=generator).to(model.device, model.dtype)
    grid_thw = torch.tensor(grids)

    lengths = segment_lengths(grids, model.visual.segment_by_frame)

    def official() -> Call:
        check_scores(config.num_attention_heads, max(lengths))
        return lambda: Baseline(model).get_image_features(pixels, grid_thw)

    def transformers() -> Call:
        other = transformers_model(model)
        return lambda: other.get_image_features(pixels, grid_thw)

    def compiled_tower() -> Call:
        if model.device.type != "cuda":
            raise Unavailable(f"{COMPILED_TOWER}: compared on a GPU only; compilation for a CPU takes many minutes")
        return compiled(transformers_model(model).get_image_features, pixels, grid_thw, is_timed=True)

    make = {
        OFFICIAL: official,
        TRANSFORMERS: transformers,
        KEYE_KERNELS: lambda: lambda: model.get_image_features(pixels, grid_thw),
        WITHOUT_GRAPHS: without_graphs(model, lambda: model.get_image_features(pixels, grid_thw)),
        COMPILED_TOWER: compiled_tower,
    }
    weights = vision_weights(model)
    matmuls = Matmuls(
        [(tokens // 4 if name.startswith("mlp_AR") else tokens, w) for name, w in weights.items()],
        [Attention(config.num_attention_heads, config.head_dim, n, n) for n in lengths] * config.num_hidden_layers,
    )
    out_bytes = tokens // 4 * model.config.hidden_size * pixels.element_size()
    work = RequiredWork(tokens, nbytes(pixels, *weights.values()) + out_bytes, matmuls.flops)
    return BenchmarkCase(work, make, matmuls.only)


def prefill(model: Keye, batch_size: int, length: int) -> BenchmarkCase:
    """Prefill of text prompts: token ids [B, S] to the logits of the last position [B, 1, V]."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.config.vocab_size - 16, (batch_size, length), generator=generator)
    return _prompt(model, {"input_ids": ids.clamp(max=model.config.vision_start_token_id - 1).to(model.device)})


def first_token(model: Keye, grids: list[Grid], text_tokens: int) -> BenchmarkCase:
    """Vision tower, projector and prefill of a prompt of images and text: to the logits of the last position [1, 1, V]."""
    config, generator = model.config, torch.Generator().manual_seed(3)
    text = torch.randint(0, config.vision_start_token_id - 16, (text_tokens,), generator=generator).tolist()
    ids = text[: text_tokens // 2]
    for t, h, w in grids:
        ids += [config.vision_start_token_id] + [config.image_token_id] * (t * h * w // 4) + [0]
    pixels = torch.randn(num_patches(grids), 3, 14, 14, generator=generator)
    inputs = {"input_ids": torch.tensor([ids + text[text_tokens // 2 :]]), "pixel_values": pixels.to(model.dtype)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    case = _prompt(model, inputs | {"image_grid_thw": torch.tensor(grids)})
    tower = vision(model, grids).work
    work = RequiredWork(case.work.tokens, case.work.bytes + tower.bytes, case.work.flops + tower.flops)
    return replace(case, work=work, floor=None)


def _prompt(model: Keye, inputs: dict[str, Tensor]) -> BenchmarkCase:
    batch_size, length = inputs["input_ids"].shape

    def transformers() -> Call:
        other = transformers_model(model)
        return lambda: other(**inputs, logits_to_keep=1).logits

    def official() -> Call:
        check_scores(batch_size * model.config.num_attention_heads, length)
        return lambda: Baseline(model).forward(**inputs)[0][:, -1:]

    make = {
        OFFICIAL: official,
        TRANSFORMERS: transformers,
        KEYE_KERNELS: lambda: lambda: model(**inputs, logits_to_keep=1).logits,
        WITHOUT_GRAPHS: without_graphs(model, lambda: model(**inputs, logits_to_keep=1).logits),
    }
    config, weights, head = model.config, decoder_weights(model), model.lm_head.weight
    # Causal attention needs half of the keys on average
    attention = Attention(config.num_attention_heads, config.head_dim, length, (length + 1) // 2)
    matmuls = Matmuls(
        [(batch_size * length, w) for w in weights] + [(batch_size, head)],
        [attention] * batch_size * config.num_hidden_layers,
    )
    work = RequiredWork(batch_size * length, nbytes(*weights, head), matmuls.flops)
    return BenchmarkCase(work, make, matmuls.only)


def decode(model: Keye, batch_size: int, cached: int) -> BenchmarkCase:
    """One decoding step after `cached` tokens: logits [B, 1, V]. Every call starts from the same cache.

    The floor is a sum over all bytes that a step must read: the weights and the cache.
    """
    config, device = model.config, model.device
    token = torch.arange(batch_size, device=device)[:, None]
    generator = torch.Generator(device).manual_seed(4)
    shape = (batch_size, config.num_key_value_heads, cached, config.head_dim)
    past = [
        tuple(torch.randn(shape, generator=generator, device=device).to(model.dtype) for _ in range(2))
        for _ in range(config.num_hidden_layers)
    ]

    def official() -> Call:
        other = Baseline(model)
        return lambda: other.step(token, cached, past)[0]

    def transformers() -> Call:
        other = transformers_model(model)
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, pair in enumerate(past):
            cache.update(*pair, index)
        position_ids = torch.full((3, batch_size, 1), cached, device=device)

        def call() -> Tensor:
            logits = other(token, position_ids=position_ids, past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return call

    def keye_kernels() -> Call:
        cache = model.new_cache(batch_size, cached + 64)
        for index, (key, value) in enumerate(past):
            cache.keys[index][:, :cached], cache.values[index][:, :cached] = key.transpose(1, 2), value.transpose(1, 2)
        cache.valid[:, :cached] = True
        cache.is_empty = False
        step = recorded_step(model, cache, lambda: model(token, cache=cache).logits, steps=batch_size * cached)

        def call() -> Tensor:
            cache.length.fill_(cached)
            return step()

        return call

    weights = [*decoder_weights(model), model.lm_head.weight]
    must_read = [*weights, *(x for pair in past for x in pair)]
    attention = Attention(config.num_attention_heads, config.head_dim, 1, cached)
    matmuls = Matmuls([(batch_size, w) for w in weights], [attention] * batch_size * config.num_hidden_layers)

    def read_all() -> Call:
        def call() -> Tensor:
            return torch.stack([x.sum() for x in must_read])

        return recorded(call) if device.type == "cuda" else call

    return BenchmarkCase(
        RequiredWork(batch_size, nbytes(*must_read), matmuls.flops),
        {OFFICIAL: official, TRANSFORMERS: transformers, KEYE_KERNELS: keye_kernels},
        read_all,
    )


def loading(path: Path, device: torch.device, dtype: torch.dtype) -> BenchmarkCase:
    """From a checkpoint folder to a model on `device`, with every weight read once. The floor reads the file into memory.

    Reading the weights is included because transformers maps a file that needs no conversion, and would read it in the first
    forward.
    """
    file = path / "model.safetensors"

    def read_weights(model: torch.nn.Module) -> Tensor:
        for parameter in model.parameters():
            parameter.sum()
        return model.mlp_AR.linear_2.weight

    def transformers() -> Call:
        try:
            from transformers import AutoModelForCausalLM

            import keye_kernels.auto  # noqa: F401
        except ImportError as error:
            raise Unavailable(f"{TRANSFORMERS}: the import failed ({error}); pip install transformers") from error

        return lambda: read_weights(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device))

    def read_file() -> Call:
        def call() -> Tensor:
            buffer = bytearray(file.stat().st_size)
            with file.open("rb", buffering=0) as handle:
                view, position = memoryview(buffer), 0
                while count := handle.readinto(view[position:]):
                    position += count
            return torch.tensor(position)

        return call

    make = {
        TRANSFORMERS: transformers,
        KEYE_KERNELS: lambda: lambda: read_weights(Keye.from_pretrained(path, dtype=dtype, device=device)),
    }
    return BenchmarkCase(RequiredWork(0, file.stat().st_size), make, read_file)
