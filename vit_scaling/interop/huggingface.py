"""Names of Hugging Face transformers' tensors: ViT, Siglip's vision tower, Swin and Swinv2.

Files have the names of transformers up to version 4 ("encoder.layer.0.attention.attention.query"), modules of version
5 have others ("layers.0.attention.q_proj"); both are read, the files' are written. Siglip is a ViT without class
token: ForImageClassification pools by the mean, the bare vision model by attention.
"""

import re
from typing import Any

from vit_scaling import UserError
from vit_scaling.interop import convert, normalisation, timm
from vit_scaling.interop.convert import Entry, entry
from vit_scaling.interop.layout import (
    Described,
    Json,
    Layout,
    Tensors,
    shape_of,
    size_pair,
    swin_size,
    vit_grid,
    vit_heads,
)
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.timm import refuse
from vit_scaling.models import ModelConfig, swin, vit
from vit_scaling.ops import windows

IGNORED = (
    r"embeddings\.mask_token",
    r".*\.(relative_position_index|relative_coords_table|position_ids)",
    # Beside an image model in one file: a text tower, and what compares the two.
    r"text_model\..*|logit_scale|logit_bias",
)
ACTIVATIONS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "quick_gelu": "quick",
}
# Newer module names to the files'; the first groups belong to Swin and ViT alike.
_RENAME = (
    (r"^(vit|dinov2|swin|swinv2|vision_model)\.", ""),
    (r"^vision_model\.", ""),
    (r"^layers\.(\d+)\.(?!blocks|downsample)", r"encoder.layer.\1."),
    (
        r"attention\.relative_position_bias\.relative_position_bias_table$",
        r"attention.self.relative_position_bias_table",
    ),
    (r"^(encoder\.layer\.\d+)\.norm1\.", r"\1.layernorm_before."),  # of DINOv2
    (r"^(encoder\.layer\.\d+)\.norm2\.", r"\1.layernorm_after."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"(?<!pooler\.)(?<!head\.)\bmlp\.fc1\.", "intermediate.dense."),
    (r"(?<!pooler\.)(?<!head\.)\bmlp\.fc2\.", "output.dense."),
)
MODEL_TYPES = ("vit", "dinov2", "siglip", "siglip_vision_model", "swin", "swinv2")
_QKV = {"q": "query", "k": "key", "v": "value"}


def canonical(tensors: Tensors) -> dict[str, Any] | None:
    renamed = {}
    siglip = any(name.endswith("embeddings.patch_embedding.weight") for name in tensors)
    if not siglip and not any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in tensors):
        return None
    for name, tensor in tensors.items():
        for pattern, replacement in _RENAME[:2] if siglip else _RENAME:
            name = re.sub(pattern, replacement, name)
        owner = "self" if ".blocks." in name else "attention"
        name = re.sub(r"attention\.([qkv])_proj\.", lambda f: f"attention.{owner}.{_QKV[f[1]]}.", name)  # noqa: B023
        renamed[name] = tensor
    if siglip and "classifier.weight" in renamed:
        # Then the mean of the tokens is classified, and the attention pooling of the pretraining stands idle.
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("head.")}
    if "classifier.weight" in renamed:
        # ForImageClassification reads the class token; a pooler in the same file stands idle.
        renamed = {name: tensor for name, tensor in renamed.items() if not name.startswith("pooler.")}
    return renamed


