"""What residual networks cost, plain or with attention.

Convention of the papers of local and augmented attention: a multiply-add is 2 FLOPs; convolutions, projections and
attention's products count, norms, pools and softmax do not. Relative logits of local attention count as one dot product
per neighbor, which gives the published numbers; the code factorizes them into rows and columns and needs fewer.
"""

from vit_scaling.models import resnet, spatial


def resnet_forward(config: resnet.ResNetConfig, image_size: tuple[int, int], num_classes: int) -> tuple[float, float]:
    """Returns (FLOPs, bytes of activations) of the forward pass of one image."""
    itemsize = 2 if config.dtype == "bfloat16" else 4
    sizes = resnet.map_sizes(config, image_size)
    macs, stem_elements = _stem(config, image_size, sizes[0])
    kept, largest = float(stem_elements), 0.0
    inputs = config.width
    before = sizes[0]
    for group, size in enumerate(sizes, start=1):
        width, outputs = resnet.group_width(config, group), resnet.EXPANSION * resnet.group_width(config, group)
        for layer in range(resnet.DEPTHS[config.depth][group - 1]):
            pixels_in, pixels = before[0] * before[1], size[0] * size[1]
            spatial_macs, products, weights = _spatial(config, group, width, before, size)
            macs += pixels_in * inputs * width + spatial_macs + pixels * width * outputs
            macs += pixels * inputs * outputs if layer == 0 else 0
            # The block's input and the products with parameters; with their normalized forms and attention weights.
            products += pixels_in * (inputs + width) + pixels * (width + outputs)
            elements = products + pixels_in * width + pixels * (width + outputs) + weights
            kept += {"none": elements, "dots": products, "full": pixels_in * inputs}[config.remat]
            largest = max(largest, elements)
            inputs, before = outputs, size
        if group in config.nonlocal_after:
            pixels = size[0] * size[1]
            macs += pixels * outputs * (outputs // 2) * 4 + 2 * pixels**2 * (outputs // 2)
            kept += pixels * 4 * outputs + pixels**2
    macs += inputs * num_classes
    return 2.0 * macs, itemsize * (kept + (largest if config.remat != "none" else 0.0))


def _stem(config: resnet.ResNetConfig, image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Returns multiply-adds and kept elements. The attention stem has a projection for each mixture, as published."""
    pixels = image_size[0] * image_size[1]
    if config.stem == "attention":
        neighbours = spatial.AttentionStem.BLOCK**2
        macs = pixels * config.width * (3 * (2 + config.stem_mixtures) + 2 * neighbours)
        return macs, pixels * (5 * config.width + 2 * config.stem_heads * neighbours)
    if config.stem == "small":
        return pixels * 27 * config.width, 2 * pixels * config.width
    half = (-(-image_size[0] // 2)) * (-(-image_size[1] // 2))
    return half * 147 * config.width, 2 * half * config.width


def _spatial(
    config: resnet.ResNetConfig, group: int, width: int, before: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float]:
    """Returns what one spatial layer from map `before` to map `size` needs.

    Its multiply-adds, the elements of its products with parameters but the last, and those of its attention weights.
    """
    kind = resnet.spatial_kind(config, group)
    pixels = size[0] * size[1]
    if kind == "attention":  # on the incoming map; a pool reduces it afterwards
        seen = before[0] * before[1]
        # Projections of query, value and key; for each neighbor the products with value, key and relative position.
        projections, products = 2 + config.content, 1 + config.content + (config.position == "relative")
        macs = seen * (projections * width**2 + products * config.kernel_size**2 * width)
        # The default back end recomputes its logits, so q, k and v are all that is kept.
        return macs, projections * seen * width, 0
    if kind == "convolution":
        return 9 * pixels * width**2, 0, 0
    keys, values = spatial.augmented_dims(width, config.heads, config.key_fraction, config.value_fraction)
    rows, columns = size
    if resnet.attends_to_half(config, size):
        rows, columns = -(-rows // 2), -(-columns // 2)
    seen = rows * columns
    macs = 9 * pixels * width * (width - values) + seen * (width * (2 * keys + values) + values**2)
    macs += seen**2 * (keys + values) + seen * (2 * rows + 2 * columns - 2) * keys
    return macs, seen * (2 * keys + 2 * values), 2 * config.heads * seen**2
