"""Loading checkpoints: layouts, dtypes, errors and memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import keye_kernels as kk
from keye_kernels.model import checkpoint
from tests.helpers.random_checkpoint import write_random_checkpoint
from tests.helpers.tiny import CONFIG, prompt, save_checkpoint, tiny_model


def logits(model):
    with torch.no_grad():
        return model(**prompt([(1, 4, 6)])).logits


def test_saved_model_loads_with_the_same_logits(tmp_path):
    model = tiny_model()
    again = kk.Keye.from_pretrained(save_checkpoint(model, tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert not again.training


def test_sharded_checkpoint_equals_single_file(tmp_path):
    write_random_checkpoint(tmp_path / "sharded", shards=3)
    sharded = kk.Keye.from_pretrained(tmp_path / "sharded")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) == 3
    (tmp_path / "single").mkdir()
    save_file({k: v for file in files for k, v in load_file(file).items()}, tmp_path / "single" / "model.safetensors")
    (tmp_path / "single" / "config.json").write_text((tmp_path / "sharded" / "config.json").read_text())
    single = kk.Keye.from_pretrained(tmp_path / "single")
    for (name, one), (_, other) in zip(sharded.named_parameters(), single.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert sharded.generation_config["top_k"] == 20 and single.generation_config == {}


def test_one_error_lists_all_wrong_tensors(tmp_path):
    path = save_checkpoint(
        tiny_model(),
        tmp_path,
        **{
            "model.norm.weight": None,
            "model.layers.0.self_attn.k_proj.weight": torch.zeros(3, 64),
            "model.layers.7.surplus": torch.zeros(1),
            "mlp_AR.pre_norm.weight": torch.ones(192),
        },
    )
    with pytest.raises(ValueError) as error:
        kk.Keye.from_pretrained(path)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "missing: model.norm.weight",
        "unexpected: model.layers.7.surplus",
        "wrong shape: mlp_AR.pre_norm.weight is [192], expected [48]",
        "wrong shape: model.layers.0.self_attn.k_proj.weight is [3, 64], expected [64, 64]",
    ]


def test_unused_tensors_of_released_checkpoints_are_accepted(tmp_path):
    extra = {
        "visual.vision_model.head.probe": torch.zeros(1, 1, 48),
        "visual.vision_model.embeddings.packing_position_embedding.weight": torch.zeros(64, 48),
    }
    kk.Keye.from_pretrained(save_checkpoint(tiny_model(), tmp_path, **extra))


def test_tied_embeddings(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    model = tiny_model(tie_word_embeddings=True)
    again = kk.Keye.from_pretrained(save_checkpoint(model, tmp_path, config))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_dtype_from_argument_config_or_file(tmp_path):
    model = tiny_model()
    path = save_checkpoint(model.bfloat16(), tmp_path / "stored")
    assert kk.Keye.from_pretrained(path).dtype == torch.bfloat16
    assert kk.Keye.from_pretrained(path, dtype=torch.float16).dtype == torch.float16
    path = save_checkpoint(model, tmp_path / "configured", {**CONFIG, "torch_dtype": "float32"})
    assert kk.Keye.from_pretrained(path).dtype == torch.float32
    with pytest.raises(TypeError, match="dtype must be a floating-point torch dtype"):
        kk.Keye.from_pretrained(path, dtype="int8")


def test_nested_text_config_equals_the_flat_one():
    text = {k: v for k, v in CONFIG.items() if k not in ("vision_config", "model_type")}
    nested = {"model_type": "Keye", "text_config": text, "vision_config": CONFIG["vision_config"]}
    assert kk.KeyeConfig.from_dict(nested) == kk.KeyeConfig.from_dict(CONFIG)


def invalid_folders(tmp_path):
    yield FileNotFoundError, "config.json does not exist", tmp_path / "nowhere"
    path = save_checkpoint(tiny_model(), tmp_path / "type", {**CONFIG, "model_type": "Qwen2VL"})
    yield ValueError, "model_type must be one of Keye, KeyeVL1_5, got 'Qwen2VL'", path
    path = save_checkpoint(tiny_model(), tmp_path / "json")
    (path / "config.json").write_text("{")
    yield ValueError, "is not valid JSON", path
    path = save_checkpoint(tiny_model(), tmp_path / "pickle")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    yield ValueError, "pickled weights", path
    path = save_checkpoint(tiny_model(), tmp_path / "none")
    (path / "model.safetensors").unlink()
    yield FileNotFoundError, "must hold model.safetensors or", path
    path = save_checkpoint(tiny_model(), tmp_path / "cut")
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    yield ValueError, "not a complete safetensors file", path
    path = tmp_path / "shards"
    write_random_checkpoint(path)
    (path / "model-00002-of-00002.safetensors").unlink()
    yield FileNotFoundError, "names model-00002-of-00002.safetensors, which is missing", path
    path = save_checkpoint(tiny_model(), tmp_path / "mrope", {**CONFIG, "rope_scaling": {"type": "yarn"}})
    yield ValueError, "rope_scaling must have type", path


def test_invalid_checkpoints_raise_with_the_reason(tmp_path):
    for kind, message, path in invalid_folders(tmp_path):
        with pytest.raises(kind, match=message):
            kk.Keye.from_pretrained(path)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x", "C:x", "..", ".", "", 5, None], ids=str
)
def test_index_names_outside_the_folder_are_refused(tmp_path, file):
    path = tmp_path / "model"
    write_random_checkpoint(path)
    outside = tmp_path / "x.safetensors"
    outside.write_bytes((path / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = file
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"index\.json: weight_map must name files in its own folder, got .* for model.norm.weight"
    ):
        kk.Keye.from_pretrained(path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "a"}'])
def test_an_index_without_a_weight_map_is_named(tmp_path, content):
    path = save_checkpoint(tiny_model(), tmp_path)
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: weight_map must be a JSON object"):
        kk.Keye.from_pretrained(path)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_weights_of_other_dtypes_are_refused(tmp_path, dtype, name):
    model = tiny_model()
    weight = checkpoint.destinations(model)[name].clone().to(getattr(torch, dtype))
    with pytest.raises(ValueError, match=rf"wrong dtype: {name} is \w+, expected one of BF16, F16, F32, F64"):
        kk.Keye.from_pretrained(save_checkpoint(model, tmp_path, **{name: weight}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floating_point_weights_are_loaded(tmp_path, dtype):
    path = save_checkpoint(tiny_model().to(dtype), tmp_path)
    model = kk.Keye.from_pretrained(path)
    assert model.dtype == dtype
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight.to(dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.float8_e5m2, torch.complex64, "uint8", "no_dtype", 5])
def test_other_dtypes_of_the_model_are_refused(tmp_path, dtype):
    with pytest.raises(TypeError, match="dtype must be a floating-point torch dtype, one of float32, bfloat16"):
        kk.Keye.from_pretrained(save_checkpoint(tiny_model(), tmp_path), dtype=dtype)


def test_wrong_sizes_in_config_json_allocate_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("keye_kernels.model.keye.allocate", None)
    path = save_checkpoint(tiny_model(), tmp_path, {**CONFIG, "intermediate_size": 2**20, "num_hidden_layers": 64})
    with pytest.raises(ValueError, match=r"wrong shape: model\.layers\.0\.mlp\.down_proj\.weight"):
        kk.Keye.from_pretrained(path)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_tensors_loaded_in_pieces_are_complete(tmp_path, monkeypatch, rows):
    """Pieces of `rows` rows of a matrix with 64 columns, which do not divide the number of rows."""
    model = tiny_model()
    path = save_checkpoint(model, tmp_path)
    monkeypatch.setattr(checkpoint, "BYTES_PER_MAPPING", 4 * 64 * rows)
    pieces = list(checkpoint._read_chunks([("lm_head.weight", path / "model.safetensors")]))
    assert [first for _, first, _ in pieces] == list(range(0, 120, rows))
    with torch.device("meta"):
        loaded = kk.Keye(model.config)
    checkpoint.allocate(loaded, torch.float32, torch.device("cpu"))
    for parameter in loaded.parameters():
        parameter.data.fill_(float("nan"))
    checkpoint.load_weights(loaded, checkpoint.matching_tensors(loaded, path))
    for (name, found), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_missing_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device must be available, got 'cuda', but torch finds no CUDA"):
        kk.Keye.from_pretrained(save_checkpoint(tiny_model(), tmp_path), device="cuda")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_of_loading_is_close_to_the_weights(tmp_path, dtype):
    """The peak memory of the process, mapped pages included, grows by at most 1.15 times the weights."""
    config = {**CONFIG, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 8000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = f"""
