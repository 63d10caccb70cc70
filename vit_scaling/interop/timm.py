"""Names of timm's and the official Swin's tensors.

ViT (timm vision_transformer.py), Swin V1 and V2 (timm swin_transformer.py, swin_transformer_v2.py; the official files
call the merge after stage s `layers.s.downsample`, timm `layers.<s+1>.downsample`, and the classifier head, not
head.fc). Index and mask buffers of old files are rebuilt from sizes and never read.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vit_scaling import UserError
from vit_scaling.interop import normalisation, timm_models
from vit_scaling.interop.families import FAMILIES, Family
from vit_scaling.interop.layout import Json, Layout, Tensors, Told
from vit_scaling.interop.normalisation import Normalisation
from vit_scaling.interop.stored import Stored
from vit_scaling.interop.timm_models import Known
from vit_scaling.models import ModelConfig, swin, vit
from vit_scaling.ops import windows

VIT_EPS, SWIN_EPS = 1e-6, 1e-5
POOLS = {"token": "token", "map": "map", "avg": "gap", "max": "max", "avgmax": "avgmax"}
# Names of official files: a distilled DeiT, DINOv2 (g/14 has a gated MLP) with registers.
_RENAME: tuple[tuple[str, Any], ...] = (
    (r"^(dist_token|register_tokens)$", "reg_token"),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# Tensors that tell whose a file without a config is, and so its normalisation (keys of normalisation.FAMILIES).
PIXELS = (
    (r"decoder_embed\.weight", "mae"),
    (r"mask_token|teacher\.backbone\.pos_embed", "dino"),
    (r"(head_dist\.weight|blocks\.0\.gamma_1)", "deit"),
)
# Tensors of networks that timm's names belong to and models here do not have.
RECOGNISED = (
    (r"blocks\.0\.attn\.q_bias|blocks\.0\.gamma_[12]_?|rel_pos_bias\..*", "BEiT"),
    (r"blocks\.0\.attn\.relative_position_bias_table", "BEiT, with relative positions in every block"),
)


def canonical(tensors: Tensors) -> dict[str, Stored]:
    renames = list(_RENAME)
    if any(name.startswith("layers.0.downsample.") for name in tensors):
        renames.append((r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample"))
    if any(name.startswith("layers.") for name in tensors):
        renames.append((r"^head\.(weight|bias)$", r"head.fc.\1"))
    if "blocks.0.gamma_1" in tensors and "blocks.0.attn.qkv.bias" in tensors:  # the official DeiT-III
        renames.append((r"\.gamma_([12])$", r".ls\1.gamma"))
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return two_heads(renamed, "head", "head", "head_dist")


def two_heads(tensors: dict[str, Stored], name: str, first: str, second: str) -> dict[str, Stored]:
    """Returns the tensors with one classifier of both tokens in place of a distilled DeiT's two, which it averages."""
    for leaf, axis in (("weight", 1), ("bias", None)):
        if f"{second}.{leaf}" in tensors and f"{first}.{leaf}" in tensors:
            one, other = tensors.pop(f"{first}.{leaf}"), tensors.pop(f"{second}.{leaf}")
            shape = one.shape if axis is None else (one.shape[0], one.shape[1] + other.shape[1])

            def read(one: Stored = one, other: Stored = other, axis: int | None = axis) -> np.ndarray:
                halves = 0.5 * one.read().astype(np.float32), 0.5 * other.read().astype(np.float32)
                return halves[0] + halves[1] if axis is None else np.concatenate(halves, axis)

            tensors[f"{name}.{leaf}"] = Stored(shape, one.dtype, read)
    return tensors


def variant(family: Family, pool_norm: bool) -> Family:
    """Returns the family with the name that the last norm has where it follows the pool."""
    return family._replace(table=family.table | {"norm": "fc_norm"}) if pool_norm else family


def told(neighbour: Json | None, tensors: Tensors, family: Family) -> Told:
    known = timm_models.known(neighbour)
    for name, what in RECOGNISED if known is None else ():
        if any(re.fullmatch(name, tensor) for tensor in tensors):
            raise UserError(f"the tensors are those of {what}; models here do not have that")
    stages = family.name.startswith("Swin")
    if known is not None and stages != (known.kind in (timm_models.SWIN, timm_models.SWIN2)):
        raise UserError(f"config.json says {known.architecture}, a {known.kind}, and the tensors are of another class")
    if known is None:
        return Told({} if stages else _shown(tensors))
    fields = _swin_fields(known) if stages else _vit_fields(known, tensors)
    if known.image_size:
        fields["image_size"] = known.image_size
    return Told(fields, known.normalisation, known.class_names)


