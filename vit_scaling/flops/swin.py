"""What a Swin Transformer costs: multiply-adds of its matrix products, and what its backward pass keeps."""

from vit_scaling.models.swin import SwinConfig, stage_grids, stage_windows


def swin_forward(config: SwinConfig, image_size: tuple[int, int], num_classes: int) -> tuple[float, float]:
    """Returns (FLOPs, bytes of activations) of the forward pass of one image, padding of windows included.

    A block's attention takes 4D² + 2nD multiply-adds a token (V1 section 3.2, eq. 2). A multiply-add is two FLOPs
    here and one in the Swin papers. V2's position network is left out: it runs once a step, not once an image.
    """
    grids, built_windows = stage_grids(config, image_size), stage_windows(config, image_size)
    size = 2 if config.dtype == "bfloat16" else 4
    macs = grids[0][0] * grids[0][1] * 3 * config.patch**2 * config.width
    kept_bytes, recomputed_bytes = 0, 0
    for stage, ((height, width), window) in enumerate(zip(grids, built_windows, strict=True)):
        dim, heads, depth = config.width * 2**stage, config.heads[stage], config.depths[stage]
        tokens, hidden = height * width, config.mlp_ratio * dim
        padded = (height + -height % window) * (width + -width % window)
        macs += depth * (padded * (4 * dim**2 + 2 * window**2 * dim) + tokens * 2 * dim * hidden)
        if stage + 1 < len(grids):
            macs += grids[stage + 1][0] * grids[stage + 1][1] * 4 * dim * 2 * dim
        # Of a block: inputs and outputs of both norms, windows, q, k, v and what they give; hidden units before and
        # after GELU; attention weights in float32 and in the dtype of the computation.
        entry = tokens * dim * size
        inside = 4 * entry + 5 * padded * dim * size + 2 * tokens * hidden * size
        inside += heads * padded * window**2 * (4 + size)
        pair = {"none": 2 * inside, "dots": 2 * (6 * entry + tokens * hidden * size), "full": entry}[config.remat]
        kept_bytes += depth // 2 * pair
        recomputed_bytes = max(recomputed_bytes, 2 * inside if config.remat != "none" else 0)
    macs += config.width * 2 ** (len(grids) - 1) * num_classes
    return 2.0 * macs, float(kept_bytes + recomputed_bytes)
