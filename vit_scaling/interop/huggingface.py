"""Names and configs of Hugging Face transformers: ViT, DeiT, ViTMAE, DINOv2 and v3, CLIP, SigLIP, Swin and Swinv2.

Files have the names of transformers up to version 4 ("encoder.layer.0.attention.attention.query"), modules of version
5 have others ("layers.0.attention.q_proj"); both are read, the files' are written. SigLIP is a ViT without class
token: ForImageClassification pools by the mean, the bare vision model by attention.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vit_scaling import UserError
from vit_scaling.interop import normalisation, timm
from vit_scaling.interop.families import FAMILIES, Family
from vit_scaling.interop.layout import Json, Layout, Tensors, Told, size_pair
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.stored import Stored
from vit_scaling.interop.timm import refuse, refuse_others, refuse_rule
from vit_scaling.models import ModelConfig, swin, vit

ACTIVATIONS = {
    "gelu": "exact",
    "gelu_new": "tanh",
    "gelu_pytorch_tanh": "tanh",
    "gelu_fast": "tanh",
    "quick_gelu": "quick",
}
# For each model_type its family, and the key of normalisation.FAMILIES where it is not the family's.
MODEL_TYPES: dict[str, tuple[str, str | None]] = {
    "vit": ("ViT of transformers", None),
    "deit": ("ViT of transformers", "deit"),
    "vit_mae": ("ViT of transformers", "mae"),
    "dinov2": ("DINOv2", None),
    "dinov2_with_registers": ("DINOv2", None),
    "dinov3_vit": ("DINOv3", None),
    "clip": ("CLIP", None),
    "clip_vision_model": ("CLIP", None),
    "siglip": ("SigLIP", None),
    "siglip_vision_model": ("SigLIP", None),
    "swin": ("Swin of transformers", None),
    "swinv2": ("Swin of transformers", None),
}
# A nested config lacks what its class has by default.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "SigLIP": {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "image_size": 224},
    "CLIP": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "image_size": 224},
}
# Fields of the config and of the model; those after the first three only for comparison with the tensors.
_FIELDS = {
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "window_size": "window",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "intermediate_size": "mlp",
}
# Keys of which one value can be expressed here.
_ONLY = {"rope_theta": (100.0,), "num_channels": (3,), "pooler_act": ("tanh",)}
# Tensors of networks that models here do not have, with the number of axes that tells them.
_OTHERS = (
    (r"encoder\.layer\.0\.lambda_1", 1, "BEiT or data2vec, with relative positions in attention"),
    (r"embeddings\.patch_embedding\.weight", 2, "SigLIP 2 NaFlex, with images of any aspect ratio"),
)
_Rename = tuple[tuple[str, str], ...]
_V5: _Rename = (  # names of version 5 to the files'
    (r"^layers\.(\d+)\.(?!blocks|downsample)", r"encoder.layer.\1."),
    (
        r"attention\.relative_position_bias\.relative_position_bias_table$",
        "attention.self.relative_position_bias_table",
    ),
    (r"attention\.o_proj\.", "attention.output.dense."),
)
_V5_MLP: _Rename = ((r"\bmlp\.fc1\.", "intermediate.dense."), (r"\bmlp\.fc2\.", "output.dense."))
_GATED: _Rename = ((r"\bmlp\.weights_in\.", "mlp.fc1."), (r"\bmlp\.weights_out\.", "mlp.fc2."))
_QKV = {"q": "query", "k": "key", "v": "value"}


def canonical(tensors: Tensors) -> dict[str, Stored]:
    names = " ".join(tensors)
    renames: _Rename
    if "embeddings.patch_embedding.weight" in tensors or "conv1.weight" in tensors:
        renames = ((r"in_proj_(weight|bias)$", r"in_proj.\1"),)
    elif "embeddings.patch_embeddings.weight" in tensors:
        renames = ((r"^(model\.)?layers?\.(\d+)\.", r"layer.\2."),)
    else:
        renames = _V5 + (_GATED if "layer_scale1" in names else _V5_MLP)
        owner = "self" if ".blocks." in names else "attention"
        renames += tuple((rf"attention\.{q}_proj\.", f"attention.{owner}.{part}.") for q, part in _QKV.items())
    renamed: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if 0 in tensor.shape:
            continue  # the register tokens of a DINOv3 that has none
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    renamed = timm.two_heads(renamed, "classifier", "cls_classifier", "distillation_classifier")
    if "classifier.weight" in renamed:
        # The classifier reads the tokens; a pooler in the same file, SigLIP's attention pooling too, stands idle.
        renamed = {name: tensor for name, tensor in renamed.items() if not re.match(r"pooler\.|head\.", name)}
    return renamed


def told(neighbour: Json | None, tensors: Tensors, family: Family) -> Told:
    for pattern, dims, what in _OTHERS:
        if any(re.fullmatch(pattern, name) and len(tensor.shape) == dims for name, tensor in tensors.items()):
            raise UserError(f"the tensors are those of {what}; models here do not have that")
    whole = {**(neighbour or {}), **((neighbour or {}).get("vision_config") or {})}
    kind = whole.get("model_type")
    pixels = family.pixels
    if kind is not None:
        if kind not in MODEL_TYPES:
            raise UserError(
                f"config.json says model_type {kind!r}; of Hugging Face's models {', '.join(MODEL_TYPES)} are read here"
            )
        name, own = MODEL_TYPES[kind]
        pixels = own or pixels
        if name != family.name:
            raise UserError(f"config.json says model_type {kind!r}, and the tensors are those of {family.name}")
        whole = {**_DEFAULTS.get(name, {}), **whole}
    fields = {ours: whole[key] for key, ours in _FIELDS.items() if whole.get(key) is not None}
    for key, allowed in _ONLY.items():
        if key in whole and whole[key] not in allowed:
            raise UserError(f"config.json's {key} is {whole[key]!r}; models here have {allowed[0]!r} only")
    if "hidden_act" in whole:
        activation = str(whole["hidden_act"])
        if activation not in ACTIVATIONS and not (activation == "silu" and whole.get("use_gated_mlp")):
            raise UserError(f"config.json's hidden_act is {activation!r}; models here have {', '.join(ACTIVATIONS)}")
        fields["gelu"] = ACTIVATIONS.get(activation, "tanh")
    if size := size_pair(whole.get("image_size")):
        fields["image_size"] = size
    if "Swin" in family.name:
        fields.pop("width", None)
        pretrained = whole.get("pretrained_window_sizes")
        if pretrained and any(pretrained):
            fields["pretrained_windows"] = tuple(pretrained[: len(whole.get("depths", pretrained))])
    else:
        fields["pool"] = _pool(tensors, family)
    found = None if pixels is None else normalisation.family(pixels)
    loss = "sigmoid" if whole.get("problem_type") == "multi_label_classification" else "softmax"
    return Told(fields, found, _class_names(whole), loss)


def _pool(tensors: Tensors, family: Family) -> str:
    classified = "classifier.weight" in tensors
    if family.name == "SigLIP":
        return "map" if "head.probe" in tensors else "gap"
    if family.name == "CLIP" and classified:
        raise UserError(
            "the classifier of this CLIP reads the mean of the patches before the last norm, which models here do not "
            "have; leave out the classifier.* tensors for its backbone"
        )
    width = tensors["embeddings.cls_token"].shape[-1] if "embeddings.cls_token" in tensors else 0
    if classified and tensors["classifier.weight"].shape[1:] == (2 * width,):
        return "token+gap" if family.name == "DINOv2" else "token+register"
    return "token"


def _class_names(told: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the names of id2label in order; None where they are missing or only numbered (LABEL_0)."""
    labels = told.get("id2label") or {}
    names = [labels.get(str(index)) for index in range(len(labels))]
    if not names or any(name is None for name in names) or all(re.fullmatch(r"LABEL_\d+", str(n)) for n in names):
        return None
    return tuple(str(name) for name in names)