def pixels(names: Iterable[str]) -> Normalisation | None:
    """Returns the normalisation that the names in a file without a config tell, before `canonical` changes them."""
    joined = "\n".join(names)
    found = next((key for name, key in PIXELS if re.search(rf"(^|\.)({name})$", joined, re.MULTILINE)), None)
    return None if found is None else normalisation.family(found)


def _shown(tensors: Tensors) -> dict[str, Any]:
    """Returns what the tensors of a ViT show by their names alone."""
    found: dict[str, Any] = {}
    if "fc_norm.weight" in tensors:
        found["pool_norm"] = True
    if tensors.keys() & {"head.weight"} and tensors["head.weight"].shape[1:] == (
        2 * tensors["patch_embed.proj.weight"].shape[0],
    ):
        found["pool"] = "token+register"
    return found


def _vit_fields(known: Known, tensors: Tensors) -> dict[str, Any]:
    arguments = known.arguments
    kind, eps = timm_models.norm(known, VIT_EPS)
    pool = arguments.get("global_pool", "token")
    if pool not in POOLS:
        raise timm_models.refusal(known.architecture, "global_pool", pool)
    pool = POOLS[pool]
    if known.kind == timm_models.DISTILLED:
        pool = "token+register"
    if "fc_norm.weight" in tensors and pool == "token":
        raise timm_models.refusal(known.architecture, "fc_norm", True)
    token = int("cls_token" in tensors)
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors and len(tensors["reg_token"].shape) == 3 else 0
    fields = {
        "heads": arguments.get("num_heads", 12),
        "pool": pool,
        "pool_prefix": bool(arguments.get("pool_include_prefix", False)),
        "pool_norm": "fc_norm.weight" in tensors,
        "norm": kind,
        "norm_eps": eps,
        "rows": 0 if arguments.get("no_embed_class") else token + registers,
    }
    gated = arguments.get("mlp_layer", "Mlp") not in ("Mlp", "mlp")
    return fields | ({} if gated else {"gelu": timm_models.gelu(known)})


def _swin_fields(known: Known) -> dict[str, Any]:
    arguments = known.arguments
    window = arguments.get("window_size", 7)
    if isinstance(window, list | tuple):
        if len(set(window)) > 1:
            raise timm_models.refusal(known.architecture, "window_size", window)
        window = window[0]
    pretrained = arguments.get("pretrained_window_sizes")
    return {
        "shift_rule": "timm",
        "window": int(window),
        "pretrained_windows": tuple(pretrained) if pretrained and any(pretrained) else None,
        "gelu": timm_models.gelu(known),
        "norm_eps": timm_models.norm(known, SWIN_EPS)[1],
        "mlp_ratio": arguments.get("mlp_ratio", 4.0),
    }


def family_of(config: ModelConfig, told: Json) -> Family:
    """Returns the family whose names an export has."""
    del told
    if isinstance(config, swin.SwinConfig):
        return FAMILIES["Swin V2" if config.version == 2 else "Swin"]
    assert isinstance(config, vit.ViTConfig)
    return variant(FAMILIES["ViT"], config.pool_norm)


def neighbour(
    config: ModelConfig,
    image_size: tuple[int, int],
    num_classes: int,
    found: Normalisation,
    class_names: tuple[str, ...] | None,
) -> dict[str, Any]:
    """Returns the config.json from which `timm.create_model("local-dir:FOLDER")` makes the same network.

    Raises:
        UserError: timm has no such network; the sentence names the field.
    """
    if isinstance(config, vit.ViTConfig):
        architecture, arguments = _vit_arguments(config)
    elif isinstance(config, swin.SwinConfig):
        refuse_rule("timm", config, image_size, "timm")
        architecture, arguments = _swin_arguments(config)
    else:
        raise UserError(f"timm's layout is written for ViT and Swin, not for a {type(config).__name__}")
    features = config.width if isinstance(config, vit.ViTConfig) else config.width * 2 ** (len(config.depths) - 1)
    return {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": features,
        "model_args": {"img_size": list(image_size), **arguments},
        "pretrained_cfg": {
            **normalisation.timm_fields(found, image_size),
            "num_classes": num_classes,
            **({"label_names": list(class_names)} if class_names else {}),
        },
    }


