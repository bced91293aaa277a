"""One rank of `test_tensor_parallel`: checks the golden tokens of a model that is split over all ranks."""

import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import keye_kernels.auto  # noqa: F401
from tests.helpers.golden import golden, load_case

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Shapes on one rank: half of the rows or columns
SPLIT = {
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 192),
    "visual.vision_model.encoder.layers.0.self_attn.k_proj.weight": (72, 144),
    "visual.vision_model.encoder.layers.0.mlp.fc2.weight": (144, 100),
    "mlp_AR.linear_1.weight": (288, 576),
}


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    path, config = golden("preview"), DistributedConfig(tp_size=dist.get_world_size())
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, distributed_config=config)
    parameters = dict(model.named_parameters())
    for name, shape in SPLIT.items():
        assert tuple(parameters[name].to_local().shape) == shape, (name, parameters[name])
    for name in ("c_batch_left_pad", "d1_video_ts_0_5"):
        inputs, outputs = load_case("preview", name)
        tokens = model.generate(**inputs, max_new_tokens=16, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(tokens, outputs["generated"]), name
    dist.destroy_process_group()
    print("golden tokens")


if __name__ == "__main__":
    main()
