"""Writes vit.json: features of small DINOv3, DINOv2 (SwiGLU) and CLIP networks by transformers.

    python -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.24.0
    reference/bin/python tests/golden/make_vit.py

Weights and images follow fill.py. A parameter's name is translated to ours, filled there, and brought to the
reference's shape.
"""

import json
import pathlib
import re

import fill
import numpy as np
import torch
import transformers

HEADS, LAYERS = 2, 2
COMMON = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_channels": 3}
DINOV3 = {**COMMON, "patch_size": 4, "image_size": 16, "num_register_tokens": 3, "layer_norm_eps": 1e-5}
REFERENCES = {
    "dinov3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**DINOV3, intermediate_size=24)),
    "dinov3 gated": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**DINOV3, intermediate_size=24, use_gated_mlp=True, hidden_act="silu")
    ),
    "dinov2 swiglu": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**COMMON, patch_size=4, image_size=16, use_swiglu_ffn=True, mlp_ratio=2)
    ),
    "clip": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**COMMON, patch_size=4, image_size=16, intermediate_size=24)
    ),
}
IMAGES = {"dinov3": (2, 16, 24, 3), "dinov3 gated": (2, 16, 24, 3), "dinov2 swiglu": (2, 16, 16, 3)}
# Their name and ours. The first that matches counts; what is not read by the class token maps to None.
NAMES = (
    (r".*mask_token|.*position_ids", None),
    (r".*(?:cls_token|class_embedding)", "class_token"),
    (r".*register_tokens", "registers"),
    (r".*position_embedding.*", "position_embedding"),
    (r".*patch_embedding.*\.(weight|bias)", r"embedding/\1"),
    (r".*pre_?la?yrnorm\.(weight|bias)", r"pre_norm/\1"),
    (r"(?:.*\.)?layers?\.(\d+)\.(?:norm|layer_norm)([12])\.(weight|bias)", r"blocks/\1/norm\2/\3"),
    (r"(?:.*\.)?layers?\.(\d+)\..*(q|k|v|o|out)_proj\.(weight|bias)", r"blocks/\1/attention/\2/\3"),
    (r"(?:.*\.)?layers?\.(\d+)\..*layer_scale([12])\.lambda1", r"blocks/\1/layerscale\2"),
    (r"(?:.*\.)?layers?\.(\d+)\.mlp\.(?:fc1|up_proj)\.(weight|bias)", r"blocks/\1/mlp/up/\2"),
    (r"(?:.*\.)?layers?\.(\d+)\.mlp\.gate_proj\.(weight|bias)", r"blocks/\1/mlp/gate/\2"),
    (r"(?:.*\.)?layers?\.(\d+)\.mlp\.(?:fc2|down_proj)\.(weight|bias)", r"blocks/\1/mlp/down/\2"),
    (r"(?:.*\.)?(?:norm|layernorm|post_layernorm)\.(weight|bias)", r"norm/\1"),
)
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out", "out": "out"}


def our_name(name):
    for pattern, ours in NAMES:
        if match := re.fullmatch(pattern, name):
            if ours is None:
                return None
            ours = match.expand(ours)
            ours = re.sub(r"attention/(\w+)/", lambda m: f"attention/{PROJECTIONS[m.group(1)]}/", ours)
            return ours.replace("weight", "scale" if "norm" in ours else "kernel")
    raise KeyError(name)


def values(name, shape):
    """Returns the values of a parameter of ours, in the shape of theirs."""
    if name.endswith("kernel") and len(shape) == 4:
        return fill.leaf(name, (shape[2], shape[3], shape[1], shape[0])).transpose(3, 2, 0, 1)
    if name.endswith("kernel"):
        inputs, outputs = shape[1], shape[0]
        if "attention/out" in name:
            return fill.leaf(name, (HEADS, inputs // HEADS, outputs)).reshape(inputs, outputs).T
        if "attention" in name:
            return fill.leaf(name, (inputs, HEADS, outputs // HEADS)).reshape(inputs, outputs).T
        return fill.leaf(name, (inputs, outputs)).T
    if name.endswith("bias") and "attention" in name and "out" not in name:
        return fill.leaf(name, (HEADS, shape[0] // HEADS)).reshape(shape)
    if name == "position_embedding":  # their first row belongs to the class token; ours adds it to the token
        rows = np.zeros(shape, np.float32)
        rows.reshape(-1, shape[-1])[1:] = fill.leaf(name, (rows.size // shape[-1] - 1, shape[-1]))
        return rows
    if name in ("class_token", "registers"):
        return fill.leaf(name, (np.prod(shape) // shape[-1] if len(shape) > 1 else 1, shape[-1])).reshape(shape)
    return fill.leaf(name, shape)


def main():
    torch.set_default_dtype(torch.float64)
    goldens = {}
    for case, build in REFERENCES.items():
        model = build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ours := our_name(name):
                    parameter.copy_(torch.from_numpy(np.array(values(ours, tuple(parameter.shape)), np.float64)))
            images = fill.images(case, IMAGES.get(case, (2, 16, 16, 3)))
            out = model(pixel_values=torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2))
        feature = out.pooler_output if case == "clip" else out.last_hidden_state[:, 0]
        goldens[case] = {"image": list(images.shape), "features": np.round(feature.numpy(), 7).tolist()}
    path = pathlib.Path(__file__).parent / "vit.json"
    lines = ",\n".join(f'"{case}": {json.dumps(golden)}' for case, golden in goldens.items())
    path.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
