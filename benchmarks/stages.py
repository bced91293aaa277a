"""The stages of the whole model as contestants: the same work in the official eager form, in transformers, and here.

Used by `bench_model` (pytest-benchmark) and by `compare` (rounds in turn, on one machine in one run).
"""

import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from keye_kernels.geometry import segment_lengths
from keye_kernels.model import Keye, KeyeConfig, VisionConfig
from keye_kernels.model.checkpoint import allocate, destinations
from keye_kernels.model.step_graph import decoding_step

from .baseline import Baseline
from .measuring import Work, nbytes
from .peers import Unavailable
from .shapes import Grid, num_patches

Call = Callable[[], Tensor]
NOISE = (1 << 24) - 3  # values that fill the weights, again and again; odd, so that no two rows of a matrix are equal
# float32 logits and features of random weights, of the largest value; the official code's own recorded numbers allow 1e-4
TOLERANCE = 1e-4
SMALL = KeyeConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    tie_word_embeddings=True,
    vision_start_token_id=500,
    image_token_id=501,
    video_token_id=502,
    vision_config=VisionConfig(hidden_size=144, intermediate_size=304, num_hidden_layers=2, num_attention_heads=2),
)


def config(*, small: bool, tower_layers: int | None = None, decoder_layers: int | None = None) -> KeyeConfig:
    """Preview's numbers or small ones, with fewer layers where asked. Tied, since a head of 2.5 GB need not be held twice."""
    chosen = SMALL if small else KeyeConfig(tie_word_embeddings=True)
    if tower_layers is not None:
        chosen = replace(chosen, vision_config=replace(chosen.vision_config, num_hidden_layers=tower_layers))
    if decoder_layers is not None:
        chosen = replace(chosen, num_hidden_layers=decoder_layers)
    if decoder_layers != 0:
        return chosen
    return replace(chosen, vocab_size=8, vision_start_token_id=5, image_token_id=6, video_token_id=7)


@lru_cache(maxsize=1)
def build(chosen: KeyeConfig, dtype: torch.dtype, device: torch.device) -> Keye:
    """A model with random weights, quickly: one block of noise is copied into all of them. The last one built is kept."""
    gc.collect()
    with torch.device("meta"):
        model = Keye(chosen)
    allocate(model, dtype, device)
    model._tie()
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(NOISE, generator=generator) * chosen.initializer_range).to(device, dtype)
    at = 0
    for name, parameter in model.named_parameters():
        flat = parameter.data.view(-1)
        if "norm" in name and name.endswith("weight"):
            flat.fill_(1)
            continue
        while len(flat):
            count = min(len(flat), NOISE - at)
            flat[:count] = noise[at : at + count]
            flat, at = flat[count:], (at + count) % NOISE
    return model.eval()


def transformers_model(model: Keye) -> torch.nn.Module:
    """The transformers model of this package with SDPA, on the weights of `model`, not copied."""
    try:
        from keye_kernels.integrations.transformers.config import KeyeConfig as HubConfig
        from keye_kernels.integrations.transformers.modeling import KeyeForConditionalGeneration
    except ImportError as error:
        raise Unavailable(f"transformers: cannot import it ({error}); pip install transformers") from error
    with torch.device("meta"):
        shell = KeyeForConditionalGeneration._from_config(
            HubConfig(**hub_fields(model.config)), attn_implementation="sdpa"
        )
    shell.load_state_dict(Baseline(model).weights, assign=True)
    return shell.eval()


def hub_fields(chosen: KeyeConfig) -> dict:
    """What a checkpoint's config.json says of this configuration."""
    fields = asdict(chosen)
    del fields["torch_dtype"]
    sections, theta = list(fields.pop("mrope_section")), fields.pop("rope_theta")
    rope = {"type": "mrope", "mrope_section": sections}
    return fields | {"rope_theta": theta, "rope_scaling": rope, "architectures": ["KeyeForConditionalGeneration"]}


@dataclass
class Case:
    """One piece of work: `make[name]()` gives a contestant's call, or raises Unavailable. All calls put out the same."""

    work: Work
    make: dict[str, Callable[[], Call]]
    floor: Callable[[], Call] | None = None