def refuse(layout: str, config: ModelConfig, **wanted: Any) -> None:
    """Raises UserError for the first field that is not what the layout's networks have."""
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise UserError(
                f"{layout} has no such network: model.{field} is {getattr(config, field)!r}, and there it is {value!r}"
            )


def refuse_others(layout: str, config: vit.ViTConfig, expressed: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raises UserError for the first field that changes the network and is not expressed.

    Args:
        layout: for the message.
        config: of the network.
        expressed: fields that the layout can express.
        fixed: what a layout's networks have, where it is not ViTConfig's default.
    """
    default = vit.ViTConfig()
    others = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in expressed and field.name not in vit.NOT_OF_THE_WEIGHTS
    ]
    refuse(layout, config, **{field: fixed.get(field, getattr(default, field)) for field in others})


_EXPRESSED = (
    *("width", "depth", "mlp", "heads", "patch", "pool", "class_token", "pool_prefix", "pool_norm", "position"),
    *("registers", "layerscale", "pre_norm", "qk_norm", "qkv_bias", "proj_bias", "gelu", "norm_eps"),
)
# No argument sets epsilon: it belongs to the architecture's name.
_EPSILONS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}


def nearest_epsilon(config: vit.ViTConfig | swin.SwinConfig) -> float:
    """Returns the epsilon of timm's norms that is the config's, or the usual one of its networks."""
    if isinstance(config, swin.SwinConfig):
        return SWIN_EPS
    return config.norm_eps if config.norm_eps in _EPSILONS else VIT_EPS


def _vit_arguments(config: vit.ViTConfig) -> tuple[str, dict[str, Any]]:
    refuse_others("timm", config, _EXPRESSED, {"qk_norm_bias": config.qk_norm})
    if config.norm_eps not in _EPSILONS:
        refuse("timm", config, norm_eps=VIT_EPS)
    pools = {ours: theirs for theirs, ours in POOLS.items()}
    if config.pool not in pools:
        raise UserError(f"timm has no such network: model.pool is {config.pool!r}, and there is {', '.join(POOLS)}")
    ratio = config.mlp / config.width
    return _EPSILONS[config.norm_eps], {
        "patch_size": list(config.patch) if config.patch[0] != config.patch[1] else config.patch[0],
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        # timm cuts width x ratio to a whole number.
        "mlp_ratio": ratio if int(config.width * ratio) == config.mlp else (config.mlp + 0.5) / config.width,
        "qkv_bias": config.qkv_bias,
        "class_token": vit.prefix_tokens(config) > config.registers,
        "reg_tokens": config.registers,
        "no_embed_class": bool(config.registers),
        "init_values": config.layerscale,
        "global_pool": pools[config.pool],
        "fc_norm": config.pool_norm,
        "act_layer": {"tanh": "gelu_tanh", "exact": "gelu", "quick": "quick_gelu"}[config.gelu],
        **({"pre_norm": config.pre_norm} if config.pre_norm or config.norm_eps == 1e-5 else {}),
        **({"qk_norm": True} if config.qk_norm else {}),
        **({"proj_bias": False} if not config.proj_bias else {}),
        **({"pool_include_prefix": True} if config.pool_prefix else {}),
    }


def refuse_rule(layout: str, config: swin.SwinConfig, image_size: tuple[int, int], rule: str) -> None:
    """Raises UserError where a library's rule of shifted windows would change what a Swin computes."""
    grids = swin.stage_grids(config, image_size)
    if config.shift_rule != rule and (other := [g for g in grids if windows.rules_differ(*g, config.window)]):
        raise UserError(
            f"{layout} shifts the windows of {config.window} on a grid of {other[0][0]}x{other[0][1]} in another way "
            f"(model.shift_rule {rule!r}, not {config.shift_rule!r}), which changes logits; take an image size whose "
            f"grids are multiples of the windows, or set the field to {rule!r} and train again"
        )


def _swin_arguments(config: swin.SwinConfig) -> tuple[str, dict[str, Any]]:
    refuse(
        "timm",
        config,
        patch_norm=True,
        absolute_position=False,
        norm_eps=SWIN_EPS,
        gelu="exact",
        shifted=True,
        extra_norm_every=None,
    )
    arguments: dict[str, Any] = {
        "patch_size": config.patch,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": config.window,
        "mlp_ratio": float(config.mlp_ratio),
    }
    if config.version == 1:
        return "swin_tiny_patch4_window7_224", arguments
    arguments["pretrained_window_sizes"] = list(config.pretrained_windows or [0] * len(config.depths))
    return "swinv2_tiny_window8_256", arguments


LAYOUT = Layout(canonical, told)