# ---- export


class Kind(NamedTuple):
    """A network of transformers that exports may be.

    model_type: as config.json has it. name: of its classes. prefix: of tensors' names where there is a classifier.
    expressed: fields of ViTConfig that config.json and the tensors carry, beside `_COMMON`.
    fixed: fields that have this value; any other field has ViTConfig's default.
    classified: the pool that its classifier reads; None: it has no classifier.
    """

    model_type: str
    name: str
    prefix: str
    expressed: tuple[str, ...]
    fixed: dict[str, Any]
    classified: str | None


_COMMON = ("width", "depth", "mlp", "heads", "patch", "gelu", "norm_eps")
_SCALED = ("layerscale", "mlp_kind", "registers", "qkv_bias")
KINDS = (
    Kind("clip_vision_model", "CLIPVisionModel", "", (), {"pool": "token", "pre_norm": True}, None),
    Kind(
        *("dinov3_vit", "DINOv3ViTModel", "", (*_SCALED, "key_bias", "proj_bias", "mlp_bias")),
        *({"pool": "token", "position": "rope"}, None),
    ),
    Kind("dinov2_with_registers", "Dinov2WithRegisters", "dinov2_with_registers.", _SCALED, {}, "token+gap"),
    Kind("dinov2", "Dinov2", "dinov2.", _SCALED, {}, "token+gap"),
    Kind("vit", "ViT", "vit.", ("qkv_bias",), {}, "token"),
    Kind("siglip", "Siglip", "vision_model.", (), {}, "gap"),
)
_SWIN = {"swin": "swin.", "swinv2": "swinv2."}