def vision(model: Keye, grids: list[Grid]) -> Case:
    """Tower and projector: [T, 3, 14, 14] to [T/4, hidden]."""
    tokens, device = num_patches(grids), model.device
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(tokens, 3, 14, 14, generator=generator).to(device, model.dtype)
    grid_thw = torch.tensor(grids)

    def shell() -> Call:
        other = transformers_model(model)
        return lambda: other.get_image_features(pixels, grid_thw)

    make = {
        "official": lambda: lambda: Baseline(model).get_image_features(pixels, grid_thw),
        "transformers": shell,
        "keye_kernels": lambda: lambda: model.get_image_features(pixels, grid_thw),
    }
    c = model.config.vision_config
    matrices = vision_matrices(model)
    lengths = segment_lengths([tuple(grid) for grid in grids], model.visual.segment_by_frame)
    products = [(tokens // 4 if name.startswith("mlp_AR") else tokens, w) for name, w in matrices.items()]
    attention = [(c.num_attention_heads, c.head_dim, n, n) for n in lengths] * c.num_hidden_layers
    out = tokens // 4 * model.config.hidden_size * pixels.element_size()
    work = Work(tokens, nbytes(pixels, *matrices.values()) + out, count_flops(products, attention))
    return Case(work, make, lambda: products_alone(products, attention))


def prefill(model: Keye, rows: int, length: int) -> Case:
    """A prompt of text to the logits of its last position, [B, 1, V]."""
    ids = torch.randint(0, model.config.vocab_size - 16, (rows, length), generator=torch.Generator().manual_seed(2))
    return _prompt(model, {"input_ids": ids.clamp(max=model.config.vision_start_token_id - 1).to(model.device)})


def first_token(model: Keye, grids: list[Grid], text: int) -> Case:
    """Pictures and `text` tokens to the logits of the last position: tower, projector and prompt."""
    c, generator = model.config, torch.Generator().manual_seed(3)
    words = torch.randint(0, c.vision_start_token_id - 16, (text,), generator=generator).tolist()
    ids = words[: text // 2]
    for t, h, w in grids:
        ids += [c.vision_start_token_id] + [c.image_token_id] * (t * h * w // 4) + [0]
    pixels = torch.randn(num_patches(grids), 3, 14, 14, generator=generator)
    inputs = {"input_ids": torch.tensor([ids + words[text // 2 :]]), "pixel_values": pixels.to(model.dtype)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    case = _prompt(model, inputs | {"image_grid_thw": torch.tensor(grids)})
    seen = vision(model, grids).work
    return replace(
        case, work=Work(case.work.tokens, case.work.bytes + seen.bytes, case.work.flops + seen.flops), floor=None
    )


def _prompt(model: Keye, inputs: dict[str, Tensor]) -> Case:
    rows, length = inputs["input_ids"].shape

    def shell() -> Call:
        other = transformers_model(model)
        return lambda: other(**inputs, logits_to_keep=1).logits

    make = {
        "official": lambda: lambda: Baseline(model).forward(**inputs)[0][:, -1:],
        "transformers": shell,
        "keye_kernels": lambda: lambda: model(**inputs, logits_to_keep=1).logits,
    }
    c, layers, head = model.config, layer_matrices(model), model.lm_head.weight
    products = [(rows * length, w) for w in layers] + [(rows, head)]
    # Of a causal product half is needed
    attention = [(c.num_attention_heads, c.head_dim, length, (length + 1) // 2)] * rows * c.num_hidden_layers
    work = Work(rows * length, nbytes(*layers, head), count_flops(products, attention))
    return Case(work, make, lambda: products_alone(products, attention))


def decode(model: Keye, rows: int, cached: int) -> Case:
    """One further token of each row after `cached` others: logits [B, 1, V]. Every call starts from the same cache."""
    c, device = model.config, model.device
    token = torch.arange(rows, device=device)[:, None]
    generator = torch.Generator().manual_seed(4)
    shape = (rows, c.num_key_value_heads, cached, c.head_dim)
    past = [
        tuple(torch.randn(shape, generator=generator).to(device, model.dtype) for _ in range(2))
        for _ in range(c.num_hidden_layers)
    ]

    def official() -> Call:
        other = Baseline(model)
        return lambda: other.step(token, cached, past)[0]

    def shell() -> Call:
        other = transformers_model(model)
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, pair in enumerate(past):
            cache.update(*pair, index)
        position_ids = torch.full((3, rows, 1), cached, device=device)

        def call() -> Tensor:
            logits = other(token, position_ids=position_ids, past_key_values=cache).logits
            cache.crop(-1)
            return logits

        return call

    def ours() -> Call:
        cache = model.new_cache(rows, cached + 64)
        for index, (key, value) in enumerate(past):
            cache.keys[index][:, :cached], cache.values[index][:, :cached] = key.transpose(1, 2), value.transpose(1, 2)
        cache.valid[:, :cached] = True
        cache.is_empty = False
        step = decoding_step(model, cache, steps=rows * cached)

        def call() -> Tensor:
            cache.length.fill_(cached)
            return step(token)

        return call

    read = [*layer_matrices(model), model.lm_head.weight, *(x for pair in past for x in pair)]
    products = [(rows, w) for w in read[: -2 * len(past)]]
    attention = [(c.num_attention_heads, c.head_dim, 1, cached)] * rows * c.num_hidden_layers
    work = Work(rows, nbytes(*read), count_flops(products, attention))
    return Case(
        work,
        {"official": official, "transformers": shell, "keye_kernels": ours},
        lambda: lambda: torch.stack([x.sum() for x in read]),
    )


@contextmanager
def checkpoint(model: Keye) -> Iterator[Path]:
    """A folder with the model's weights and configuration, as a checkpoint has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        dtype = str(model.dtype).removeprefix("torch.")
        fields = hub_fields(model.config) | {"torch_dtype": dtype}
        (path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        tensors = {name: view.contiguous() for name, view in destinations(model).items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        yield path


def loading(path: Path, device: torch.device, dtype: torch.dtype) -> Case:
    """From a folder to a model on `device` whose weights have all been read once; the floor reads the file's bytes into memory.

    Read once, since transformers only maps what it need not convert: the first forward would pay for the rest.
    """
    file = path / "model.safetensors"

    def read_once(model: torch.nn.Module) -> Tensor:
        for parameter in model.parameters():
            parameter.sum()
        return model.mlp_AR.linear_2.weight

    def shell() -> Call:
        try:
            from transformers import AutoModelForCausalLM

            import keye_kernels.auto  # noqa: F401
        except ImportError as error:
            raise Unavailable(f"transformers: cannot import it ({error}); pip install transformers") from error

        def call() -> Tensor:
            return read_once(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device))

        return call

    def read() -> Call:
        def call() -> Tensor:
            buffer = bytearray(file.stat().st_size)
            with file.open("rb", buffering=0) as handle:
                view, at = memoryview(buffer), 0
                while count := handle.readinto(view[at:]):
                    at += count
            return torch.tensor(at)

        return call

    make = {
        "transformers": shell,
        "keye_kernels": lambda: lambda: read_once(Keye.from_pretrained(path, dtype=dtype, device=device)),
    }
    return Case(Work(0, file.stat().st_size), make, read)


def vision_matrices(model: Keye) -> dict[str, Tensor]:
    """The weights of every product of tower and projector, as the lean model holds them."""
    parts = {"visual": model.visual, "mlp_AR": model.mlp_AR}
    return {
        f"{part}.{name}": weight.data
        for part, module in parts.items()
        for name, weight in module.named_parameters()
        if weight.ndim == 2 and "position_embedding" not in name
    }


def layer_matrices(model: Keye) -> list[Tensor]:
    """The weights of every product of the decoder's layers."""
    return [weight.data for weight in model.model.layers.parameters() if weight.ndim == 2]


def count_flops(products: list[tuple[int, Tensor]], attention: list[tuple[int, int, int, int]]) -> int:
    """Of products (rows, weight) and of attention (heads, head dim, queries, keys)."""
    return sum(2 * rows * w.numel() for rows, w in products) + sum(4 * h * d * m * n for h, d, m, n in attention)


def products_alone(products: list[tuple[int, Tensor]], attention: list[tuple[int, int, int, int]]) -> Call:
    """A call that does nothing but these products: the floor of a stage that consists of them."""
    first = products[0][1]
    inputs = {(rows, w.shape[1]): torch.randn(rows, w.shape[1]).to(first) for rows, w in products}
    heads = {
        case: tuple(torch.randn(case[0], n, case[1]).to(first) for n in (case[2], case[3], case[3]))
        for case in attention
    }

    def call() -> Tensor:
        for rows, w in products:
            out = torch.mm(inputs[rows, w.shape[1]], w.t())
        for case in attention:
            q, k, v = heads[case]
            torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
        return out

    return call