def describe(tensors: Tensors, neighbour: Json | None, trained_size: tuple[int, int] | None) -> Described:
    told: dict[str, Any] = dict(neighbour or {})
    told = {**told, **(told.get("vision_config") or {})}
    kind = told.get("model_type")
    if kind is not None and kind not in MODEL_TYPES:
        raise UserError(
            f"config.json says model_type {kind!r}; of Hugging Face's models {', '.join(MODEL_TYPES)} are read here"
        )
    assumed = [] if "layer_norm_eps" in told else ["norm_eps"]
    assumed += [] if "hidden_act" in told else ["gelu"]
    activation = str(told.get("hidden_act", "gelu"))
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json's hidden_act is {activation!r}; models here have {', '.join(ACTIVATIONS)}")
    common: dict[str, Any] = {"gelu": ACTIVATIONS[activation]}
    classes = shape_of(tensors, "classifier.weight", 2)[0] if "classifier.weight" in tensors else None
    if any(name.startswith("encoder.layers.0.blocks.") for name in tensors):
        config, tables = _describe_swin(tensors, told, assumed, common)
        size = swin_size(tables, config.window, size_pair(told.get("image_size")) or trained_size)
        unknown = tuple(field for field in assumed if field == "window")
        found, names = normalisation.family("swin"), _class_names(told)
        return Described(config, size, classes, tuple(assumed), 0, unknown, found, names)
    siglip = "embeddings.patch_embedding.weight" in tensors
    config_, rows = _describe_siglip(tensors) if siglip else _describe_vit(tensors)
    heads = told.get("num_attention_heads")
    if heads is None:
        assumed.append("heads")
        heads = vit_heads(config_.width) or config_.width // 64 or 1
    config_.heads = int(heads)
    config_.gelu = "tanh" if siglip and "gelu" in assumed else common["gelu"]
    dino = config_.layerscale is not None
    config_.norm_eps = float(told.get("layer_norm_eps", 1e-6 if siglip or dino else 1e-12))
    prefixes = (1,) if config_.pool == "token" else (0,)
    size, prefix_rows = vit_grid(rows, config_.patch, prefixes, size_pair(told.get("image_size")) or trained_size)
    unknown = ("heads",) if "heads" in assumed and vit_heads(config_.width) is None else ()
    family = normalisation.family("siglip") if siglip else normalisation.family("dino") if dino else None
    names = _class_names(told)
    return Described(config_, size, classes, tuple(assumed), prefix_rows, unknown, family, names)


def _class_names(told: Json) -> tuple[str, ...] | None:
    """Returns the names of id2label in order; None where they are missing or only numbered (LABEL_0)."""
    labels = told.get("id2label") or {}
    names = [labels.get(str(index)) for index in range(len(labels))]
    if not names or any(name is None for name in names) or all(re.fullmatch(r"LABEL_\d+", str(n)) for n in names):
        return None
    return tuple(str(name) for name in names)


def _describe_vit(tensors: Tensors) -> tuple[vit.ViTConfig, int]:
    width, _, *patch = shape_of(tensors, "embeddings.patch_embeddings.projection.weight", 4)
    config = vit.ViTConfig(
        width=width,
        depth=convert.count(tensors, r"encoder\.layer\.(\d+)\."),
        mlp=shape_of(tensors, "encoder.layer.0.intermediate.dense.weight", 2)[0],
        patch=(patch[0], patch[1]),
        pool="token",
        layerscale=1.0 if "encoder.layer.0.layer_scale1.lambda1" in tensors else None,
        qkv_bias="encoder.layer.0.attention.attention.query.bias" in tensors,
        pre_logits="pooler.dense.weight" in tensors,
    )
    return config, shape_of(tensors, "embeddings.position_embeddings", 3)[1]


