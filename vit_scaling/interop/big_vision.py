"""Names of google-research's .npz files: vision_transformer (ViT, AugReg) and big_vision, old and new.

    prefix       none or opt/target/ (vision_transformer), params/, params/img/ (big_vision)
    positions    Transformer/posembed_input/pos_embedding with a row of the class token, or pos_embedding without
    blocks       LayerNorm_0, MultiHeadDotProductAttention_1, LayerNorm_2, MlpBlock_3, or all numbered from 0;
                 one after the other (encoderblock_3/...) or stacked (encoderblock/... with a leading axis)
    head         head/..., [pre_logits/...], [MAPHead_0/...]

GELU is Flax's, the tanh approximation. Read, never written.
"""

import dataclasses
import functools
import re

from vit_scaling.interop import convert
from vit_scaling.interop.families import Family
from vit_scaling.interop.layout import Json, Layout, Tensors, Told
from vit_scaling.interop.stored import Stored

# The longest prefix under which a patch embedding lies; what is beside it is another tower, or the optimizer's state.
PREFIXES = ("params/img/", "opt/target/", "target/", "params/", "")
POSITIONS = "pos_embedding"
_RENAME = (
    (r"^Transformer/posembed_input/pos_embedding$", POSITIONS),
    (r"MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    (r"(encoderblock[_\d]*)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"MlpBlock_3/", "MlpBlock_0/"),
)


def canonical(tensors: Tensors) -> dict[str, Stored]:
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in tensors), "")
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            renamed[f"outside:{name}"] = tensor
            continue
        name = name.removeprefix(prefix)
        for pattern, replacement in _RENAME:
            name = re.sub(pattern, replacement, name)
        if name.startswith("Transformer/encoderblock/") and tensor.shape:
            whole = dataclasses.replace(tensor, read=functools.cache(tensor.read))
            for index in range(min(tensor.shape[0], convert.MAX_LAYERS + 1)):
                renamed[name.replace("encoderblock/", f"encoderblock_{index}/")] = whole.layer(index)
        else:
            renamed[name] = tensor
    return renamed


def told(neighbour: Json | None, tensors: Tensors, family: Family) -> Told:
    del neighbour, family
    pool = "map" if "MAPHead_0/probe" in tensors else "token" if "cls" in tensors else "gap"
    return Told({"pool": pool})


LAYOUT = Layout(canonical, told)
