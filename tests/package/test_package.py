"""Importing the package, and what stands in it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import sys
for name in ("triton", "transformers", "flash_attn", "vllm"):
    sys.modules[name] = None  # importing it raises ImportError
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_everything_works_without_triton_and_transformers():
    code = f"""{BLOCKED}
import keye_kernels as kk, numpy as np
model, processor = kk.small_model(), kk.small_processor()
messages = [{{"role": "user", "content": [{{"type": "image", "image": np.zeros((56, 84, 3), np.uint8)}}]}}]
images, videos = kk.process_vision_info(messages)
inputs = processor(text=processor.apply_chat_template(messages), images=images)
print(model.generate(**inputs, max_new_tokens=3, eos_token_id=()).shape[1] - inputs["input_ids"].shape[1])
"""
    assert run(code).strip() == "3"


def test_import_is_light():
    code = """
import time, torch, sys
before = set(sys.modules)
start = time.perf_counter()
import keye_kernels as kk
seconds = time.perf_counter() - start
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"triton", "transformers", "flash_attn", "tokenizers", "PIL", "jinja2", "av"}, new
print(seconds)
"""
    assert min(float(run(code)) for _ in range(3)) < 0.2


@pytest.mark.parametrize(
    "name",
    [
        "Keye",
        "KeyeProcessor",
        "process_vision_info",
        "ops",
        "use_impl",
        "split_thinking",
        "small_model",
        "warmup",
        "apply_keye_kernels",
    ],
)
def test_promised_names(name):
    import keye_kernels as kk

    assert getattr(kk, name) is getattr(kk, name) and name in dir(kk)


def test_unknown_name_is_an_attribute_error():
    import keye_kernels as kk

    with pytest.raises(AttributeError, match="no attribute 'fast_mode'"):
        kk.fast_mode  # noqa: B018


def imported_modules(file: Path) -> set[str]:
    """Absolute names of the modules that a file of the package imports, anywhere in it."""
    package = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").split(".")
    package = package if file.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_down():
    """cli → processing, model → ops → geometry, reference, triton; never back up, never sideways between the lowest."""
    may_import = {
        "reference": set(),
        "triton": set(),
        "geometry": set(),
        "ops": {"geometry", "reference", "triton"},
        "model": {"ops", "geometry"},
        "processing": set(),
        "small": {"model", "processing"},
        "layers": {"geometry", "ops"},
        "warm_up": {"model", "geometry", "ops", "triton"},
        "integrations": {"layers", "model", "processing", "geometry", "ops"},
        "auto": {"integrations"},
        "tools": {"small", "model", "processing", "geometry", "ops", "reference", "triton"},
        "cli": {"tools", "model", "processing", "ops"},
    }
    seen = set()
    for file in (ROOT / "keye_kernels").rglob("*.py"):
        home = file.relative_to(ROOT / "keye_kernels").with_suffix("").parts[0]
        if home.startswith("__"):
            continue
        seen.add(home)
        for module in imported_modules(file):
            parts = module.split(".")
            if parts[0] == "keye_kernels" and len(parts) > 1 and parts[1] in may_import and parts[1] != home:
                assert parts[1] in may_import[home], f"{file.name} imports {module}"
    assert seen <= may_import.keys(), "a new folder: say what it may import"


def test_model_files_read_well_alone():
    for file in (ROOT / "keye_kernels" / "model").glob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 320, file
