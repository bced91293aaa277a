"""Importing the package: which names it has, and what it needs."""

import subprocess
import sys
from importlib import import_module

import pytest

import keye_kernels as kk

BLOCKED = """
import sys
for name in ("triton", "transformers", "flash_attn", "vllm"):
    sys.modules[name] = None  # importing it raises ImportError
"""
# Public name -> module that defines it
PUBLIC = {
    "Keye": "model.keye",
    "KeyeConfig": "model.config",
    "KVCache": "model.cache",
    "TextStreamer": "model.generation",
    "KeyeProcessor": "processing.processor",
    "process_vision_info": "processing.vision_info",
    "split_thinking": "processing.prompts",
    "apply_keye_kernels": "integrations.patching.patch",
    "revert_keye_kernels": "integrations.patching.patch",
    "PatchReport": "integrations.patching.report",
    "use_impl": "ops.implementation",
    "small_model": "small",
    "small_processor": "small",
    "warmup": "warm_up",
}
OPERATORS = [
    "add_norm", "cache_attention", "linear_few_rows", "patch_merge_projection", "position_embedding_2d", "rope_2d", "rope_3d",
    "rope_3d_to_cache", "silu_mul", "varlen_attention",
]  # fmt: skip


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_small_model_runs_without_triton_and_transformers():
    code = f"""{BLOCKED}
import keye_kernels as kk, numpy as np
model, processor = kk.small_model(), kk.small_processor()
messages = [{{"role": "user", "content": [{{"type": "image", "image": np.zeros((56, 84, 3), np.uint8)}}]}}]
images, videos = kk.process_vision_info(messages)
inputs = processor(text=processor.apply_chat_template(messages), images=images)
print(model.generate(**inputs, max_new_tokens=3, eos_token_id=()).shape[1] - inputs["input_ids"].shape[1])
"""
    assert run(code).strip() == "3"


def test_import_loads_no_optional_or_slow_package():
    code = """
import torch, sys
before = set(sys.modules)
import keye_kernels
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    loaded = set(run(code).split())
    assert "keye_kernels" in loaded
    assert not loaded & {"triton", "transformers", "flash_attn", "tokenizers", "PIL", "jinja2", "av"}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_come_from_their_modules(name):
    assert getattr(kk, name) is getattr(import_module(f"keye_kernels.{PUBLIC[name]}"), name)
    assert name in dir(kk) and name in kk.__all__


@pytest.mark.parametrize("name", OPERATORS)
def test_public_operators_can_be_called(name):
    assert callable(getattr(kk.ops, name))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'fast_mode'"):
        kk.fast_mode  # noqa: B018
