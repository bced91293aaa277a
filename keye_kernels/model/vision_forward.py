"""The forward of the vision tower, shared by the lean model, the transformers model and the vLLM plugin.

The three differ in their modules (one fused q, k, v projection, three, or tensor-parallel ones) and in the names of their
parameters. The computation is described in `docs/models/keye_vl_1_5.md`, "Vision tower".
Symbols: T patches, H heads, D head dim, C = H·D channels.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from keye_kernels import ops
from keye_kernels.geometry import Order, VisionBatch

from .config import VisionConfig
from .positions import inverse_frequencies


def vision_batch(
    config: VisionConfig,
    grid_thw: Tensor,
    num_patches: int,
    *,
    segment_by_frame: bool,
    device: torch.device,
    order: Order = "block",
) -> VisionBatch:
    """The geometry of a batch, built once per call of the tower and used by all its layers and by the projector.

    Args:
        config: configuration of the tower.
        grid_thw: [n, 3] integers: frames, patch rows and patch columns of each image or video.
        num_patches: T, number of patches in the batch.
        segment_by_frame: attention runs within single frames, see `keye_kernels.editions.Edition`.
        device: where the tensors of the batch are placed.
        order: order of the patches in the tower and in its output.

    Raises:
        ValueError: a grid is odd or empty, or the grids do not have `num_patches` patches.
    """
    return ops.build_vision_batch(
        grid_thw,
        num_patches,
        table_side=config.table_side,
        merge_size=config.spatial_merge_size,
        segment_by_frame=segment_by_frame,
        order=order,
        device=device,
    )


def vision_forward(
    pixel_values: Tensor,
    batch: VisionBatch,
    config: VisionConfig,
    *,
    embed_patches: Callable[[Tensor], Tensor],
    position_table: Tensor,
    layers: Iterable[Callable[[Tensor, VisionBatch, Tensor], Tensor]],
    post_layernorm: Callable[[Tensor], Tensor],
    impl: str = "auto",
) -> Tensor:
    """Runs the tower: patch embedding, learned positions, layers, final norm.

    Args:
        pixel_values: [T, 3, 14, 14] patches in raster order; floating-point ones are cast to the dtype of the weights.
        batch: geometry of the patches.
        config: configuration of the tower.
        embed_patches: maps patches [T, 3, 14, 14] to [T, C].
        position_table: [table_side², C] learned positions.
        layers: each maps (x [T, C], batch, inv_freq [D/4] float32) to [T, C]; attends with `vision_attention`.
        post_layernorm: the final norm.
        impl: implementation of the position embedding.

    Returns:
        Features [T, C] in the order of `batch`.
    """
    inv_freq = inverse_frequencies(config.rope_theta, config.head_dim // 4, pixel_values.device)
    x = embed_patches(_in_batch_order(pixel_values, batch, position_table.dtype))
    x = ops.position_embedding_2d(x, position_table, batch, impl=impl)
    for layer in layers:
        x = layer(x, batch, inv_freq)
    return post_layernorm(x)


def _in_batch_order(pixel_values: Tensor, batch: VisionBatch, dtype: torch.dtype) -> Tensor:
    if pixel_values.is_floating_point():
        pixel_values = pixel_values.to(dtype)
    return pixel_values[batch.raster_index]


def vision_attention(
    x: Tensor,
    project_qkv: Callable[[Tensor], Iterable[Tensor]],
    batch: VisionBatch,
    inv_freq: Tensor,
    *,
    impl: str = "auto",
    rope_impl: str = "auto",
) -> Tensor:
    """Projects to q, k and v, rotates q and k by row and column, and attends within each segment without a causal mask.

    Args:
        x: [T, C].
        project_qkv: maps x to q, k and v [T, H, D], with all heads or those of one tensor-parallel rank. A function, so that q
            and k are freed once they are rotated.
        batch: geometry of the patches.
        inv_freq: [D/4] float32.
        impl: implementation of the attention.
        rope_impl: implementation of the rotation.

    Returns:
        [T, H·D], before the output projection.
    """
    q, k, v = project_qkv(x)
    q, k = ops.rope_2d(q, k, batch.position_ids, inv_freq, impl=rope_impl)
    return ops.varlen_attention(q, k, v, batch.segments, batch.segments.max_seqlen, impl=impl).flatten(1)
