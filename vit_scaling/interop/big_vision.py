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

from vit_scaling.interop import convert, normalisation
from vit_scaling.interop.convert import Entry, entry
from vit_scaling.interop.layout import Described, Json, Layout, Tensors, shape_of, vit_grid
from vit_scaling.interop.stored import Stored
from vit_scaling.models import ModelConfig, vit

# The longest prefix under which a patch embedding lies; what is beside it is another tower, or the optimizer's state.
PREFIXES = ("params/img/", "opt/target/", "target/", "params/", "")
IGNORED = (r"outside:.*",)
POSITIONS = "pos_embedding"
BLOCK = r"Transformer/encoderblock_(\d+)/"
_RENAME = (
    (r"^Transformer/posembed_input/pos_embedding$", POSITIONS),
    (r"MultiHeadDotProductAttention_1/", "MultiHeadDotProductAttention_0/"),
    (r"(encoderblock[_\d]*)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"MlpBlock_3/", "MlpBlock_0/"),
)


def canonical(tensors: Tensors) -> dict[str, Stored] | None:
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in tensors), None)
    if prefix is None:
        return None
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


def describe(tensors: Tensors, neighbour: Json | None, trained_size: tuple[int, int] | None) -> Described:
    del neighbour
    height, width, _, features = shape_of(tensors, "embedding/kernel", 4)
    token = "cls" in tensors
    rows = shape_of(tensors, POSITIONS, 3)[1]
    size, prefix_rows = vit_grid(rows, (height, width), (1, 0) if token else (0,), trained_size, square=True)
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel"
    config = vit.ViTConfig(
        width=features,
        depth=convert.count(tensors, BLOCK),
        mlp=shape_of(tensors, "Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel", 2)[1],
        heads=shape_of(tensors, attention, 3)[1],
        patch=(height, width),
        pool="map" if "MAPHead_0/probe" in tensors else "token" if token else "gap",
        pre_logits="pre_logits/kernel" in tensors,
        gelu="tanh",
        norm_eps=1e-6,
    )
    classes = shape_of(tensors, "head/kernel", 2)[1] if "head/kernel" in tensors else None
    found = normalisation.family("google .npz")
    return Described(config, size, classes, ("gelu", "norm_eps"), prefix_rows, normalisation=found)


def entries(config: ModelConfig, prefix_rows: int, head: bool) -> list[Entry]:
    assert isinstance(config, vit.ViTConfig)

    def same(theirs: str, ours: str, *names: str) -> list[Entry]:
        return [entry(f"{theirs}/{name}", f"{ours}/{name}", "same") for name in names or ("kernel", "bias")]

    def attention(theirs: str, ours: str) -> list[Entry]:
        theirs = f"{theirs}/MultiHeadDotProductAttention_0"
        return [e for part in ("query", "key", "value", "out") for e in same(f"{theirs}/{part}", f"{ours}/{part}")]

    def mlp(theirs: str, ours: str) -> list[Entry]:
        return same(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}/up") + same(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}/down")

    found = same("embedding", "embedding")
    found.append(
        Entry(POSITIONS, ("class_token+", "position_embedding"), "lead", axis=1)
        if prefix_rows
        else entry(POSITIONS, "position_embedding", "lead")
    )
    found += [entry("cls", "class_token", "lead")] if config.pool == "token" else []
    for i in range(config.depth):
        theirs, ours = f"Transformer/encoderblock_{i}", f"blocks/{i}"
        found += same(f"{theirs}/LayerNorm_0", f"{ours}/norm1", "scale", "bias")
        found += attention(theirs, f"{ours}/attention")
        found += same(f"{theirs}/LayerNorm_1", f"{ours}/norm2", "scale", "bias") + mlp(theirs, f"{ours}/mlp")
    found += same("Transformer/encoder_norm", "norm", "scale", "bias")
    if config.pool == "map":
        found.append(entry("MAPHead_0/probe", "pool/probe", "lead"))
        found += attention("MAPHead_0", "pool/attention")
        found += same("MAPHead_0/LayerNorm_0", "pool/norm", "scale", "bias") + mlp("MAPHead_0", "pool/mlp")
    found += same("pre_logits", "pre_logits") if config.pre_logits else []
    return found + (same("head", "head") if head else [])


LAYOUT = Layout("big_vision", canonical, IGNORED, describe, entries, None)
