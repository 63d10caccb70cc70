"""One rule that gives every parameter a value by its name and shape, so that a golden is only its logits.

Both sides of a comparison, this package and a reference library elsewhere, fill their weights by this rule; needs
NumPy alone. Nothing is trivial: biases, norms, tables and scales are all away from where they start.
"""

import zlib

import numpy as np

# The last part of a name and what its values are: mean, and spread around it (None: see `leaf`).
RULES = {
    "kernel": (0.0, None),
    "bias": (0.0, 0.1),
    "scale": (1.0, 0.2),
    "relative_position_bias_table": (0.0, 1.0),
    "logit_scale": (np.log(10.0), 0.5),
    "position_embedding": (0.0, 0.5),
    "class_token": (0.0, 0.5),
    "registers": (0.0, 0.5),
    "probe": (0.0, 0.5),
    "layerscale1": (0.5, 0.2),
    "layerscale2": (0.5, 0.2),
}


def normal(name, shape):
    """Standard normal numbers that belong to a name; RandomState's stream never changes."""
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def leaf(name, shape):
    """Returns the values of one parameter of one layer, float32.

    Kernels spread by the fourth root of their size, the mean of what fan-in and fan-out ask for.

    name: its path, a layer's number in place of the stack: "blocks/3/attention/query/kernel".
    """
    mean, spread = RULES[name.rsplit("/", 1)[-1]]
    spread = np.prod(shape) ** -0.25 if spread is None else spread
    return (mean + spread * normal(name, shape)).astype(np.float32)


def tree(parameters, prefix="", layer=""):
    """Returns a nested dict like this one, filled; leaves below a key `blocks` layer by layer, and stacked again.

    prefix, layer: the name down to and including `blocks`, and from there, if a stack is being filled.
    """
    filled = {}
    for key, value in parameters.items():
        if isinstance(value, dict) and key == "blocks":
            filled[key] = tree(value, f"{prefix}{key}/", "/")
        elif isinstance(value, dict):
            filled[key] = tree(value, prefix, f"{layer}{key}/") if layer else tree(value, f"{prefix}{key}/")
        elif layer:
            names = [f"{prefix}{i}{layer}{key}" for i in range(value.shape[0])]
            filled[key] = np.stack([leaf(name, value.shape[1:]) for name in names])
        else:
            filled[key] = leaf(f"{prefix}{key}", value.shape)
    return filled


def images(name, shape):
    """Returns images [B, H, W, 3] that belong to a name, float32."""
    return normal(name, shape).astype(np.float32)


def reference_leaf(name, shape):
    """Returns the values, float32, of a parameter that a reference library calls `name`."""
    spread = np.prod(shape) ** -0.25 if name.endswith("weight") and len(shape) > 1 else 0.2
    scale = name.endswith("weight") and len(shape) == 1
    if name.endswith("logit_scale"):
        return (np.log(10.0) + 0.5 * normal(name, shape)).astype(np.float32)
    return (scale + spread * normal(name, shape)).astype(np.float32)
