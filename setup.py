from pathlib import Path

from setuptools import find_packages, setup

TRANSFORMERS = "transformers>=4.57"
PLOTS = "matplotlib>=3.7"
HUB = "kernels>=0.17"

setup(
    name="keye_kernels",
    version="0.1.0",
    description="Fast, exact Keye-VL: Triton kernels, a lean model, and everything between a picture and an answer",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["keye_kernels", "keye_kernels.*"]),
    package_data={"keye_kernels": ["assets/**/*", "triton/tables/*.json"]},
    install_requires=[
        "torch>=2.6",
        # A CUDA build of torch brings the Triton it was made for; elsewhere on Linux this brings the newest
        'triton>=3.4; platform_system == "Linux"',
        "numpy>=1.24",
        "safetensors>=0.4.3",
        "tokenizers>=0.20",
        "jinja2>=3.1",
        "pillow>=10",
        "tqdm>=4.60",
        "av>=17",
    ],
    extras_require={
        "transformers": [TRANSFORMERS, "accelerate>=1.10"],
        "hub": [HUB],
        "flash": ["flash-attn>=2.6"],
        "vllm": ["vllm>=0.32"],
        "bench": ["pytest>=8", "pytest-benchmark>=4", PLOTS],
        "test": [
            *("pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "ruff>=0.8"),
            *(PLOTS, TRANSFORMERS, "accelerate>=1.10", "peft>=0.17"),
        ],
    },
    entry_points={
        "console_scripts": ["keye-kernels = keye_kernels.cli:main"],
        "vllm.general_plugins": ["keye_kernels = keye_kernels.integrations.vllm:register"],
    },
)