def _kind(config: vit.ViTConfig) -> Kind:
    """Returns the kind of network that is nearest to a ViT."""
    if config.pre_norm:
        name = "clip_vision_model"
    elif vit.rotary_positions(config):
        name = "dinov3_vit"
    elif config.layerscale is not None:
        name = "dinov2_with_registers" if config.registers else "dinov2"
    else:
        name = "vit" if config.pool in vit.TOKEN_POOLS else "siglip"
    return next(kind for kind in KINDS if kind.model_type == name)


def family_of(config: ModelConfig, told: Json) -> Family:
    """Returns the family whose names an export has."""
    del config
    return FAMILIES[MODEL_TYPES[told["model_type"]][0]]


def file_name(config: Json, name: str) -> str:
    """Returns a tensor's name in a file; a network without a classifier has no prefix."""
    name = re.sub(r"in_proj\.", "in_proj_", name)
    name = re.sub(r"mlp\.fc1\.", "mlp.weights_in.", name) if config.get("use_swiglu_ffn") else name
    name = re.sub(r"mlp\.fc2\.", "mlp.weights_out.", name) if config.get("use_swiglu_ffn") else name
    bare = not config["architectures"][0].endswith("ForImageClassification")
    prefixes = _SWIN | {kind.model_type: kind.prefix for kind in KINDS}
    return name if bare or name.startswith("classifier.") else prefixes[config["model_type"]] + name


