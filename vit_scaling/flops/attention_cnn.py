"""What the attention-CNN costs, with and without the products of attention."""

from vit_scaling.models.attention_cnn import AttentionCNNConfig


def attention_cnn_forward(
    config: AttentionCNNConfig, image_size: tuple[int, int], num_classes: int
) -> tuple[float, float]:
    """Returns (FLOPs, bytes of activations) of the forward pass of one image.

    The published counts leave out the products of attention (weights x values, q·k, q·r): see `attention_cnn_linear`.
    """
    tokens = image_size[0] // 2 * (image_size[1] // 2)
    by_query = config.position in ("learned+query", "learned+content")
    products = config.heads * tokens**2 * config.width  # weights x values
    if config.position == "learned+content":
        products *= 2
    if by_query:
        # Half of a head's query against every row offset, half against every column offset.
        offsets = image_size[0] // 2 * 2 - 1 + image_size[1] // 2 * 2 - 1
        products += config.heads * tokens * offsets * (config.width // 2)
    itemsize = 2 if config.dtype == "bfloat16" else 4
    copies = config.heads * (1 + by_query + (config.position == "learned+content"))
    elements = tokens * ((6 + copies) * config.width + 2 * config.mlp)
    elements += 2 * config.heads * tokens**2 * by_query
    entry, products_kept = tokens * config.width, tokens * ((5 + copies) * config.width + config.mlp)
    kept = config.depth * {"none": elements, "dots": products_kept, "full": entry}[config.remat]
    kept += elements if config.remat != "none" else 0
    linear = attention_cnn_linear(config, image_size, num_classes)
    return linear + 2.0 * config.depth * products, float(itemsize * kept)


def attention_cnn_linear(config: AttentionCNNConfig, image_size: tuple[int, int], num_classes: int) -> float:
    """Returns the FLOPs of the affine maps alone: what Cordonnier et al. 2020, Table 1, reports."""
    tokens, width = image_size[0] // 2 * (image_size[1] // 2), config.width
    merged = config.heads * width**2
    per_head = {"learned+query": 1, "learned+content": 2}.get(config.position, 0)
    layer = merged * (1 + per_head) + width**2 + 2 * width * config.mlp
    return 2.0 * (tokens * (12 * width + config.depth * layer) + width * num_classes)
