"""Writes vLLM's answers to fixed prompts as JSON: python -m tests.integrations.vllm.answers OUTPUT OPTIONS FOLDER...

OPTIONS are arguments of `vllm.LLM`, as JSON. This is a separate program because vLLM chooses its model classes once per process.
With VLLM_PLUGINS=none it runs stock vLLM; configurations and processors are then registered here, because the checkpoints
contain no code. The result has, for each checkpoint, the model class, the tokens of each prompt with their log probabilities,
and the number of calls of each operator of this package.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from keye_kernels import ops

OPERATORS = ("position_embedding_2d", "rope_2d", "varlen_attention", "patch_merge_projection")
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TOKENS = 8


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def prompts(model_type: str) -> list[dict]:
    """Ten prompts: text, one image, two images of different sizes, a video (for 1.5 with slow and fast frames)."""
    sizes = [(56, 84), (84, 56), (112, 112), (140, 84), (56, 168), (168, 112)]
    images = [Image.fromarray(noise(seed, *size, 3)) for seed, size in enumerate(sizes)]
    chosen = [[0], [1], [2], [3, 4], [4, 5], [5, 3], [0, 1]]
    found = [{"prompt": TURN.format(text)} for text in ("hello", "what is in the picture?")]
    for indices in chosen:
        text = IMAGE * len(indices) + "what is in the picture?"
        data = {"image": [images[index] for index in indices]}
        found.append({"prompt": TURN.format(text), "multi_modal_data": data})
    video = {"prompt": TURN.format(VIDEO + "which way?"), "multi_modal_data": {"video": noise(9, 4, 112, 84, 3)}}
    if model_type == "KeyeVL1_5":
        video["mm_processor_kwargs"] = {
            # Tensors, as from process_vision_info: vLLM cannot hash nested lists
            "frame_types": [torch.tensor([0, 1, 1, 0], dtype=torch.int32)],
            "timestamps": [torch.tensor([0.0, 0.5, 1.0, 1.5])],
            **{"height": [112], "width": [84], "fast_height": [56], "fast_width": [56]},
        }
    return [*found, video]


def answer(folder: str, options: dict, calls: Counter) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    calls.clear()
    llm = LLM(
        folder,
        dtype="float32",
        max_model_len=2048,
        distributed_executor_backend="mp" if options.get("tensor_parallel_size", 1) > 1 else "uni",
        enforce_eager=True,
        kv_cache_memory_bytes=128 << 20,
        limit_mm_per_prompt={"image": 2, "video": 1},
        skip_mm_profiling=True,
        **options,
    )
    model_type = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["model_type"]
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    outputs = [output.outputs[0] for output in llm.generate(prompts(model_type), sampling, use_tqdm=False)]
    result = {
        "classes": llm.collective_rpc(model_class),
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [[step[token].logprob for token, step in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs],
        "calls": dict(calls),
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def model_class(worker) -> str:
    kind = type(worker.get_model())
    return f"{kind.__module__}.{kind.__name__}"


def counted(name: str, calls: Counter):
    operator = getattr(ops, name)

    def call(*args, **kwargs):
        calls[name] += 1
        return operator(*args, **kwargs)

    return call


def main() -> None:
    output, options, *folders = sys.argv[1:]
    if os.environ.get("VLLM_PLUGINS") == "none":
        from keye_kernels.integrations.transformers import register_processors

        register_processors()
    calls = Counter()
    for name in OPERATORS:
        setattr(ops, name, counted(name, calls))
    answers = {folder: answer(folder, json.loads(options), calls) for folder in folders}
    Path(output).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main()