def _describe_siglip(tensors: Tensors) -> tuple[vit.ViTConfig, int]:
    width, _, *patch = shape_of(tensors, "embeddings.patch_embedding.weight", 4)
    config = vit.ViTConfig(
        width=width,
        depth=convert.count(tensors, r"encoder\.layers\.(\d+)\."),
        mlp=shape_of(tensors, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        patch=(patch[0], patch[1]),
        pool="map" if "head.probe" in tensors else "gap",
    )
    return config, shape_of(tensors, "embeddings.position_embedding.weight", 2)[0]


def _describe_swin(
    tensors: Tensors, told: dict[str, Any], assumed: list[str], common: dict[str, Any]
) -> tuple[swin.SwinConfig, list[tuple[int, ...]]]:
    width, _, *patch = shape_of(tensors, "embeddings.patch_embeddings.projection.weight", 4)
    stages = range(convert.count(tensors, r"encoder\.layers\.(\d+)\."))
    attention = "encoder.layers.{}.blocks.0.attention.self.{}"
    second = attention.format(0, "logit_scale") in tensors
    tables: list[tuple[int, ...]] = []
    if second:
        heads = [shape_of(tensors, attention.format(s, "logit_scale"), 3)[0] for s in stages]
        window = told.get("window_size")
        assumed += [] if window else ["window"]
    else:
        tables = [shape_of(tensors, attention.format(s, "relative_position_bias_table"), 2) for s in stages]
        heads = [table[1] for table in tables]
        window = max(windows.table_window(table[0]) for table in tables)
    pretrained = told.get("pretrained_window_sizes")
    pretrained = tuple(pretrained[: len(heads)]) if second and pretrained and any(pretrained) else None
    config = swin.SwinConfig(
        version=2 if second else 1,
        width=width,
        depths=tuple(convert.count(tensors, rf"encoder\.layers\.{s}\.blocks\.(\d+)\.") for s in stages),
        heads=tuple(heads),
        window=int(window or 8),
        patch=patch[0],
        mlp_ratio=shape_of(tensors, "encoder.layers.0.blocks.0.intermediate.dense.weight", 2)[0] // width,
        absolute_position="embeddings.position_embeddings" in tensors,
        pretrained_windows=pretrained,
        norm_eps=float(told.get("layer_norm_eps", 1e-5)),
        **common,
    )
    return config, tables


def entries(config: ModelConfig, prefix_rows: int, head: bool) -> list[Entry]:
    if isinstance(config, swin.SwinConfig):
        return _swin_entries(config, head)
    assert isinstance(config, vit.ViTConfig)
    found = _vit_entries(config, prefix_rows) if config.pool == "token" else _siglip_entries(config)
    return found + (_linear("classifier", "head") if head else [])


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [entry(f"{theirs}.weight", f"{ours}/scale", "same"), entry(f"{theirs}.bias", f"{ours}/bias", "same")]


def _linear(theirs: str, ours: str, kind: str = "linear", bias: bool = True) -> list[Entry]:
    kernel = entry(f"{theirs}.weight", f"{ours}/kernel", kind)
    return [kernel, entry(f"{theirs}.bias", f"{ours}/bias", "flat")] if bias else [kernel]


def _layer(theirs: str, ours: str, owner: str, norms: tuple[str, str], qkv_bias: bool, key_bias: bool) -> list[Entry]:
    found = _norm(f"{theirs}.layernorm_before", f"{ours}/{norms[0]}")
    for part in ("query", "key", "value"):
        bias = key_bias if part == "key" else qkv_bias
        found += _linear(f"{theirs}.attention.{owner}.{part}", f"{ours}/attention/{part}", bias=bias)
    found += _linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out", "out")
    found += _norm(f"{theirs}.layernorm_after", f"{ours}/{norms[1]}")
    found += _linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/up")
    return found + _linear(f"{theirs}.output.dense", f"{ours}/mlp/down")


def _vit_entries(config: vit.ViTConfig, prefix_rows: int) -> list[Entry]:
    found = [entry("embeddings.cls_token", "class_token", "lead")]
    found.append(
        Entry("embeddings.position_embeddings", ("class_token+", "position_embedding"), "lead", axis=1)
        if prefix_rows
        else entry("embeddings.position_embeddings", "position_embedding", "lead")
    )
    found += _linear("embeddings.patch_embeddings.projection", "embedding", "conv")
    for i in range(config.depth):
        bias = config.qkv_bias
        found += _layer(f"encoder.layer.{i}", f"blocks/{i}", "attention", ("norm1", "norm2"), bias, bias)
        if config.layerscale is not None:
            scale = f"encoder.layer.{i}.layer_scale{{}}.lambda1"
            found += [entry(scale.format(n), f"blocks/{i}/layerscale{n}", "same") for n in (1, 2)]
    return found + _norm("layernorm", "norm") + (_linear("pooler.dense", "pre_logits") if config.pre_logits else [])


def _siglip_entries(config: vit.ViTConfig) -> list[Entry]:
    found = _linear("embeddings.patch_embedding", "embedding", "conv")
    found.append(entry("embeddings.position_embedding.weight", "position_embedding", "same"))
    for i in range(config.depth):
        theirs, ours = f"encoder.layers.{i}", f"blocks/{i}"
        for part in ("query", "key", "value"):
            found += _linear(f"{theirs}.self_attn.{part[0]}_proj", f"{ours}/attention/{part}")
        found += _linear(f"{theirs}.self_attn.out_proj", f"{ours}/attention/out", "out")
        found += _norm(f"{theirs}.layer_norm1", f"{ours}/norm1") + _norm(f"{theirs}.layer_norm2", f"{ours}/norm2")
        found += _linear(f"{theirs}.mlp.fc1", f"{ours}/mlp/up") + _linear(f"{theirs}.mlp.fc2", f"{ours}/mlp/down")
    found += _norm("post_layernorm", "norm")
    if config.pool == "map":
        parts = [f"pool/attention/{part}" for part in ("query", "key", "value")]
        found.append(entry("head.probe", "pool/probe", "lead"))
        found.append(Entry("head.attention.in_proj_weight", tuple(f"{part}/kernel" for part in parts), "linear"))
        found.append(Entry("head.attention.in_proj_bias", tuple(f"{part}/bias" for part in parts), "flat"))
        found += _linear("head.attention.out_proj", "pool/attention/out", "out")
        found += _norm("head.layernorm", "pool/norm")
        found += _linear("head.mlp.fc1", "pool/mlp/up") + _linear("head.mlp.fc2", "pool/mlp/down")
    return found


def _swin_entries(config: swin.SwinConfig, head: bool) -> list[Entry]:
    found = _linear("embeddings.patch_embeddings.projection", "embedding", "conv")
    found += _norm("embeddings.norm", "embedding_norm")
    if config.absolute_position:
        found.append(entry("embeddings.position_embeddings", "position_embedding", "lead"))
    for s, depth in enumerate(config.depths):
        for b in range(depth):
            theirs = f"encoder.layers.{s}.blocks.{b}"
            ours = f"stage{s + 1}/blocks/{b // 2}/{('plain', 'shifted')[b % 2]}"
            found += _layer(theirs, ours, "self", ("norm1", "norm2"), True, config.version == 1)
            theirs, ours = f"{theirs}.attention.self", f"{ours}/attention"
            if config.version == 1:
                table = "relative_position_bias_table"
                found.append(entry(f"{theirs}.{table}", f"{ours}/{table}", "same"))
            else:
                found.append(entry(f"{theirs}.logit_scale", f"{ours}/logit_scale", "column"))
                found += _linear(f"{theirs}.continuous_position_bias_mlp.0", f"{ours}/cpb_mlp/up")
                found += _linear(f"{theirs}.continuous_position_bias_mlp.2", f"{ours}/cpb_mlp/down", bias=False)
        if s < len(config.depths) - 1:
            found += _norm(f"encoder.layers.{s}.downsample.norm", f"stage{s + 1}/merging/norm")
            found += _linear(f"encoder.layers.{s}.downsample.reduction", f"stage{s + 1}/merging/reduction", bias=False)
    found += _norm("layernorm", "norm")
    return found + (_linear("classifier", "head") if head else [])


# ---- export

# Names in a file of ForImageClassification: the model's own prefix on everything but the classifier.
PREFIXES = {"vit": "vit.", "siglip": "vision_model.", "swin": "swin.", "swinv2": "swinv2."}


def file_name(model_type: str, name: str) -> str:
    return name if name.startswith("classifier.") else PREFIXES[model_type] + name


def neighbour(
    config: ModelConfig,
    image_size: tuple[int, int],
    num_classes: int,
    found: Normalisation,
    class_names: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Returns the config.json from which transformers' AutoModelForImageClassification makes the same network.

    Raises:
        UserError: transformers has no such network; the sentence names the field.
    """
    del found  # it stands in preprocessor_config.json
    labels = {str(index): name for index, name in enumerate(class_names or _numbered(num_classes))}
    common = {"num_channels": 3, "dtype": "float32"}
    classes = {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    if isinstance(config, vit.ViTConfig) and config.pool == "token":
        return {
            "architectures": ["ViTForImageClassification"],
            "model_type": "vit",
            **_vit_fields(config, "transformers' ViT"),
            "qkv_bias": config.qkv_bias,
            "image_size": _square(image_size),
            **common,
            **classes,
        }
    if isinstance(config, vit.ViTConfig):
        refuse("transformers", config, pool="gap", qkv_bias=True)
        if not isinstance(_square(image_size), int):
            raise UserError(
                f"transformers' Siglip, its ViT without class token, has square images; these are "
                f"{image_size[0]}x{image_size[1]}: export in timm's layout"
            )
        vision = {
            "model_type": "siglip_vision_model",
            **_vit_fields(config, "transformers' Siglip"),
            "image_size": image_size[0],
            "vision_use_head": False,
            **common,
        }
        # transformers makes the config of a text tower too, which the classifier does not have.
        return {
            "architectures": ["SiglipForImageClassification"],
            "model_type": "siglip",
            "vision_config": vision,
            **classes,
        }
    if isinstance(config, swin.SwinConfig):
        return _swin_fields(config, image_size) | common | classes
    raise UserError(f"Hugging Face's layout is written for ViT and Swin, not for a {type(config).__name__}")


def _numbered(num_classes: int) -> list[str]:
    return [f"LABEL_{index}" for index in range(num_classes)]


def _square(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _activation(gelu: str) -> str:
    return {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}[gelu]


def _vit_fields(config: vit.ViTConfig, layout: str) -> dict[str, Any]:
    refuse(
        layout,
        config,
        parallel=False,
        qk_norm=False,
        norm_bias=True,
        layerscale=None,
        registers=0,
        pre_logits=False,
        patch=(config.patch[0], config.patch[0]),
        class_token=False,
        pool_norm=False,
        **timm.PLAIN,
    )
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "patch_size": config.patch[0],
        "hidden_act": _activation(config.gelu),
        "layer_norm_eps": config.norm_eps,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }


def _swin_fields(config: swin.SwinConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    refuse("transformers", config, patch_norm=True, shifted=True, extra_norm_every=None)
    if config.version == 1 and len(set(swin.stage_windows(config, image_size))) > 1:
        raise UserError(
            f"transformers' Swin has one window, but stages of this one have "
            f"{swin.stage_windows(config, image_size)}: its grids are smaller than model.window {config.window}"
        )
    fields = {
        "architectures": [f"Swin{'v2' if config.version == 2 else ''}ForImageClassification"],
        "model_type": "swinv2" if config.version == 2 else "swin",
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": swin.stage_windows(config, image_size)[0] if config.version == 1 else config.window,
        "patch_size": config.patch,
        "mlp_ratio": float(config.mlp_ratio),
        "image_size": _square(image_size),
        "use_absolute_embeddings": config.absolute_position,
        "hidden_act": _activation(config.gelu),
        "layer_norm_eps": config.norm_eps,
        "drop_path_rate": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
        "qkv_bias": True,
    }
    if config.version == 2:
        fields["pretrained_window_sizes"] = list(config.pretrained_windows or [0] * len(config.depths))
    return fields


LAYOUT = Layout("huggingface", canonical, IGNORED, describe, entries, neighbour)
