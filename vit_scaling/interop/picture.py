"""What was understood of a weight file, as a drawing for the terminal."""

import numpy as np

from vit_scaling.interop import imagenet21k
from vit_scaling.interop.weights import Weights
from vit_scaling.models import layers, swin, vit

POOLS = {
    "gap": "mean of the patches",
    "max": "maximum of the patches",
    "avgmax": "half mean, half maximum of the patches",
    "map": "attention pooling",
    "token": "class token",
    "token+gap": "class token and mean of the patches",
    "token+register": "class and distillation token",
}


def picture(weights: Weights, asked: str = "") -> str:
    """Returns the network from images to classes as boxes, and below them what was said, assumed and left out.

    Args:
        weights: as read.
        asked: what the user asked for beside the file.
    """
    steps = _boxes([_pixels(weights), *_network(weights), _classes(weights)])
    names, total = weights.class_names, sum(leaf.size for leaf in weights.leaves.values())
    facts = {
        "network": f"{_title(weights)}, {total:,} parameters",
        "names": weights.family or weights.layout,
        "normalisation": str(weights.normalisation or "not said: give --normalisation"),
        "classes": f"{weights.num_classes:,}{', from zero' if weights.fresh_head else ''}"
        if weights.num_classes
        else "none",
        "class names": ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "not said",
        "not said by the file, taken as usual": ", ".join(weights.assumed) or "nothing",
        "left out": "; ".join(weights.notes) or "nothing",
        "asked for": asked or "nothing",
    }
    width = max(map(len, facts))
    return "\n".join([steps, "", *(f"{name:{width}s}  {value}" for name, value in facts.items())])


def table(weights: Weights) -> str:
    """Returns every parameter with its shape, mean and standard deviation."""
    width = max(len(path) for path in weights.leaves)
    rows = [f"{'parameter':{width}s}  {'shape':22s}  {'mean':>7s}  {'std':>6s}"]
    for path, leaf in weights.leaves.items():
        mean, std = (float(np.mean(leaf)), float(np.std(leaf))) if leaf.size else (0.0, 0.0)
        rows.append(f"{path:{width}s}  {leaf.shape!s:22s}  {mean:+7.3f}  {std:6.3f}")
    return "\n".join(rows)


def _pixels(weights: Weights) -> list[str]:
    height, width = weights.image_size
    return [f"image {height} x {width}", "(x / 255 - mean) / std"]


def _network(weights: Weights) -> list[list[str]]:
    config = weights.config
    if isinstance(config, vit.ViTConfig):
        rows, columns = layers.grid_size(weights.image_size, config.patch)
        extra = [f"+ class token{'' if config.pool in vit.TOKEN_POOLS else ', not read'}"] if _has_class(config) else []
        extra += [f"+ {config.registers} registers"] if config.registers else []
        blocks = [
            f"{config.depth} blocks of width {config.width}",
            f"{config.heads} heads, MLP {config.mlp} ({_activation(config)})",
            f"{config.norm}, epsilon {config.norm_eps:g}",
        ]
        pool = [POOLS[config.pool]] + (["then the last norm"] if config.pool_norm else [])
        grid = [f"{rows} x {columns} patches", f"of {config.patch[0]} x {config.patch[1]} pixels"]
        return [[*grid, f"positions: {config.position}", *extra], blocks, pool]
    if isinstance(config, swin.SwinConfig):
        grids = swin.stage_grids(config, weights.image_size)
        sides = swin.stage_windows(config, weights.image_size)
        stages = [
            [
                f"stage {s + 1}: {grids[s][0]} x {grids[s][1]}",
                f"{config.depths[s]} blocks of width {config.width * 2**s}",
                f"{config.heads[s]} heads, window {sides[s]}",
            ]
            for s in range(len(config.depths))
        ]
        return [*stages, ["mean of the tokens"]]
    return [[type(config).__name__]]


def _classes(weights: Weights) -> list[str]:
    if not weights.num_classes:
        return ["features", "(no classifier)"]
    known = imagenet21k.NUMBERINGS.get(weights.num_classes)
    return [f"{weights.num_classes:,} classes", *([known] if known else [])] + (
        ["from zero: train it"] if weights.fresh_head else []
    )


def _has_class(config: vit.ViTConfig) -> bool:
    return vit.prefix_tokens(config) > config.registers


def _activation(config: vit.ViTConfig) -> str:
    return "SwiGLU" if config.mlp_kind == "swiglu" else f"GELU {config.gelu}"


def _title(weights: Weights) -> str:
    """Returns the published name of a network's size, where it has one."""
    config = weights.config
    if isinstance(config, vit.ViTConfig):
        own = (config.width, config.depth, config.mlp, config.heads)
        size = next((name for name, size in vit.SIZES.items() if tuple(size) == own), "of no published size")
        patch = "x".join(str(side) for side in dict.fromkeys(config.patch))
        return f"ViT {size}, patch {patch}"
    if isinstance(config, swin.SwinConfig):
        return f"Swin V{config.version}, width {config.width}, depths {'-'.join(map(str, config.depths))}"
    return type(config).__name__.removesuffix("Config")


def _boxes(boxes: list[list[str]]) -> str:
    """Returns boxes one below the other, joined by arrows."""
    width = max(len(line) for box in boxes for line in box)
    border = "+" + "-" * (width + 2) + "+"
    drawn = ["\n".join([border, *(f"| {line:^{width}s} |" for line in box), border]) for box in boxes]
    return f"\n{'v':^{width + 4}s}\n".join(drawn)
