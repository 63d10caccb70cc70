"""Writes swin.npz: logits of the networks in swin.json by transformers' Swin and Swinv2, an independent reference.

    python -m venv reference
    reference/bin/pip install torch==2.13.0 transformers==5.23.0
    reference/bin/python tests/golden/make_swin.py

Weights and images follow fill.py. A name of theirs is translated to ours, with its shape; the values are made for
ours and brought to theirs.
"""

import json
import pathlib
import re

import fill
import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent

# Their name of a layer, in either of the two libraries' models, and ours. The first that matches counts.
NAMES = (
    (r"classifier", "head"),
    (r"embeddings.patch_embeddings.projection", "embedding"),
    (r"embeddings.norm", "embedding_norm"),
    (r"layernorm", "norm"),
    (r"layers.\d+.downsample.(norm|reduction)", r"merging/\1"),
    (r".*(layernorm_before)", "norm1"),
    (r".*(layernorm_after)", "norm2"),
    (r".*attention.(?:self.)?(query|key|value)", r"attention/\1"),
    (r".*attention.q_proj", "attention/query"),
    (r".*attention.k_proj", "attention/key"),
    (r".*attention.v_proj", "attention/value"),
    (r".*attention.(?:o_proj|output.dense)", "attention/out"),
    (r".*continuous_position_bias_mlp.0", "attention/cpb_mlp/up"),
    (r".*continuous_position_bias_mlp.2", "attention/cpb_mlp/down"),
    (r".*(?:mlp.fc1|intermediate.dense)", "mlp/up"),
    (r".*(?:mlp.fc2|output.dense)", "mlp/down"),
)


def build(
    version, image_size, num_classes, width, depths, heads, window, absolute_position=False, pretrained_windows=None
):
    fields = {
        "image_size": image_size,
        "embed_dim": width,
        "depths": depths,
        "num_heads": heads,
        "window_size": window,
        "num_labels": num_classes,
        "use_absolute_embeddings": absolute_position,
        "attn_implementation": "eager",
    }
    if version == 1:
        return transformers.SwinForImageClassification(transformers.SwinConfig(**fields)).eval()
    fields["pretrained_window_sizes"] = pretrained_windows or [0] * len(depths)
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**fields)).eval()


def our_value(name, shape, heads):
    """Returns the value, in their layout, of the parameter they call `name`; `heads` of each stage."""
    name = re.sub(r"^swin(v2)?\.(encoder\.)?", "", name)
    place, head_count = "", None
    if found := re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)\.)?", name):
        place, head_count = f"stage{int(found[1]) + 1}/", heads[int(found[1])]
        if found[2] is not None:
            place += f"blocks/{int(found[2]) // 2}/{('plain', 'shifted')[int(found[2]) % 2]}/"
    if name.endswith("relative_position_bias_table"):
        return fill.leaf(place + "attention/relative_position_bias_table", shape)
    if name.endswith("logit_scale"):
        return fill.leaf(place + "attention/logit_scale", (shape[0],)).reshape(shape)
    if name == "embeddings.position_embeddings":
        return fill.leaf("position_embedding", shape[1:]).reshape(shape)
    layer, kind = name.rsplit(".", 1)
    ours = place + next(re.sub(theirs, ours, layer) for theirs, ours in NAMES if re.fullmatch(theirs, layer))
    to_heads, from_heads = re.search(r"attention/(query|key|value)$", ours), ours.endswith("attention/out")
    if kind == "bias":
        our_shape = (head_count, shape[0] // head_count) if to_heads else shape
        return fill.leaf(ours + "/bias", our_shape).reshape(shape)
    if len(shape) == 1:
        return fill.leaf(ours + "/scale", shape)
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        return fill.leaf(ours + "/kernel", (height, width, inputs, outputs)).transpose(3, 2, 0, 1)
    outputs, inputs = shape
    our_shape = (inputs, outputs)
    if to_heads:
        our_shape = (inputs, head_count, outputs // head_count)
    elif from_heads:
        our_shape = (head_count, inputs // head_count, outputs)
    return fill.leaf(ours + "/kernel", our_shape).reshape(inputs, outputs).T


def logits(name, case):
    config = case["config"]
    model = build(image_size=tuple(case["image_size"]), num_classes=case["num_classes"], **config)
    with torch.no_grad():
        for theirs, parameter in model.named_parameters():
            value = our_value(theirs, tuple(parameter.shape), config["heads"])
            parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
        images = fill.images(name, (2, *case["image_size"], 3))
        return model(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()


def main():
    cases = json.loads((FOLDER / "swin.json").read_text())
    np.savez(FOLDER / "swin.npz", **{name: logits(name, case) for name, case in cases.items()})
    for name, values in np.load(FOLDER / "swin.npz").items():
        print(f"{name}: {values.shape}, deviation {values.std():.3f}")


if __name__ == "__main__":
    main()
