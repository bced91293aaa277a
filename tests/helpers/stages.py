"""Records the outputs of a model's stages in the layout of the golden data: raster order, [B, S, ...]."""

import torch


def record_stages(model, inputs):
    """Runs a forward pass.

    Returns:
        `{image,video}.{patch_embeds,layer0,post_ln,projector}`, `inputs_embeds`, `text_layer0`, `final_hidden`, `logits`.
    """
    stages = {}
    num_sequences, length = inputs["input_ids"].shape
    kinds = [k for k, name in (("image", "pixel_values"), ("video", "pixel_values_videos")) if name in inputs]
    num_calls = {"patch_embeds": 0, "layer0": 0, "post_ln": 0, "projector": 0}

    def keep(stage, value):
        stages[f"{kinds[num_calls[stage]]}.{stage}"] = value
        num_calls[stage] += 1

    def raster(value, batch):
        restored = torch.empty_like(value)
        restored[batch.raster_index] = value
        return restored

    hooks = [
        model.visual.layers[0].register_forward_pre_hook(lambda m, args: keep("patch_embeds", raster(*args[:2]))),
        model.visual.layers[0].register_forward_hook(lambda m, args, out: keep("layer0", raster(out, args[1]))),
        model.visual.register_forward_hook(lambda m, args, out: keep("post_ln", raster(out, args[1]))),
        model.mlp_AR.register_forward_hook(lambda m, args, out: keep("projector", out)),
        model.model.register_forward_pre_hook(lambda m, args: stages.update(inputs_embeds=args[0])),
        model.model.layers[0].register_forward_hook(
            lambda m, args, out: stages.update(text_layer0=out.unflatten(0, (num_sequences, length)))
        ),
        model.model.register_forward_hook(lambda m, args, out: stages.update(final_hidden=out)),
    ]
    try:
        with torch.no_grad():
            stages["logits"] = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    return stages
