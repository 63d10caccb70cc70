"""How each library names the parameters of the networks that are here: one table for each family.

A row is `ours: theirs`. Of the numbers in a name, {i} is a layer of a ViT; {s} is a stage of a Swin from 0, {next} the
stage after it, and {b} a block of the stage. A row of a module stands for its kernel, bias and scale; rows with the
same name are one tensor, joined in their order. After "|" stands how an array that is no module's lies in their file, a
kind of convert.py.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

Rows = dict[str, str]


class Family(NamedTuple):
    """A family of networks as a library names it.

    Attributes:
        name: for messages.
        layout: "timm", "huggingface", "open_clip" or "big_vision".
        table: see above.
        marker: a regular expression; one of the tensors' names must match it as a whole.
        usual: fields of the model that the family's networks have, where neither the file nor a config says it.
        pixels: the key of `normalisation.FAMILIES` for files that do not say it.
        rows: which of "class" and "registers" have a row in the position table; None: any.
        ignored: regular expressions of names that hold no parameter of the image model.
    """

    name: str
    layout: str
    table: Rows
    marker: str
    usual: Mapping[str, Any]
    pixels: str | None = None
    rows: tuple[str, ...] | None = None
    ignored: tuple[str, ...] = ()


def _at(ours: str, theirs: str, rows: Rows) -> Rows:
    """Returns rows below a prefix of ours and one of theirs."""
    return {ours + key: theirs + value for key, value in rows.items()}


_PARTS = ("query", "key", "value")
_FC = {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
_BIAS_TABLE = "relative_position_bias_table"

# ---- timm, and the official files of DeiT, DINO, DINOv2, MAE and Swin

_TIMM_BLOCK = {
    "norm1": "norm1",
    **{f"attention/{part}": "attn.qkv" for part in _PARTS},
    "attention/out": "attn.proj",
    "norm2": "norm2",
    **_FC,
}
TIMM_VIT = {
    "embedding": "patch_embed.proj",
    "position_embedding": "pos_embed|lead",
    "class_token": "cls_token|lead",
    "registers": "reg_token|lead",
    "pre_norm": "norm_pre",
    **_at("blocks/", "blocks.{i}.", {"mlp/gate": "mlp.fc1", **_TIMM_BLOCK}),
    **_at("blocks/", "blocks.{i}.", {f"attention/{part}_norm": f"attn.{part[0]}_norm" for part in _PARTS[:2]}),
    **_at("blocks/", "blocks.{i}.", {f"layerscale{n}": f"ls{n}.gamma|same" for n in (1, 2)}),
    "norm": "norm",
    "pool/probe": "attn_pool.latent|lead",
    **_at("pool/attention/", "attn_pool.", {"query": "q", "key": "kv", "value": "kv", "out": "proj"}),
    **_at("pool/", "attn_pool.", {"norm": "norm", **_FC}),
    "pre_logits": "pre_logits.fc",
    "head": "head",
}
TIMM_SWIN = {
    "embedding": "patch_embed.proj",
    "embedding_norm": "patch_embed.norm",
    "position_embedding": "absolute_pos_embed|lead",
    **_at("merging/", "layers.{next}.downsample.", {"norm": "norm", "reduction": "reduction"}),
    **_at("blocks/", "layers.{s}.blocks.{b}.", _TIMM_BLOCK),
    f"blocks/attention/{_BIAS_TABLE}": f"layers.{{s}}.blocks.{{b}}.attn.{_BIAS_TABLE}|same",
    "norm": "norm",
    "head": "head.fc",
}
TIMM_SWIN2 = {
    **TIMM_SWIN,
    **_at(
        "blocks/attention/",
        "layers.{s}.blocks.{b}.attn.",
        {
            "query/bias": "q_bias|flat",  # there is none of the keys
            "value/bias": "v_bias|flat",
            "logit_scale": "logit_scale|column",
            "cpb_mlp/up": "cpb_mlp.0",
            "cpb_mlp/down": "cpb_mlp.2",
        },
    ),
}

# ---- transformers

_EMBEDDINGS = {
    "embedding": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings|lead",
    "class_token": "embeddings.cls_token|lead",
}
_END = {"norm": "layernorm", "pre_logits": "pooler.dense", "head": "classifier"}
_LAYERSCALE = {f"layerscale{n}": f"layer_scale{n}.lambda1|same" for n in (1, 2)}


def _block(owner: str) -> Rows:
    return {
        "norm1": "layernorm_before",
        **{f"attention/{part}": f"attention.{owner}.{part}" for part in _PARTS},
        "attention/out": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    }


HF_VIT = {
    **_EMBEDDINGS,
    "registers": "embeddings.distillation_token|lead",
    **_at("blocks/", "encoder.layer.{i}.", _block("attention")),
    **_END,
}
# The gated MLP of g/14 has one matrix for both of its halves.
_DINOV2_BLOCK = _block("attention") | {"norm1": "norm1", "norm2": "norm2", **_FC, **_LAYERSCALE}
HF_DINOV2 = {
    **_EMBEDDINGS,
    "registers": "embeddings.register_tokens|lead",
    **_at("blocks/", "encoder.layer.{i}.", {"mlp/gate": "mlp.fc1", **_DINOV2_BLOCK}),
    **_END,
}
HF_DINOV3 = {
    "embedding": "embeddings.patch_embeddings",
    "class_token": "embeddings.cls_token|lead",
    "registers": "embeddings.register_tokens|lead",
    **_at(
        "blocks/",
        "layer.{i}.",
        {
            "norm1": "norm1",
            **{f"attention/{part}": f"attention.{part[0]}_proj" for part in _PARTS},
            "attention/out": "attention.o_proj",
            "norm2": "norm2",
            **{f"mlp/{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
            **_LAYERSCALE,
        },
    ),
    "norm": "norm",
    "head": "classifier",
}
_TOWER_BLOCK = {
    "norm1": "layer_norm1",
    **{f"attention/{part}": f"self_attn.{part[0]}_proj" for part in _PARTS},
    "attention/out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    **_FC,
}
_TOWER = {
    "embedding": "embeddings.patch_embedding",
    "position_embedding": "embeddings.position_embedding.weight|same",
    **_at("blocks/", "encoder.layers.{i}.", _TOWER_BLOCK),
    "norm": "post_layernorm",
    "head": "classifier",
}
HF_SIGLIP = {
    **_TOWER,
    "pool/probe": "head.probe|lead",
    **_at("pool/attention/", "head.attention.", dict.fromkeys(_PARTS, "in_proj") | {"out": "out_proj"}),
    **_at("pool/", "head.", {"norm": "layernorm", **_FC}),
}
HF_CLIP = {**_TOWER, "class_token": "embeddings.class_embedding|flat", "pre_norm": "pre_layrnorm"}
HF_SWIN = {
    "embedding": "embeddings.patch_embeddings.projection",
    "embedding_norm": "embeddings.norm",
    "position_embedding": "embeddings.position_embeddings|lead",
    **_at("merging/", "encoder.layers.{s}.downsample.", {"norm": "norm", "reduction": "reduction"}),
    **_at("blocks/", "encoder.layers.{s}.blocks.{b}.", _block("self")),
    **_at(
        "blocks/attention/",
        "encoder.layers.{s}.blocks.{b}.attention.self.",
        {
            _BIAS_TABLE: f"{_BIAS_TABLE}|same",
            "logit_scale": "logit_scale|column",
            "cpb_mlp/up": "continuous_position_bias_mlp.0",
            "cpb_mlp/down": "continuous_position_bias_mlp.2",
        },
    ),
    "norm": "layernorm",
    "head": "classifier",
}

# ---- OpenCLIP, and google-research's .npz files

OPEN_CLIP = {
    "embedding": "conv1",
    "position_embedding": "positional_embedding|same",
    "class_token": "class_embedding|flat",
    "pre_norm": "ln_pre",
    **_at(
        "blocks/",
        "transformer.resblocks.{i}.",
        {
            "norm1": "ln_1",
            **{f"attention/{part}": "attn.in_proj" for part in _PARTS},
            "attention/out": "attn.out_proj",
            "norm2": "ln_2",
            "mlp/up": "mlp.c_fc",
            "mlp/down": "mlp.c_proj",
        },
    ),
    "norm": "ln_post",
    "head": "classifier",
}
_FLAX = {
    **{f"attention/{part}": f"MultiHeadDotProductAttention_0/{part}" for part in (*_PARTS, "out")},
    "mlp/up": "MlpBlock_0/Dense_0",
    "mlp/down": "MlpBlock_0/Dense_1",
}
BIG_VISION = {
    "embedding": "embedding",
    "position_embedding": "pos_embedding|lead",
    "class_token": "cls|lead",
    **_at("blocks/", "Transformer/encoderblock_{i}/", {"norm1": "LayerNorm_0", "norm2": "LayerNorm_1", **_FLAX}),
    "norm": "Transformer/encoder_norm",
    **_at("pool/", "MAPHead_0/", {"probe": "probe|lead", "norm": "LayerNorm_0", **_FLAX}),
    "pre_logits": "pre_logits",
    "head": "head",
}

BUFFERS = r".*\.(relative_position_index|attn_mask|relative_coords_table|position_ids)"
_BUFFERS = (BUFFERS,)
_MASK = (r"(embeddings\.)?mask_token", r"decoder_.*|decoder\..*")  # of the pretraining of MAE and DINOv2
_SWIN = {"gelu": "exact", "norm_eps": 1e-5}
_TOKEN = {"gelu": "exact", "pool": "token"}
FAMILIES = {
    family.name: family
    for family in (
        Family("Swin V2", "timm", TIMM_SWIN2, r"layers\.0\.blocks\.0\.attn\.q_bias", _SWIN, "swin", (), _BUFFERS),
        Family(
            "Swin", "timm", TIMM_SWIN, r"layers\.0\.blocks\.0\.attn\.qkv\.weight", _SWIN, "swin", (), _BUFFERS
        ),
        Family(
            "ViT", "timm", TIMM_VIT, r"patch_embed\.proj\.weight", {"gelu": "exact", "norm_eps": 1e-6}, ignored=_MASK
        ),
        Family(
            "Swin of transformers", "huggingface", HF_SWIN, r"encoder\.layers\.0\.blocks\.0\..*", _SWIN, "swin", (),
            _BUFFERS,
        ),
        Family(
            "DINOv2", "huggingface", HF_DINOV2, r"encoder\.layer\.0\.layer_scale1\.lambda1",
            _TOKEN | {"norm_eps": 1e-6}, "dino", ("class",), _MASK,
        ),
        Family(
            "DINOv3", "huggingface", HF_DINOV3, r"layer\.0\.attention\.q_proj\.weight",
            _TOKEN | {"norm_eps": 1e-5, "position": "rope"}, "dino", (), _MASK,
        ),
        Family(
            "ViT of transformers", "huggingface", HF_VIT, r"embeddings\.patch_embeddings\.projection\.weight",
            _TOKEN | {"norm_eps": 1e-12}, None, ("class", "registers"), _MASK,
        ),
        Family(
            "CLIP", "huggingface", HF_CLIP, r"embeddings\.class_embedding",
            _TOKEN | {"gelu": "quick", "norm_eps": 1e-5}, "clip", ("class",), _BUFFERS,
        ),
        Family(
            "SigLIP", "huggingface", HF_SIGLIP, r"embeddings\.patch_embedding\.weight",
            {"gelu": "tanh", "norm_eps": 1e-6}, "siglip", (), _BUFFERS,
        ),
        Family(
            "OpenCLIP", "open_clip", OPEN_CLIP, r"conv1\.weight", _TOKEN | {"norm_eps": 1e-5}, "clip", ("class",),
            ("proj",),
        ),
        Family("ViT of google-research", "big_vision", BIG_VISION, r"embedding/kernel",
               {"gelu": "tanh", "norm_eps": 1e-6}, "google .npz",
               ignored=(r"outside:.*",)),
    )
}  # fmt: skip