import sys, torch
sys.path.insert(0, {str(tmp_path)!r})
import keye_kernels as kk
from keye_kernels.model.checkpoint import destinations
from pathlib import Path
from safetensors.torch import save_file
path = Path({str(tmp_path)!r})
if sys.argv[1] == "write":
    model = kk.model.Keye(kk.KeyeConfig.from_pretrained(path)).to(torch.bfloat16)
    save_file({{k: v.contiguous() for k, v in destinations(model).items()}}, path / "model.safetensors")
else:
    from safetensors import safe_open
    with safe_open(path / "model.safetensors", "pt") as f: f.get_tensor("model.norm.weight")  # loads libraries
    def status(key):  # unlike ru_maxrss, VmHWM does not include the parent process
        return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
    before = status("VmRSS")
    model = kk.Keye.from_pretrained(path, dtype=sys.argv[1])
    print(status("VmHWM") - before, sum(p.nbytes for p in model.parameters()))
"""
    for argument in ("write", dtype):
        result = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    peak, weights = map(int, result.stdout.split())
    assert weights > 200e6
    assert 0.9 * weights < peak < 1.15 * weights, peak / weights


def test_large_parameters_use_huge_pages():
    """Writing the weights then takes one page fault per 2 MB instead of one per 4 KB."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.is_file() or "[never]" in setting.read_text():
        pytest.skip("needs a Linux kernel with transparent huge pages")

    def bytes_in_huge_pages():
        return int(re.search(r"AnonHugePages:\s+(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]) * 1024

    with torch.device("meta"):
        model = torch.nn.Linear(4096, 8192, bias=False)
    before = bytes_in_huge_pages()
    checkpoint.allocate(model, torch.float32, torch.device("cpu"))
    model.weight.data.fill_(1)
    assert bytes_in_huge_pages() - before > 0.5 * model.weight.nbytes


def test_a_file_is_mapped_again_after_bytes_per_mapping(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(checkpoint, "safe_open", lambda *a: opened.append(a[0]) or safe_open(*a))
    path = save_checkpoint(tiny_model(), tmp_path)
    size = (path / "model.safetensors").stat().st_size
    for limit in (size, size // 4):
        opened.clear()
        monkeypatch.setattr(checkpoint, "BYTES_PER_MAPPING", limit)
        assert torch.equal(logits(kk.Keye.from_pretrained(path)), logits(tiny_model()))
        assert (once := len(opened)) if limit == size else once < len(opened) <= once + 8