def idle_tensors(config: Json) -> dict[str, np.ndarray]:
    """Returns tensors that classes of transformers have and inference does not read, so that none is missing there."""
    width, kind = config.get("hidden_size", 0), str(config["model_type"])
    shapes: dict[str, tuple[int, ...]]
    if kind == "dinov3_vit":
        registers = {} if config["num_register_tokens"] else {"embeddings.register_tokens": (1, 0, width)}
        shapes = {"embeddings.mask_token": (1, 1, width), **registers}
    else:
        shapes = {"embeddings.mask_token": (1, width)} if kind.startswith("dinov2") else {}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def neighbour(
    config: ModelConfig,
    image_size: tuple[int, int],
    num_classes: int,
    found: Normalisation,
    class_names: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Returns the config.json from which transformers' AutoModelForImageClassification, or AutoModel of a backbone
    without a classifier, makes the same network.

    Raises:
        UserError: transformers has no such network; the sentence names the field.
    """
    del found  # it stands in preprocessor_config.json
    common = {"num_channels": 3, "dtype": "float32"}
    if num_classes:
        labels = {str(index): name for index, name in enumerate(class_names or _numbered(num_classes))}
        common |= {"id2label": labels, "label2id": {label: int(index) for index, label in labels.items()}}
    if isinstance(config, vit.ViTConfig):
        return _vit_fields(config, image_size, num_classes, common)
    if isinstance(config, swin.SwinConfig):
        fields = _swin_fields(config, image_size) | common
        return (
            fields if num_classes else fields | {"architectures": [f"Swin{'v2' if config.version == 2 else ''}Model"]}
        )
    raise UserError(f"Hugging Face's layout is written for ViT and Swin, not for a {type(config).__name__}")


def _numbered(num_classes: int) -> list[str]:
    return [f"LABEL_{index}" for index in range(num_classes)]


def _square(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _activation(gelu: str) -> str:
    return {"exact": "gelu", "tanh": "gelu_pytorch_tanh", "quick": "quick_gelu"}[gelu]


def _vit_fields(
    config: vit.ViTConfig, image_size: tuple[int, int], num_classes: int, common: dict[str, Any]
) -> dict[str, Any]:
    kind = _kind(config)
    library = f"transformers' {kind.name}"
    if num_classes and kind.classified is None:
        raise UserError(f"{library} has no classifier; export the backbone without one, or in timm's layout")
    siglip = kind.model_type == "siglip"
    pool = "map" if siglip and config.pool == "map" else "gap" if siglip else "token"
    fixed = {"position": "learned", "pool": kind.classified if num_classes else pool, **kind.fixed}
    expressed = (*_COMMON, *kind.expressed, *(() if "position" in kind.fixed else ("position",)))
    refuse_others(library, config, expressed, {**fixed, "patch": (config.patch[0],) * 2})
    refuse(library, config, patch=(config.patch[0],) * 2)
    if kind.model_type != "vit" and not isinstance(_square(image_size), int) and kind.model_type != "dinov3_vit":
        raise UserError(
            f"{library} has square images; these are {image_size[0]}x{image_size[1]}: export in timm's layout"
        )
    fields: dict[str, Any] = {
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
    if "qkv_bias" in kind.expressed:
        fields["qkv_bias"] = config.qkv_bias
    fields["image_size"] = _square(image_size)
    if kind.model_type.startswith("dinov2"):
        fields |= {"mlp_ratio": _ratio(library, config), "use_swiglu_ffn": config.mlp_kind == "swiglu"}
        fields["num_register_tokens"] = config.registers
    if kind.model_type == "dinov3_vit":
        fields |= {
            "query_bias": config.qkv_bias,
            "value_bias": config.qkv_bias,
            "num_register_tokens": config.registers,
        }
        fields |= {"key_bias": config.key_bias, "proj_bias": config.proj_bias, "mlp_bias": config.mlp_bias}
        gated = config.mlp_kind == "swiglu"
        fields |= {"use_gated_mlp": gated, "hidden_act": "silu" if gated else fields["hidden_act"]}
    architecture = f"{kind.name}ForImageClassification" if num_classes else f"{kind.name.removesuffix('Model')}Model"
    if siglip:
        labels = {key: value for key, value in common.items() if "label" in key}
        rest = {key: value for key, value in common.items() if key not in labels}
        vision = {"model_type": "siglip_vision_model", **fields, "vision_use_head": config.pool == "map", **rest}
        if not num_classes:
            return {"architectures": ["SiglipVisionModel"], **vision}
        # transformers makes the config of a text tower too, which the classifier does not have.
        return {"architectures": [architecture], "model_type": "siglip", "vision_config": vision, **labels}
    return {"architectures": [architecture], "model_type": kind.model_type, **fields, **common}


def _ratio(library: str, config: vit.ViTConfig) -> int:
    """Returns the mlp_ratio of DINOv2 that gives the hidden units."""
    for ratio in range(1, 17):
        hidden = config.width * ratio
        if (hidden if config.mlp_kind == "gelu" else (int(hidden * 2 / 3) + 7) // 8 * 8) == config.mlp:
            return ratio
    raise UserError(f"{library} has a whole mlp_ratio; model.mlp {config.mlp} is none of model.width {config.width}")


def _swin_fields(config: swin.SwinConfig, image_size: tuple[int, int]) -> dict[str, Any]:
    refuse("transformers", config, patch_norm=True, shifted=True, extra_norm_every=None)
    refuse_rule("transformers", config, image_size, "official")
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


LAYOUT = Layout(canonical, told)
